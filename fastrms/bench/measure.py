"""The timing of several implementations on one case: they take turns, and give medians with their spread."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict, TypeVar

import numpy as np

from fastrms.bench.cases import Case
from fastrms.bench.errors import BenchmarkError, PeerError
from fastrms.bench.workers import Worker

__all__ = [
    "Entry", "Limits", "Progress", "StepRow", "limit_of", "measure", "quartiles", "seconds_of", "take_turns",
    "time_in_turns",
]  # fmt: skip

T = TypeVar("T")

# A function that shows the share of a case that is done, from 0 to 1, and the work in progress.
Progress = Callable[[float, str], None]

Wait = Callable[[], object] | None

# Rounds in which every implementation gets one turn.
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# The share of --min-time that a turn lasts; at least one step.
TURN_SHARE = 0.05
# The kinds of rooflines of a processor.
BOUNDS = ("memory", "divider")
# Seconds between two turns: threads of OpenMP and OpenBLAS spin for some time after their work is done.
PAUSE = 0.02


@dataclass(frozen=True)
class Entry:
    """An implementation in a measurement; `moves` is its share of `Case.traffic`, `bound` the kind of a roofline."""

    label: str
    threads: int
    worker: Worker
    moves: float = 1.0
    bound: str = ""


# Seconds of the rooflines, by number of threads and by bound.
Limits = Mapping[int, Mapping[str, float]]


class StepRow(TypedDict):
    """The result of one implementation, or of one roofline, on one case."""

    kernel: str  # "limit" for a roofline
    label: str
    dtype: str
    arrays: int
    shape: str
    params: int
    threads: int
    seconds: float  # median of a step
    quarter: float
    three_quarters: float
    rounds: int
    steps_in_a_turn: int
    gparam_per_s: float
    gbyte_per_s: float
    percent_of_limit: float
    bound: str  # of the limit: the slower one of memory and divider; of a roofline its own
    check: str


@dataclass
class _Timing:
    check: str
    calls: int
    seconds: list[float] = field(default_factory=list)


def measure(
    case: Case,
    entries: Mapping[str, Entry],
    rooflines: Mapping[str, Entry],
    min_time: float,
    *,
    on_progress: Progress = lambda share, what: None,
    on_skip: Callable[[str, Case, str], None] = lambda name, case, why: None,
    rows: list[StepRow],
) -> None:
    """Check and time implementations on one case, and append their rows to `rows`, also after an interruption.

    `entries` and `rooflines` are by the name that their worker knows; the rows of rooflines are the first. `min_time`
    is in seconds, for each implementation. `on_skip` is called with the name of an implementation that is left out, the
    case, and the reason. Raise BenchmarkError if an implementation of this process (fastrms, or the user's own kernel)
    computes something else.
    """
    everything = {**rooflines, **entries}
    timings: dict[str, _Timing] = {}
    for k, (name, entry) in enumerate(everything.items()):
        on_progress(0.5 * k / len(everything), f"{case.name}: checking {entry.label}")
        try:
            check = entry.worker.open(name, case)
            timings[name] = _Timing(check, _calls_in_a_turn(entry.worker, name, min_time * TURN_SHARE))
        except PeerError as error:
            on_skip(name, case, str(error))
        except BenchmarkError as error:
            raise BenchmarkError(f"{entry.label}: {case.name}: {error}") from None
    names = list(timings)
    try:
        for name, share in take_turns(names, min_time):
            entry, timing = everything[name], timings[name]
            on_progress(0.5 + 0.5 * share, f"{case.name}: {entry.label}")
            time.sleep(PAUSE)
            try:
                timing.seconds.append(entry.worker.time(name, timing.calls))
            except PeerError as error:  # its process has ended
                on_skip(name, case, str(error))
                names.remove(name)
    finally:
        measured = {name: timing for name, timing in timings.items() if timing.seconds}
        limits: dict[int, dict[str, float]] = {}
        for name, entry in rooflines.items():
            if name in measured:
                limits.setdefault(entry.threads, {})[entry.bound] = quartiles(measured[name].seconds)[1]
        rows += [_row(case, name, everything[name], timing, limits) for name, timing in measured.items()]
    for worker in {id(entry.worker): entry.worker for entry in everything.values()}.values():
        with contextlib.suppress(PeerError):  # of a process that has ended, which was reported then
            worker.close()


def _calls_in_a_turn(worker: Worker, name: str, turn: float) -> int:
    once = worker.time(name, 1)
    if once < 0.01:  # a single short call is mostly overhead of the clock
        once = worker.time(name, max(1, min(10, int(turn / once))))
    return max(1, round(turn / once))


def take_turns(
    names: list[T], min_time: float, least: int = MIN_ROUNDS, most: int = MAX_ROUNDS
) -> Iterator[tuple[T, float]]:
    """Yield the names in rounds, each with the share of all turns that is done, from 0 to 1.

    Each name is first as often as last, so that drift of the machine affects all alike. A name that the caller removes
    from `names` gets no more turns. Rounds end after `min_time` seconds for each name, but not before `least` rounds,
    and at the latest after `most` rounds.
    """
    start = time.perf_counter()
    budget = min_time * len(names)
    for k in range(most):
        spent = time.perf_counter() - start
        number = len(names)
        if not number or (k >= least and spent >= budget):
            return
        order = names[k % number :] + names[: k % number]
        for i, name in enumerate(order if k % 2 == 0 else order[::-1]):
            yield name, min(1.0, max(spent / budget, (k + i / number) / most))


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return low, median, high


def limit_of(threads: int, limits: Limits) -> tuple[float, str]:
    """Return the seconds of a step at the limit of the machine, and the bound that holds.

    For each number of threads the slower bound holds. An implementation may use fewer threads than `threads`, and small
    arrays are faster on one. Therefore the fastest limit up to `threads` counts. Without any, return NaN and "".
    """
    slower = [
        max((seconds, bound) for bound, seconds in bounds.items())
        for number, bounds in limits.items()
        if number <= threads
    ]
    return min(slower, default=(math.nan, ""))


def time_in_turns(
    steps: Mapping[str, Callable[[], object]], min_time: float, turn: float = 0, wait: Wait = None
) -> dict[str, list[float]]:
    """Time functions in turns (`take_turns`); return the seconds of a call in each turn, by name.

    A turn lasts about `turn` seconds, at least one call, after one call that is not timed. `min_time` is in seconds,
    for each function. `wait` is that of `seconds_of`.
    """
    calls, seconds = {}, {name: list[float]() for name in steps}
    for name, step in steps.items():
        step()  # compiles
        once = seconds_of(step, 1, wait)
        calls[name] = max(1, round(turn / once))
    for name, _ in take_turns(list(steps), min_time):
        steps[name]()  # the caches are full of another function's arrays
        seconds[name].append(seconds_of(steps[name], calls[name], wait))
    return seconds


def seconds_of(step: Callable[[], object], calls: int, wait: Wait = None) -> float:
    """Return the mean seconds of a step; `wait`, if any, returns when a GPU has done all earlier calls."""
    if wait is not None:
        wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if wait is not None:
        wait()
    return (time.perf_counter() - start) / calls


def _row(case: Case, name: str, entry: Entry, timing: _Timing, limits: Limits) -> StepRow:
    quarter, median, three_quarters = quartiles(timing.seconds)
    limit, bound = limit_of(entry.threads, limits)
    return {
        "kernel": "limit" if entry.bound in BOUNDS else name,
        "label": entry.label,
        "dtype": case.dtype,
        "arrays": case.arrays,
        "shape": "x".join(map(str, case.shape)),
        "params": case.params,
        "threads": entry.threads,
        "seconds": median,
        "quarter": quarter,
        "three_quarters": three_quarters,
        "rounds": len(timing.seconds),
        "steps_in_a_turn": timing.calls,
        "gparam_per_s": case.params / median / 1e9,
        "gbyte_per_s": entry.moves * case.traffic / median / 1e9,
        "percent_of_limit": 100 * limit / median,
        "bound": entry.bound or bound,
        "check": timing.check,
    }
