"""Conversion of one object to an array of numbers, and the casts that a buffer allows."""

from typing import Any

import numpy as np

from fastrms._types import Array, DType
from fastrms.buffers import bfloat16
from fastrms.buffers.pytree import describe
from fastrms.errors import DtypeError

__all__ = ["as_array", "can_store", "castable_to"]

# The value of `numpy.dtype.isbuiltin` for a dtype that another package has added, such as the bfloat16 of ml_dtypes.
_REGISTERED = 2

# DLPack's device types. The CPU can read its own memory, pinned memory of CUDA and ROCm, and managed memory of CUDA.
_ON_HOST = (1, 3, 11, 13)
_DEVICES = {2: "cuda", 8: "metal", 10: "rocm", 14: "oneapi"}


def as_array(item: Any, name: str, target: DType | None = None) -> Array:
    """Return `item` as an array of NumPy's bool, integer, float or complex kinds, or raise DtypeError.

    An ordinary array is returned as it is. For an array of another library on the CPU, a view of its memory is
    returned: from ``__array__`` if there is such a method, otherwise from DLPack. Numbers of bfloat16, or of a dtype
    that another package has added to NumPy, are cast to `target`. They are refused if `target` is None.
    """
    if isinstance(item, np.ma.MaskedArray):
        raise DtypeError(
            f"{name}: expected an array, got a masked array; use .filled(value), because the mask would be lost"
        )
    if isinstance(item, np.matrix):
        raise DtypeError(f"{name}: expected an array, got a np.matrix; use np.asarray(...), for which * is elementwise")
    try:
        if getattr(item, "is_neg", bool)():  # a view of PyTorch, with the opposite sign in memory
            item = item.resolve_neg()
        if hasattr(item, "__array__") or isinstance(item, int | float | complex | list | tuple):
            array = np.asarray(item)
        elif hasattr(item, "__dlpack__"):
            array = np.from_dlpack(item)
        else:
            raise DtypeError(f"{name}: expected an array, got {describe(item)}")
    except DtypeError:
        raise
    except Exception as error:  # a method of `item` may raise any error
        if (bits := bfloat16.bits_of(item)) is None:
            host, place = "", ""
            if (device := _device_of(item)) is not None:
                host, place = " on the host", f" on {device}; copy it to the host"
            raise DtypeError(f"{name}: expected an array{host}, got {describe(item)}{place}: {error}") from None
        if target is None:
            raise DtypeError(
                f"{name}: expected an array with a NumPy dtype, got bfloat16; convert it to float32"
            ) from None
        array = bfloat16.from_bfloat16(bits)
    if array.dtype.isbuiltin == _REGISTERED:
        if target is None:
            raise DtypeError(
                f"{name}: expected an array with a NumPy dtype, got {array.dtype}; convert it with .astype(np.float32)"
            )
        if can_store(array.dtype, target):
            with np.errstate(all="ignore"):
                return array.astype(target)
    elif array.dtype.kind not in "biufc":
        raise DtypeError(f"{name}: expected an array of numbers, got dtype {array.dtype}")
    return array


def _device_of(item: Any) -> str | None:
    """Return the name that DLPack gives the device of an array, such as "cuda:0"; None if it is on the host."""
    try:
        kind, number = map(int, item.__dlpack_device__())
    except Exception:  # a method of `item` may raise any error, or be missing
        return None
    return None if kind in _ON_HOST else f"{_DEVICES.get(kind, f'device type {kind}')}:{number}"


def can_store(source: DType, target: DType) -> bool:
    """Tell whether numbers of dtype `source` may be written to a buffer of dtype `target`."""
    # A mask among gradients is a mistake, so bool goes only into bool.
    return (source.kind != "b" or target.kind == "b") and np.can_cast(source, target, casting="same_kind")


def castable_to(dtype: DType) -> str:
    """Name the dtypes that can be written to a buffer of this dtype, for an error message."""
    kinds = {"b": "bool", "i": "an integer dtype", "u": "an unsigned integer dtype", "c": "a numeric dtype"}
    return f"a dtype that can be cast to {dtype} ({kinds.get(dtype.kind, 'a float or integer dtype')})"
