"""Gradients that are handed over one by one, and the reductions that begin as soon as all of a piece are there."""

from collections.abc import Sequence

import numpy as np

from fastrms.buffers import FlatBuffer
from fastrms.mpi.communicator import Bounds, Piece, Ranks

__all__ = ["Handover"]

# Elements in a reduction of its own: of 1e7 float32 on 2 ranks, 2**16 at a time took 55 ms, 2**18 21, 2**20 15, all
# at once 8.
BUCKET = 1 << 20


class Handover:
    """Which gradients of a step are there, and which reductions have begun.

    A bucket is a range of one segment of the gradient buffer. All ranks begin buckets in one order, whatever the order
    of their gradients: from the last gradient of the buffer to the first, as back-propagation finds them.

    Parameters
    ----------
    ranks : Ranks
    whole, own : FlatBuffer
        The gradients of this rank, and its part of the sum.
    bounds : sequence of ndarray of int
        Where the parts of each segment begin.

    Attributes
    ----------
    given, present : list of bool
        For each leaf, whether it was handed over, and whether as an array, not as None.
    begun : bool
        Whether anything was handed over since the last step.
    """

    def __init__(self, ranks: Ranks, whole: FlatBuffer, own: FlatBuffer, bounds: Sequence[Bounds]) -> None:
        self._ranks, self._whole, self._own = ranks, whole, own
        layout = whole.layout
        self._leaves = len(layout.leaves)
        buckets = []
        for number, segment in enumerate(layout.segments if ranks.size > 1 else ()):
            inside = [k for k, leaf in enumerate(layout.leaves) if leaf.segment == number and leaf.stop > leaf.start]
            starts = [layout.leaves[k].start for k in inside]
            for start in range(0, segment.size, BUCKET):
                stop = min(start + BUCKET, segment.size)
                first, last = np.searchsorted(starts, [start + 1, stop]) - [1, 0]
                buckets.append((inside[first], start, number, stop, inside[first:last]))
        buckets.sort(reverse=True)
        self._buckets = [
            (number, Piece(bounds[number], ranks.rank, start, stop)) for _, start, number, stop, _ in buckets
        ]
        self._missing_at_first = [len(leaves) for *_, leaves in buckets]
        self._buckets_of: list[list[int]] = [[] for _ in layout.leaves]
        for b, (*_, leaves) in enumerate(buckets):
            for k in leaves:
                self._buckets_of[k].append(b)
        self.reset()

    def reset(self) -> None:
        """Begin with a new step."""
        self.given = [False] * self._leaves
        self.present = [False] * self._leaves
        self.begun = False
        self._missing = list(self._missing_at_first)
        self._next = 0

    def give(self, k: int, present: bool) -> None:
        """Take note of a gradient, which is in the buffer, and begin what is complete with it."""
        self.begun = self.given[k] = True
        self.present[k] = present
        for b in self._buckets_of[k]:
            self._missing[b] -= 1
        self._ranks.progress()
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._start_next()

    def finish(self) -> None:
        """Begin what has not, wait for all, and be ready for a new step; all ranks do so at the same time."""
        while self._next < len(self._buckets):
            self._start_next()
        self._ranks.wait()
        self.reset()

    def _start_next(self) -> None:
        number, piece = self._buckets[self._next]
        self._ranks.start_reduce(self._whole.segments[number], self._own.segments[number], piece)
        self._next += 1
