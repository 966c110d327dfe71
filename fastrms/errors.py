"""The errors that fastrms raises.

Each error is also the builtin exception that a NumPy user would expect (`ValueError`, `TypeError` and so on), so code
that catches builtin exceptions keeps working. Every message names the argument, the expected value and the actual one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Self

import numpy as np

from fastrms._types import Array

__all__ = [
    "CheckpointError",
    "DeviceError",
    "DtypeError",
    "FastrmsError",
    "NonfiniteError",
    "OptionError",
    "OptionTypeError",
    "RankError",
    "StepInProgressError",
    "StorageError",
    "StructureError",
    "call_all",
]


def call_all(functions: Iterable[Callable[[], object]]) -> None:
    """Call all functions, also after one of them raises, and raise their errors in the end."""
    errors: list[BaseException] = []
    for function in functions:
        try:
            function()
        except BaseException as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        # At exit Python prints only this text of a group.
        texts = "; ".join(f"{type(error).__name__}: {error}" for error in errors)
        raise BaseExceptionGroup(f"{len(errors)} errors, one after another: {texts}", errors)


class FastrmsError(Exception):
    """Base class of all errors that fastrms raises on purpose."""


class OptionError(FastrmsError, ValueError):
    """An option has a value outside its range, or an unknown name."""


class OptionTypeError(FastrmsError, TypeError):
    """An option is of the wrong kind, such as a string instead of a number."""


class DtypeError(FastrmsError, TypeError):
    """An array has a wrong dtype, or an argument is not an array of a suitable kind."""


class StructureError(FastrmsError, ValueError):
    """The structure of arrays is wrong: their number, a key, a shape or the nesting; or arrays share memory."""


class CheckpointError(FastrmsError, ValueError):
    """A state or a file is damaged, from another optimizer, or not a checkpoint. Nothing was changed."""


class DeviceError(FastrmsError, RuntimeError):
    """A GPU was requested, but cannot be used. The message names the missing part."""


class StepInProgressError(FastrmsError, RuntimeError):
    """A call during a step, from a signal handler or when only some parameters are updated. It had no effect."""


class RankError(FastrmsError, RuntimeError):
    """Another rank of an MPI program failed, made a different call, or timed out. Nothing was changed."""


class StorageError(FastrmsError, OSError):
    """A folder cannot be the storage of an optimizer, or belongs to another one. The folder was not changed."""


class NonfiniteError(FastrmsError, FloatingPointError):
    """Gradients contain inf or NaN. Parameters and state were not changed.

    Parameters
    ----------
    message : str
        The text of the error.
    counts : mapping of str to int
        The number of inf and NaN by the path of the parameter (``"[0]['W']"``), without parameters that have none.

    Attributes
    ----------
    counts : dict of str to int
        A copy of the argument.
    """

    def __init__(self, message: str, counts: Mapping[str, int]) -> None:
        super().__init__(message)
        self.counts = dict(counts)

    @classmethod
    def of(cls, gradients: Mapping[str, Array]) -> Self:
        """Return the error about gradients.

        Parameters
        ----------
        gradients : mapping of str to ndarray
            The gradients with an inf or NaN, by the path of the parameter.

        Returns
        -------
        error : NonfiniteError
            Its message names the first ten.
        """
        return cls.of_counts(
            {path: (int(np.isnan(a).sum()), int(np.isinf(a).sum()), a.size) for path, a in gradients.items()}
        )

    @classmethod
    def of_counts(cls, found: Mapping[str, tuple[int, int, int]]) -> Self:
        """Return the error about gradients whose values were counted.

        Parameters
        ----------
        found : mapping of str to (int, int, int)
            The numbers of NaN, of inf and of all values, by the path of the parameter.

        Returns
        -------
        error : NonfiniteError
            Its message names the first ten.
        """
        counts, texts = {}, []
        for path, (nans, infs, size) in found.items():
            counts[path] = nans + infs
            texts.append(f"gradients{path}: {nans} NaN and {infs} inf among {size} values")
        more = f"; and {len(texts) - 10} more parameters" if len(texts) > 10 else ""
        return cls(f"expected finite gradients, got {'; '.join(texts[:10])}{more}; nothing was changed", counts)

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, int]]]:
        return type(self), (str(self), self.counts)
