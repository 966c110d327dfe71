"""The memory of an optimizer whose buffers are ordinary arrays."""

from collections.abc import Iterator
from functools import partial
from itertools import starmap
from operator import call

import numpy as np
from numpy.typing import NDArray

from fastrms.backends.base import RunCalls
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.kernels.norms import SpanNorms

__all__ = ["Ram"]


class Ram:
    """A `Memory` of ordinary arrays."""

    in_parts = False

    # Not a Python function, since each step calls it.
    run: RunCalls = staticmethod(partial(starmap, call))

    def new_buffer(self, name: str, layout: Layout) -> FlatBuffer:
        """Return a buffer of zeros with this layout."""
        return FlatBuffer.from_layout(layout)

    def norms(self, spans: NDArray[np.int64]) -> SpanNorms:
        """Return an object that computes the norm of each span of the gradient buffer."""
        return SpanNorms(spans)

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over one slice of the whole array."""
        yield slice(None)
