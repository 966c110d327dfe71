"""Private communicators: each communicator of the user has a pool of them, with one pair for each living optimizer."""

import os
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

__all__ = ["Channel", "Pool", "pool_of"]

_KEYVAL = MPI.Comm.Create_keyval()


@dataclass
class Channel:
    """Two duplicates of a user's communicator, so that messages of the library and of the user never meet."""

    control: MPI.Intracomm  # for calls that all ranks make in the same order
    # For reductions of gradient buckets. A bucket may start before all ranks have joined the step, so these calls have
    # no fixed order with the calls on `control`.
    buckets: MPI.Intracomm
    requests: list[MPI.Request] = field(default_factory=list)  # reductions of buckets in flight
    taken: bool = True  # whether an optimizer of this rank uses the channel

    def release(self) -> None:
        """Offer the channel to the next optimizer. With a reduction in flight it is never used again."""
        self.taken = bool(self.requests)


class Pool:
    """The channels of one communicator of the user. They are used again: MPI has only some thousand communicators."""

    def __init__(self) -> None:
        self.channels: list[Channel] = []  # in the same order on all ranks
        self.threads = 0  # as `_threads` returns, after the first `take`

    def take(self, comm: MPI.Intracomm, taken: NDArray[np.bool_]) -> Channel:
        """Return the first channel that is free on all ranks, or a new one. All ranks call it at the same time.

        `taken` tells for each channel whether any rank uses it. Ranks may collect an optimizer at different times.
        """
        if not self.threads:
            self.threads = _threads(comm)
        if taken.all():
            self.channels.append(Channel(comm.Dup(), comm.Dup()))
            return self.channels[-1]
        channel = self.channels[int(np.argmin(taken))]
        channel.taken = True
        return channel


def pool_of(comm: MPI.Intracomm) -> Pool:
    """Return the pool of a communicator. The first call makes it."""
    pool = comm.Get_attr(_KEYVAL)
    if not isinstance(pool, Pool):
        pool = Pool()
        comm.Set_attr(_KEYVAL, pool)
    return pool


def _threads(comm: MPI.Intracomm) -> int:
    """Count the cores of this process. Divide each core by the number of ranks that may use it."""
    try:
        cores = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        cores = set(range(os.cpu_count() or 1))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores_of_ranks = node.allgather(cores)
    node.Free()
    return max(1, int(sum(1 / sum(core in others for others in cores_of_ranks) for core in cores)))
