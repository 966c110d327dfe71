"""Start Numba's threads, limit them, and keep parallel kernels working after a fork."""

import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba

from fastrms.errors import call_all

__all__ = [
    "SPIN_COUNT", "call_after_fork", "limit_threads", "max_threads", "one_at_a_time", "start_threads", "threads_work",
]  # fmt: skip


def max_threads() -> int:
    """How many threads Numba started with: NUMBA_NUM_THREADS, or the processor's cores."""
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


@contextmanager
def limit_threads(num_threads: int) -> Iterator[None]:
    """Let parallel kernels use `num_threads` threads inside the block."""
    start_threads()
    before = numba.get_num_threads()
    numba.set_num_threads(num_threads)
    try:
        yield
    finally:  # the setting is the calling thread's, and the user's own parallel code reads it
        numba.set_num_threads(before)


# How often an idle thread of GNU OpenMP looks for work before it sleeps: some 0.3 ms. Its default, 300,000, is some
# 10 ms, in which it starves the user's next matrix product: training with the parallel kernel was four times slower.
# With 0, or OMP_WAIT_POLICY=passive, threads have to be woken for each step, and two of them gain nothing below 1e6
# elements (48 us a step at 1e5 float32, 24 with this, 39 serial).
SPIN_COUNT = 10_000


def start_threads() -> None:
    """Start Numba's threads, if they are not running, such that they spin only for a moment when idle.

    GNU OpenMP reads its environment when it is loaded, which is now, unless something else has loaded it: for that
    moment GOMP_SPINCOUNT is `SPIN_COUNT`. Settings of the user's own stay as they are.

    Numba's threads are started by a thread that ends then. With OpenMP, Numba sets how many threads the next parallel
    region of the thread that starts them has, and whether regions may be nested. That would hold for other libraries
    with the same OpenMP, such as PyTorch, too. And Numba takes a lock from multiprocessing, after which nobody could
    set a start method any more.
    """
    if _layer() is not None:
        return
    undecided = not multiprocessing.get_start_method(allow_none=True)
    spin = None if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() else str(SPIN_COUNT)
    if spin is not None:
        os.environ["GOMP_SPINCOUNT"] = spin
    try:
        with suppress(RuntimeError):  # where a thread cannot be started, as at a limit
            starter = threading.Thread(target=_start, name="fastrms starts Numba's threads")
            starter.start()
            starter.join()
        numba.get_num_threads()  # raises here, if it did in `_start`
    finally:
        if spin is not None:
            del os.environ["GOMP_SPINCOUNT"]
        if undecided:
            multiprocessing.set_start_method(None, force=True)


def _start() -> None:
    with suppress(Exception):
        numba.get_num_threads()


# In a child of fork() there are no threads but the one that called it. Numba's TBB and workqueue layers start new ones;
# with GNU OpenMP, whose state says that they are there, a parallel kernel would end the process.
_lost_threads = False
_after_fork: "weakref.WeakSet[Any]" = weakref.WeakSet()


_region = threading.Lock()


def one_at_a_time(kernel: Callable[..., None]) -> Callable[..., None]:
    """`kernel`, which has a parallel loop, or where Numba's layer needs it, a form of it at which threads take turns.

    Parallel loops run without the GIL, and the workqueue layer ends the process when two threads enter it at once.
    """
    start_threads()
    if _layer() != "workqueue":
        return kernel

    def run(*arguments: Any) -> None:
        with _region:
            kernel(*arguments)

    return run


def _layer() -> str | None:
    """Numba's threading layer, or None as long as its threads have not been started."""
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined]
    except ValueError:
        return None


def threads_work() -> bool:
    """Whether parallel kernels can run in this process."""
    return not _lost_threads


def call_after_fork(optimizer: Any) -> None:
    """Let `optimizer.after_fork` be called in children of this process, for as long as it lives."""
    _after_fork.add(optimizer)


def _in_child() -> None:
    global _lost_threads, _region
    _region = threading.Lock()  # a thread that held it is not here
    _lost_threads = _layer() == "omp"  # None: this process can start its own
    call_all([optimizer.after_fork for optimizer in _after_fork])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
