"""Conversion of one object to an array of numbers, and the casts that a buffer allows."""

import numpy as np

from fastrms._types import Array, DType
from fastrms.buffers.pytree import describe
from fastrms.errors import DtypeError

__all__ = ["as_array", "can_store", "castable_to"]

# The value of `numpy.dtype.isbuiltin` for a dtype that another package has added, such as the bfloat16 of ml_dtypes.
_REGISTERED = 2


def as_array(item: object, name: str, target: DType | None = None) -> Array:
    """Return `item` as an array of NumPy's bool, integer, float or complex kinds, or raise DtypeError.

    An ordinary array comes back as it is. Numbers of a dtype that another package has added are cast to `target`, and
    refused if `target` is None.
    """
    if isinstance(item, np.ma.MaskedArray):
        raise DtypeError(f"{name}: expected an array, got a masked array; use .filled(value), the mask would be lost")
    if isinstance(item, np.matrix):
        raise DtypeError(f"{name}: expected an array, got a np.matrix; use np.asarray(...), for which * is elementwise")
    try:
        if not (hasattr(item, "__array__") or isinstance(item, int | float | complex | list | tuple)):
            raise DtypeError(f"{name}: expected an array, got {describe(item)}")
        array = np.asarray(item)
    except DtypeError:
        raise
    except Exception as error:  # an error in a method of `item`, of any kind
        raise DtypeError(f"{name}: expected an array, got {describe(item)}: {error}") from None
    if array.dtype.isbuiltin == _REGISTERED:
        if target is None:
            raise DtypeError(
                f"{name}: expected an array of a dtype of NumPy's own, got {array.dtype}; convert it with "
                ".astype(np.float32)"
            )
        if can_store(array.dtype, target):
            with np.errstate(all="ignore"):
                return array.astype(target)
    elif array.dtype.kind not in "biufc":
        raise DtypeError(f"{name}: expected an array of numbers, got dtype {array.dtype}")
    return array


def can_store(source: DType, target: DType) -> bool:
    """Tell whether numbers of dtype `source` may be written to a buffer of dtype `target`."""
    # A mask among gradients is a slip, so bool goes only into bool.
    return (source.kind != "b" or target.kind == "b") and np.can_cast(source, target, casting="same_kind")


def castable_to(dtype: DType) -> str:
    """Name the dtypes that can be written to a buffer of this dtype, for an error message."""
    kinds = {"b": "bool", "i": "an integer dtype", "u": "an unsigned integer dtype", "c": "a numeric dtype"}
    return f"a dtype that can be cast to {dtype} ({kinds.get(dtype.kind, 'a float or integer dtype')})"
