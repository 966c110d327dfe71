"""Attributes of `RMSProp` that are made alike: views of a buffer, options of all groups, and those of the whole."""

from collections.abc import Callable
from typing import Any

from fastrms.errors import OptionError

__all__ = ["checked", "option_of_all_groups", "views"]


def views(name: str, meaning: str) -> property:
    """The views of buffer `name`, or None if there is no such buffer; they cannot be replaced as a whole."""

    def get(self: Any) -> Any:
        buffer = self.buffers.get(name)
        return None if buffer is None else buffer.views

    def refuse_another(self: Any, value: Any) -> None:
        # What `opt.grads *= 0.5` assigns, for a single array, is the same array.
        if value is not get(self):
            raise AttributeError(f"{name}: these views cannot be replaced; write into them: opt.{name}[...] = value")

    return property(get, refuse_another, doc=f"{meaning} Views of a flat buffer.")


def option_of_all_groups(name: str, meaning: str) -> property:
    """Option `name`, to read where it is the same in all groups, and to set for all."""

    def get(self: Any) -> Any:
        values = [group[name] for group in self.param_groups]
        if any(value != values[0] for value in values):
            # A number that holds for one group only would be a trap: `opt.lr *= 0.5` would level all groups.
            raise OptionError(f"{name}: differs between groups, {values}; use opt.param_groups[i][{name!r}]")
        return values[0]

    def set_all(self: Any, value: Any) -> None:
        before = [group[name] for group in self.param_groups]
        try:
            for group in self.param_groups:
                group[name] = value
        except Exception:
            for group, old in zip(self.param_groups, before, strict=True):
                group[name] = old
            raise

    return property(get, set_all, doc=f"{meaning} Setting it sets it for all groups.")


def checked(name: str, check: Callable[[Any], Any], changed: str, meaning: str) -> property:
    """An option of the optimizer as a whole: setting it checks the value, and calls the method `changed`."""

    def get(self: Any) -> Any:
        return getattr(self, f"_{name}")

    def set_checked(self: Any, value: Any) -> None:
        setattr(self, f"_{name}", check(value))
        getattr(self, changed)()

    return property(get, set_checked, doc=meaning)
