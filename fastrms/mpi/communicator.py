"""What the ranks of an MPI program do together: meet, agree, divide arrays, exchange parts of them, end together."""

import math
import os
import pickle
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Real
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastrms.errors import OptionError, OptionTypeError, RankError

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError where there is no library of MPI to load
    _found = "mpi4py is not installed" if find_spec("mpi4py") is None else "mpi4py finds no MPI"
    raise ImportError(
        f'{_found} ({" ".join(str(error).split())}); install with: python -m pip install "fastrms[mpi]", or '
        '"fastrms[mpi-bundled]", which brings an MPI'
    ) from None

__all__ = ["MPI", "Bounds", "Piece", "Ranks", "check_timeout", "end_all", "end_together", "named"]

Array = NDArray[Any]
Bounds = NDArray[np.int64]  # shape (ranks + 1,)

# Parts begin on a cache line of 64 bytes, for float32 and float64.
_MULTIPLE = 16

# The most elements in one call of MPI: less than 2**31 bytes, as counts are C integers before MPI 4, some algorithms
# count bytes, and MPI takes as much memory again for a reduction. What is longer goes in blocks, through a copy: with
# 2**22 elements each, 6e7 float32 took as long on 2 ranks as in one call.
_MOST = 2**28 - 1
_BLOCK = 1 << 22

# Seconds that a rank waits for the others to come to the same call. As long as PyTorch's process groups wait with NCCL.
_TIMEOUT = 600.0
_TIMEOUT_VARIABLE = "FASTRMS_MPI_TIMEOUT"

# A waiting rank polls MPI this many times without a pause, some 0.2 ms. Then it yields the core between two polls, and
# after `_AWAKE` seconds it sleeps between them.
_QUESTIONS = 1000
_AWAKE = 0.005
_yield_core = getattr(os, "sched_yield", lambda: None)  # not on Windows

# The tag of messages in which a rank says where it waits, and the seconds in which it collects those of the others.
_WAITS = 32_767
_COLLECTED_FOR = 1.0

# Up to so many ranks, a piece of the gradients goes to its owner by a reduce-scatter.
_FEW = 4


@dataclass
class _Channel:
    """Two communicators of the library's own, so that its messages and a user's never meet."""

    control: MPI.Intracomm
    # For reductions that begin before all ranks have come to the same step: on one communicator they would have to
    # come in one order with everything else.
    data: MPI.Intracomm
    taken: bool = True
    requests: list[MPI.Request] = field(default_factory=list)

    def release(self) -> None:
        self.taken = bool(self.requests)  # with a reduction that nobody waits for, it is lost


class _Pool:
    """The channels of one communicator of the user's. MPI has some thousands of communicators and no more."""

    def __init__(self) -> None:
        self.channels: list[_Channel] = []
        self.threads = 0  # not counted yet

    def take(self, comm: MPI.Intracomm, taken: NDArray[np.bool_]) -> _Channel:
        """The first channel that is taken on no rank, or a new one."""
        if not self.threads:
            self.threads = _threads(comm)
        if taken.all():
            self.channels.append(_Channel(comm.Dup(), comm.Dup()))
            return self.channels[-1]
        channel = self.channels[int(np.argmin(taken))]
        channel.taken = True
        return channel


# The calls that make an optimizer.
_MAKE = ("ShardedRMSProp", "ShardedRMSProp.from_checkpoint")


_pool_of = MPI.Comm.Create_keyval()


class Piece:
    """Elements of an array that are added up in one call.

    Parameters
    ----------
    bounds : ndarray of int, shape (ranks + 1,)
        Where the parts of the array begin.
    rank : int
        The number of this rank.
    start, stop : int
        Which elements.

    Attributes
    ----------
    all, own : slice
        Where they are in the array, and those of this rank in its part.
    counts : ndarray of int, shape (ranks,)
        How many go to each rank.
    owner : int or None
        The rank to which they are reduced, or None where they are scattered.
    """

    def __init__(self, bounds: Bounds, rank: int, start: int, stop: int) -> None:
        low, high = np.clip(bounds[:-1], start, stop), np.clip(bounds[1:], start, stop)
        self.all = slice(start, stop)
        self.counts = high - low
        first = int(low[rank] - bounds[rank]) if self.counts[rank] else 0
        self.own = slice(first, first + int(self.counts[rank]))
        largest = int(np.argmax(self.counts))
        # A reduce-scatter is what MPICH is fastest at: 1e7 float32 on 2 ranks in 15 ms, with reductions to one rank
        # each 40 ms. But of many ranks all would send to the one that has this piece, whereas a long reduction to one
        # rank is shared out.
        alone = self.counts[largest] == stop - start and len(self.counts) > _FEW
        self.owner = largest if alone else None


class Ranks:
    """The processes that share an optimizer.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or None
        All its processes make this object at the same time. None for MPI.COMM_WORLD.
    call : {"ShardedRMSProp", "ShardedRMSProp.from_checkpoint"}
        The call that makes it, which must be the same on all ranks.
    timeout : float
        Seconds that this rank waits for the others to come to the same call; inf for no end.

    Attributes
    ----------
    rank, size : int
        The number of this process, and how many there are.
    timeout : float
        As given.
    told : ndarray of float64
        What `meet` exchanges, after `prepare_meet`.
    threads : int
        The cores that this process may use, each divided by the number of ranks that may use it.
    """

    def __init__(self, comm: Any, call: str, timeout: float) -> None:
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise OptionTypeError(f"comm: expected an intracommunicator of mpi4py, or None, got {comm!r}")
        pool: Any = comm.Get_attr(_pool_of)
        if pool is None:
            pool = _Pool()
            comm.Set_attr(_pool_of, pool)
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.timeout = timeout
        self._all_raise = 0  # the id of an exception that all ranks raise
        self._left: str | None = None  # where this rank left the others, in an interactive session
        # Here the ranks meet for the first time. Optimizers may be collected at different times on them.
        taken = [channel.taken for channel in pool.channels]
        told = np.array([_MAKE.index(call), -_MAKE.index(call), *taken], np.float64)
        try:
            _wait(comm, comm.Iallreduce(MPI.IN_PLACE, told, MPI.MAX), f"{call}()", timeout)
            if told[0] != -told[1]:
                raise self.all_raise(RankError(_different_calls(comm.allgather(call))))
            self._channel = pool.take(comm, told[2:] > 0)
        except BaseException as error:
            self.leave(error)
            raise
        self.threads: int = pool.threads
        weakref.finalize(self, self._channel.release)

    @property
    def control(self) -> MPI.Intracomm:
        """The communicator on which all ranks make the same calls in the same order."""
        control: MPI.Intracomm = self._channel.control
        return control

    def bounds(self, size: int) -> Bounds:
        """Where the parts of an array of `size` elements begin, and where the last one ends; the last may be empty."""
        share = -(-size // (self.size * _MULTIPLE)) * _MULTIPLE
        return np.minimum(np.arange(self.size + 1, dtype=np.int64) * share, size)

    def prepare_meet(self, length: int) -> None:
        """Make `told`, the numbers that `meet` exchanges. All ranks call it at the same time, once.

        Parameters
        ----------
        length : int
            How many numbers: as many on all ranks and in all calls, so that ranks which are in different calls find it.
        """
        self.told = np.zeros(length)
        self._meeting: MPI.Prequest | None = None
        # With Open MPI, a step of 2 ranks with 1,000 parameters takes 4 us more of 31 without it.
        with suppress(NotImplementedError):  # before MPI 4
            self._meeting = self.control.Allreduce_init(MPI.IN_PLACE, self.told, MPI.MAX)
            weakref.finalize(self, _free, self._meeting)

    def meet(self, call: str, steps: int) -> None:
        """Wait until all ranks have come to a call, and replace each number in `told` by the largest of the ranks.

        This is the first exchange of every call. It costs what a blocking one costs, and waits with an end.

        Parameters
        ----------
        call : str
            The name of the method.
        steps : int
            How many this rank has taken.

        Raises
        ------
        RankError
            Others have not come within `timeout` seconds. `leave` ends all ranks then.
        """
        if self._left is not None:
            raise RankError(f"this optimizer lost the other ranks ({self._left}); make a new one on all ranks")
        request: MPI.Request
        if self._meeting is None:
            request = self.control.Iallreduce(MPI.IN_PLACE, self.told, MPI.MAX)
        else:
            request = self._meeting
            self._meeting.Start()
        if not request.Test():
            _wait(self.control, request, f"{call}() (steps taken: {steps})", self.timeout)

    def refuse_different(self, call: str) -> NoReturn:
        """Raise on all ranks, which have come to different calls."""
        raise self.all_raise(RankError(_different_calls(self.control.allgather(call))))

    def all_raise(self, error: BaseException) -> BaseException:
        """Return the error, marked as one that all ranks raise, so that `leave` does not end the ranks for it."""
        self._all_raise = id(error)
        return error

    def leave(self, error: BaseException) -> None:
        """End all ranks where an error takes this one out of a call in which the others would wait for it.

        To be called with each error that comes after the first exchange of a call. It does nothing about one that all
        ranks raise. An interactive session goes on, without the optimizer.

        Parameters
        ----------
        error : BaseException
            That is being handled.
        """
        if self.size == 1 or id(error) == self._all_raise:
            return
        self._left = f"{type(error).__name__}: {error}"
        if not _interactive():
            stack = [*traceback.format_stack()[:-1], *traceback.format_exception(error, chain=False)[1:]]
            _say(
                f"Traceback (most recent call last):\n{''.join(stack)}fastrms: rank {self.rank} of {self.size} ends in "
                "the middle of a call; it ends the other ranks too, which would wait for it (MPI_Abort)\n"
            )
            end_all()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """`leave` with whatever is raised in the block, in calls that are not steps."""
        try:
            yield
        except BaseException as error:
            self.leave(error)
            raise

    def agree(self, error: Exception | None, fact: Any = None) -> list[Any]:
        """Go on together or not at all.

        Parameters
        ----------
        error : Exception or None
            Why this rank cannot go on.
        fact : object
            Something to tell the others; pickled.

        Returns
        -------
        facts : list
            Those of all ranks.

        Raises
        ------
        Exception
            `error` itself, where there is one.
        RankError
            Elsewhere, if there is one on any rank.
        """
        text = None if error is None else f"{type(error).__name__}: {error}"
        told = self.control.allgather((text, fact))
        if error is not None:
            raise self.all_raise(error)
        for rank, (theirs, _) in enumerate(told):
            if theirs is not None:
                raise self.all_raise(RankError(f"rank {rank} of {self.size} cannot go on: {theirs}"))
        return [fact for _, fact in told]

    def raise_of_first(self, error: BaseException | None) -> None:
        """Raise on all ranks what rank 0 could not do, if there is anything."""
        found = self.control.bcast(None if error is None else _sendable(error))
        if found is not None:
            raise self.all_raise(error if error is not None else found)

    def take_largest(self, array: Array) -> None:
        """Replace each number by the largest of the ranks."""
        self.control.Allreduce(MPI.IN_PLACE, array, MPI.MAX)

    def add_up(self, array: Array) -> None:
        """Replace each number by the sum of the ranks, for numbers whose sums are exact."""
        self.control.Allreduce(MPI.IN_PLACE, array, MPI.SUM)

    def broadcast(self, array: Array) -> None:
        """Copy an array of rank 0 to all others."""
        for start, stop in _blocks(0, array.size):
            self.control.Bcast(array[start:stop])

    def reduce(self, whole: Array, own: Array, bounds: Bounds) -> None:
        """Add up an array over the ranks, of which each gets its part."""
        if whole.size <= _MOST:
            counts: Any = np.diff(bounds)
            self.control.Reduce_scatter(whole, own, counts, MPI.SUM)
            return
        for first, cuts, counts in self._even_blocks(bounds):
            block = np.concatenate([whole[a:b] for a, b in cuts])
            self.control.Reduce_scatter(block, own[first : first + counts[self.rank]], counts, MPI.SUM)

    def start_reduce(self, whole: Array, own: Array, piece: "Piece") -> None:
        """Begin to add up a piece; calls of `start_reduce` have one order on all ranks."""
        data, part = self._channel.data, own[piece.own]
        if piece.owner is None:
            counts: Any = piece.counts
            request = data.Ireduce_scatter(whole[piece.all], part, counts, MPI.SUM)
        else:
            mine = part if piece.owner == self.rank else None
            request = data.Ireduce(whole[piece.all], mine, MPI.SUM, root=piece.owner)
        self._channel.requests.append(request)

    def progress(self) -> None:
        """Let MPI work on the reductions that have begun: most do so only when they are called."""
        MPI.Request.Testall(self._channel.requests)

    def wait(self) -> None:
        """Wait for the reductions that have begun."""
        MPI.Request.Waitall(self._channel.requests)
        self._channel.requests.clear()

    def all_gather(self, whole: Array, bounds: Bounds) -> None:
        """Give all ranks each other's part of an array, in place."""
        if whole.size <= _MOST:
            self.control.Allgatherv(MPI.IN_PLACE, [whole, (np.diff(bounds), bounds[:-1])])
            return
        for _, cuts, counts in self._even_blocks(bounds):
            block = np.empty(sum(counts), whole.dtype)
            self.control.Allgatherv(whole[slice(*cuts[self.rank])], [block, counts])
            for (a, b), stop in zip(cuts, np.cumsum(counts), strict=True):
                whole[a:b] = block[stop - (b - a) : stop]

    def _even_blocks(self, bounds: Bounds) -> Iterator[tuple[int, Any, Any]]:
        """Blocks with as many elements of each part: one of a single part would all go to, or come from, one rank.

        Yields where in a part they are, where in the whole, and how many there are of each part.
        """
        step = max(1, _BLOCK // self.size)
        for first in range(0, bounds[1], step):
            starts, stops = (np.minimum(bounds[:-1] + first + more, bounds[1:]) for more in (0, step))
            yield first, list(zip(starts.tolist(), stops.tolist(), strict=True)), stops - starts

    def gather(self, own: Array, whole: Array | None, bounds: Bounds) -> None:
        """Copy all parts to rank 0, which alone has a `whole`."""
        for rank in range(self.size):
            for start, stop in _blocks(*bounds[rank : rank + 2]):
                part = own[start - bounds[rank] : stop - bounds[rank]]
                if whole is not None and rank == 0:
                    whole[start:stop] = part
                elif whole is not None:
                    self.control.Recv(whole[start:stop], source=rank)
                elif rank == self.rank:
                    self.control.Send(part, dest=0)

    def scatter(self, whole: Array | None, own: Array, bounds: Bounds) -> None:
        """Copy its part to each rank, from rank 0, which alone has a `whole`."""
        for rank in range(self.size):
            for start, stop in _blocks(*bounds[rank : rank + 2]):
                part = own[start - bounds[rank] : stop - bounds[rank]] if rank == self.rank else own[:0]
                if whole is not None and rank == 0:
                    part[...] = whole[start:stop]
                elif whole is not None:
                    self.control.Send(whole[start:stop], dest=rank)
                elif rank == self.rank:
                    self.control.Recv(part, source=0)


def _sendable(error: BaseException) -> BaseException:
    """The error itself, or where pickling would lose it, another one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"rank 0 cannot go on: {type(error).__name__}: {error}")
    return error


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, _BLOCK):
        yield first, min(first + _BLOCK, stop)


def _threads(comm: MPI.Intracomm) -> int:
    try:
        cores = os.sched_getaffinity(0)
    except AttributeError:  # not on this system
        cores = set(range(os.cpu_count() or 1))
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    others = node.allgather(cores)
    node.Free()
    return max(1, int(sum(1 / sum(core in other for other in others) for core in cores)))


def check_timeout(value: Any) -> float:
    """Return the seconds that a rank waits for the others, inf for no end.

    Parameters
    ----------
    value : float, None or "auto"
        Seconds, 0 and None for no end, "auto" for the environment variable FASTRMS_MPI_TIMEOUT, or 600.

    Raises
    ------
    OptionError, OptionTypeError
        It is something else, or the variable is.
    """
    name, kinds = "timeout", 'a number of seconds >= 0, None or "auto"'
    if isinstance(value, str) and value == "auto":
        name, kinds = f"the environment variable {_TIMEOUT_VARIABLE}", "a number of seconds >= 0"
        text = os.environ.get(_TIMEOUT_VARIABLE, "")
        try:
            value = float(text) if text.strip() else _TIMEOUT
        except ValueError:
            raise OptionError(f"{name}: expected {kinds}, got {text!r}") from None
    if value is None:
        return math.inf
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise OptionTypeError(f"{name}: expected {kinds}, got {value!r} ({type(value).__name__})")
    if not float(value) >= 0:
        raise OptionError(f"{name}: expected {kinds}, got {value!r}")
    return float(value) or math.inf


def _free(request: MPI.Prequest) -> None:
    if not MPI.Is_finalized() and request not in _given_up:
        request.Free()


# Requests that nobody waits for any more, with the memory that MPI may still use.
_given_up: list[MPI.Request] = []


def _wait(comm: MPI.Intracomm, request: MPI.Request, where: str, timeout: float) -> None:
    """Wait for a request, or raise RankError after `timeout` seconds, or when another rank has waited for so long."""
    try:
        for _ in range(_QUESTIONS):
            if request.Test():
                return
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited > timeout or comm.Iprobe(tag=_WAITS):
                raise RankError(_who_is_missing(comm, where, waited))
            if waited < _AWAKE:
                _yield_core()
            else:  # a hundredth of the time is not noticed
                time.sleep(min(waited / 100, 0.01))
    except BaseException:
        _given_up.append(request)
        raise


def _who_is_missing(comm: MPI.Intracomm, where: str, waited: float) -> str:
    """Tell the other ranks where this one waits, and say where they do."""
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    _given_up.extend(comm.isend(where, rank, _WAITS) for rank in others)
    heard: dict[int, str] = {}
    end = time.monotonic() + _COLLECTED_FOR
    status = MPI.Status()
    while len(heard) < len(others) and time.monotonic() < end:
        if comm.Iprobe(tag=_WAITS, status=status):
            heard[status.source] = comm.recv(source=status.source, tag=_WAITS)
        else:
            time.sleep(0.001)
    missing = named([rank for rank in others if rank not in heard]) if len(heard) < len(others) else "a late rank"
    places: dict[str, list[int]] = {}
    for rank in sorted(heard):
        places.setdefault(heard[rank], []).append(rank)
    waiting = "".join(f"; {named(ranks)} wait{'s' * (len(ranks) == 1)} in {place}" for place, ranks in places.items())
    return (
        f"rank {comm.rank} of {comm.size} waited {waited:.1f} s in {where} for {missing}, which did not join{waiting}; "
        "all ranks must make the same calls in the same order. For longer waits set timeout= or the environment "
        f"variable {_TIMEOUT_VARIABLE} (seconds; 0 for no limit)"
    )


def _different_calls(calls: list[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks.setdefault(call, []).append(rank)
    told = ", ".join(f"{call}() on {named(numbers)}" for call, numbers in ranks.items())
    return f"expected the same call on all ranks, got {told}; nothing was changed"


def named(ranks: Sequence[int]) -> str:
    """Name the first ten of these ranks, as in "ranks 1, 2"."""
    more = f" and {len(ranks) - 10} more" if len(ranks) > 10 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:10]))}{more}"


def _interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _say(text: str) -> None:
    sys.stderr.write(text)  # in one piece, as other ranks write there too


# Seconds between an exception that nobody catches and the end of all ranks.
_LAST_WORDS = 0.5


def end_all() -> None:
    """End all ranks, and with them this program, after what was written to the standard outputs is passed on."""
    sys.stdout.flush()
    sys.stderr.flush()
    # What a launcher has not passed on by then is lost: of MPICH's, in one of ten runs, all of it.
    time.sleep(_LAST_WORDS)
    MPI.COMM_WORLD.Abort(1)
    os._exit(1)  # MPICH 5 comes back for a moment


_hook = threading.Lock()
_installed = False


def end_together() -> None:
    """See to it that an exception that ends this process ends all ranks.

    The others would wait for it for ever. Nothing is done in an interactive session, where no exception ends anything.
    """
    global _installed
    with _hook:
        if _installed:
            return
        _installed = True
        previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> Any:
        try:
            return previous(kind, error, traceback)
        finally:
            if not (_interactive() or MPI.Is_finalized()):
                world = MPI.COMM_WORLD
                _say(
                    f"fastrms: rank {world.rank} of {world.size} ends with {kind.__name__}: {error}; it ends the other "
                    "ranks too, which would wait for it (MPI_Abort)\n"
                )
                end_all()

    sys.excepthook = hook
