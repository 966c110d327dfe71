"""Attributes of `RMSProp` that are made alike: views of a buffer, options of all groups, and those of the whole."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from fastrms.dialects import meant
from fastrms.errors import OptionError, OptionTypeError

__all__ = ["Guarded", "change", "checked", "option_of_all_groups", "refuse_unknown", "views"]


def views(name: str, meaning: str) -> property:
    """The views of buffer `name`, or None if there is no such buffer; they cannot be replaced as a whole."""

    def get(self: Any) -> Any:
        buffer = self.buffers.get(name)
        return None if buffer is None else buffer.views

    def refuse_another(self: Any, value: Any) -> None:
        # What `opt.grads *= 0.5` assigns, for a single array, is the same array.
        if value is not get(self):
            path = self.buffers["params"].layout.leaves[0].path
            raise AttributeError(
                f"{name}: these views cannot be replaced; write into them: opt.{name}{path}[...] = value"
            )

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
        self._set_options([(group, {name: value}) for group in self.param_groups])

    return property(get, set_all, doc=f"{meaning} Setting it sets it for all groups.")


def checked(name: str, check: Callable[[Any], Any], changed: str, meaning: str) -> property:
    """An option of the optimizer as a whole: setting it checks the value, and calls the backend's method `changed`."""

    def get(self: Any) -> Any:
        return getattr(self._state, name)

    def set_checked(self: Any, value: Any) -> None:
        change(self, name, check(value), changed)

    return property(get, set_checked, doc=meaning)


def change(optimizer: Any, name: str, value: Any, changed: str) -> None:
    """Set an option of the optimizer as a whole, call the backend's method `changed`, and undo both after an error."""
    with optimizer._turns.lock:  # a step on another thread ends first
        before = getattr(optimizer._state, name)
        setattr(optimizer._state, name, value)
        try:
            getattr(optimizer._backend, changed)()
        except BaseException:
            setattr(optimizer._state, name, before)
            raise


class Guarded:
    """Refuse to set a public attribute that nothing reads, such as ``opt.learning_rate = 0.1``.

    A class outside this package that derives from one of these may have attributes of its own, as long as their names
    do not look like an option's.
    """

    # Public attributes that are no properties: they are set once.
    _set_once: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            if name not in self._set_once:
                self._refuse_unknown(name)
            elif vars(self).get(name, value) is not value:
                raise AttributeError(f"{name}: cannot be replaced; write into it: {name}[...] = value")
        elif not callable(value) and inspect.isfunction(getattr(type(self), name, None)):
            raise AttributeError(f"{name}: expected a function in the place of a method, got {value!r}")
        super().__setattr__(name, value)

    def _refuse_unknown(self, name: str) -> None:
        known = [key for key in dir(type(self)) if isinstance(getattr(type(self), key), property)]
        known = sorted({*known, *self._set_once} - {"storage"})
        hint = meant(name, [key for key in known if not key.startswith("_")])
        if _is_ours(type(self)) or not hint.startswith("the "):
            raise AttributeError(f"{name}: {type(self).__name__} has no such attribute; {hint}")


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def refuse_unknown(cls: type, options: Mapping[str, Any]) -> None:
    """Raise if a class of this package is called with names that its constructor does not take.

    Parameters
    ----------
    cls : type
        A class whose bases of this package share their options.
    options : mapping of str to value
        Arguments given by name.

    Raises
    ------
    OptionTypeError
        It says which name is meant.
    """
    if _is_ours(cls):  # others may take anything
        known = _arguments(cls)
        for name in options:
            if name not in known:
                raise OptionTypeError(f"{name}: {cls.__name__} has no such argument; {meant(name, known)}")


@cache
def _arguments(cls: type) -> list[str]:
    """The names that the constructors of a class and of its bases take."""
    return [
        name
        for base in cls.__mro__
        if _is_ours(base) and "__init__" in vars(base)
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    ]
