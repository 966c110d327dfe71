"""Choose the kernel of large runs while a program trains: the one that makes whole training steps fastest.

An isolated kernel time misleads. In a training loop the threads of the matrix products (OpenBLAS) still spin when the
optimizer's turn comes, and threads of an OpenMP region spin when the next product begins: each starves the other, and
the second cost is outside the optimizer's own time. So "auto" measures what counts, the time from the end of one step
to the end of the next, over real steps, first with the serial and then with the parallel kernel, and keeps the faster.
Bits do not depend on the kernel, so trying is harmless.
"""

import time
from collections import deque
from collections.abc import Callable, Generator

import numpy as np

from fastrms.kernels import threads

__all__ = ["TRY_PARALLEL_FROM", "Tuner", "explain"]

# Below this many elements of one dtype and group nothing is tried: the serial pass takes some 25 us, and a second
# thread saves less than the two take to meet when both cores are busy.
TRY_PARALLEL_FROM = 65_536


class Tuner:
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
        self._last: float | None = None
        self._begin()

    def _begin(self) -> None:
        plan = self._make_plan()
        self.kernel = next(plan)
        self._plan = plan  # last: Ctrl-C may come at any line

    def step_done(self) -> None:
        """Tell the tuner that a step has ended. The time since the last one is that of a whole training step."""
        now = self._clock()
        if self._last is not None:
            try:
                self.kernel = self._plan.send(now - self._last)
            except StopIteration:  # Ctrl-C came within the plan, which ended it
                self._begin()
        self._last = now

    def _make_plan(self) -> Generator[str, float, None]:
        """Yield the kernel for the next step; the seconds of the training step that it ended are sent back."""
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


def explain(size: int, kernel: str, tuner: Tuner | None, num_threads: int) -> str:
    """Say which kernel updates a run of parameters, and why.

    Parameters
    ----------
    size : int
        Elements of the run.
    kernel : {"auto", "numpy", "serial", "parallel"}
        The option.
    tuner : Tuner or None
        Of the optimizer; None where nothing is tried.
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
