"""Choose the kernel of large runs in the course of training: the one that makes whole training steps faster.

The time of a kernel alone misleads. In a training loop the threads of matrix products (OpenBLAS) still spin when the
optimizer begins its step, and the threads of its OpenMP region still spin when the next product begins. Each slows the
other, and the second cost lies outside the optimizer's own time. So "auto" measures the time from the end of one step
to the end of the next, with the serial and with the parallel kernel, and keeps the faster one. Bits do not depend on
the kernel, so trying is harmless.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator

import numpy as np

from fastrms.kernels import threads

__all__ = ["TRY_PARALLEL_FROM", "Tuner", "explain"]

# Runs with fewer elements stay serial: one pass takes some 25 us, and on busy cores a second thread saves less than the
# synchronization of the two costs.
TRY_PARALLEL_FROM = 65_536


class Tuner:
    """The choice between the serial and the parallel kernel, from times of training steps.

    Parameters
    ----------
    clock : callable, default time.perf_counter
        Returns seconds.

    Attributes
    ----------
    kernel : {"serial", "parallel"}
        The kernel of the next step.
    reason : str
        The reason for it, for users.
    """

    # Seconds of training until the first trial, so that a short training never compiles the parallel kernel. The time
    # to each later trial doubles, up to the second number: the load of the machine may have changed.
    FIRST_LOOK, LAST_LOOK = 2.0, 600.0
    # A trial has so many rounds. In each round both kernels take at least so many steps, for so many seconds. The first
    # steps after a change of kernel are dropped, until the system has distributed the threads among cores.
    ROUNDS, STEPS, DROPPED = 3, 8, 3
    TURN_SECONDS, DROPPED_SECONDS = 0.03, 0.01
    # Ratios of parallel to serial time: below the first, parallel is kept; above the second, the trial stops early.
    GAIN, GIVE_UP = 0.97, 1.15
    # So many steps in a row, over so many seconds, so much slower than in the trial: the load of the machine has
    # changed, and a trial begins at once. (Another program on a core can make parallel ten times slower. A few slow
    # steps mean nothing: after a pause the system takes some milliseconds to put two threads on two cores.)
    SLOW_STEPS, SLOW_SECONDS, SLOWER = 12, 0.1, 1.5
    # At most so many usual steps count of the time of one step. The rest is a pause, not training.
    PAUSE = 10

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._best = "serial"
        self.reason = f"after {self.FIRST_LOOK:g} s of training parallel is tried too"
        self._last: float | None = None
        self._begin()

    def _begin(self) -> None:
        plan = self._make_plan()
        self.kernel = next(plan)
        self._plan = plan  # last: Ctrl-C may come at any line

    def step_done(self) -> None:
        """Record the end of a step. The time since the last call is that of a whole training step."""
        now = self._clock()
        if self._last is not None:
            try:
                self.kernel = self._plan.send(now - self._last)
            except StopIteration:  # Ctrl-C came within the plan, which ended it
                self._begin()
        self._last = now

    def _make_plan(self) -> Generator[str, float, None]:
        """Yield the kernel of the next step, and receive the seconds of that training step."""
        patience, expected = self.FIRST_LOOK, float("inf")
        last: deque[float] = deque(maxlen=5)  # before the first trial their median is the usual time
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
            serial = parallel = math.nan
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
            # After a change of load, start again with short times between trials.
            patience = self.FIRST_LOOK if changed else min(2 * patience, self.LAST_LOOK)


def explain(size: int, kernel: str, tuner: Tuner | None, num_threads: int) -> str:
    """Return which kernel updates a run of parameters, and why.

    Parameters
    ----------
    size : int
        The number of elements.
    kernel : {"auto", "numpy", "serial", "parallel"}
        The option.
    tuner : Tuner or None
        That of the optimizer, or None where nothing is tried.
    num_threads : int
        Threads of the parallel kernel.
    """
    if not threads.threads_work() and kernel in ("auto", "parallel"):
        return "serial; this process was forked from one that had started OpenMP threads"
    if kernel != "auto":
        return f"{kernel}, as asked for"
    if tuner is not None and size >= TRY_PARALLEL_FROM:
        return f"{tuner.kernel}; {tuner.reason}"
    if num_threads > 1:
        return f"serial; {TRY_PARALLEL_FROM:,} elements are too few for threads to gain"
    return "serial; there is one thread"
