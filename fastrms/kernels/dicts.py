"""The contents of a dict of dicts, compared with a record of them, in compiled code.

The comparison is by identity and calls no ``__eq__``. It goes through the items with CPython's ``PyDict_Next``, some
3 ns for each, where a loop in Python over 1,000 dicts takes longer than the update of as many small arrays.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastrms.kernels import pointers
from fastrms.kernels.access import int64_at
from fastrms.kernels.compiled import inner, jit

__all__ = ["Record"]


class Record:
    """The objects of a dict, and of the dicts among its values, at one time.

    A value of a subclass of dict counts as one object.

    Parameters
    ----------
    dictionary : dict
    """

    def __init__(self, dictionary: dict[Any, Any]) -> None:
        objects = list(_objects(dictionary))
        self._identities = list(map(id, objects))
        self._array = np.array(self._identities, np.int64)
        self._held = objects  # so that no new object gets one of their ids

    def is_of(self, dictionary: dict[Any, Any]) -> bool:
        """Return whether a dict has the recorded objects, and no others, in the same order."""
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


@intrinsic
def _next(typingctx: Any, dictionary: Any, position: Any) -> Any:
    """Return the position after the next item of the dict at an address (0 after the last), its key and its value."""
    number = ir.IntType(64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        slots = [cgutils.alloca_once(builder, number) for _ in range(3)]
        builder.store(arguments[1], slots[0])
        kind = ir.FunctionType(ir.IntType(32), [byte, *[number.as_pointer()] * 3])
        step = cgutils.get_or_insert_function(builder.module, kind, "PyDict_Next")
        more = builder.call(step, [builder.inttoptr(arguments[0], byte), *slots])
        there = builder.icmp_signed("!=", more, ir.Constant(ir.IntType(32), 0))
        values = [builder.select(there, builder.load(slot), ir.Constant(number, 0)) for slot in slots]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, 3)(types.int64, types.int64), codegen


@inner
def _after(dictionary, expected, i):
    """Return the index in `expected` after the items of a dict, which begin at `i`; -1 if it has others."""
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
