"""Hyper-parameters: their ranges, the parameter group that holds them, and the numbers that a kernel gets for them."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import cache
from typing import Any, NoReturn, SupportsFloat

import numpy as np

from fastrms.dialects import meant
from fastrms.errors import OptionError, OptionTypeError, StructureError

__all__ = [
    "GROUP_DEFAULTS",
    "HYPER_FIELDS",
    "NONFINITE",
    "ParamGroup",
    "ParamGroups",
    "check_cache_dtype",
    "check_count",
    "check_for_dtype",
    "check_one_of",
    "check_option",
    "check_threads",
    "hyper_values",
    "needs_extended_rule",
    "parameter_groups",
    "resolve_lr",
]

LearningRate = SupportsFloat | Callable[[int], SupportsFloat]

# What can be set per parameter group, with the default and, for numbers, the range: (default, low, high, may be low,
# may be None). The upper end is never included. The defaults of the first three are the reference's; the others are
# off, because the reference has none of them, except flush_subnormals (docs/options.md says why).
_NUMBERS: dict[str, tuple[float | None, float, float, bool, bool]] = {
    "lr": (1e-3, 0.0, math.inf, True, False),
    "decay_rate": (0.9, 0.0, 1.0, True, False),
    "epsilon": (1e-8, 0.0, math.inf, False, False),
    "momentum": (0.0, 0.0, 1.0, True, False),
    "weight_decay": (0.0, 0.0, math.inf, True, False),
    "initial_scale": (0.0, 0.0, math.inf, True, False),
    "clip_value": (None, 0.0, math.inf, False, True),
    "clip_norm": (None, 0.0, math.inf, False, True),
}
_FLAGS: dict[str, bool] = {
    "nesterov": False,
    "centered": False,
    "decoupled_weight_decay": False,
    "maximize": False,
    "eps_in_sqrt": False,
    "bias_correction": False,
    "lr_in_momentum": False,
    "flush_subnormals": True,
}
GROUP_DEFAULTS: dict[str, Any] = {name: spec[0] for name, spec in _NUMBERS.items()} | _FLAGS

# For the optimizer as a whole: one norm over all groups.
_GLOBAL_NUMBERS = {"global_clip_norm": (None, 0.0, math.inf, False, True)}


def check_option(name: str, value: Any) -> Any:
    """Return `value` as a plain float, bool, None or callable if option `name` may have it, and raise if not.

    Raises
    ------
    OptionTypeError
        `value` is of the wrong kind.
    OptionError
        `value` is NaN, infinite or out of range.
    """
    if name in _FLAGS:
        if not isinstance(value, bool | np.bool_):
            raise OptionTypeError(f"{name}: expected True or False, got {_shown(value)} ({type(value).__name__})")
        return bool(value)
    if name == "lr" and callable(value):
        return value
    _, low, high, may_be_low, may_be_none = (_NUMBERS | _GLOBAL_NUMBERS)[name]
    if value is None and may_be_none:
        return None
    kinds = "a number" + (" or a function of the step" if name == "lr" else "") + (" or None" if may_be_none else "")
    if type(value) is not float and not _is_number(value):
        raise OptionTypeError(f"{name}: expected {kinds}, got {_shown(value)} ({type(value).__name__})")
    try:
        with np.errstate(all="ignore"):  # a longdouble that is too large
            # PyTorch warns where a gradient of the number would be lost.
            number = float(value.detach() if hasattr(value, "detach") else value)
    except Exception as error:  # an int too large for a float, or whatever a type of the user's own raises
        kind = OptionTypeError if isinstance(error, TypeError) else OptionError
        raise kind(f"{name}: expected {kinds}, got {_shown(value)}: {error}") from None
    if not (low <= number < high) or (number == low and not may_be_low):
        limits = f"{name} {'>=' if may_be_low else '>'} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise OptionError(f"{name}: expected {kinds} with {limits}, finite; got {_shown(value)}")
    return number


# Parts of the names of dtypes whose scalars are no real numbers, although `float` may take them: it would read a time
# as a number, or lose an imaginary part.
_NO_REAL_NUMBER = ("bool", "complex", "datetime", "timedelta", "str", "<U", ">U", "|S", "|V")


def _is_number(value: Any) -> bool:
    """Whether this is one real number that `float` takes: of Python, or a scalar or 0-d array of any library."""
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype == object:
        value = value[()]
    # bool is a number to Python, but lr=True is a slip.
    if isinstance(value, bool | str) or not hasattr(type(value), "__float__"):
        return False
    try:
        shape, dtype = tuple(getattr(value, "shape", ())), str(getattr(value, "dtype", ""))
    except Exception:  # whatever an attribute of the user's own raises
        return False
    return shape == () and not any(word in dtype for word in _NO_REAL_NUMBER)


def _shown(value: Any) -> str:
    """`value` for a message, whatever its own way to show itself does."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"something that cannot be shown: {error}"
    return text if len(text) <= 80 else text[:77] + "..."


def check_threads(value: Any, available: int) -> int | None:
    """Return `value` if it is None or a number of threads from 1 to `available`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise OptionTypeError(f"num_threads: expected an integer or None, got {_shown(value)} ({type(value).__name__})")
    if not 1 <= value <= available:
        raise OptionError(
            f"num_threads: expected 1 to {available}, got {_shown(value)}; Numba started with {available}, and the "
            "environment variable NUMBA_NUM_THREADS, set before it is imported, can raise that"
        )
    return int(value)


def check_count(name: str, value: Any) -> int:
    """Return `value` as an int if it is a number of steps, from 0 to 2**53."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise OptionTypeError(f"{name}: expected a whole number, got {_shown(value)} ({type(value).__name__})")
    if not 0 <= value <= 2**53:
        raise OptionError(f"{name}: expected a whole number from 0 to 2**53, got {_shown(value)}")
    return int(value)


NONFINITE = ("propagate", "raise", "skip")


def check_one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of these words."""
    if not isinstance(value, str):
        raise OptionTypeError(f"{name}: expected one of {choices}, got {_shown(value)} ({type(value).__name__})")
    if value not in choices:
        raise OptionError(f"{name}: expected one of {choices}, got {_shown(value)}")
    return value


# bfloat16 keeps 8 bits of a number, so that a change by less than 2**-8 of it can round back to the same number.
_BFLOAT16_STEP = 2.0**-8


def check_cache_dtype(value: Any, dtypes: set[np.dtype[Any]]) -> str | None:
    """Return `value` if it is None or "bfloat16" and parameters of `dtypes` can have such state."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise OptionTypeError(f'cache_dtype: expected "bfloat16" or None, got {_shown(value)} ({type(value).__name__})')
    if value != "bfloat16":
        raise OptionError(f'cache_dtype: expected "bfloat16" or None, got {_shown(value)}')
    if dtypes != {np.dtype(np.float32)}:
        raise OptionError(
            "cache_dtype: bfloat16 goes with float32 parameters, got float64 ones; use .astype(np.float32)"
        )
    return value


def check_for_dtype(name: str, value: float, dtype: np.dtype[Any]) -> None:
    """Raise OptionError if `value` has no useful counterpart in `dtype`: inf for a finite one, or 0 for epsilon."""
    with np.errstate(over="ignore", under="ignore"):
        there = dtype.type(value)
    if not np.isfinite(there):
        raise OptionError(f"{name}: {value!r} is too large for {dtype} parameters (at most {np.finfo(dtype).max})")
    if there == 0 and name in ("epsilon", "clip_value"):
        raise OptionError(
            f"{name}: {value!r} is 0 in {dtype}, the dtype of some parameters; use at least "
            f"{float(np.finfo(dtype).tiny):.2g}, the smallest normal {dtype}, or float64 parameters"
        )


class ParamGroup(MutableMapping[str, Any]):
    """The options of one parameter group, under ``"params"`` the parameters themselves; an item of `param_groups`.

    Behaves like PyTorch's dict: ``group["lr"] = 1e-2`` holds from the next step on. Unlike a dict, it checks each
    value when it is set, so that a bad one raises there and the old one stays. `RMSProp` makes them; there is no use
    for one without an optimizer.

    Parameters
    ----------
    options : mapping of str to option
        Those that differ from the defaults.
    label : str
        What error messages call the group.
    dtypes : set of numpy.dtype
        Of its parameters: an option must have a counterpart in each.
    cache_dtype : {"bfloat16"} or None, default None
        Of its state, which bounds decay rates.

    Raises
    ------
    OptionError
        Unknown name, value out of range, a name that cannot change (``"params"``, ``"initial_scale"``), or deletion.
    OptionTypeError
        A value of the wrong kind.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp
    >>> opt = RMSProp([{"params": [np.ones(3)], "weight_decay": 0.1}, {"params": [np.zeros(3)]}])
    >>> opt.param_groups[1]["lr"] = 0.01
    >>> opt.param_groups
    [ParamGroup(lr=0.001, weight_decay=0.1), ParamGroup(lr=0.01)]
    """

    def __init__(
        self, options: Mapping[str, Any], label: str, dtypes: set[np.dtype[Any]], cache_dtype: str | None = None
    ) -> None:
        self._label = label
        self._cache_dtype = cache_dtype
        self.dtypes = dtypes
        self._params: Any = None
        self._optimizer: Callable[[], Any] = _none
        self._values: dict[str, Any] = {}
        self.take(self.with_changes(GROUP_DEFAULTS | dict(options)))

    def with_changes(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Check new values of options, together with those that stay, and return all options; nothing is set.

        Parameters
        ----------
        changes : mapping of str to option
            New values by name.

        Returns
        -------
        values : dict
            For `take`.

        Raises
        ------
        OptionError, OptionTypeError
            As for the class.
        """
        for name, value in changes.items():
            if name == "params":
                raise OptionError(
                    f"{self._label}: 'params' cannot be set; write into them: group['params'][...] = value"
                )
            if name not in GROUP_DEFAULTS:
                raise OptionError(
                    f"{self._label}: {name!r} is no option of a parameter group; {meant(name, GROUP_DEFAULTS)}"
                )
            if name == "initial_scale" and value != self._values.get(name, value):
                raise OptionError(
                    f"initial_scale: set at construction only, got {_shown(value)} later; it is what the cache started "
                    "from. To change the cache now, write to it: opt.cache[0][...] = value"
                )
        checked = self._values | {name: check_option(name, value) for name, value in changes.items()}
        for dtype in sorted(self.dtypes, key=str):
            for name in changes:
                if isinstance(checked[name], float):
                    check_for_dtype(name, checked[name], dtype)
        for name in ("decay_rate", "momentum") if self._cache_dtype == "bfloat16" else ():
            if 1 - checked[name] <= _BFLOAT16_STEP:
                raise OptionError(
                    f"{name}: {checked[name]!r} would not decay in bfloat16, where a change by less than 1/256 can be "
                    f"rounded away; use less than {1 - _BFLOAT16_STEP:.4f}, or cache_dtype=None"
                )
        if checked["nesterov"] and checked["momentum"] == 0:
            raise OptionError(
                "nesterov: True needs momentum > 0, got momentum 0; it looks ahead along the momentum buffer. Set both "
                "together: opt.param_groups[0].update(nesterov=True, momentum=0.9)"
            )
        return checked

    def take(self, values: Mapping[str, Any]) -> None:
        """Have these options beside the others; the optimizer is not told.

        Parameters
        ----------
        values : mapping of str to option
            From `with_changes`, of this group or of one with the same dtypes.
        """
        self._values.update(values)

    def take_over(self, other: "ParamGroup") -> None:
        """Have the options of another group, which were checked when it was made; the optimizer is not told.

        Parameters
        ----------
        other : ParamGroup
            Its options are copied.
        """
        self.take(other._values)

    def bind(self, params: Any, optimizer: Any) -> None:
        """Connect the group with its optimizer, which does this itself.

        Parameters
        ----------
        params : the structure of the group's parameters
            What ``group["params"]`` is from now on.
        optimizer : RMSProp
            Changes of options are left to it.
        """
        self._params = params
        # Not to keep the optimizer, which has this group: its buffers go at once when nobody else has it.
        self._optimizer = weakref.ref(optimizer)

    def update(self, *others: Any, **options: Any) -> None:
        """Set several options at once, as `dict.update`: all or, after an error, none.

        Parameters
        ----------
        *others : mapping or iterable of pairs
            At most one.
        **options
            By name.

        Raises
        ------
        OptionError, OptionTypeError
            As for the class.
        """
        changes = dict(*others, **options)
        optimizer = self._optimizer()
        if optimizer is None:
            self.take(self.with_changes(changes))
        else:
            optimizer._set_options([(self, changes)])

    def __getitem__(self, name: str) -> Any:
        return self._params if name == "params" else self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __ior__(self, other: Any) -> "ParamGroup":
        self.update(other)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._ATTRIBUTES:
            raise AttributeError(f"{name}: a parameter group has no such attribute; write group[{name!r}] = value")
        super().__setattr__(name, value)

    _ATTRIBUTES = frozenset({"_label", "_cache_dtype", "dtypes", "_params", "_optimizer", "_values"})

    def __delitem__(self, name: str) -> None:
        raise OptionError(f"{name}: an option cannot be deleted; its default is {GROUP_DEFAULTS.get(name)!r}")

    def __iter__(self) -> Iterator[str]:
        yield "params"
        yield from self._values

    def __len__(self) -> int:
        return 1 + len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_params": None, "_optimizer": _none}  # the optimizer binds it again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        changed = ", ".join(f"{k}={v!r}" for k, v in self._values.items() if v != GROUP_DEFAULTS[k] or k == "lr")
        return f"ParamGroup({changed})"


class ParamGroups(list[ParamGroup]):
    """The groups of an optimizer. Their number is fixed: a group that was put in later would never be updated."""

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise StructureError(
            "param_groups: expected the groups that the optimizer was made with, got a change of the list; set options "
            "with param_groups[k][name] = value, and give all groups to the constructor"
        )

    def __setitem__(self, index: Any, group: Any) -> None:
        if not isinstance(index, int) or self[index] is not group:  # as in groups[0] |= options
            self._refuse()

    __delitem__ = __iadd__ = __imul__ = append = extend = insert = _refuse
    remove = pop = clear = reverse = sort = _refuse

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return ParamGroups, (list(self),)  # by default an empty list, which is appended to


def _none() -> None:
    return None


def parameter_groups(params: Any) -> list[Mapping[str, Any]] | None:
    """`params` as a list of groups, or None if it is something else: a list of dicts with "params" is a list of groups.

    A list of dicts without that key is a list of layers.
    """
    if not isinstance(params, list | tuple) or not any(isinstance(p, Mapping) and "params" in p for p in params):
        return None
    for k, group in enumerate(params):
        if not isinstance(group, Mapping) or "params" not in group:
            raise StructureError(
                f"params[{k}]: expected a parameter group with the key 'params', as another item of the list has, "
                f"got {_shown(group)}"
            )
    return list(params)


def resolve_lr(group: "ParamGroup", step: int) -> float:
    """The learning rate of a group at step number `step`, counted from 0: a number, or what its function returns."""
    lr = group["lr"]
    if not callable(lr):
        return float(lr)
    value = lr(step)
    try:
        if callable(value):
            raise OptionTypeError(f"lr: expected a number, got {_shown(value)}")
        number: float = check_option("lr", value)
        for dtype in group.dtypes:
            check_for_dtype("lr", number, dtype)
    except (OptionError, OptionTypeError) as error:
        raise type(error)(f"the function given as lr returned, at step {step}: {error}") from None
    return number


# The numbers that a kernel gets, in this order, in the dtype of the arrays. docs/options.md has the equations.
HYPER_FIELDS = (
    "lr_inside",  # multiplies the gradient: ahead of the momentum buffer where there is one
    "lr_outside",  # multiplies the momentum buffer
    "decay",
    "rest",  # 1 - decay, rounded once from float64 as NumPy does
    "eps_inside",  # added under the root
    "eps_outside",  # added to the root
    "l2",  # weight decay added to the gradient
    "decoupled",  # lr times weight decay, taken off the parameter
    "momentum",
    "nesterov",  # 1 or 0
    "clip",  # bound on the absolute gradient, inf for none
    "gradient_floor",  # below this, a gradient's weighted square would be subnormal; it squares to 0
    "mean_floor",  # below this, a mean gradient's square would be subnormal; it squares to 0
    "state_floor",  # state below this is 0: the smallest normal number
    "zero",  # 0 in the dtype of the arrays: a literal 0.0 would turn a float32 loop into float64 arithmetic
)


def hyper_values(options: Mapping[str, Any], lr: float, dtype: np.dtype[Any]) -> list[float]:
    """The values of `HYPER_FIELDS` for a group with `options` at learning rate `lr`; the floors depend on `dtype`."""
    eps = options["epsilon"]
    rest = 1.0 - options["decay_rate"]
    lr_goes_outside = options["momentum"] > 0 and not options["lr_in_momentum"]
    flush = options["flush_subnormals"]
    decoupled = options["decoupled_weight_decay"]
    return [
        1.0 if lr_goes_outside else lr,
        lr if lr_goes_outside else 1.0,
        options["decay_rate"],
        rest,
        eps if options["eps_in_sqrt"] else 0.0,
        0.0 if options["eps_in_sqrt"] else eps,
        0.0 if decoupled else options["weight_decay"],
        lr * options["weight_decay"] if decoupled else 0.0,
        options["momentum"],
        float(options["nesterov"]),
        math.inf if options["clip_value"] is None else options["clip_value"],
        _smallest_with_normal_square(dtype, rest) if flush else 0.0,
        _smallest_with_normal_square(dtype, 1.0) if flush else 0.0,
        float(np.finfo(dtype).tiny) if flush else 0.0,
        0.0,
    ]


def needs_extended_rule(options: Mapping[str, Any]) -> bool:
    """Whether `options` use a term that the short form of the compiled rule leaves out."""
    return bool(
        options["weight_decay"] > 0
        or options["maximize"]
        or options["eps_in_sqrt"]
        or options["bias_correction"]
        or options["clip_value"] is not None
    )


@cache
def _smallest_with_normal_square(dtype: np.dtype[Any], weight: float) -> float:
    """The smallest positive x for which ``weight * (x * x)``, rounded twice in `dtype`, is a normal number.

    The product grows with x, so comparing x with this bound decides exactly as comparing the product would, without
    ever computing the subnormal.
    """
    tiny = np.finfo(dtype).tiny
    factor = dtype.type(weight)
    x = dtype.type(math.sqrt(float(tiny) / float(factor)))
    zero, infinity = dtype.type(0), dtype.type(math.inf)
    with np.errstate(under="ignore"):
        while factor * (x * x) >= tiny:
            x = np.nextafter(x, zero)
        while factor * (x * x) < tiny:
            x = np.nextafter(x, infinity)
    return float(x)
