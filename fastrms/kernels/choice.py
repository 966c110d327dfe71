"""Which kernel to run: what the user asked for, or what makes whole training steps fastest.

An isolated kernel time misleads. In a training loop the threads of the matrix products (OpenBLAS) still spin when the
optimizer's turn comes, and threads of an OpenMP region spin when the next product begins: each starves the other, and
the second cost is outside the optimizer's own time. So "auto" measures what counts, the time from the end of one step
to the end of the next, over real steps, first with the serial and then with the parallel kernel, and keeps the faster.
Bits do not depend on the kernel, so trying is harmless.
"""

import multiprocessing
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba
import numpy as np

from fastrms.errors import call_all

__all__ = [
    "KERNELS", "Chooser", "call_after_fork", "limit_threads", "max_threads", "one_at_a_time",
    "start_threads", "threads_work",
]  # fmt: skip

KERNELS = ("auto", "numpy", "serial", "parallel")

# Below this many elements of one dtype and group nothing is tried: the serial pass takes some 25 us, and a second
# thread saves less than the two take to meet when both cores are busy.
TRY_PARALLEL_FROM = 65_536


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
    """Let `optimizer._in_child_of_fork` be called in children of this process, for as long as it lives."""
    _after_fork.add(optimizer)


def _in_child() -> None:
    global _lost_threads, _region
    _region = threading.Lock()  # a thread that held it is not here
    _lost_threads = _layer() == "omp"  # None: this process can start its own
    call_all([optimizer._in_child_of_fork for optimizer in _after_fork])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


class Chooser:
    """Finds out in the course of training whether the serial or the parallel kernel makes whole steps faster.

    Parameters
    ----------
    clock : callable, default time.perf_counter
        Seconds.

    Attributes
    ----------
    kernel : {"serial", "parallel"}
        What to use for the next step.
    reason : str
        Why.
    """

    # The first look comes after this many seconds of training, so that a short one never pays for compiling the
    # parallel kernel; each later one after twice as long, as the machine may have become busier or less so.
    FIRST_LOOK, LAST_LOOK = 2.0, 600.0
    # A trial: rounds of steps with the one and the other, at least so many and for so many seconds. The first of them
    # are dropped: they show what was before, and threads that have to be put on two cores again.
    ROUNDS, STEPS, DROPPED = 3, 8, 3
    TURN_SECONDS, DROPPED_SECONDS = 0.03, 0.01
    # How much faster parallel has to be to be kept, and how much slower to stop a trial after its first round.
    GAIN, GIVE_UP = 0.97, 1.15
    # So many steps in a row, over so many seconds, that are so much slower than those of the trial mean that things
    # have changed: another program on one of the cores makes parallel ten times slower, for instance. (After a pause it
    # takes the system some milliseconds to put two threads on two cores again: a look just then would mislead.)
    SLOW_STEPS, SLOW_SECONDS, SLOWER = 12, 0.1, 1.5
    # What is longer than so many steps is a pause between two of them, not training: it brings no look nearer.
    PAUSE = 10

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._best = "serial"
        self.reason = f"after {self.FIRST_LOOK:g} s of training parallel is tried too"
        self._plan = self._make_plan()
        self.kernel = next(self._plan)
        self._last: float | None = None

    def step_done(self) -> None:
        """Tell the chooser that a step has ended. The time since the last one is that of a whole training step."""
        now = self._clock()
        if self._last is not None:
            self.kernel = self._plan.send(now - self._last)
        self._last = now

    def _make_plan(self) -> Generator[str, float, None]:
        """Yields the kernel for the next step, and is sent how long the training step took that it ended."""
        patience, expected = self.FIRST_LOOK, float("inf")
        last: deque[float] = deque(maxlen=5)  # whose median stands for what is expected, until there was a trial
        while True:
            spent = slow_seconds = 0.0
            slow_steps = 0
            while spent < patience and (slow_steps < self.SLOW_STEPS or slow_seconds < self.SLOW_SECONDS):
                period = yield self._best
                last.append(period)
                usual = sorted(last)[len(last) // 2] if expected == float("inf") else expected
                counted = min(period, self.PAUSE * usual)
                spent += counted
                slow = period > self.SLOWER * expected
                slow_steps, slow_seconds = (slow_steps + 1, slow_seconds + counted) if slow else (0, 0.0)
            changed = spent < patience
            times: dict[str, list[float]] = {"serial": [], "parallel": []}
            for _ in range(self.ROUNDS):
                for kernel, taken in times.items():
                    steps, turn = 0, 0.0
                    while steps < self.STEPS or turn < self.TURN_SECONDS:
                        period = yield kernel
                        steps += 1
                        turn += period
                        if steps > self.DROPPED and turn > self.DROPPED_SECONDS:
                            taken.append(period)
                serial, parallel = (float(np.median(taken)) for taken in times.values())
                if parallel > self.GIVE_UP * serial:
                    break
            self._best = "parallel" if parallel < self.GAIN * serial else "serial"
            self.reason = (
                f"a training step took {1e3 * serial:.3g} ms with the serial kernel, {1e3 * parallel:.3g} ms with the "
                "parallel one"
            )
            expected = min(serial, parallel)
            # After a change, not the old patience: what is found now holds only since then.
            patience = self.FIRST_LOOK if changed else min(2 * patience, self.LAST_LOOK)
