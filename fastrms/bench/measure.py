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
from fastrms.bench.implementations import ROOFLINES
from fastrms.bench.workers import Worker

__all__ = ["Entry", "Progress", "StepRow", "measure", "percent_of_roofline", "quartiles", "take_turns"]

T = TypeVar("T")

# A function that shows the share of a case that is done, from 0 to 1, and the work in progress.
Progress = Callable[[float, str], None]

# Rounds in which every implementation gets one turn.
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# The share of --min-time that a turn lasts; at least one step.
TURN_SHARE = 0.05
# Seconds between two turns: threads of OpenMP and OpenBLAS spin for some time after their work is done.
PAUSE = 0.02


@dataclass(frozen=True)
class Entry:
    """An implementation in a measurement; `moves` is its share of `Case.traffic`."""

    label: str
    threads: int
    worker: Worker
    moves: float = 1.0


class StepRow(TypedDict):
    """The result of one implementation on one case; `seconds` is the median of a step, between its quartiles."""

    kernel: str
    label: str
    dtype: str
    arrays: int
    shape: str
    params: int
    threads: int
    seconds: float
    quarter: float
    three_quarters: float
    rounds: int
    steps_in_a_turn: int
    gparam_per_s: float
    gbyte_per_s: float
    percent_of_limit: float
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

    `entries` and `rooflines` have the name that their worker knows; the rows of rooflines are the first. `min_time` is
    in seconds, for each implementation. `on_skip` is called with the name of an implementation that is left out, the
    case, and the reason.

    Raises
    ------
    BenchmarkError
        An implementation of this process computes something else: one of fastrms, or the user's own kernel.
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
        bounds = {entry.threads: quartiles(measured[name].seconds)[1]
                  for name, entry in rooflines.items() if name in measured}  # fmt: skip
        rows += [_row(case, name, everything[name], timing, bounds) for name, timing in measured.items()]
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
    from `names` gets no more turns. No round begins after `min_time` seconds for each name, except for the first
    `least` rounds; there are at most `most`.
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


def percent_of_roofline(seconds: float, threads: int, rooflines: Mapping[int, float]) -> float:
    """Return a speed in percent of the roofline: at 100 a step is as fast as the machine moves its bytes.

    `rooflines` has seconds by number of threads. An implementation may use fewer threads than `threads`, and small
    arrays are faster on one. So the fastest roofline of at most `threads` threads counts. Without one, return NaN.
    """
    return 100 * min((bound for number, bound in rooflines.items() if number <= threads), default=math.nan) / seconds


def _row(case: Case, name: str, entry: Entry, timing: _Timing, bounds: Mapping[int, float]) -> StepRow:
    quarter, median, three_quarters = quartiles(timing.seconds)
    return {
        "kernel": "limit" if name in ROOFLINES else name,
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
        "percent_of_limit": percent_of_roofline(median, entry.threads, bounds),
        "check": timing.check,
    }
