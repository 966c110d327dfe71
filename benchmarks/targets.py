"""Measure and print the targets: the bound, the figure that was measured, and whether it is reached.

    python benchmarks/targets.py                   # all (some 12 minutes)
    python benchmarks/targets.py --only serial     # some of them; --help names the groups
    python benchmarks/targets.py --quick           # sizes up to 1e6 and little time, for trying it out
    python benchmarks/targets.py --from FILE       # from a file of results, without measuring

All are ratios, or differences, of medians in one run in which the sides take turns. The exit status is 0 also if a
target is missed, because that is a result.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import datetime
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent))
import bench_torch
from pages import markdown
from results import Results, TorchRow, read

sys.path.pop(0)

from fastrms.bench import machine, quiet
from fastrms.bench.cases import DTYPES, MANY_ARRAYS, NETWORKS, SIZES, Case, Network
from fastrms.bench.implementations import IMPLEMENTATIONS
from fastrms.bench.measure import StepRow
from fastrms.bench.run import Output, run_steps, run_training
from fastrms.kernels.threads import max_threads, start_threads

Value = Callable[[Results], float | None]


@dataclass(frozen=True)
class Target:
    """A figure that follows from results, and the bound that it has to keep."""

    what: str
    bound: float
    value: Value
    at_most: bool = False

    def row(self, runs: Sequence[Results]) -> list[str]:
        """The cells of the target's line: its name, the bound, and for each run the figure and the verdict."""
        cells = [self.what, f"{'≤' if self.at_most else '≥'} {self.bound:g}"]
        for run in runs:
            value = self.value(run)
            if value is None:
                cells.append("–")
            else:
                reached = value <= self.bound if self.at_most else value >= self.bound
                cells.append(f"{value:.3g} {'reached' if reached else '**missed**'}")
        return cells


@dataclass(frozen=True)
class Group:
    """Targets that are measured together: cases of a step with their ways, networks, and cases of bench_torch.py."""

    targets: list[Target]
    cases: tuple[Case, ...] = ()
    ways: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    torch: tuple[str, ...] = ()


def step(run: Results, case: Case, way: str) -> StepRow | None:
    """The row of a way on a case."""
    key = (way, case.dtype, case.arrays, "x".join(map(str, case.shape)))
    found = (row for row in run.steps if (row["kernel"], row["dtype"], row["arrays"], row["shape"]) == key)
    return next(found, None)


def faster(case: Case, ours: str, *theirs: str) -> Value:
    """How many times as fast `ours` is as the best of `theirs`."""

    def value(run: Results) -> float | None:
        mine, others = step(run, case, ours), [row for way in theirs if (row := step(run, case, way))]
        return min(row["seconds"] for row in others) / mine["seconds"] if mine and others else None

    return value


def later(case: Case, ours: str, theirs: str) -> Value:
    """How many microseconds `ours` takes more than `theirs`."""

    def value(run: Results) -> float | None:
        mine, other = step(run, case, ours), step(run, case, theirs)
        return 1e6 * (mine["seconds"] - other["seconds"]) if mine and other else None

    return value


def of_limit(case: Case, way: str) -> Value:
    """The fraction of the machine's limit."""

    def value(run: Results) -> float | None:
        row = step(run, case, way)
        return None if row is None or row["percent_of_limit"] is None else row["percent_of_limit"] / 100

    return value


def training(network: Network, gradients: str, key: Literal["times_faster", "over_no_optimizer"]) -> Value:
    """A ratio of whole training steps with the defaults."""
    wanted = (network.network, network.dtype, "auto", gradients)

    def value(run: Results) -> float | None:
        found = (row for row in run.training
                 if (row["network"], row["dtype"], row["kernel"], row["gradients"]) == wanted)  # fmt: skip
        return next((row[key] for row in found), None)

    return value


def beside_torch(name: str, busy: bool, one_thread: bool) -> Value:
    """How many times as fast the adapter is as the better of PyTorch's settings."""

    def value(run: Results) -> float | None:
        wanted = (name, busy, one_thread)
        found = (row for row in run.torch if (row["case"], row["busy"], row.get("one_thread", False)) == wanted)
        return next((row["ratio"] for row in found), None)

    return value


def flat(size: int, dtype: str) -> Case:
    """One array."""
    return Case(1, (size,), dtype)


def power(size: int) -> str:
    """A size as in 5e7."""
    return f"{size:.0e}".replace("e+0", "e")


NAIVE = {"serial": "naive", "parallel": "naive-parallel"}
KINDS = {"": "`step()`", "-list": "`step(list)`"}
# Settings of measurements next to PyTorch: whether another program runs, and whether PyTorch uses one thread. Next to
# another program PyTorch's own threads decide the time of a step by chance, with every optimizer. With one thread the
# optimizers can be compared.
TORCH_SETTINGS = {
    "": (False, False), ", busy machine": (True, False), ", busy machine, PyTorch with one thread": (True, True)
}  # fmt: skip
SMALL, LARGE = SIZES[:2], SIZES[2:]
SAME_BYTES = {"tensorplay": "TensorPlay", "torch-adagrad": "torch fused Adagrad"}
MIDDLE, BIG = "784-512-512-10", "784-2048-2048-10"


def against_naive(kernel: str) -> Group:
    """A kernel against its naive loop, from 1e5 elements on."""
    cases = tuple(flat(size, dtype) for dtype in DTYPES for size in LARGE)
    naive = NAIVE[kernel]
    targets = [
        Target(f"{power(case.params)} {case.dtype}, {kernel} {text} against the {IMPLEMENTATIONS[naive].label}", 0.97,
               faster(case, kernel + kind, naive))
        for kind, text in KINDS.items() for case in cases
    ]  # fmt: skip
    return Group(targets, cases, (kernel, f"{kernel}-list", naive))


def small() -> Group:
    """Microseconds of a call that the naive loop does not take."""
    cases = tuple(flat(size, dtype) for dtype in DTYPES for size in SMALL)
    targets = [
        Target(f"{power(case.params)} {case.dtype}, {kernel} {text}: µs more than the {IMPLEMENTATIONS[naive].label}",
               1.0 if kind else 0.5, later(case, kernel + kind, naive), at_most=True)
        for kernel, naive in NAIVE.items() for kind, text in KINDS.items() for case in cases
    ]  # fmt: skip
    return Group(targets, cases, tuple(way for k, naive in NAIVE.items() for way in (k, f"{k}-list", naive)))


def lists() -> Group:
    """Large lists against the buffer."""
    cases = tuple(flat(size, dtype) for dtype in DTYPES for size in LARGE[1:])
    targets = [
        Target(f"{power(case.params)} {case.dtype}, {kernel} `step(list)` against `step()`", 0.97,
               faster(case, f"{kernel}-list", kernel))
        for kernel in NAIVE for case in cases
    ]  # fmt: skip
    return Group(targets, cases, tuple(way for kernel in NAIVE for way in (kernel, f"{kernel}-list")))


def limit() -> Group:
    """The largest arrays against the limit of the machine."""
    cases = tuple(flat(SIZES[-1], dtype) for dtype in DTYPES)
    targets = [Target(f"{power(case.params)} {case.dtype}, parallel: fraction of the limit", 0.95,
                      of_limit(case, "parallel")) for case in cases]  # fmt: skip
    return Group(targets, cases, ("parallel",))


def same_bytes() -> Group:
    """The defaults against the other fused kernels that move the same bytes."""
    cases = tuple(flat(size, "float32") for size in LARGE)
    targets = [
        Target(f"{power(case.params)} float32, auto `step(list)` against {label}", 1.0, faster(case, "auto-list", way))
        for way, label in SAME_BYTES.items()
        for case in cases
    ]
    return Group(targets, cases, ("auto-list", *SAME_BYTES))


def arrays() -> Group:
    """Many arrays against the same kernels."""
    hundred, thousand = Case(100, (100, 100), "float32"), Case(*MANY_ARRAYS, "float32")
    targets = [Target("100 × 100x100 float32, auto `step(list)` against TensorPlay", 4.0,
                      faster(hundred, "auto-list", "tensorplay"))]  # fmt: skip
    targets += [Target(f"1,000 × 10x10 float32, auto `step(list)` against {label}", 90.0,
                       faster(thousand, "auto-list", way)) for way, label in SAME_BYTES.items()]  # fmt: skip
    targets.append(Target("1,000 × 10x10 float32, auto `step(list)`: times the best of `step()`", 1.3,
                          _slower_than_buffer(thousand), at_most=True))  # fmt: skip
    return Group(targets, (hundred, thousand), ("auto", "auto-list", "serial", "parallel", *SAME_BYTES))


def _slower_than_buffer(case: Case) -> Value:
    speed = faster(case, "auto-list", "auto", "serial", "parallel")
    return lambda run: None if (value := speed(run)) is None else 1 / value


def in_situ() -> Group:
    """Whole training steps against the same steps without an optimizer."""
    bounds = {"float32": (1.13, 1.10), "float64": (1.25, 1.18)}
    networks = tuple(Network(name, NETWORKS[name], dtype) for dtype in DTYPES for name in (MIDDLE, BIG))
    targets = [
        Target(f"training step of {each.name}, {text}: times the step without an optimizer", bounds[each.dtype][k],
               training(each, gradients, "over_no_optimizer"), at_most=True)
        for each in networks for k, (gradients, text) in enumerate({"list": "lists", "buffer": "`opt.grads`"}.items())
    ]  # fmt: skip
    return Group(targets, networks=networks)


def torch_adapter() -> Group:
    """Whole training steps of the adapter, also next to another program."""
    names = tuple(name for name in bench_torch.CASES if name.startswith("training step"))
    targets = [Target(f"torch adapter, {name}{setting}", 1.0, beside_torch(name, busy, one_thread))
               for setting, (busy, one_thread) in TORCH_SETTINGS.items() for name in names]  # fmt: skip
    return Group(targets, torch=names)


def reference() -> Group:
    """The defaults against NumPy and the other libraries."""
    big, middle, tiny = (flat(size, "float32") for size in (SIZES[-1], 100_000, 1_000))
    many = Case(*MANY_ARRAYS, "float32")
    torch = ("torch", "torch-foreach")
    names = {"reference": "the reference class", "torch": "torch.optim's best", "optax": "optax under jit",
             "torch-compile": "torch.compile"}  # fmt: skip
    bounds = [
        (big, "parallel", {"reference": 14.0, "torch": 4.0, "optax": 1.6, "torch-compile": 0.97}),
        (middle, "auto", {"reference": 5.0, "torch": 3.0, "torch-compile": 2.0}),
        (tiny, "auto", {"reference": 2.5}),
        (many, "auto-list", {"reference": 45.0, "torch": 30.0, "torch-compile": 35.0, "optax": 45.0}),
        (many, "auto", {"reference": 70.0}),
    ]
    targets = [
        Target(f"{case.name}, {way} against {names[theirs]}", bound,
               faster(case, way, *(torch if theirs == "torch" else (theirs,))))
        for case, way, found in bounds for theirs, bound in found.items()
    ]  # fmt: skip
    targets.append(Target("5e7 float32, parallel with 16-bit state against float32", 1.15,
                          faster(big, "parallel-bfloat16", "parallel")))  # fmt: skip
    networks = tuple(Network(name, NETWORKS[name], "float32") for name in (MIDDLE, BIG))
    steps = {"list": (1.8, 2.3), "buffer": (1.9, 2.7)}
    targets += [Target(f"training step of {each.name}, {gradients}, against the reference class", steps[gradients][k],
                       training(each, gradients, "times_faster"))
                for gradients in steps for k, each in enumerate(networks)]  # fmt: skip
    ways = ("auto", "auto-list", "parallel", "parallel-bfloat16", "reference", "optax", "torch-compile", *torch)
    return Group(targets, (big, middle, tiny, many), ways, networks)


GROUPS: dict[str, Group] = {
    "serial": against_naive("serial"),
    "parallel": against_naive("parallel"),
    "small": small(),
    "lists": lists(),
    "limit": limit(),
    "same-bytes": same_bytes(),
    "arrays": arrays(),
    "in-situ": in_situ(),
    "torch": torch_adapter(),
    "reference": reference(),
}


def table(runs: Sequence[Results], groups: Sequence[str] = tuple(GROUPS)) -> str:
    """The targets as a table in Markdown, with a column for each run."""
    rows = [target.row(runs) for name in groups for target in GROUPS[name].targets]
    return markdown(["target", "", *(run.processor for run in runs)], rows)


def measure(groups: Sequence[str], min_time: float, quick: bool) -> Results:
    """Measure what the targets of some groups need."""
    start_threads()
    threads = max_threads()
    state = quiet.look(threads)
    for warning in state.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    settings = {"threads": threads, "min_time": min_time, "quick": quick}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run = Results(date, machine.describe(), state.document(), settings)
    output = Output(
        lambda share, what: None,
        lambda title, rows: print(f"measured: {title}", file=sys.stderr, flush=True),
        lambda what, why: print(f"left out: {what}: {why}", file=sys.stderr),
    )
    for cases, ways in _plan(groups, quick):
        implementations = {way: each for way, each in IMPLEMENTATIONS.items() if way in ways and not each.missing()}
        found = run_steps(cases, implementations, threads, min_time=min_time, timeout=600, with_device=False,
                          output=output)  # fmt: skip
        run.steps += found.rows
        run.left_out |= found.left_out
        _stop_if(found.interrupted)
    networks = list(dict.fromkeys(network for name in groups for network in GROUPS[name].networks))
    if networks:
        trained = run_training(networks, ("auto",), None, min_time, output)
        run.training += trained.rows
        _stop_if(trained.interrupted)
    names = list(dict.fromkeys(case for name in groups for case in GROUPS[name].torch))
    run.torch += beside_torch_rows(names, 1.0 if quick else 7 * min_time) if names else []
    return run


def _plan(groups: Sequence[str], quick: bool) -> list[tuple[list[Case], tuple[str, ...]]]:
    """Cases that are measured together, since they have the same ways; each case once."""
    ways: dict[Case, dict[str, None]] = {}
    for name in groups:
        for case in GROUPS[name].cases:
            if not quick or case.params <= 1_000_000:
                ways.setdefault(case, {}).update(dict.fromkeys(GROUPS[name].ways))
    together: dict[tuple[str, ...], list[Case]] = {}
    for case, needed in ways.items():
        together.setdefault(tuple(needed), []).append(case)
    return [(cases, needed) for needed, cases in together.items()]


def _stop_if(interrupted: bool) -> None:
    if interrupted:
        raise KeyboardInterrupt


def beside_torch_rows(names: Sequence[str], seconds: float) -> list[TorchRow]:
    """Cases of bench_torch.py in each of `TORCH_SETTINGS`; none if torch is not installed."""
    if IMPLEMENTATIONS["torch"].missing():
        return []
    rows = []
    for setting, (busy, one_thread) in TORCH_SETTINGS.items():
        for name in names:
            with _another_program(busy), _one_thread_of_torch(one_thread):
                rows.append(bench_torch.result(name, bench_torch.measure(name, seconds), busy, one_thread))
            print(f"measured: {name}{setting}", file=sys.stderr, flush=True)
    return rows


@contextmanager
def _one_thread_of_torch(wanted: bool) -> Iterator[None]:
    """Let PyTorch use one thread inside the block, or as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _another_program(busy: bool) -> Iterator[None]:
    """Keep one processor busy with another process inside the block, or none."""
    if not busy:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _spin() -> None:
    parent = os.getppid()
    while os.getppid() == parent:  # the program that measures may be killed
        pass


def main(argv: list[str] | None = None) -> int:
    """Measure or read, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=tuple(GROUPS), default=tuple(GROUPS), help="some groups of targets"
    )
    parser.add_argument("--quick", action="store_true", help="sizes up to 1e6 and little time")
    parser.add_argument("--min-time", type=float, default=2.0, metavar="S", help="for each way (default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a file of results, not to measure")
    args = parser.parse_args(argv)
    run = read(args.source) if args.source else measure(args.only, 0.1 if args.quick else args.min_time, args.quick)
    print(f"{run.processor}, {run.machine['processors']} processors, {run.date[:10]}\n")
    print(table([run], args.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
