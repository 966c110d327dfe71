"""Properties of an optimizer that are made alike: views of a buffer, options of all groups, options of the whole."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from fastrms.buffers import FlatBuffer
from fastrms.errors import OptionError
from fastrms.options import ParamGroup, ParamGroups

__all__ = ["checked", "option_of_all_groups", "views"]


class _Optimizer(Protocol):
    """A class that has these properties."""

    _lock: AbstractContextManager[Any]

    @property
    def buffers(self) -> Mapping[str, FlatBuffer]: ...

    @property
    def param_groups(self) -> ParamGroups: ...

    def _set_options(self, changes: Iterable[tuple[ParamGroup, Mapping[str, Any]]]) -> None: ...


def views(name: str, meaning: str) -> property:
    """Return a property for the views of buffer `name`, None without the buffer; nothing can be put in their place."""

    def get(self: _Optimizer) -> Any:
        buffer = self.buffers.get(name)
        return None if buffer is None else buffer.views

    def refuse_another(self: _Optimizer, value: Any) -> None:
        # `opt.grads *= 0.5`, for a single array, assigns the same array.
        if value is not get(self):
            path = self.buffers["params"].layout.leaves[0].path
            raise AttributeError(
                f"{name}: these views cannot be replaced; write into them: opt.{name}{path}[...] = value"
            )

    return property(get, refuse_another, doc=f"{meaning} Views of a flat buffer.")


def option_of_all_groups(name: str, meaning: str) -> property:
    """Return a property for option `name`: its value where all groups have the same, and to be set for all groups."""

    def get(self: _Optimizer) -> Any:
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            # The number of one group would be a trap: `opt.lr *= 0.5` would level all groups.
            raise OptionError(f"{name}: differs between groups, {values}; use opt.param_groups[i][{name!r}]")
        return values[0]

    def set_all(self: _Optimizer, value: Any) -> None:
        self._set_options([(group, {name: value}) for group in self.param_groups])

    return property(get, set_all, doc=f"{meaning} Setting it sets it for all groups.")


def checked(name: str, check: Callable[[Any], Any], changed: str, meaning: str) -> property:
    """Return a property for an option of the optimizer as a whole, kept as attribute ``_name``.

    Setting it checks the value with `check`, and calls the method named `changed`; an error of either leaves the
    option as it was.
    """

    def get(self: _Optimizer) -> Any:
        return getattr(self, f"_{name}")

    def set_checked(self: _Optimizer, value: Any) -> None:
        value = check(value)
        with self._lock:  # a step on another thread ends first
            before = getattr(self, f"_{name}")
            setattr(self, f"_{name}", value)
            try:
                getattr(self, changed)()
            except BaseException:
                setattr(self, f"_{name}", before)
                raise

    return property(get, set_checked, doc=meaning)
