"""Addresses of the tensors of other frameworks, from DLPack's C exchange API, in compiled code.

A type with ``__dlpack_c_exchange_api__`` (DLPack 1.2 and later) gives the address of a C function that describes a
tensor without making an object. The call takes some 15 ns; address, shape and strides from Python take 50 ns each.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastrms.kernels.access import call_c, int64_at
from fastrms.kernels.compiled import inner, jit

__all__ = [
    "ABSENT", "CPU", "CUDA", "ORDINARY", "UNUSUAL", "WORDS", "current_stream", "exchange_function", "expected_of",
    "locate",
]  # fmt: skip

# The states of a tensor that `locate` writes.
ORDINARY, ABSENT, UNUSUAL = 0, 1, 2

# Struct DLPackExchangeAPI, in words of 64 bits: version (major, minor: 32 bits each), previous table, then functions.
# Here are the fourth and the fifth function.
_FUNCTION, _STREAM = 5, 6
# Struct DLTensor, in words of 64 bits: data, device (type, number: 32 bits each), dimensions and dtype (32 bits each),
# shape, strides, byte offset.
WORDS = 6
_FLOAT = 2
# Types of device; `locate` has the number of the device in the upper half.
CPU, CUDA = 1, 2


def exchange_function(kind: type) -> int:
    """Return the address of ``dltensor_from_py_object_no_sync`` for tensors of a type, or 0 without the API."""
    return _function(kind, _FUNCTION)


def current_stream(kind: type, device: int) -> int:
    """Return the number of this thread's current stream for tensors of a type on a device."""
    ask = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
    stream = ctypes.c_void_p()
    ask(_function(kind, _STREAM))(device & 0xFFFFFFFF, device >> 32, ctypes.byref(stream))
    return stream.value or 0


def _function(kind: type, number: int) -> int:
    capsule = getattr(kind, "__dlpack_c_exchange_api__", None)
    if capsule is None or numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return 0
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = (ctypes.c_int64 * (_STREAM + 1)).from_address(pointer_of(capsule, b"dlpack_exchange_api"))
    return table[number] if table[0] & 0xFFFFFFFF == 1 else 0


def expected_of(arrays: Sequence[Any]) -> NDArray[np.int64]:
    """Return for `locate` a row for each array: the upper half of a DLTensor's third word, dimensions, and shape."""
    rows = np.zeros((len(arrays), 2 + max(len(array.shape) for array in arrays)), np.int64)
    for row, array in zip(rows, arrays, strict=True):
        kind, dimensions = _FLOAT | 8 * array.dtype.itemsize << 8 | 1 << 16, len(array.shape)  # code, bits, lanes
        row[:2], row[2 : 2 + dimensions] = (kind, dimensions), array.shape
    return rows


@intrinsic
def _describe(typingctx: Any, function: Any, tensor: Any, words: Any) -> Any:
    """Let the function describe the object at address `tensor` in the array `words`; tell whether it succeeded."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        describe = builder.inttoptr(arguments[0], ir.FunctionType(ir.IntType(32), [byte, byte]).as_pointer())
        data = context.make_array(words)(context, builder, arguments[2]).data
        status = builder.call(describe, [builder.inttoptr(arguments[1], byte), builder.bitcast(data, byte)])
        failed = builder.icmp_signed("!=", status, ir.Constant(ir.IntType(32), 0))
        with builder.if_then(failed):  # it has set an exception
            call_c(builder, "PyErr_Clear", ir.VoidType())
        return builder.not_(failed)

    return types.boolean(types.int64, types.int64, words), codegen


@inner
def _elements(words, expected, k, device):
    """Return the size of a tensor; -1 unless it is contiguous, on `device`, and of the expected dtype and shape."""
    if words[1] != device or words[2] & 0xFFFFFFFF != expected[k, 1]:
        return -1
    if (words[2] >> 32) & 0xFFFFFFFF != expected[k, 0]:
        return -1
    dense = 1
    for back in range(expected[k, 1]):
        d = expected[k, 1] - 1 - back
        size = expected[k, 2 + d]
        if int64_at(words[3] + 8 * d) != size:
            return -1
        if size > 1 and int64_at(words[4] + 8 * d) != dense:
            return -1
        dense *= size
    return dense


@inner
def _has(numbers, number):
    """Tell whether a 1-D array has a number."""
    for i in range(numbers.size):  # noqa: SIM110 - Numba does not compile `any`
        if numbers[i] == number:
            return True
    return False


@inner
def _overlaps(start, end, pieces):
    """Tell whether [start, end) overlaps a piece of memory [low, high), one a row."""
    for j in range(pieces.shape[0]):  # noqa: SIM110
        if start < pieces[j, 1] and end > pieces[j, 0]:
            return True
    return False


@jit()
def locate(function, tensors, kinds, none, expected, excluded, words, addresses, states, device):
    """Write addresses and states of tensors; tell whether all are ordinary, and whether all were the same before.

    Parameters
    ----------
    function : int
        From `exchange_function`.
    tensors : int
        Address of the items of a tuple of tensors, which the caller holds. None is an absent tensor.
    kinds : ndarray of int64, shape (m,)
        The ``id`` of each type that the function is for, without subclasses.
    none : int
        ``id(None)``.
    expected : ndarray of int64, shape (k, 2 + most dimensions)
        From `expected_of`.
    excluded : ndarray of int64, shape (m, 2)
        Pieces of memory [low, high) that an ordinary tensor does not alias.
    words : ndarray of int64, shape (`WORDS`,)
        Scratch memory.
    addresses : ndarray of int64, shape (k,)
        Written: the address of the elements; 0 unless the tensor is ordinary.
    states : ndarray of int64, shape (k,)
        Written: `ORDINARY` for a contiguous tensor on the device with the expected dtype and shape, `ABSENT`, or
        `UNUSUAL`.
    device : int
        `CPU`, or `CUDA` plus the number of the device times 2**32.
    """
    ordinary = unchanged = True
    for k in range(addresses.size):
        tensor = int64_at(tensors + 8 * k)
        state, address = UNUSUAL, 0
        if tensor == none:
            state = ABSENT
        elif _has(kinds, int64_at(tensor + 8)) and _describe(function, tensor, words):
            size = _elements(words, expected, k, device)
            if size >= 0:
                start = words[0] + words[5]
                # The dtype is in the upper half of its word: code, bits, lanes.
                end = start + size * (expected[k, 0] >> 8 & 0xFF) // 8
                if not _overlaps(start, end, excluded):
                    state, address = ORDINARY, start
        ordinary = ordinary and state == ORDINARY
        unchanged = unchanged and state == states[k] and address == addresses[k]
        addresses[k], states[k] = address, state
    return ordinary, unchanged
