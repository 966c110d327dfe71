"""Choose how large runs are updated in the course of training: the way that makes whole training steps fastest.

The time of a kernel alone misleads. In a training loop the threads of matrix products (OpenBLAS) still spin when the
optimizer begins its step, and the threads of its OpenMP region still spin when the next product begins. Each slows the
other, and the optimizer's own time has only the first cost. Matrix products also push the optimizer's arrays out of the
caches, so prefetching may gain in training and lose elsewhere, depending on the processor. So "auto" measures the time
from the end of one step to the end of the next with each variant, and keeps the fastest one. Before that it uses the
plain serial loop. ``FASTRMS_TUNE=0`` in the environment turns the trials off. No bit depends on the variant.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence

import numpy as np

from fastrms.backends.plan import Variant
from fastrms.kernels import threads
from fastrms.kernels.cpu import COMPILED, LINES_AHEAD

__all__ = ["TRY_PARALLEL_FROM", "TRY_PREFETCHING_FROM", "VARIANTS", "Tuner", "explain", "of_run", "variants"]

# Runs with fewer elements stay serial: one pass takes some 25 us, and on busy cores a second thread saves less than the
# synchronization of the two costs.
TRY_PARALLEL_FROM = 65_536

# Runs with fewer elements, 1 MiB an array in float32, stay in the caches of usual processors from step to step.
TRY_PREFETCHING_FROM = 262_144

VARIANTS = {
    "serial": Variant("serial"),
    "parallel": Variant("parallel"),
    "serial with prefetching": Variant("serial", LINES_AHEAD),
    "parallel with prefetching": Variant("parallel", LINES_AHEAD),
}


def variants(largest: int, num_threads: int) -> list[str]:
    """Return the `VARIANTS` that are worth a trial, the plain serial loop first.

    `largest` is the number of elements of the largest run, and `num_threads` belongs to the parallel kernel.
    """
    tunes = os.environ.get("FASTRMS_TUNE", "1") != "0"
    parallel = tunes and largest >= TRY_PARALLEL_FROM and num_threads > 1 and threads.threads_work()
    prefetching = tunes and largest >= TRY_PREFETCHING_FROM and COMPILED
    return [
        name
        for name, (kernel, lines_ahead) in VARIANTS.items()
        if (kernel == "serial" or parallel) and (lines_ahead is None or prefetching)
    ]


class Tuner:
    """The choice among variants, from times of training steps.

    The first of the `candidates` is used until the first trial, and later unless another one gains. `variant` is the
    candidate of the next step, `best` the choice between trials, and `reason` says why, for users. `trying` tells
    whether a trial is running, and `decided` whether one has ended. A trial begins when the function that `prepare`
    returns is true: candidates are compiled then.
    """

    # Seconds of training before the first trial: a short training never compiles the parallel kernel. The time before
    # each later trial doubles, up to the second number. Later trials notice a change in the load of the machine.
    FIRST_LOOK, LAST_LOOK = 2.0, 600.0
    # A trial has `ROUNDS`. In each round each candidate takes at least `STEPS`, for at least `TURN_SECONDS`. The first
    # steps after a change do not count: the system has not distributed the threads among cores yet.
    ROUNDS, STEPS, DROPPED = 3, 8, 3
    TURN_SECONDS, DROPPED_SECONDS = 0.03, 0.01
    # Another candidate is kept if its time is below `GAIN` times the time of the first. It leaves the trial if its time
    # is above `GIVE_UP` times the time of the fastest.
    GAIN, GIVE_UP = 0.97, 1.15
    # A trial begins at once after `SLOW_STEPS` in a row, for `SLOW_SECONDS`, that are slower than in the last trial by
    # the factor `SLOWER`: the load of the machine has changed. (Another program on a core can make parallel ten times
    # slower. A few slow steps mean nothing: after a pause the system takes some milliseconds to put two threads on two
    # cores.)
    SLOW_STEPS, SLOW_SECONDS, SLOWER = 12, 0.1, 1.5
    # A step counts as at most this many usual steps. The rest of its time is a pause, not training.
    PAUSE = 10

    def __init__(
        self,
        candidates: Sequence[str],
        clock: Callable[[], float] = time.perf_counter,
        prepare: Callable[[], Callable[[], bool]] = lambda: lambda: True,
    ) -> None:
        self._candidates = candidates
        self._clock = clock
        self._prepare = prepare
        self.best = candidates[0]
        self.reason = f"after {self.FIRST_LOOK:g} s of training, auto also tries {', '.join(candidates[1:])}"
        self.decided = False
        self._last: float | None = None
        self._begin()

    def _begin(self) -> None:
        self.trying = False
        plan = self._make_plan()
        self.variant = next(plan)
        self._plan = plan  # last: Ctrl-C may come at any line

    def step_done(self) -> None:
        """Record the end of a step. A whole training step lies between two calls."""
        now = self._clock()
        if self._last is not None:
            try:
                self.variant = self._plan.send(now - self._last)
            except StopIteration:  # Ctrl-C came within the plan, and ended it
                self._begin()
        self._last = now

    # Each generator yields the variant of the next step, and receives the seconds of that training step.

    def _make_plan(self) -> Generator[str, float, None]:
        """Alternate between training with the best variant and trials."""
        patience, expected = self.FIRST_LOOK, None
        while True:
            changed = yield from self._train(patience, expected)
            prepared = self._prepare()
            while not prepared():
                yield self.best
            self.trying = True
            times = yield from self._compare()
            self.trying = False
            self.decided = True
            first, fastest = self._candidates[0], min(times, key=times.__getitem__)
            self.best = fastest if times[fastest] < self.GAIN * times[first] else first
            measured = ", ".join(f"{1e3 * seconds:.3g} ms with {name}" for name, seconds in times.items())
            self.reason = f"a training step took {measured}"
            expected = times[fastest]
            # After a change of load, start again with short times between trials.
            patience = self.FIRST_LOOK if changed else min(2 * patience, self.LAST_LOOK)

    def _train(self, patience: float, expected: float | None) -> Generator[str, float, bool]:
        """Use the best variant for `patience` seconds, or until steps become slow. Return whether they became slow.

        `expected` is the time of a step in the last trial, or None before the first trial.
        """
        recent: deque[float] = deque(maxlen=5)
        spent = slow_seconds = 0.0
        slow_steps = 0
        while spent < patience:
            if slow_steps >= self.SLOW_STEPS and slow_seconds >= self.SLOW_SECONDS:
                return True
            period = yield self.best
            recent.append(period)
            counted = min(period, self.PAUSE * (sorted(recent)[len(recent) // 2] if expected is None else expected))
            spent += counted
            slow = expected is not None and period > self.SLOWER * expected
            slow_steps, slow_seconds = (slow_steps + 1, slow_seconds + counted) if slow else (0, 0.0)
        return False

    def _compare(self) -> Generator[str, float, dict[str, float]]:
        """Take steps with each candidate in turn. Return the median time of a training step with each."""
        periods: dict[str, list[float]] = {name: [] for name in self._candidates}
        in_trial, times = list(self._candidates), dict.fromkeys(self._candidates, 0.0)
        for _ in range(self.ROUNDS):
            for name in in_trial:
                steps, turn = 0, 0.0
                while steps < self.STEPS or turn < self.TURN_SECONDS:
                    period = yield name
                    steps += 1
                    turn += period
                    if steps > self.DROPPED and turn > self.DROPPED_SECONDS:
                        periods[name].append(period)
            times = {name: float(np.median(of_name)) for name, of_name in periods.items()}
            limit = self.GIVE_UP * min(times.values())
            in_trial = [name for name in self._candidates if name == self._candidates[0] or times[name] <= limit]
            if len(in_trial) == 1:
                break
        return times


def of_run(size: int, variant: str, tunes: bool) -> Variant:
    """Return the variant of a run of `size` elements. `variant` is the variant of large runs.

    `tunes` tells whether variants are tried.
    """
    kernel, lines_ahead = VARIANTS.get(variant, Variant("serial" if variant == "auto" else variant))
    if kernel == "parallel" and ((tunes and size < TRY_PARALLEL_FROM) or not threads.threads_work()):
        kernel = "serial"
    if size < TRY_PREFETCHING_FROM:
        lines_ahead = None
    # The parallel loop is compiled once, for both.
    return Variant(kernel, lines_ahead or 0 if kernel == "parallel" else lines_ahead)


def explain(size: int, kernel: str, tuner: Tuner | None, num_threads: int) -> str:
    """Return which kernel updates a run of `size` elements, and why. `kernel` is the option.

    `tuner` is None if nothing is tried.
    """
    if not threads.threads_work() and kernel in ("auto", "parallel"):
        return "serial; this process was forked from one that had started OpenMP threads"
    if kernel != "auto":
        return f"{kernel}, as requested"
    if tuner is not None and size >= TRY_PARALLEL_FROM:
        return f"{tuner.best}; {tuner.reason}{'; a trial is running' if tuner.trying else ''}"
    if os.environ.get("FASTRMS_TUNE") == "0":
        return "serial; FASTRMS_TUNE is 0 in the environment"
    if num_threads > 1:
        return f"serial; threads do not pay below {TRY_PARALLEL_FROM:,} elements"
    return "serial; only one thread is available"
