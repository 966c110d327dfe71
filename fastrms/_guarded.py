"""Refusal of names that a class does not have: attributes that are set, and arguments of constructors."""

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from fastrms.dialects import meant
from fastrms.errors import OptionTypeError

__all__ = ["Guarded", "refuse_unknown"]


class Guarded:
    """Base of classes that refuse to set an unknown public attribute, such as ``opt.learning_rate = 0.1``.

    A derived class outside this package may have attributes of its own, if their names do not look like an option's.
    `set_once` in the class statement names public attributes that are no properties, and can be set only once.
    """

    _set_once: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, set_once: Iterable[str] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._set_once = cls._set_once | frozenset(set_once)

    if not TYPE_CHECKING:  # a type checker that sees the method takes any name for an attribute

        def __setattr__(self, name: str, value: object) -> None:
            if not name.startswith("_") and not hasattr(type(self), name):
                if name not in self._set_once:
                    self._refuse_attribute(name)
                elif vars(self).get(name, value) is not value:
                    raise AttributeError(f"{name}: cannot be replaced; write into it: {name}[...] = value")
            elif not callable(value) and inspect.isfunction(getattr(type(self), name, None)):
                raise AttributeError(f"{name}: expected a function to replace a method, got {value!r}")
            super().__setattr__(name, value)

    def _refuse_attribute(self, name: str) -> None:
        known = [key for key in dir(type(self)) if isinstance(getattr(type(self), key), property)]
        known = sorted({*known, *self._set_once} - {"storage", "backend"})
        hint = meant(name, [key for key in known if not key.startswith("_")])
        if _is_ours(type(self)) or not hint.startswith("the "):
            raise AttributeError(f"{name}: {type(self).__name__} has no such attribute; {hint}")


def _is_ours(cls: type) -> bool:
    """Tell whether a class is of this package."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def refuse_unknown(cls: type, options: Mapping[str, object]) -> None:
    """Raise OptionTypeError, with a hint, if no constructor of a class of this package takes one of the names."""
    if _is_ours(cls):  # a class of the user's own may take any name
        known = _arguments(cls)
        for name in options:
            if name not in known:
                raise OptionTypeError(f"{name}: {cls.__name__} has no such argument; {meant(name, known)}")


@cache
def _arguments(cls: type) -> list[str]:
    """Return the names of all arguments of the constructors of a class and its bases."""
    return [
        name
        for base in cls.__mro__
        if _is_ours(base) and "__init__" in vars(base)
        for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    ]
