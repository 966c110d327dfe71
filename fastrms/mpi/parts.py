"""Buffers with parts of other buffers, and the flat copy of parameters that are updated in place."""

from collections.abc import Sequence
from typing import Any

from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.flat import views_of
from fastrms.buffers.held import HeldArrays

__all__ = ["BufferPart", "Exchanged"]


class BufferPart(FlatBuffer):
    """A buffer with parts of the segments of another buffer."""

    def __init__(self, whole: FlatBuffer, layout: Layout, segments: Sequence[Array]) -> None:
        self._whole = whole
        self.layout, self.segments = layout, tuple(segments)
        self.leaves = tuple(views_of(self.segments, layout))
        self.views = layout.structure(self.leaves)

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Tell for each array whether it may share memory with the other buffer."""
        return self._whole.aliases(arrays)


class Exchanged:
    """All parameters in flat segments, which ranks exchange. `shard` has the part of each segment of this rank.

    The segments are those of `params`. If parameters are updated in place, the segments are copies, with the layout of
    `grads`. Then a step reads this rank's shard from the arrays of the program, and writes all parameters there.
    """

    def __init__(self, params: FlatBuffer, grads: FlatBuffer, shard: Sequence[slice]) -> None:
        self.buffer = params
        # Pairs of a vector in the segments and a vector of an array of the program: of the shard, and of all arrays.
        self._own: list[tuple[Array, Array]] = []
        self._all: list[tuple[Array, Array]] = []
        if not isinstance(params, HeldArrays):
            return
        self.buffer = grads.like()
        for leaf, array in zip(self.buffer.layout.leaves, params.original_views(), strict=True):
            vector, segment, part = array.reshape(-1), self.buffer.segments[leaf.segment], shard[leaf.segment]
            self._all.append((segment[leaf.start : leaf.stop], vector))
            start, stop = max(leaf.start, part.start), min(leaf.stop, part.stop)
            if start < stop:
                self._own.append((segment[start:stop], vector[start - leaf.start : stop - leaf.start]))

    def read_shard(self) -> None:
        """Copy this rank's shard from the arrays of the program. Without such arrays, do nothing."""
        for copy, array in self._own:
            copy[...] = array

    def read(self) -> None:
        """Copy all parameters from the arrays of the program. Without such arrays, do nothing."""
        for copy, array in self._all:
            copy[...] = array

    def write(self) -> None:
        """Copy all parameters to the arrays of the program. Without such arrays, do nothing."""
        for copy, array in self._all:
            array[...] = copy
