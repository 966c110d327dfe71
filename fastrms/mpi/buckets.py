"""Gradient buckets: parts of the gradient buffer, each reduced as soon as all of its gradients are ready."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from fastrms.buffers import FlatBuffer, Layout
from fastrms.mpi.communicator import Bounds, Communicator

__all__ = ["GradientBuckets"]

# Elements of a bucket. 1e7 float32 on 2 ranks take 55 ms in buckets of 2**16, 21 ms in 2**18, 15 ms in 2**20, and 8 ms
# in one reduction of all.
BUCKET_SIZE = 1 << 20

# Up to this number of ranks, each bucket is reduced by a reduce-scatter, also a bucket in the shard of a single rank.
FEW_RANKS = 4


class GradientBuckets:
    """The buckets of an optimizer: which gradients of a step are ready, and which reductions have started.

    Buckets start in the same order on all ranks, from the end of the buffer to its beginning, as back-propagation finds
    gradients. `grads` has the gradients of this rank, and `sums` this rank's shard of their sum over ranks.
    """

    def __init__(self, comm: Communicator, grads: FlatBuffer, sums: FlatBuffer, bounds: Sequence[Bounds]) -> None:
        self._channel, self._grads, self._sums = comm.channel, grads, sums
        self._buckets = list(_buckets(grads.layout, bounds, comm.rank)) if comm.size > 1 else []
        self._buckets.sort(key=lambda bucket: (bucket.leaves[0], bucket.whole.start), reverse=True)
        self._buckets_of: list[list[int]] = [[] for _ in grads.layout.leaves]
        for number, bucket in enumerate(self._buckets):
            for k in bucket.leaves:
                self._buckets_of[k].append(number)
        self.reset()

    def reset(self) -> None:
        """Begin a new step. No gradient is ready."""
        self.ready = [False] * len(self._buckets_of)  # whether the gradient of each parameter was handed over
        self.present = [False] * len(self._buckets_of)  # whether it was an array, not None
        self.begun = False  # whether any gradient was handed over
        self._missing = [len(bucket.leaves) for bucket in self._buckets]
        self._next = 0

    def mark_ready(self, k: int, present: bool) -> None:
        """Note that the gradient of parameter `k` is in the buffer, and start the buckets that are now complete."""
        self.begun = self.ready[k] = True
        self.present[k] = present
        for number in self._buckets_of[k]:
            self._missing[number] -= 1
        # Most MPIs work on a reduction in flight only while they are called.
        MPI.Request.Testall(self._channel.requests)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._start_next()

    def finish(self) -> None:
        """Start the remaining buckets, wait for all, and begin a new step. All ranks call it at the same time."""
        while self._next < len(self._buckets):
            self._start_next()
        MPI.Request.Waitall(self._channel.requests)
        self._channel.requests.clear()
        self.reset()

    def _start_next(self) -> None:
        """Start the reduction of the next bucket."""
        bucket = self._buckets[self._next]
        comm = self._channel.buckets
        whole = self._grads.segments[bucket.segment][bucket.whole]
        own = self._sums.segments[bucket.segment][bucket.own]
        if bucket.root is None:
            request = comm.Ireduce_scatter(whole, own, bucket.counts, MPI.SUM)
        else:
            request = comm.Ireduce(whole, own if bucket.root == comm.rank else None, MPI.SUM, root=bucket.root)
        self._channel.requests.append(request)
        self._next += 1


@dataclass(frozen=True)
class _Bucket:
    """A range of one segment of the gradient buffer. One call reduces it."""

    segment: int
    leaves: list[int]  # the numbers of the parameters with elements in the bucket, in ascending order
    whole: slice  # the elements in the segment
    own: slice  # the elements in this rank's shard of the segment
    counts: list[int]  # the number of elements in the shard of each rank
    root: int | None  # the rank that gets all elements by a reduce, or None for a reduce-scatter


def _buckets(layout: Layout, bounds: Sequence[Bounds], rank: int) -> Iterator[_Bucket]:
    """Yield the buckets of all segments."""
    for number, segment in enumerate(layout.segments):
        leaves = [k for k, leaf in enumerate(layout.leaves) if leaf.segment == number and leaf.stop > leaf.start]
        starts = [layout.leaves[k].start for k in leaves]
        for start in range(0, segment.size, BUCKET_SIZE):
            stop = min(start + BUCKET_SIZE, segment.size)
            inside = leaves[bisect_right(starts, start) - 1 : bisect_left(starts, stop)]
            lows, highs = np.clip(bounds[number][:-1], start, stop), np.clip(bounds[number][1:], start, stop)
            counts = (highs - lows).tolist()
            first = int(lows[rank] - bounds[number][rank]) if counts[rank] else 0
            # MPICH is fastest at a reduce-scatter: 1e7 float32 on 2 ranks take 15 ms, and 40 ms as reductions to one
            # rank each. But if the bucket is in one shard, all ranks would send to its rank. A reduction to one rank
            # divides this work among all ranks.
            one_rank = max(counts) == stop - start and len(counts) > FEW_RANKS
            root = counts.index(stop - start) if one_rank else None
            yield _Bucket(number, inside, slice(start, stop), slice(first, first + counts[rank]), counts, root)
