"""Ordinary memory for the buffers of an optimizer."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import starmap
from operator import call
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.kernels.norms import SpanNorms

if TYPE_CHECKING:
    from fastrms.backends.base import RunCalls

__all__ = ["Ram"]

_call = cast("Callable[..., None]", call)  # kernels return None


class Ram:
    """A `Memory` of ordinary arrays."""

    in_parts = False

    def __init__(self) -> None:
        # Not a Python function, since each step calls it.
        self.run: RunCalls = partial(starmap, _call)

    def new_buffer(self, name: str, layout: Layout) -> FlatBuffer:
        """Return a buffer of zeros with this layout."""
        return FlatBuffer.from_layout(layout)

    def norms(self, spans: NDArray[np.int64]) -> SpanNorms:
        """Return an object that computes the norm of each span of the gradient buffer."""
        return SpanNorms(spans)

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over one slice of the whole array."""
        yield slice(None)
