"""Numbers of bfloat16, for which NumPy has no dtype: as bits in uint16, as float32, and in the dtype of ml_dtypes."""

import ctypes
import functools
import importlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastrms._types import DType

__all__ = ["bits_of", "from_bfloat16", "ml_dtype", "to_bfloat16"]


def to_bfloat16(array: ArrayLike) -> NDArray[np.uint16]:
    """Round numbers to float32, then to bfloat16 (to nearest, ties to even), and return the bits as uint16.

    The bits of a number are the upper half of the bits of its rounded float32; those of NaN are 0x7FC0.
    """
    array = np.asarray(array, np.float32, order="C")
    bits = array.view(np.uint32)
    lower, upper = bits & 0xFFFF, bits >> 16
    up = (lower > 0x8000) | ((lower == 0x8000) & (upper & 1 == 1))
    return np.where(np.isnan(array), 0x7FC0, upper + up).astype(np.uint16)


def from_bfloat16(bits: ArrayLike) -> NDArray[np.float32]:
    """Convert bfloat16 numbers, such as those of `RMSProp.cache` with 16-bit state, exactly to float32.

    Parameters
    ----------
    bits : ndarray of uint16, or of ml_dtypes' bfloat16
        The numbers. With dtype uint16, each element is the upper half of a float32 number.

    Returns
    -------
    array : ndarray of float32
        A new array of the same shape.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import from_bfloat16
    >>> from_bfloat16(np.array([0x3F80, 0xC000], np.uint16))
    array([ 1., -2.], dtype=float32)
    """
    array = np.asarray(bits)
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    return (array.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def ml_dtype() -> DType | None:
    """Return the dtype bfloat16 of ml_dtypes, or None if ml_dtypes cannot be imported."""
    try:
        dtype: DType = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except Exception:  # an ImportError, or any error of a build for another version of NumPy
        return None
    return dtype


class _Tensor(ctypes.Structure):
    """The struct DLTensor of DLPack: the first member of the struct DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_number", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


_CPU, _BFLOAT = 1, 4  # kDLCPU, kDLBfloat
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Elements:
    """The memory of a bfloat16 tensor, as an object that NumPy reads as uint16. `capsule` owns the tensor."""

    def __init__(self, capsule: object, tensor: _Tensor) -> None:
        self._capsule = capsule
        strides = [2 * tensor.strides[d] for d in range(tensor.ndim)] if tensor.strides else None
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.uint16).str,
            "shape": tuple(tensor.shape[d] for d in range(tensor.ndim)),
            "strides": None if strides is None else tuple(strides),
            "data": ((tensor.data or 0) + tensor.byte_offset, True),  # True: read-only
        }


def bits_of(item: Any) -> NDArray[np.uint16] | None:
    """Return a read-only view of a bfloat16 tensor on the CPU as uint16; None for anything else.

    The tensor is an object of another library that supports DLPack. The view keeps its memory alive.
    """
    try:
        capsule = item.__dlpack__()
        tensor = _Tensor.from_address(_pointer_of(capsule, b"dltensor"))
    except Exception:  # a method of `item` may raise any error
        return None
    if (tensor.device_type, tensor.code, tensor.bits, tensor.lanes) != (_CPU, _BFLOAT, 16, 1):
        return None
    return np.asarray(_Elements(capsule, tensor))
