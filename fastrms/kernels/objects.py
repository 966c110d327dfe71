"""The objects in dicts and attributes, read by compiled code with functions of CPython's C API.

A loop in Python over the state of 1,000 small arrays would take longer than their update.
"""

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastrms.kernels import pointers
from fastrms.kernels.access import call_c, int64_at
from fastrms.kernels.compiled import inner, jit

__all__ = ["Record", "attributes"]


class Record:
    """The present objects of a dict and of the dicts among its values, compared by identity.

    A value of a subclass of dict counts as one object.
    """

    def __init__(self, dictionary: dict[Any, Any]) -> None:
        objects = list(_objects(dictionary))
        self._identities = list(map(id, objects))
        self._array = np.array(self._identities, np.int64)
        self._held = objects  # so that no new object gets one of their ids

    def is_of(self, dictionary: dict[Any, Any]) -> bool:
        """Tell whether a dict has the recorded objects, and no others, in the same order."""
        if pointers.available() and isinstance(dictionary, dict):
            return bool(_equals(id(dictionary), id(dict), id(_END), self._array))
        return list(map(id, _objects(dictionary))) == self._identities


_END = object()  # follows the items of each inner dict


def _objects(dictionary: dict[Any, Any]) -> Iterator[object]:
    for key, value in dictionary.items():
        yield from (key, value)
        if type(value) is dict:
            for item in value.items():
                yield from item
            yield _END


def attributes(objects: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """Return the attribute `name` of each object."""
    values: list[Any] = [None] * len(objects)
    if pointers.available() and _read(pointers.items_of(objects), id(name), id(values), len(objects)):
        return tuple(values)
    return tuple(map(operator.attrgetter(name), objects))  # raises the error of an object without it


@intrinsic
def _next(typingctx: Any, dictionary: Any, position: Any) -> Any:
    """Return the position after the next item of the dict at an address (0 after the last), its key and its value."""
    number = ir.IntType(64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        slots = [cgutils.alloca_once(builder, number) for _ in range(3)]
        builder.store(arguments[1], slots[0])
        more = call_c(builder, "PyDict_Next", ir.IntType(32), builder.inttoptr(arguments[0], byte), *slots)
        there = builder.icmp_signed("!=", more, ir.Constant(ir.IntType(32), 0))
        values = [builder.select(there, builder.load(slot), ir.Constant(number, 0)) for slot in slots]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, 3)(types.int64, types.int64), codegen


@inner
def _after(dictionary, expected, i):
    """Compare the items of a dict with `expected` from `i` on; return the index after them, or -1 at a difference."""
    position, key, value = _next(dictionary, 0)
    while position:
        if i + 2 > expected.size or key != expected[i] or value != expected[i + 1]:
            return -1
        i += 2
        position, key, value = _next(dictionary, position)
    return i


@jit()
def _equals(dictionary, kind, end, expected):
    """Tell whether a dict of dicts has the objects whose addresses are in `expected`, and no others.

    `dictionary` is its address, `kind` is ``id(dict)``, and `end` follows the items of each inner dict.
    """
    i = 0
    position, key, value = _next(dictionary, 0)
    while position:
        if i + 2 > expected.size or key != expected[i] or value != expected[i + 1]:
            return False
        i += 2
        if int64_at(value + 8) == kind:
            i = _after(value, expected, i)
            if i < 0 or i == expected.size or expected[i] != end:
                return False
            i += 1
        position, key, value = _next(dictionary, position)
    return i == expected.size


@intrinsic
def _move(typingctx: Any, source: Any, name: Any, values: Any, k: Any) -> Any:
    """Put the attribute `name` of the object `source` into item `k` of the list `values`; tell whether it succeeded.

    The arguments except `k` are addresses.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        source, name, values = (builder.inttoptr(argument, byte) for argument in arguments[:3])
        value = call_c(builder, "PyObject_GetAttr", byte, source, name)
        failed = cgutils.is_null(builder, value)
        with builder.if_else(failed) as (otherwise, then):
            with otherwise:
                call_c(builder, "PyErr_Clear", ir.VoidType())
            with then:  # the list takes over the reference
                call_c(builder, "PyList_SetItem", ir.IntType(32), values, arguments[3], value)
        return builder.not_(failed)

    return types.boolean(types.int64, types.int64, types.int64, types.int64), codegen


@jit()
def _read(objects, name, values, count):
    """Put the attribute `name` of each object into the list `values`; tell whether it succeeded.

    The arguments except `count` are addresses; `objects` is that of the items of a tuple.
    """
    k = 0
    while k < count and _move(int64_at(objects + 8 * k), name, values, k):
        k += 1
    return k == count
