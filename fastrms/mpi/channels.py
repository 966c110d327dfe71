"""Private communicators: each communicator of the user's has a pool of them, one for each optimizer that is alive."""

import os
from dataclasses import dataclass, field

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

__all__ = ["Channel", "Pool", "pool_of"]

_KEYVAL = MPI.Comm.Create_keyval()


@dataclass
class Channel:
    """Two duplicates of a user's communicator, so that messages of the library and of the user never meet.

    Attributes
    ----------
    control : mpi4py.MPI.Intracomm
        For calls that all ranks make in the same order.
    buckets : mpi4py.MPI.Intracomm
        For reductions of gradient buckets. A bucket may start before all ranks have joined the step, and so in no
        fixed order with the calls on `control`.
    requests : list of mpi4py.MPI.Request
        Reductions of buckets that are in flight.
    taken : bool
        Whether an optimizer of this rank uses the channel.
    """

    control: MPI.Intracomm
    buckets: MPI.Intracomm
    requests: list[MPI.Request] = field(default_factory=list)
    taken: bool = True

    def release(self) -> None:
        """Offer the channel to the next optimizer, unless a reduction is in flight: then it is never used again."""
        self.taken = bool(self.requests)


class Pool:
    """The channels of one communicator of the user's, which are used again: MPI has only some thousand communicators.

    Attributes
    ----------
    channels : list of Channel
        All channels, in the same order on all ranks.
    threads : int
        The cores that this process may use, each divided by the number of ranks that may use it; 0 before `take`.
    """

    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.threads = 0

    def take(self, comm: MPI.Intracomm, taken: NDArray[np.bool_]) -> Channel:
        """Return the first channel that is free on all ranks, or a new one. All ranks call it at the same time.

        Parameters
        ----------
        comm : mpi4py.MPI.Intracomm
            The communicator of this pool.
        taken : ndarray of bool, shape (channels,)
            For each channel, whether any rank uses it: optimizers may be collected at different times on the ranks.
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
    """Return the pool of a communicator, which the first call makes."""
    pool = comm.Get_attr(_KEYVAL)
    if not isinstance(pool, Pool):
        pool = Pool()
        comm.Set_attr(_KEYVAL, pool)
    return pool


def _threads(comm: MPI.Intracomm) -> int:
    """Count the cores that this process may use, each divided by the number of ranks that may use it."""
    try:
        cores = os.sched_getaffinity(0)
    except AttributeError:  # macOS, Windows
        cores = set(range(os.cpu_count() or 1))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores_of_ranks = node.allgather(cores)
    node.Free()
    return max(1, int(sum(1 / sum(core in others for others in cores_of_ranks) for core in cores)))
