"""The whole benchmark: all cases one after another, with their workers, and the document of results."""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fastrms.bench import device
from fastrms.bench.cases import Case, Network
from fastrms.bench.errors import BenchmarkError
from fastrms.bench.implementations import ROOFLINES, Implementation
from fastrms.bench.in_situ import TrainingRow, measure_training
from fastrms.bench.machine import Description
from fastrms.bench.measure import Entry, Progress, StepRow, measure
from fastrms.bench.quiet import Quiet
from fastrms.bench.workers import LocalWorker, RemoteWorker, first_line

__all__ = ["Output", "Results", "run_steps", "run_training"]

R = TypeVar("R", bound=Mapping[str, object])


@dataclass(frozen=True)
class Output(Generic[R]):
    """The functions that show the progress and the results of a benchmark."""

    on_progress: Progress  # with the number of cases done, fractions included
    on_rows: Callable[[str, Sequence[R]], None]  # with the title and the rows of a case, incomplete if interrupted
    on_left_out: Callable[[str, str], None]  # with the label of an implementation, and the reason


@dataclass
class Results(Generic[R]):
    """The rows of a benchmark, reasons for missing ones, and the number of complete cases."""

    rows: list[R] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    done: int = 0
    interrupted: bool = False

    def document(self, about: Description, quiet: Quiet, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the content of the JSON file: the machine, the settings and the rows, with None for NaN."""
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": about,
            "quiet": quiet.document(),
            "settings": dict(settings),
            "left_out": self.left_out,
            "complete": not self.interrupted,
            "results": [{key: None if value != value else value for key, value in row.items()} for row in self.rows],
        }

    @contextmanager
    def case(self, title: str, output: Output[R]) -> Iterator[Progress]:
        """Show the rows that the block appends, even if it is interrupted, and count the case if it is complete."""
        first = len(self.rows)
        try:
            yield lambda share, what: output.on_progress(self.done + share, what)
        finally:
            if len(self.rows) > first:
                output.on_rows(title, self.rows[first:])
        self.done += 1


def run_steps(
    cases: Sequence[Case], implementations: Mapping[str, Implementation], threads: int, *, min_time: float,
    timeout: float, with_device: bool, output: Output[StepRow],
) -> Results[StepRow]:  # fmt: skip
    """Time steps of all implementations beside the roofline; Ctrl-C ends the run and keeps its rows.

    `implementations` are by name, the user's own among them. `threads` limits implementations that may use many.
    `min_time` is in seconds, for each implementation on each case; `timeout` is in seconds, for one answer of a worker
    process. With `with_device` the GPU is timed too, and its rows are the last. Raise BenchmarkError if an
    implementation of fastrms or of the user's computes something else.
    """
    results, on_device = Results[StepRow](), Results[StepRow]()
    remotes: dict[str, RemoteWorker] = {}
    try:
        output.on_progress(0, "starting")
        local = LocalWorker(threads, implementations)

        def entry(implementation: Implementation) -> Entry:
            process = implementation.process
            if process != "here" and process not in remotes:
                remotes[process] = RemoteWorker(process, threads, timeout)
            many = threads if implementation.many_threads else 1
            worker = remotes.get(process, local)
            return Entry(implementation.label, many, worker, implementation.moves, implementation.bound)

        entries = {name: entry(implementation) for name, implementation in implementations.items()}
        rooflines = {name: entry(each) for name, each in ROOFLINES.items() if threads > 1 or not each.many_threads}

        def skip(name: str, case: Case, why: str) -> None:
            results.left_out[f"{name} ({case.name})"] = f"{case.name}: {why}"
            output.on_left_out(entries[name].label, f"{case.name}: {why}")

        for case in cases:
            fitting = {name: each for name, each in entries.items() if case.dtype in implementations[name].dtypes}
            with results.case(case.name, output) as progress:
                measure(case, fitting, rooflines, min_time, on_progress=progress, on_skip=skip, rows=results.rows)
            if with_device:
                try:
                    with on_device.case(f"{case.name}, on the GPU", output):
                        device.measure_device(case, min_time, on_device.rows)
                except BenchmarkError:
                    raise
                except Exception as error:  # of CUDA: too little memory, for instance
                    output.on_left_out(f"{case.name} on the GPU", first_line(error))
    except KeyboardInterrupt:
        results.interrupted = True
    finally:
        for remote in remotes.values():
            remote.end(0 if results.interrupted else 2)
    results.rows += on_device.rows
    return results


def run_training(
    networks: Sequence[Network], ways: Sequence[str], threads: int | None, min_time: float,
    output: Output[TrainingRow],
) -> Results[TrainingRow]:  # fmt: skip
    """Train all networks in all ways, as `measure_training` does; Ctrl-C ends the run and keeps its rows."""
    results = Results[TrainingRow]()
    try:
        for network in networks:
            with results.case(network.name, output) as progress:
                measure_training(network, ways, threads, min_time, on_progress=progress, rows=results.rows)
    except KeyboardInterrupt:
        results.interrupted = True
    return results
