"""The errors that fastrms raises for bad input.

Each is also the builtin exception that a NumPy user would expect (`ValueError` or `TypeError`), so code that
catches those keeps working. Every message names the argument, what was expected and what came.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """Call all functions, also where one raises; what was raised comes out in the end."""
    errors: list[BaseException] = []
    for function in functions:
        try:
            function()
        except BaseException as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        # What Python prints of an error at exit is this text alone.
        texts = "; ".join(f"{type(error).__name__}: {error}" for error in errors)
        raise BaseExceptionGroup(f"{len(errors)} errors, one after another: {texts}", errors)


class FastrmsError(Exception):
    """Base class of all errors that fastrms raises on purpose."""


class OptionError(FastrmsError, ValueError):
    """A hyper-parameter or another option has a value outside its range, or its name is unknown."""


class OptionTypeError(FastrmsError, TypeError):
    """A hyper-parameter or another option is of the wrong kind, such as a string where a number belongs."""


class DtypeError(FastrmsError, TypeError):
    """An array has a dtype, or is of a kind, that cannot be used where it was given."""


class StructureError(FastrmsError, ValueError):
    """Arrays do not fit together: wrong count, key, shape or nesting, nothing given, or memory that overlaps."""


class CheckpointError(FastrmsError, ValueError):
    """A state or a file is damaged, of another optimizer, or no checkpoint; the optimizer is as it was."""


class DeviceError(FastrmsError, RuntimeError):
    """A GPU was asked for, and there is none that can be used here; the message says what is missing."""


class StepInProgressError(FastrmsError, RuntimeError):
    """A signal handler, or a function that a step calls, made a call in the midst of that step; nothing was changed."""


class RankError(FastrmsError, RuntimeError):
    """Another rank of an MPI program failed, made another call, or did not come in time; nothing was changed."""


class StorageError(FastrmsError, OSError):
    """A folder cannot be, or is not, the storage of an optimizer, or is that of another one; it is as it was."""


class NonfiniteError(FastrmsError, FloatingPointError):
    """Gradients have values that are inf or NaN; parameters and state are as they were.

    Parameters
    ----------
    message : str
        What was expected and what came.
    counts : mapping of str to int
        How many, by the path of the parameter (``"[0]['W']"``), of those that have any.

    Attributes
    ----------
    counts : dict of str to int
        A copy of what was given.
    """

    def __init__(self, message: str, counts: Mapping[str, int]) -> None:
        super().__init__(message)
        self.counts = dict(counts)

    @classmethod
    def of(cls, gradients: Mapping[str, NDArray[Any]]) -> "NonfiniteError":
        """Make the error about gradients.

        Parameters
        ----------
        gradients : mapping of str to ndarray
            Those that have an inf or NaN, by the path of their parameter.

        Returns
        -------
        error : NonfiniteError
            Its message names the first ten.
        """
        return cls.of_counts(
            {path: (int(np.isnan(a).sum()), int(np.isinf(a).sum()), a.size) for path, a in gradients.items()}
        )

    @classmethod
    def of_counts(cls, found: Mapping[str, tuple[int, int, int]]) -> "NonfiniteError":
        """Make the error about gradients whose values were counted.

        Parameters
        ----------
        found : mapping of str to (int, int, int)
            How many NaN, inf and values in all, by the path of the parameter.

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
