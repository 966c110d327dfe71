"""Types that annotations share: arrays, options, and the words that an argument can be."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, SupportsFloat, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AfterCrash", "Array", "CacheDType", "DType", "HostKernel", "Items", "Kernel", "LearningRate", "Metadata",
    "NonFinite", "Options", "ParamsCheck", "Reduction",
]  # fmt: skip

# Of any dtype.
Array: TypeAlias = NDArray[Any]
DType: TypeAlias = np.dtype[Any]

# One object for each array of a structure, not yet checked.
Items: TypeAlias = tuple[Any, ...]

# Options of a group or of the optimizer by name, and the metadata of a checkpoint, whose values differ in type.
Options: TypeAlias = Mapping[str, Any]
Metadata: TypeAlias = Mapping[str, Any]

LearningRate: TypeAlias = SupportsFloat | Callable[[int], SupportsFloat]

# `fastrms._checks` has the words of each type as a tuple, for the check at run time.
HostKernel: TypeAlias = Literal["auto", "numpy", "serial", "parallel"]
Kernel: TypeAlias = Literal[HostKernel, "cuda"]
NonFinite: TypeAlias = Literal["propagate", "raise", "skip"]
CacheDType: TypeAlias = Literal["bfloat16"]
AfterCrash: TypeAlias = Literal["raise", "use"]
Reduction: TypeAlias = Literal["mean", "sum"]
ParamsCheck: TypeAlias = Literal["broadcast", "raise"]
