"""Wait for the other ranks with a time limit, and name the ranks that are missing after it."""

import math
import os
import time
from collections.abc import Sequence
from numbers import Real

import numpy as np
from mpi4py import MPI

from fastrms.errors import OptionError, OptionTypeError, RankError

__all__ = ["check_timeout", "free", "named", "wait"]

# Seconds that a rank waits for the others to make the same call. PyTorch's process groups wait as long with NCCL.
_TIMEOUT = 600.0
_TIMEOUT_VARIABLE = "FASTRMS_MPI_TIMEOUT"

# A waiting rank first polls MPI this many times without a pause, some 0.2 ms. Then it yields the core between polls.
# After this many seconds it sleeps between them.
_POLLS = 1000
_AWAKE = 0.005
_yield_core = getattr(os, "sched_yield", lambda: None)  # not on Windows

# After the time limit ranks tell one another where they wait: the tag of these messages, and the seconds in which a
# rank collects them.
_TAG = 32_767
_COLLECTED_FOR = 1.0

# Requests that nobody waits for any more. MPI may still use their memory.
_abandoned: list[MPI.Request] = []


def check_timeout(value: object) -> float:
    """Return the seconds that a rank waits for the others, inf for no limit.

    `value` is the argument `timeout` of `ShardedRMSProp`. Raise OptionError or OptionTypeError for another value.
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


def wait(comm: MPI.Intracomm, request: MPI.Request, where: str, timeout: float) -> None:
    """Wait for a nonblocking collective call, at most `timeout` seconds.

    Raise RankError after this time on this rank or on another one. Then nobody may use the request again. `where` names
    the call in the error message.
    """
    try:
        for _ in range(_POLLS):
            if request.Test():
                return
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited > timeout or comm.Iprobe(tag=_TAG):
                raise RankError(_who_is_missing(comm, where, waited))
            if waited < _AWAKE:
                _yield_core()
            else:  # the sum of the pauses is at most 1% longer than the wait
                time.sleep(min(waited / 100, 0.01))
    except BaseException:
        _abandoned.append(request)
        raise


def free(request: MPI.Prequest) -> None:
    """Free a persistent request, unless it was abandoned or MPI is finalized."""
    if not MPI.Is_finalized() and request not in _abandoned:
        request.Free()


def named(ranks: Sequence[int]) -> str:
    """Name the first ten of these ranks, as in "ranks 1, 2"."""
    more = f" and {len(ranks) - 10} more" if len(ranks) > 10 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:10]))}{more}"


def _who_is_missing(comm: MPI.Intracomm, where: str, waited: float) -> str:
    """Exchange with the other ranks where each one waits, and return a message with the result."""
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    _abandoned.extend(comm.isend(where, rank, _TAG) for rank in others)
    heard: dict[int, str] = {}
    end = time.monotonic() + _COLLECTED_FOR
    status = MPI.Status()
    while len(heard) < len(others) and time.monotonic() < end:
        if comm.Iprobe(tag=_TAG, status=status):
            heard[status.source] = comm.recv(source=status.source, tag=_TAG)
        else:
            time.sleep(0.001)
    missing = [rank for rank in others if rank not in heard]
    places: dict[str, list[int]] = {}
    for rank in sorted(heard):
        places.setdefault(heard[rank], []).append(rank)
    waiting = "".join(f"; {named(ranks)} wait{'s' * (len(ranks) == 1)} in {place}" for place, ranks in places.items())
    return (
        f"rank {comm.rank} of {comm.size} waited {waited:.1f} s in {where} for "
        f"{named(missing) if missing else 'a late rank'}, which did not join{waiting}; "
        "all ranks must make the same calls in the same order. For longer waits set timeout= or the environment "
        f"variable {_TIMEOUT_VARIABLE} (seconds; 0 for no limit)"
    )
