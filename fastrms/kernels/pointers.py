"""Reading gradients where they lie: compiled code that looks into a tuple of arrays, without Python work for each.

Asking an array for its address from Python costs 0.5 us or more, which for 1,000 small arrays is many times the whole
update. So `find_sources` reads what it needs from the objects' own memory: type, dtype, flags, shape and data pointer,
as CPython (``PyTupleObject``, ``PyObject``) and NumPy (``PyArrayObject_fields``, part of its public C API) lay them
out. It accepts an array only if every field is exactly as expected; anything else is left to the general path.

`available` checks all that this relies on, once, by comparing those bytes with what Python itself says, and turns the
path off where anything is different: other interpreters, builds without the GIL, 32 bits, a NumPy with another layout.
``FASTRMS_ZERO_COPY=0`` in the environment turns it off by hand.
"""

import ctypes
import os
import platform
import sys
import sysconfig
from functools import cache
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastrms.kernels.cpu import array_at, jit

__all__ = ["GATHER_BELOW", "available", "find_sources", "gather", "identity", "items_of"]

# Up to how many elements on average the arrays of a run are copied together, rather than read where they lie.
GATHER_BELOW = 512

# Byte offsets on 64-bit CPython with the GIL: an object starts with reference count and type; the items of a tuple
# follow its size; the fields of an array follow its head.
_TYPE = 8
_ITEMS = tuple.__basicsize__
_DATA, _NDIM, _SHAPE, _DTYPE, _FLAGS = 16, 24, 32, 56, 64
_POINTER = 8
_CONTIGUOUS_AND_ALIGNED = 0x0001 | 0x0100  # NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED


def _load(kind: Any) -> Any:
    """An intrinsic that reads an integer of type `kind` at an address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer())
            return builder.load(pointer)

        return kind(types.int64), codegen

    return load


_int64_at = _load(types.int64)
_int32_at = _load(types.int32)


@jit()
def find_sources(items, known, shapes, forbidden, spans):
    """Find each array that a run needs, and write its address to ``spans[k, 2]``.

    Returns -1, or the number of the first span whose array is not exactly as expected; then what was written before
    must not be used. Whoever calls holds the tuple, so that the arrays live until they were read.

    Parameters
    ----------
    items : int
        Address of the items of the tuple of arrays: `items_of`.
    known : ndarray of int64, shape (3,)
        From `identity`: what type and dtype have to be, and the bytes of an element.
    shapes : ndarray of int64, shape (k, 2 + most dimensions)
        For each span the number of its array in the tuple, its number of dimensions, and its shape.
    forbidden : ndarray of int64, shape (m, 2)
        Addresses [low, high) that a gradient may not touch: what the step writes, and where it is copied to.
    spans : ndarray of int64, shape (k, 3)
        As for `reference.update`; the third column is written.
    """
    for k in range(spans.shape[0]):
        array = _int64_at(items + _POINTER * shapes[k, 0])
        if _int64_at(array + _TYPE) != known[0] or _int64_at(array + _DTYPE) != known[1]:
            return k
        if _int32_at(array + _FLAGS) & _CONTIGUOUS_AND_ALIGNED != _CONTIGUOUS_AND_ALIGNED:
            return k
        if _int32_at(array + _NDIM) != shapes[k, 1]:
            return k
        shape = _int64_at(array + _SHAPE)
        for d in range(shapes[k, 1]):
            if _int64_at(shape + _POINTER * d) != shapes[k, 2 + d]:
                return k
        data = _int64_at(array + _DATA)
        end = data + (spans[k, 1] - spans[k, 0]) * known[2]
        for j in range(forbidden.shape[0]):
            if data < forbidden[j, 1] and end > forbidden[j, 0]:
                return k
        spans[k, 2] = data
    return -1


@jit()
def gather(spans, grads):
    """Copy each array that `find_sources` found to its place in `grads`, and let the spans point there.

    Small arrays are updated faster as one: 1,000 of 100 float32 each in 60 us, instead of 78 one by one.
    """
    for k in range(spans.shape[0]):
        target = grads[spans[k, 0] : spans[k, 1]]
        source = array_at(spans[k, 2], target.size, grads)
        for i in range(target.size):
            target[i] = source[i]
        spans[k, 2] = 0


def items_of(arrays: tuple[Any, ...]) -> int:
    """The address of the items of a tuple."""
    return id(arrays) + _ITEMS


def identity(dtype: np.dtype[Any]) -> NDArray[np.int64]:
    """What `find_sources` recognises an ordinary array of `dtype` by; `dtype` is NumPy's own object for it."""
    return np.array([id(np.ndarray), id(dtype), dtype.itemsize], np.int64)


@cache
def available() -> bool:
    """Whether gradients can be read where they lie, on this interpreter, with this NumPy, and as the user wishes."""
    return (
        os.environ.get("FASTRMS_ZERO_COPY", "1") != "0"
        and not numba.config.DISABLE_JIT
        and platform.python_implementation() == "CPython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and sys.maxsize == 2**63 - 1
        and tuple.__itemsize__ == _POINTER
        and np.ndarray.__basicsize__ >= _FLAGS + 4
        and all(_reads_right(array) for array in _samples())
    )


def _samples() -> list[NDArray[Any]]:
    square = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    return [square, square.T, square[:, 1:], square.astype(np.float64), np.array(1.0), np.zeros((0, 2)), square[0]]


def _reads_right(array: NDArray[Any]) -> bool:
    """Whether the bytes of `array`, inside a tuple, say what Python says of it."""

    def word(address: int, kind: Any = ctypes.c_int64) -> int:
        return int(kind.from_address(address).value)

    holder = (None, array)
    address = word(items_of(holder) + _POINTER)
    if address != id(array) or word(address + _TYPE) != id(np.ndarray):
        return False
    flags = word(address + _FLAGS, ctypes.c_int32)
    shape, strides = word(address + _SHAPE), word(address + _SHAPE + _POINTER)
    return (
        word(address + _DATA) == array.ctypes.data
        and word(address + _NDIM, ctypes.c_int32) == array.ndim
        # NumPy keeps shape and strides in one piece of memory: look there only if these are those two pointers.
        and strides == shape + _POINTER * array.ndim
        and tuple(word(shape + _POINTER * d) for d in range(array.ndim)) == array.shape
        and word(address + _DTYPE) == id(np.dtype(array.dtype.char))
        and bool(flags & 0x0001) == array.flags.c_contiguous
        and bool(flags & 0x0100) == array.flags.aligned
    )
