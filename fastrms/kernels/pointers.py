"""The memory layout of tuples and arrays, from which compiled code reads the addresses of gradients.

In Python the address of an array costs 0.5 us or more, for 1,000 small arrays many times the whole update. So
`cpu.serial_from` reads type, dtype, flags, shape and data pointer from the memory of the objects, as CPython
(``PyTupleObject``, ``PyObject``) and NumPy (``PyArrayObject_fields``, part of its public C API) lay them out. It
accepts an array only if every field is exactly as expected, and leaves all other arrays to the general path.

`available` compares these bytes with the answers of Python itself, once, and turns the path off at any difference:
other interpreters, builds without the GIL, 32 bits, a NumPy with another layout. ``FASTRMS_ZERO_COPY=0`` in the
environment turns it off by hand.
"""

import ctypes
import os
import platform
import sys
import sysconfig
from functools import cache

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms._types import Array, DType, Items

__all__ = ["available", "identity", "items_of"]

# Byte offsets on 64-bit CPython with the GIL: an object starts with reference count and type; the items of a tuple
# follow its size; the fields of an array follow its head.
TYPE = 8
_ITEMS = tuple.__basicsize__
DATA, NDIM, SHAPE, DTYPE, FLAGS = 16, 24, 32, 56, 64
_POINTER = 8
ORDINARY = 0x0001 | 0x0100  # NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED
_WRITEABLE = 0x0400  # NPY_ARRAY_WRITEABLE


def items_of(arrays: Items) -> int:
    """Return the address of the items of a tuple."""
    return id(arrays) + _ITEMS


def identity(dtype: DType) -> NDArray[np.int64]:
    """Return the numbers by which `cpu.serial_from` recognises arrays of NumPy's own `dtype`, shape (2, 5).

    They are: address of the type, address of the dtype, bytes of an element, address of None, and flags. The first row
    is for gradients. The second row is for parameters that are held in place. It requires writable arrays, and allows
    any type and any dtype object.
    """
    both = [id(dtype), dtype.itemsize, id(None)]
    return np.array([[id(np.ndarray), *both, ORDINARY], [0, *both, ORDINARY | _WRITEABLE]], np.int64)


@cache
def available() -> bool:
    """Tell whether compiled code can read gradients where they lie: with this interpreter, NumPy and environment."""
    return (
        os.environ.get("FASTRMS_ZERO_COPY", "1") != "0"
        and not numba.config.DISABLE_JIT
        and platform.python_implementation() == "CPython"
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and sys.maxsize == 2**63 - 1
        and tuple.__itemsize__ == _POINTER
        and np.ndarray.__basicsize__ >= FLAGS + 4
        and all(_reads_right(array) for array in _samples())
    )


def _samples() -> list[Array]:
    """Return arrays that differ in shape, strides, dtype and flags."""
    square = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    return [square, square.T, square[:, 1:], square.astype(np.float64), np.array(1.0), np.zeros((0, 2)), square[0]]


def _reads_right(array: Array) -> bool:
    """Tell whether the bytes of `array`, inside a tuple, agree with Python's answers."""

    def word(address: int, kind: object = ctypes.c_int64) -> int:
        return int(kind.from_address(address).value)

    holder = (None, array)
    address = word(items_of(holder) + _POINTER)
    if address != id(array) or word(address + TYPE) != id(np.ndarray):
        return False
    flags = word(address + FLAGS, ctypes.c_int32)
    shape, strides = word(address + SHAPE), word(address + SHAPE + _POINTER)
    return (
        word(address + DATA) == array.ctypes.data
        and word(address + NDIM, ctypes.c_int32) == array.ndim
        # NumPy keeps strides behind shape; the next line reads there only if these words are the two pointers.
        and strides == shape + _POINTER * array.ndim
        and tuple(word(shape + _POINTER * d) for d in range(array.ndim)) == array.shape
        and word(address + DTYPE) == id(np.dtype(array.dtype.char))
        and bool(flags & 0x0001) == array.flags.c_contiguous
        and bool(flags & 0x0100) == array.flags.aligned
    )
