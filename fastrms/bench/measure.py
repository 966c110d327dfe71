"""Timing several ways on one case: they take turns, and medians with their spread are kept."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastrms.bench.cases import Case
from fastrms.bench.roofline import percent_of_limit, rates
from fastrms.bench.workers import LIMIT_PARALLEL, LIMIT_SERIAL
from fastrms.cli.common import CommandError

__all__ = ["Entry", "Row", "Where", "measure"]

# Rounds in which every way gets one turn.
MIN_ROUNDS, MAX_ROUNDS = 5, 200
# Share of --min-time that one turn lasts, at least if a step is not longer.
TURN_SHARE = 0.05
# Pause between two processes: threads of OpenMP and OpenBLAS go on spinning for some time after their work is done.
PAUSE = 0.02


class Where(Protocol):
    """What ways run in: `fastrms.bench.workers.Session` or `Remote`."""

    def open(self, name: str, case: Case) -> str:
        """Make a way ready and compare its result with the reference's."""

    def time(self, name: str, calls: int) -> float:
        """Seconds a step."""

    def close(self) -> None:
        """Give back memory."""


@dataclass(frozen=True)
class Entry:
    """One way as the user sees it: its label, the threads it may use, where it runs, and on what.

    `takes` says whether it can be run on a dtype, and `moves` which share of the usual bytes it moves.
    """

    label: str
    threads: int
    where: Where
    takes: Callable[[str], bool] = lambda dtype: True
    moves: float = 1.0


@dataclass(frozen=True)
class Row:
    """What was measured of one way on one case; `seconds` is the median of a step."""

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


def measure(
    case: Case,
    entries: Mapping[str, Entry],
    limits: Mapping[str, Entry],
    min_time: float,
    *,
    on_progress: Callable[[float, str], None] = lambda share, what: None,
    on_skip: Callable[[str, str], None] = lambda name, why: None,
    rows: list[Row],
) -> None:
    """Check and time all ways on one case, and append a `Row` for each to `rows`, also after an interruption.

    Parameters
    ----------
    case : Case
    entries : mapping of str to Entry
        The ways, by the name that `Where` knows.
    limits : mapping of str to Entry
        The machine's limit, likewise, with one thread and perhaps with more.
    min_time : float
        Seconds to spend on each way.
    on_progress : callable
        Called with the share of this case that is done, from 0 to 1, and what is done now.
    on_skip : callable
        Called with the name of a way that is left out, and why: its library failed, or computes something else.
    rows : list of Row
        Where results go.

    Raises
    ------
    CommandError
        A way that runs in this process computes something else: ours, or the user's own kernel.
    """
    entries = {name: entry for name, entry in entries.items() if entry.takes(case.dtype)}
    everything = dict(limits) | entries
    checks: dict[str, str] = {}
    calls: dict[str, int] = {}
    for k, (name, entry) in enumerate(everything.items()):
        on_progress(0.5 * k / len(everything), f"{case.name}: checking {entry.label}")
        try:
            checks[name] = entry.where.open(name, case)
            once = entry.where.time(name, 1)
            # Again, over a few: one call alone is mostly the clock and the way to it.
            once = entry.where.time(name, max(1, min(10, int(min_time * TURN_SHARE / once)))) if once < 0.01 else once
            calls[name] = max(1, round(min_time * TURN_SHARE / once))
        except CommandError as error:
            if _is_local(entry, everything):
                raise CommandError(f"{entry.label}: {case.name}: {error}") from None
            on_skip(name, f"{case.name}: {error}")
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        start = time.perf_counter()
        budget = min_time * len(names)
        for k in range(MAX_ROUNDS):
            spent = time.perf_counter() - start
            if k >= MIN_ROUNDS and spent >= budget:
                break
            # Everyone is first as often as last, so that drift of the machine hits all alike.
            turn = names[k % len(names) :] + names[: k % len(names)]
            for i, name in enumerate(turn if k % 2 == 0 else turn[::-1]):
                share = max(spent / budget, (k + i / len(names)) / MAX_ROUNDS)
                on_progress(0.5 + 0.5 * min(1.0, share), f"{case.name}: {everything[name].label}")
                time.sleep(PAUSE)
                try:
                    times[name].append(everything[name].where.time(name, calls[name]))
                except CommandError as error:  # its process is gone
                    on_skip(name, f"{case.name}: {error}")
                    names.remove(name)
    finally:
        rows += _rows(case, entries, limits, times, checks, calls)
    for where in {id(entry.where): entry.where for entry in everything.values()}.values():
        with contextlib.suppress(CommandError):  # that one is gone was said when it was
            where.close()


def _is_local(entry: Entry, everything: Mapping[str, Entry]) -> bool:
    limit = everything.get(LIMIT_SERIAL)
    return limit is None or entry.where is limit.where


def _rows(
    case: Case,
    entries: Mapping[str, Entry],
    limits: Mapping[str, Entry],
    times: Mapping[str, Sequence[float]],
    checks: Mapping[str, str],
    calls: Mapping[str, int],
) -> list[Row]:
    """A row for every way that was timed once at least."""
    bounds = {entry.threads: float(np.median(times[name])) for name, entry in limits.items() if times.get(name)}
    rows = []
    for name, entry in {**limits, **entries}.items():
        if not times.get(name):
            continue
        quarter, median, three_quarters = np.quantile(times[name], [0.25, 0.5, 0.75]).tolist()
        gparam, gbyte = rates(case.params, entry.moves * case.traffic, median)
        enough = min(bounds, default=np.inf) <= entry.threads
        rows.append(
            Row(
                kernel="limit" if name in (LIMIT_SERIAL, LIMIT_PARALLEL) else name,
                label=entry.label,
                dtype=case.dtype,
                arrays=case.arrays,
                shape="x".join(map(str, case.shape)),
                params=case.params,
                threads=entry.threads,
                seconds=median,
                quarter=quarter,
                three_quarters=three_quarters,
                rounds=len(times[name]),
                steps_in_a_turn=calls[name],
                gparam_per_s=gparam,
                gbyte_per_s=gbyte,
                percent_of_limit=percent_of_limit(median, entry.threads, bounds) if enough else float("nan"),
                check=checks[name],
            )
        )
    return rows
