"""`ParamGroup`: the options of the parameters of one group, as users read and set them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Set
from typing import TYPE_CHECKING, Any, NoReturn, Required, Self, SupportsIndex, TypeAlias, TypedDict
from weakref import WeakMethod

from fastrms._checks import BFLOAT16_STEP, GROUP_DEFAULTS, check_for_dtype, check_option, shown
from fastrms._types import CacheDType, DType, LearningRate, NonFinite, Options
from fastrms.dialects import meant
from fastrms.errors import OptionError, OptionTypeError, StructureError

__all__ = ["Group", "Keywords", "ParamGroup", "ParamGroups", "parameter_groups", "resolve_lr"]

# Sets options of several groups: all, or none after an error.
SetOptions: TypeAlias = Callable[[Iterable[tuple["ParamGroup", Options]]], None]


class _Extensions(TypedDict, total=False):
    """The options of a group that the reference lacks."""

    momentum: float
    nesterov: bool
    centered: bool
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool
    eps_in_sqrt: bool
    initial_scale: float
    bias_correction: bool
    lr_in_momentum: bool
    clip_value: float | None
    clip_norm: float | None
    flush_subnormals: bool


class Group(_Extensions, total=False):
    """A parameter group as users give it to `fastrms.RMSProp`, for type checkers."""

    params: Required[Any]
    lr: LearningRate
    decay_rate: float
    epsilon: float


class Keywords(_Extensions, total=False):
    """Keyword arguments that `fastrms.RMSProp` and the classes derived from it share, for type checkers."""

    global_clip_norm: float | None
    nonfinite: NonFinite
    num_threads: int | None


class ParamGroup(MutableMapping[str, Any]):
    """The options of one parameter group, and its parameters under ``"params"``; an item of `param_groups`.

    A group is used like a dict: ``group["lr"] = 1e-2`` applies from the next step on. Unlike a dict, a group checks
    each value that is set. A bad value raises an error, and the old value stays. `RMSProp` makes the groups; a group
    without an optimizer has no effect.

    Parameters
    ----------
    options : mapping of str to option
        The options that differ from the defaults.
    label : str
        The name of the group in error messages.
    dtypes : set of numpy.dtype
        The dtypes of its parameters. Each option must be representable in all of them.
    cache_dtype : {"bfloat16"} or None, default None
        The dtype of its state, which limits the decay rates.

    Raises
    ------
    OptionError
        A name is unknown, a value is out of range, an option cannot be changed (``"params"``, ``"initial_scale"``), or
        an option is deleted.
    OptionTypeError
        A value is of the wrong kind.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp
    >>> opt = RMSProp([{"params": [np.ones(3)], "weight_decay": 0.1}, {"params": [np.zeros(3)]}])
    >>> opt.param_groups[1]["lr"] = 0.01
    >>> opt.param_groups
    [ParamGroup(lr=0.001, weight_decay=0.1), ParamGroup(lr=0.01)]
    """

    def __init__(self, options: Options, label: str, dtypes: Set[DType], cache_dtype: CacheDType | None = None) -> None:
        self._label = label
        self._cache_dtype = cache_dtype
        self.dtypes = dtypes
        self._params: object = None
        self._set_options: Callable[[], SetOptions | None] = _none
        self._values: dict[str, Any] = {}
        self.assign(self.with_changes(GROUP_DEFAULTS | dict(options)))

    def with_changes(self, changes: Options) -> dict[str, Any]:
        """Check new values of options together with the other values, and return all options. Set nothing.

        Parameters
        ----------
        changes : mapping of str to option
            New values by name.

        Returns
        -------
        values : dict
            For `assign`.

        Raises
        ------
        OptionError, OptionTypeError
            As for the class.
        """
        for name, value in changes.items():
            self._refuse_fixed(name, value)
        checked = self._values | {name: check_option(name, value) for name, value in changes.items()}
        for dtype in sorted(self.dtypes, key=str):
            for name in changes:
                if isinstance(checked[name], float):
                    check_for_dtype(name, checked[name], dtype)
        for name in ("decay_rate", "momentum") if self._cache_dtype == "bfloat16" else ():
            if 1 - checked[name] <= BFLOAT16_STEP:
                raise OptionError(
                    f"{name}: {checked[name]!r} would not decay in bfloat16, where a change by less than 1/256 can be "
                    f"rounded away; use less than {1 - BFLOAT16_STEP:.4f}, or cache_dtype=None"
                )
        if checked["nesterov"] and checked["momentum"] == 0:
            raise OptionError(
                "nesterov: True needs momentum > 0, got momentum 0; it looks ahead along the momentum buffer. Set both "
                "together: opt.param_groups[0].update(nesterov=True, momentum=0.9)"
            )
        return checked

    def _refuse_fixed(self, name: str, value: object) -> None:
        """Raise OptionError for a name that is unknown or cannot be set, and for another initial scale."""
        if name == "params":
            raise OptionError(f"{self._label}: 'params' cannot be set; write into them: group['params'][...] = value")
        if name not in GROUP_DEFAULTS:
            raise OptionError(
                f"{self._label}: {name!r} is not an option of a parameter group; {meant(name, GROUP_DEFAULTS)}"
            )
        if name == "initial_scale" and value != self._values.get(name, value):
            raise OptionError(
                f"initial_scale: can only be set at construction, got {shown(value)} later; it is the initial value of "
                "the cache. To change the cache now, write to it: opt.cache[0][...] = value"
            )

    def assign(self, values: Options) -> None:
        """Set checked options without a call to the optimizer.

        Parameters
        ----------
        values : mapping of str to option
            A result of `with_changes` of this group, or another group with the same dtypes. Other options do not
            change.
        """
        self._values.update(values._values if isinstance(values, ParamGroup) else values)

    def bind(self, params: object, set_options: SetOptions) -> None:
        """Connect the group with its optimizer. The optimizer calls this method.

        Parameters
        ----------
        params : the structure of the group's parameters
            The value of ``group["params"]`` from now on.
        set_options : method of the optimizer
            Called for each change of options, with pairs of group and new values.
        """
        self._params = params
        # A strong reference would be a cycle, and keep the buffers alive after the last reference of the user.
        self._set_options = WeakMethod(set_options)

    def bind_as(self, other: "ParamGroup", params: object) -> None:
        """Connect the group with the optimizer of another group. The optimizer calls this method.

        Parameters
        ----------
        other : ParamGroup
            A group of the optimizer.
        params : the structure of this group's parameters
            The value of ``group["params"]`` from now on.
        """
        self._params, self._set_options = params, other._set_options

    def update(self, *others: Any, **options: Any) -> None:
        """Set several options at once, like `dict.update`. After an error, none of them has changed.

        Parameters
        ----------
        *others : mapping or iterable of pairs
            At most one mapping or iterable.
        **options
            Options by name.

        Raises
        ------
        OptionError, OptionTypeError
            As for the class.
        """
        changes = dict(*others, **options)
        set_options = self._set_options()
        if set_options is None:
            self.assign(self.with_changes(changes))
        else:
            set_options([(self, changes)])

    def __getitem__(self, name: str) -> Any:
        return self._params if name == "params" else self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    if not TYPE_CHECKING:  # as in `Guarded`

        def __setattr__(self, name: str, value: object) -> None:
            if name not in self._ATTRIBUTES:
                raise AttributeError(f"{name}: a parameter group has no such attribute; write group[{name!r}] = value")
            super().__setattr__(name, value)

    _ATTRIBUTES = frozenset({"_label", "_cache_dtype", "dtypes", "_params", "_set_options", "_values"})

    def __delitem__(self, name: str) -> None:
        raise OptionError(f"{name}: an option cannot be deleted; its default is {GROUP_DEFAULTS.get(name)!r}")

    def __iter__(self) -> Iterator[str]:
        yield "params"
        yield from self._values

    def __len__(self) -> int:
        return 1 + len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_params": None, "_set_options": _none}  # until the optimizer binds it again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        changed = ", ".join(f"{k}={v!r}" for k, v in self._values.items() if v != GROUP_DEFAULTS[k] or k == "lr")
        return f"ParamGroup({changed})"


class ParamGroups(list[ParamGroup]):
    """The groups of an optimizer. Only the optimizer can add a group, because it has to make the buffers."""

    def _refuse(self: Any, *arguments: object, **options: object) -> NoReturn:
        raise StructureError(
            "param_groups: expected the groups that the optimizer was made with, got a change of the list; set options "
            "with param_groups[k][name] = value, and add a group with optimizer.add_param_group(group)"
        )

    def __setitem__(self, index: object, group: object) -> None:
        if not isinstance(index, int) or self[index] is not group:  # as in groups[0] |= options
            self._refuse()

    __delitem__ = __iadd__ = __imul__ = append = extend = insert = _refuse
    remove = pop = clear = reverse = sort = _refuse

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[Self], tuple[list[ParamGroup]]]:
        return type(self), (list(self),)  # the default would append to an empty list


def _none() -> None:
    return None


def parameter_groups(params: object) -> list[Options] | None:
    """Return `params` as a list of groups if it is a list of dicts with the key "params", and None otherwise.

    Dicts without the key are layers. Raise StructureError if only some items of the list are groups.
    """
    if not isinstance(params, list | tuple) or not any(isinstance(p, Mapping) and "params" in p for p in params):
        return None
    for k, group in enumerate(params):
        if not isinstance(group, Mapping) or "params" not in group:
            raise StructureError(
                f"params[{k}]: expected a parameter group with the key 'params', because another item of the list has "
                f"one, got {shown(group)}"
            )
    return list(params)


def resolve_lr(group: ParamGroup, step: int) -> float:
    """Return the learning rate of a group at a step, counted from 0; raise if the group's function returns none."""
    lr = group["lr"]
    if not callable(lr):
        return float(lr)
    value = lr(step)
    try:
        if callable(value):
            raise OptionTypeError(f"lr: expected a number, got {shown(value)}")
        number: float = check_option("lr", value)
        for dtype in group.dtypes:
            check_for_dtype("lr", number, dtype)
    except (OptionError, OptionTypeError) as error:
        raise type(error)(f"the function given as lr returned, at step {step}: {error}") from None
    return number
