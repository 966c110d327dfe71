"""The collective calls of an optimizer's ranks: they meet, agree, and exchange parts of arrays."""

import pickle
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from fastrms.errors import OptionTypeError, RankError
from fastrms.mpi.channels import pool_of
from fastrms.mpi.ending import end_all, is_interactive
from fastrms.mpi.waiting import free, named, wait

__all__ = ["Bounds", "Communicator"]

Array = NDArray[np.generic]
# The start of the shard of each rank in an array, and the end of the last: shape (ranks + 1,).
Bounds = NDArray[np.int64]

# Shards begin on a cache line of 64 bytes, for float32 and float64.
_MULTIPLE = 16

# The most elements in one call of MPI. Before MPI 4 counts are C integers, some algorithms count bytes, and a reduction
# allocates as much memory again. Longer arrays go in blocks, through a copy: in blocks of 2**22 elements, 6e7 float32
# took as long on 2 ranks as in one call.
MAX_ELEMENTS = 2**28 - 1
BLOCK_SIZE = 1 << 22

# The calls that make an optimizer.
_CONSTRUCTORS = ("ShardedRMSProp", "ShardedRMSProp.from_checkpoint")


class Communicator:
    """The ranks that share an optimizer. All of them make this object at the same time.

    `call` is the call of the user that makes it, one of `_CONSTRUCTORS`. A rank waits `timeout` seconds for the others
    to make the same call; inf for no limit. Raise OptionTypeError if `comm` is no intracommunicator, and RankError if
    the ranks make different calls, or some make none in time.
    """

    def __init__(self, comm: MPI.Intracomm | None, call: str, timeout: float) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise OptionTypeError(f"comm: expected an intracommunicator of mpi4py, or None, got {comm!r}")
        self.rank, self.size = comm.rank, comm.size
        self.timeout = timeout
        self._raised_by_all: BaseException | None = None
        self._lost: str | None = None  # the error with which this rank left a call, in an interactive session
        self._freeing: weakref.finalize[Any, Any] | None = None  # frees the request of `meet`
        pool = pool_of(comm)
        number = _CONSTRUCTORS.index(call)
        taken = [channel.taken for channel in pool.channels]
        message = np.array([number, -number, *taken], np.float64)
        with self.leaving():
            wait(comm, comm.Iallreduce(MPI.IN_PLACE, message, MPI.MAX), f"{call}()", timeout)
            if message[0] != -message[1]:  # the largest number is not the smallest
                raise self.all_raise(RankError(_different_calls(comm.allgather(call))))
            self.channel = pool.take(comm, message[2:] > 0)
        self.control = self.channel.control
        self.threads = pool.threads
        weakref.finalize(self, self.channel.release)

    def bounds(self, size: int) -> Bounds:
        """Return the start of each shard of an array of `size` elements, and the end of the last. Some are empty."""
        share = -(-size // (self.size * _MULTIPLE)) * _MULTIPLE
        return np.minimum(np.arange(self.size + 1, dtype=np.int64) * share, size)

    # Meet, and end together.

    def prepare_meet(self, length: int) -> NDArray[np.float64]:
        """Return the message that `meet` exchanges from now on, an array of this length. All ranks call it together.

        The length is the same on all ranks and for all calls. So ranks in different calls can compare their messages.
        """
        if self._freeing is not None:
            self._freeing()
            self._freeing = None
        self._message = np.zeros(length)
        self._meeting: MPI.Prequest | None = None
        if self.size == 1:
            return self._message
        # A persistent request. With Open MPI, a step of 2 ranks with 1,000 parameters takes 31 us, and 4 us more
        # without it.
        with suppress(NotImplementedError):  # before MPI 4
            self._meeting = self.control.Allreduce_init(MPI.IN_PLACE, self._message, MPI.MAX)
            self._freeing = weakref.finalize(self, free, self._meeting)
        return self._message

    def meet(self, call: str, steps: int) -> None:
        """Wait until all ranks are in a call, and replace each number of the message by its maximum over the ranks.

        Each call begins with this exchange. It is as fast as a blocking all-reduce, and has a time limit: `RankError`
        if other ranks did not join. `call` and the `steps` taken are for that error.
        """
        if self.size == 1:
            return
        if self._lost is not None:
            raise RankError(f"this optimizer lost the other ranks ({self._lost}); make a new one on all ranks")
        request: MPI.Request
        if self._meeting is None:
            request = self.control.Iallreduce(MPI.IN_PLACE, self._message, MPI.MAX)
        else:
            request = self._meeting
            self._meeting.Start()
        if not request.Test():
            wait(self.control, request, f"{call}() (steps taken: {steps})", self.timeout)

    def leave(self, error: BaseException) -> None:
        """End all ranks if this rank alone leaves a call with an error. The others would wait for it.

        Call it once with each error after the first exchange of a call. An interactive session goes on, and later calls
        of the optimizer raise.
        """
        raised_by_all, self._raised_by_all = self._raised_by_all, None
        if self.size == 1 or error is raised_by_all:
            return
        self._lost = f"{type(error).__name__}: {error}"
        if self._freeing is not None:
            self._freeing.detach()  # after Ctrl-C the request may be active, and cannot be freed
        if not is_interactive():
            stack = [*traceback.format_stack()[:-1], *traceback.format_exception(error, chain=False)[1:]]
            end_all(
                f"Traceback (most recent call last):\n{''.join(stack)}fastrms: rank {self.rank} of {self.size} ends in "
                "the middle of a call and also ends the other ranks, which would wait for it (MPI_Abort)\n"
            )

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Call `leave` with an error of the block, and raise it again."""
        try:
            yield
        except BaseException as error:
            self.leave(error)
            raise

    # Raise on all ranks or on none.

    def all_raise(self, error: BaseException) -> BaseException:
        """Return an error that all ranks raise. `leave` does not end the ranks for it."""
        self._raised_by_all = error
        return error

    def refuse_different(self, call: str) -> NoReturn:
        """Raise RankError on all ranks, because they are in different calls."""
        raise self.all_raise(RankError(_different_calls(self.control.allgather(call))))

    def agree(self, error: Exception | None, fact: str = "") -> list[str]:
        """Return the facts of all ranks if none has an error, or raise on all: the own error, or RankError."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        told: list[tuple[str | None, str]] = self.control.allgather((text, fact))
        if error is not None:
            raise self.all_raise(error)
        for rank, (theirs, _) in enumerate(told):
            if theirs is not None:
                raise self.all_raise(RankError(f"rank {rank} of {self.size} cannot continue: {theirs}"))
        return [fact for _, fact in told]

    def broadcast_error(self, error: BaseException | None) -> None:
        """Raise the error of rank 0 on all ranks, if it has one."""
        found: BaseException | None = self.control.bcast(None if error is None else _picklable(error))
        if found is not None:
            raise self.all_raise(error if error is not None else found)

    # Exchange arrays.

    def allreduce_max(self, array: Array) -> None:
        """Replace each number by its maximum over the ranks, in place."""
        self.control.Allreduce(MPI.IN_PLACE, array, MPI.MAX)

    def allreduce_sum(self, array: Array) -> None:
        """Replace each integer by its sum over the ranks, in place."""
        self.control.Allreduce(MPI.IN_PLACE, array, MPI.SUM)

    def broadcast(self, array: Array) -> None:
        """Copy an array of rank 0 to all others, in place."""
        for start, stop in _blocks(0, array.size):
            self.control.Bcast(array[start:stop])

    def reduce_scatter(self, whole: Array, own: Array, bounds: Bounds) -> None:
        """Sum an array over the ranks. Each rank gets its shard of the sum in `own`."""
        if whole.size <= MAX_ELEMENTS:
            self.control.Reduce_scatter(whole, own, np.diff(bounds).tolist(), MPI.SUM)
            return
        for first, cuts, counts in self._even_blocks(bounds):
            block = np.concatenate([whole[start:stop] for start, stop in cuts])
            self.control.Reduce_scatter(block, own[first : first + counts[self.rank]], counts, MPI.SUM)

    def all_gather(self, whole: Array, bounds: Bounds) -> None:
        """Copy all shards of an array to all ranks, in place."""
        if whole.size <= MAX_ELEMENTS:
            self.control.Allgatherv(MPI.IN_PLACE, [whole, (np.diff(bounds), bounds[:-1])])
            return
        for _, cuts, counts in self._even_blocks(bounds):
            block = np.empty(sum(counts), whole.dtype)
            self.control.Allgatherv(whole[slice(*cuts[self.rank])], [block, counts])
            for (start, stop), end in zip(cuts, np.cumsum(counts).tolist(), strict=True):
                whole[start:stop] = block[end - (stop - start) : end]

    def _even_blocks(self, bounds: Bounds) -> Iterator[tuple[int, list[tuple[int, int]], list[int]]]:
        """Yield blocks with equally many elements of each shard, so that all ranks send and receive in each block.

        Yield the start of the block in each shard; then, for each shard, start and end of its elements in the whole
        array, and their number.
        """
        step = max(1, BLOCK_SIZE // self.size)
        for first in range(0, int(bounds[1]), step):
            starts, stops = (np.minimum(bounds[:-1] + first + more, bounds[1:]) for more in (0, step))
            yield first, list(zip(starts.tolist(), stops.tolist(), strict=True)), (stops - starts).tolist()

    def gather(self, own: Array, whole: Array | None, bounds: Bounds) -> None:
        """Copy all shards to `whole` on rank 0. It is None on other ranks."""
        for rank in range(self.size):
            for start, stop in _blocks(*bounds[rank : rank + 2].tolist()):
                part = own[start - bounds[rank] : stop - bounds[rank]]
                if whole is not None and rank == 0:
                    whole[start:stop] = part
                elif whole is not None:
                    self.control.Recv(whole[start:stop], source=rank)
                elif rank == self.rank:
                    self.control.Send(part, dest=0)

    def scatter(self, whole: Array | None, own: Array, bounds: Bounds) -> None:
        """Copy its shard to each rank from `whole` on rank 0. It is None on other ranks."""
        for rank in range(self.size):
            for start, stop in _blocks(*bounds[rank : rank + 2].tolist()):
                part = own[start - bounds[rank] : stop - bounds[rank]] if rank == self.rank else own[:0]
                if whole is not None and rank == 0:
                    part[...] = whole[start:stop]
                elif whole is not None:
                    self.control.Send(whole[start:stop], dest=rank)
                elif rank == self.rank:
                    self.control.Recv(part, source=0)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, BLOCK_SIZE):
        yield first, min(first + BLOCK_SIZE, stop)


def _picklable(error: BaseException) -> BaseException:
    """Return the error, or a RankError with its message if it cannot be pickled and loaded."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"rank 0 cannot continue: {type(error).__name__}: {error}")
    return error


def _different_calls(calls: list[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks.setdefault(call, []).append(rank)
    told = ", ".join(f"{call}() on {named(numbers)}" for call, numbers in ranks.items())
    return f"expected the same call on all ranks, got {told}; nothing was changed"
