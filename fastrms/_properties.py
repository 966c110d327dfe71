"""Makers of properties of an optimizer: views of a buffer, options of all groups, options of the whole."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from fastrms._state import OptimizerState
from fastrms._types import Options
from fastrms.backends.base import Backend
from fastrms.backends.turns import Turns
from fastrms.buffers import FlatBuffer
from fastrms.buffers.narrow import views_of_state
from fastrms.errors import OptionError
from fastrms.options import ParamGroup, ParamGroups

__all__ = ["Attribute", "change", "checked", "option_of_all_groups", "views"]


_Value = TypeVar("_Value", covariant=True)
_Taken = TypeVar("_Taken", contravariant=True)


class Attribute(Protocol[_Value, _Taken]):
    """The type of a property that returns values of one type, and takes values of another type."""

    def __get__(self, instance: object, owner: type | None = None, /) -> _Value: ...

    def __set__(self, instance: object, value: _Taken, /) -> None: ...


class _Optimizer(Protocol):
    """An optimizer that has such properties."""

    _state: OptimizerState
    _backend: Backend
    _turns: Turns

    @property
    def buffers(self) -> Mapping[str, FlatBuffer]: ...

    @property
    def param_groups(self) -> ParamGroups: ...

    def _set_options(self, changes: Iterable[tuple[ParamGroup, Options]]) -> None: ...


def views(name: str, meaning: str) -> property:
    """Return a read-only property for the views of a buffer; its value is None without the buffer.

    Views of 16-bit state are arrays of ml_dtypes' bfloat16 if ml_dtypes is installed.
    """
    is_state = name not in ("params", "grads")

    def get(self: _Optimizer) -> Any:
        buffer = self.buffers.get(name)
        if buffer is None:
            return None
        return views_of_state(buffer) if is_state else buffer.views

    def refuse_another(self: _Optimizer, value: object) -> None:
        # `opt.grads *= 0.5`, for a single array, assigns the same array.
        if value is not get(self):
            path = self.buffers["params"].layout.leaves[0].path
            raise AttributeError(
                f"{name}: these views cannot be replaced; write into them: opt.{name}{path}[...] = value"
            )

    return property(get, refuse_another, doc=f"{meaning} Views of a flat buffer.")


def option_of_all_groups(name: str, meaning: str) -> property:
    """Return a property for an option of all groups. It can be read if the values of all groups are equal."""

    def get(self: _Optimizer) -> Any:
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            # With the value of one group, `opt.lr *= 0.5` would set all groups to half of it.
            raise OptionError(f"{name}: differs between groups, {values}; use opt.param_groups[i][{name!r}]")
        return values[0]

    def set_all(self: _Optimizer, value: object) -> None:
        self._set_options([(group, {name: value}) for group in self.param_groups])

    return property(get, set_all, doc=f"{meaning} Setting it sets it for all groups.")


def checked(name: str, check: Callable[[Any], Any], changed: str, meaning: str) -> property:
    """Return a property for an option of the whole optimizer. Setting it calls `check`, and then `change`."""

    def get(self: _Optimizer) -> Any:
        return getattr(self._state, name)

    def set_checked(self: _Optimizer, value: object) -> None:
        change(self, name, check(value), changed)

    return property(get, set_checked, doc=meaning)


def change(optimizer: _Optimizer, name: str, value: object, changed: str) -> None:
    """Set an attribute of the `OptimizerState`, and call the method `changed` of the backend; undo after an error."""
    with optimizer._turns.lock:  # wait for a step on another thread
        before = getattr(optimizer._state, name)
        try:
            setattr(optimizer._state, name, value)
            getattr(optimizer._backend, changed)()
        except BaseException:
            setattr(optimizer._state, name, before)
            raise
