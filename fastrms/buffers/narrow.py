"""Views of a buffer of 16-bit state, which has the dtype uint16, as arrays of ml_dtypes' bfloat16."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from fastrms.buffers import bfloat16
from fastrms.buffers.flat import FlatBuffer

__all__ = ["Narrow", "narrow_of", "views_of_state"]


class Narrow:
    """Views of the arrays of a uint16 buffer as bfloat16: `leaves` in order, and `views` in its structure."""

    def __init__(self, buffer: FlatBuffer[Any], dtype: Any) -> None:
        self.dtype = dtype
        self.leaves = tuple(leaf.view(dtype) for leaf in buffer.leaves)
        self.views: Any = buffer.layout.structure(self.leaves)


_BITS = np.dtype(np.uint16)

# Not an attribute of the buffer, because a copy of a buffer has other memory, and so has an unpickled buffer.
_made: "WeakKeyDictionary[FlatBuffer[Any], Narrow]" = WeakKeyDictionary()


def views_of_state(buffer: FlatBuffer[Any]) -> Any:
    """Return the views of a state buffer, the same objects at each call.

    Views of 16-bit state have the dtype bfloat16 of ml_dtypes if ml_dtypes can be imported, otherwise uint16.
    """
    if buffer.leaves[0].dtype is not _BITS:
        return buffer.views
    narrow = _made.get(buffer)
    if narrow is None:
        if (dtype := bfloat16.ml_dtype()) is None:
            return buffer.views
        narrow = _made.setdefault(buffer, Narrow(buffer, dtype))  # another thread may have been faster
    return narrow.views


def narrow_of(buffer: FlatBuffer[Any]) -> Narrow | None:
    """Return the bfloat16 arrays that `views_of_state` has made for a buffer, or None if it has made none."""
    return _made.get(buffer)
