"""The options with their defaults and ranges, and checks of the values that users give."""

import math
from collections.abc import Set
from typing import Any, NamedTuple, SupportsFloat, TypeGuard, TypeVar, get_args

import numpy as np

from fastrms._types import AfterCrash, CacheDType, DType, HostKernel, Kernel, NonFinite, ParamsCheck, Reduction
from fastrms.errors import OptionError, OptionTypeError

__all__ = [
    "AFTER_CRASH", "BFLOAT16_STEP", "GROUP_DEFAULTS", "HOST_KERNELS", "KERNELS", "NONFINITE", "PARAMS_CHECKS",
    "REDUCTIONS", "check_cache_dtype", "check_count", "check_flag", "check_for_dtype", "check_one_of", "check_option",
    "check_threads", "shown",
]  # fmt: skip

# The words that an argument can be.
HOST_KERNELS: tuple[HostKernel, ...] = get_args(HostKernel)
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
NONFINITE: tuple[NonFinite, ...] = get_args(NonFinite)
AFTER_CRASH: tuple[AfterCrash, ...] = get_args(AfterCrash)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
PARAMS_CHECKS: tuple[ParamsCheck, ...] = get_args(ParamsCheck)

_Word = TypeVar("_Word", bound=str)


class _Range(NamedTuple):
    """Default and range of a number. The range excludes `high` and `low`, unless `includes_high` and `includes_low`."""

    default: float | None
    low: float
    high: float
    includes_low: bool
    or_none: bool = False
    includes_high: bool = False


# The options of a parameter group. The defaults of the first three are the reference's. The others are off, because the
# reference has none of them, except flush_subnormals (docs/options.md says why).
_NUMBERS = {
    "lr": _Range(1e-3, 0.0, math.inf, True),
    "decay_rate": _Range(0.9, 0.0, 1.0, True),
    "epsilon": _Range(1e-8, 0.0, math.inf, False),
    "momentum": _Range(0.0, 0.0, 1.0, True),
    "weight_decay": _Range(0.0, 0.0, math.inf, True),
    "initial_scale": _Range(0.0, 0.0, math.inf, True),
    "clip_value": _Range(None, 0.0, math.inf, False, or_none=True),
    "clip_norm": _Range(None, 0.0, math.inf, False, or_none=True),
}
_FLAGS = {
    "nesterov": False,
    "centered": False,
    "decoupled_weight_decay": False,
    "maximize": False,
    "eps_in_sqrt": False,
    "bias_correction": False,
    "lr_in_momentum": False,
    "flush_subnormals": True,
}
GROUP_DEFAULTS: dict[str, Any] = {name: number.default for name, number in _NUMBERS.items()} | _FLAGS

# The options of the optimizer as a whole: one norm over all groups.
_GLOBAL_NUMBERS = {"global_clip_norm": _Range(None, 0.0, math.inf, False, or_none=True, includes_high=True)}

# bfloat16 keeps 8 bits of a number: a change by less than 2**-8 of the number can be rounded away.
BFLOAT16_STEP = 2.0**-8


def check_option(name: str, value: object) -> Any:
    """Return `value` as a plain float, bool, None or callable.

    Raise OptionTypeError for a value of the wrong kind, and OptionError for NaN or a value out of range.
    """
    if name in _FLAGS:
        if not isinstance(value, bool | np.bool_):
            raise OptionTypeError(f"{name}: expected True or False, got {shown(value)} ({type(value).__name__})")
        return bool(value)
    if name == "lr" and callable(value):
        return value
    _, low, high, includes_low, or_none, includes_high = (_NUMBERS | _GLOBAL_NUMBERS)[name]
    if value is None and or_none:
        return None
    kinds = "a number" + (" or a function of the step" if name == "lr" else "") + (" or None" if or_none else "")
    if type(value) is not float and not _is_number(value):
        raise OptionTypeError(f"{name}: expected {kinds}, got {shown(value)} ({type(value).__name__})")
    try:
        with np.errstate(all="ignore"):  # a longdouble that is too large
            # Without `detach`, PyTorch warns if the number has a gradient.
            number = float(getattr(value, "detach", lambda: value)())
    except Exception as error:  # an int too large for a float, or any error of a type of the user's own
        kind = OptionTypeError if isinstance(error, TypeError) else OptionError
        raise kind(f"{name}: expected {kinds}, got {shown(value)}: {error}") from None
    if not (low <= number <= high) or (number == low and not includes_low) or (number == high and not includes_high):
        limits = f"{name} {'>=' if includes_low else '>'} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        finite = "" if includes_high else ", finite"
        raise OptionError(f"{name}: expected {kinds} with {limits}{finite}; got {shown(value)}")
    return number


# Parts of the names of dtypes whose scalars are no real numbers. `float` would read a time as a number, or lose an
# imaginary part.
_NO_REAL_NUMBER = ("bool", "complex", "datetime", "timedelta", "str", "<U", ">U", "|S", "|V")


def _is_number(value: object) -> TypeGuard[SupportsFloat]:
    """Tell whether `value` is a real number of Python, or a real scalar or 0-d array of any library."""
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype == object:
        value = value[()]
    # bool is a number to Python, but lr=True is a slip.
    if isinstance(value, bool | str) or not hasattr(type(value), "__float__"):
        return False
    try:
        shape, dtype = tuple(getattr(value, "shape", ())), str(getattr(value, "dtype", ""))
    except Exception:  # any error of an attribute of the user's own
        return False
    return shape == () and not any(word in dtype for word in _NO_REAL_NUMBER)


def shown(value: object) -> str:
    """Return the representation of `value` for an error message, in at most 80 characters; never raise."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"an object whose repr() raises: {error}"
    return text if len(text) <= 80 else text[:77] + "..."


def check_flag(name: str, value: object) -> bool:
    """Return True or False as it is; raise for another value."""
    if not isinstance(value, bool):
        raise OptionTypeError(f"{name}: expected True or False, got {shown(value)}")
    return value


def check_threads(value: object, available: int) -> int | None:
    """Return None or a number of threads from 1 to `available` as it is; raise for another value."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise OptionTypeError(f"num_threads: expected an integer or None, got {shown(value)} ({type(value).__name__})")
    if not 1 <= value <= available:
        raise OptionError(
            f"num_threads: expected 1 to {available}, got {shown(value)}; Numba started {available} threads. For more, "
            "set the environment variable NUMBA_NUM_THREADS before Numba is imported"
        )
    return int(value)


def check_count(name: str, value: object) -> int:
    """Return a number of steps from 0 to 2**53 as an int; raise for another value."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise OptionTypeError(f"{name}: expected a whole number, got {shown(value)} ({type(value).__name__})")
    if not 0 <= value <= 2**53:
        raise OptionError(f"{name}: expected a whole number from 0 to 2**53, got {shown(value)}")
    return int(value)


def check_one_of(name: str, value: object, choices: tuple[_Word, ...]) -> _Word:
    """Return one of the words `choices` as it is; raise for another value."""
    if not isinstance(value, str):
        raise OptionTypeError(f"{name}: expected one of {choices}, got {shown(value)} ({type(value).__name__})")
    if value not in choices:
        raise OptionError(f"{name}: expected one of {choices}, got {shown(value)}")
    return choices[choices.index(value)]


def check_cache_dtype(value: object, dtypes: Set[DType]) -> CacheDType | None:
    """Return None or "bfloat16" as it is; raise for another value, or if parameters of `dtypes` cannot have it."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise OptionTypeError(f'cache_dtype: expected "bfloat16" or None, got {shown(value)} ({type(value).__name__})')
    if value != "bfloat16":
        raise OptionError(f'cache_dtype: expected "bfloat16" or None, got {shown(value)}')
    if dtypes != {np.dtype(np.float32)}:
        raise OptionError(
            "cache_dtype: bfloat16 requires float32 parameters, got float64 ones; convert them with .astype(np.float32)"
        )
    return "bfloat16"


def check_for_dtype(name: str, value: float, dtype: DType) -> None:
    """Raise OptionError if `value` becomes inf in `dtype`, or 0 for an option that must not be 0."""
    with np.errstate(over="ignore", under="ignore"):
        there = dtype.type(value)
    if not np.isfinite(there):
        raise OptionError(f"{name}: {value!r} is too large for {dtype} parameters (at most {np.finfo(dtype).max})")
    if there == 0 and name in ("epsilon", "clip_value"):
        raise OptionError(
            f"{name}: {value!r} rounds to 0 in {dtype}, the dtype of a parameter; use at least "
            f"{float(np.finfo(dtype).tiny):.2g}, the smallest normal {dtype}, or float64 parameters"
        )
