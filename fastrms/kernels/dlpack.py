"""Where tensors of another framework lie in memory, asked for in compiled code through DLPack's table of C functions.

A type that has ``__dlpack_c_exchange_api__`` (DLPack 1.2 and later, the C exchange API) gives the address of a function
that describes a tensor without making an object: some 15 ns, where Python's ways to ask for address, shape and strides
take 50 ns each.
"""

import ctypes
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastrms.kernels.compiled import inner, jit
from fastrms.kernels.cpu import int64_at

__all__ = [
    "ABSENT", "CPU", "CUDA", "ORDINARY", "UNUSUAL", "WORDS", "current_stream", "exchange_function", "kind_of", "locate",
    "look_up",
]  # fmt: skip

# What `locate` says of a tensor.
ORDINARY, ABSENT, UNUSUAL = 0, 1, 2

# Struct DLPackExchangeAPI: version (major, minor: 32 bits each), previous table, then functions; these are the fourth
# and the fifth.
_FUNCTION, _STREAM = 5, 6
# Struct DLTensor, in words of 64 bits: data, device (type, number: 32 bits each), dimensions and dtype (32 bits each),
# shape, strides, byte offset.
WORDS = 6
_FLOAT = 2
# Devices: in `locate` with the device's number in the upper half.
CPU, CUDA = 1, 2


def exchange_function(kind: type) -> int:
    """The address of ``dltensor_from_py_object_no_sync`` for tensors of this type, or 0 if there is none."""
    return _function(kind, _FUNCTION)


def current_stream(kind: type, device: int) -> int:
    """The number of the stream on which tensors of this type are computed now, by this thread on this device."""
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


def kind_of(itemsize: int) -> int:
    """The upper half of a DLTensor's third word for floats of so many bytes: code, bits and lanes of the dtype."""
    return _FLOAT | 8 * itemsize << 8 | 1 << 16


@intrinsic
def _describe(typingctx: Any, function: Any, tensor: Any, words: Any) -> Any:
    """Call the function with the object at address `tensor`, to fill the array `words`; whether it could."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        describe = builder.inttoptr(arguments[0], ir.FunctionType(ir.IntType(32), [byte, byte]).as_pointer())
        data = context.make_array(words)(context, builder, arguments[2]).data
        status = builder.call(describe, [builder.inttoptr(arguments[1], byte), builder.bitcast(data, byte)])
        failed = builder.icmp_signed("!=", status, ir.Constant(ir.IntType(32), 0))
        with builder.if_then(failed):  # there is an exception, which is nobody's business
            clear = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, clear, "PyErr_Clear"), [])
        return builder.not_(failed)

    return types.boolean(types.int64, types.int64, words), codegen


@intrinsic
def _item(typingctx: Any, dictionary: Any, key: Any) -> Any:
    """The address of an item of the dict at address `dictionary`, which holds it; 0 if there is none."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        get = cgutils.get_or_insert_function(builder.module, ir.FunctionType(byte, [byte, byte]), "PyDict_GetItem")
        item = builder.call(get, [builder.inttoptr(argument, byte) for argument in arguments])
        return builder.ptrtoint(item, ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen


@jit()
def look_up(dicts, kind, key, items):
    """Look up one key in many dicts.

    Parameters
    ----------
    dicts : int
        Address of the items of a tuple, which the caller holds: dicts, or something else that has no items.
    kind : int
        ``id(dict)``; subclasses are something else.
    key : int
        Address of a str.
    items : ndarray of int64, shape (k,)
        Written: the address of each item, which its dict holds, or 0.
    """
    for k in range(items.size):
        dictionary = int64_at(dicts + 8 * k)
        items[k] = _item(dictionary, key) if int64_at(dictionary + 8) == kind else 0


@inner
def _elements(words, expected, k, device):
    """The elements of a tensor that was described, or -1 if it is not as expected: dense, on `device`, dtype, shape."""
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


@jit()
def locate(function, tensors, kinds, none, expected, excluded, words, addresses, states, device):
    """Find out where tensors lie; whether all are ordinary.

    Parameters
    ----------
    function : int
        From `exchange_function`.
    tensors : int
        Address of the items of a tuple of tensors, which the caller holds, or of an array of their addresses, 0 for
        one that is absent.
    kinds : ndarray of int64, shape (m,)
        The types (their ``id``) that the function is for, without subclasses.
    none : int
        ``id(None)``, which stands for a tensor that is absent, as 0 does.
    expected : ndarray of int64, shape (k, 2 + most dimensions)
        For each tensor `kind_of` its dtype, its number of dimensions, and its shape.
    excluded : ndarray of int64, shape (m, 2)
        Pieces of memory [low, high) of which an ordinary tensor has no byte.
    words : ndarray of int64, shape (`WORDS`,)
        Room to work.
    addresses : ndarray of int64, shape (k,)
        Written: where the elements begin; 0 unless the tensor is ordinary.
    states : ndarray of int64, shape (k,)
        Written: `ORDINARY` for a dense tensor on the device of that dtype and shape, `ABSENT`, or `UNUSUAL`.
    device : int
        `CPU`, or `CUDA` and the number of the device, times 2**32.
    """
    ordinary = True
    for k in range(addresses.size):
        tensor = int64_at(tensors + 8 * k)
        state = UNUSUAL
        addresses[k] = 0
        if tensor == none or tensor == 0:
            state = ABSENT
        else:
            kind = int64_at(tensor + 8)
            for i in range(kinds.size):
                if kind == kinds[i]:
                    size = _elements(words, expected, k, device) if _describe(function, tensor, words) else -1
                    if size >= 0:
                        state = ORDINARY
                        addresses[k] = words[0] + words[5]
                        # The dtype is in the upper half of its word: code, bits, lanes.
                        end = addresses[k] + size * (expected[k, 0] >> 8 & 0xFF) // 8
                        for j in range(excluded.shape[0]):
                            if addresses[k] < excluded[j, 1] and end > excluded[j, 0]:
                                state = UNUSUAL
                        if state == UNUSUAL:
                            addresses[k] = 0
                    break
        states[k] = state
        ordinary = ordinary and state == ORDINARY
    return ordinary
