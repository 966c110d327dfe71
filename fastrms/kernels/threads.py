"""Numba's threads: their start, their number, and parallel kernels after a fork."""

import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import MethodType
from typing import Any

import numba

from fastrms.errors import call_all

__all__ = [
    "SPIN_COUNT", "call_after_fork", "limit_threads", "max_threads", "one_at_a_time", "start_threads", "threads_work",
]  # fmt: skip


_numba: Any = numba  # its types lack settings and some functions


def max_threads() -> int:
    """Return the number of threads that Numba started with: NUMBA_NUM_THREADS, or the processor's cores."""
    return int(_numba.config.NUMBA_NUM_THREADS)


@contextmanager
def limit_threads(num_threads: int) -> Iterator[None]:
    """Let parallel kernels use `num_threads` threads inside the block."""
    start_threads()
    before = numba.get_num_threads()
    numba.set_num_threads(num_threads)
    try:
        yield
    finally:  # the user's own parallel code on this thread reads the same setting
        numba.set_num_threads(before)


# How often an idle thread of GNU OpenMP looks for work before it sleeps: some 0.3 ms. The default, 300,000, is some
# 10 ms, in which the thread starves the user's next matrix product: training with the parallel kernel was four times
# slower. With 0, or OMP_WAIT_POLICY=passive, each step has to wake the threads, and two threads gain nothing below 1e6
# elements (48 us a step at 1e5 float32, 24 with this number, 39 serial).
SPIN_COUNT = 10_000


def start_threads() -> None:
    """Start Numba's threads, unless they are running, so that idle threads spin only for a moment.

    GNU OpenMP reads its environment when it is loaded. This function loads it, unless another library has, and sets
    GOMP_SPINCOUNT to `SPIN_COUNT` meanwhile. The user's own settings stay as they are.

    Another thread starts Numba's threads, and ends. With OpenMP, Numba sets for the starting thread the number of
    threads of its next parallel region, and whether regions may be nested. On the user's thread other libraries with
    the same OpenMP, such as PyTorch, would use these settings too. Numba also takes a lock from multiprocessing, which
    fixes the start method; this function leaves the method open.
    """
    if _layer() is not None:
        return
    undecided = not multiprocessing.get_start_method(allow_none=True)
    spin = None if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() else str(SPIN_COUNT)
    if spin is not None:
        os.environ["GOMP_SPINCOUNT"] = spin
    try:
        with suppress(RuntimeError):  # no thread can be started, as at a limit
            starter = threading.Thread(target=_start, name="fastrms starts Numba's threads")
            starter.start()
            starter.join()
        numba.get_num_threads()  # raises the error that `_start` has suppressed
    finally:
        if spin is not None:
            del os.environ["GOMP_SPINCOUNT"]
        if undecided:
            multiprocessing.set_start_method(None, force=True)


def _start() -> None:
    with suppress(Exception):
        numba.get_num_threads()


# A child of fork() has only the thread that called fork(). Numba's TBB and workqueue layers start new threads. GNU
# OpenMP would use the lost ones: a parallel kernel would end the process.
_lost_threads = False
_after_fork: "weakref.WeakKeyDictionary[Any, Callable[[Any], None]]" = weakref.WeakKeyDictionary()

_region = threading.Lock()


def one_at_a_time(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel with a parallel loop in a form that several threads can call at once.

    The workqueue layer ends the process if two threads enter it at once. With this layer threads take turns; with
    other layers the kernel is returned as it is.
    """
    start_threads()
    if _layer() != "workqueue":
        return kernel

    def run(*arguments: Any) -> Any:
        with _region:
            return kernel(*arguments)

    return run


def _layer() -> str | None:
    """Return the name of Numba's threading layer, or None before its threads are started."""
    try:
        return str(_numba.threading_layer())
    except ValueError:
        return None


def threads_work() -> bool:
    """Tell whether parallel kernels can run in this process."""
    return not _lost_threads


def call_after_fork(method: Callable[[], None]) -> None:
    """Register a bound method to be called in forked children while its object lives.

    Each object, which is hashable, has one such method: a second one replaces the first.
    """
    assert isinstance(method, MethodType)
    _after_fork[method.__self__] = method.__func__


def _in_child() -> None:
    global _lost_threads, _region
    _region = threading.Lock()  # the thread that held the old one is lost
    _lost_threads = _layer() == "omp"  # None: this process can start its own
    call_all([partial(function, owner) for owner, function in _after_fork.items()])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
