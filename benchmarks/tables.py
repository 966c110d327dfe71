"""Measure, keep the results of this machine, and write the pages below and README's picture from the results of all.

    python benchmarks/tables.py           # measure (some 40 minutes), keep in benchmarks/results/, write the pages
    python benchmarks/tables.py --write   # write the pages from the files that are there
    python benchmarks/tables.py --quick   # try it out, for some minutes: print the tables, keep and write nothing

A table goes between ``<!-- table: NAME -->`` and ``<!-- end -->``; everything else on a page stays. No number on those
pages is written by hand. A page shows the newest results of each machine.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bench_torch
import targets
from pages import fill, markdown
from results import FOLDER, Results, newest, save

sys.path.pop(0)

from fastrms.bench import naive
from fastrms.bench.cases import MANY_ARRAYS, Case
from fastrms.bench.implementations import OURS
from fastrms.bench.in_situ import LABELS, TrainingRow
from fastrms.bench.measure import StepRow
from fastrms.plots import format_seconds

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "should-i-use.md", ROOT / "docs" / "performance.md")
# README's picture, drawn from the page of tables.
PICTURE, PICTURES = "training_steps", ROOT / "docs" / "pictures.py"

# The runs of `fastrms bench`, each in a process of its own, the file that each writes, and its options.
STEPS, TRAINING = "fastrms-bench.json", "fastrms-bench-in-situ.json"
RUNS = {
    "flat": (STEPS, []),
    "thousand": (STEPS, ["--arrays", str(MANY_ARRAYS[0]), "--shape", *map(str, MANY_ARRAYS[1]), "--dtypes", "float32"]),
    "hundred": (STEPS, ["--arrays", "100", "--shape", "100", "100", "--dtypes", "float32"]),
    "in-situ": (TRAINING, ["--in-situ"]),
    "in-situ-with-sleep": (TRAINING, ["--in-situ", "--networks", "784-512-512-10"]),
}
# Variables of the environment of a run.
ENVIRONMENT = {"in-situ-with-sleep": {"OPENBLAS_THREAD_TIMEOUT": "20"}}
# Training with 16-bit state, whose results are losses.
STATE = Path(__file__).parent / "bench_bfloat16.py"

# Another time is faster than ours from this factor on: less is noise.
MARGIN = 1.03


def main(argv: list[str] | None = None) -> int:
    """Measure or read, write, print; exit status 0 also if a target is missed, because that is a result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="do not measure")
    parser.add_argument("--quick", action="store_true", help="with fewer cases and less time; prints only")
    parser.add_argument("--min-time", type=float, default=2.0, metavar="S", help="for each way (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR", help="folder of the files of results")
    parser.add_argument("--pages", nargs="+", type=Path, default=PAGES, help="where to write (default: README, docs)")
    args = parser.parse_args(argv)
    if args.quick and not args.write:
        for name, text in tables([measure(args.min_time, quick=True)]).items():
            print(f"\n{name}\n\n{text}")
        return 0
    if not args.write:
        print(f"\nkept: {save(measure(args.min_time), args.results)}")
    runs = newest(args.results)
    if not runs:
        raise SystemExit(f"--results: {args.results}: expected files of results, found none")
    written = fill(args.pages, tables(runs))
    if args.pages == PAGES:
        subprocess.run([sys.executable, str(PICTURES), str(ROOT / "docs" / "_static"), PICTURE], check=True)
    print(f"\nwritten: {', '.join(written) or 'nothing, no page has a marker'}\n")
    print(targets.table(runs))
    return 0


def measure(min_time: float, quick: bool = False) -> Results:
    """Run everything on this machine."""
    documents = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, arguments) in RUNS.items():
            more = ["--quick"] if quick else ["--min-time", str(min_time)]
            output = Path(folder) / name
            command = [sys.executable, "-m", "fastrms", "bench", *arguments, *more, "--output", str(output)]
            print("\n$", *command[1:], flush=True)
            subprocess.run(command, check=True, env=os.environ | ENVIRONMENT.get(name, {}))
            documents[name] = json.loads((output / file).read_text(encoding="utf-8"))
        path = Path(folder) / "state.json"
        print("\n$", STATE, flush=True)
        subprocess.run([sys.executable, str(STATE), str(path), *(["--quick"] if quick else [])], check=True)
        state = json.loads(path.read_text(encoding="utf-8"))
    first = documents["flat"]
    steps = [row for name in ("flat", "thousand", "hundred") for row in documents[name]["results"]]
    trained = [name for name in bench_torch.CASES if name.startswith("training step")]
    return Results(
        first["date"], first["machine"], first["quiet"], {**first["settings"], "quick": quick}, steps=steps,
        training=documents["in-situ"]["results"], training_with_sleep=documents["in-situ-with-sleep"]["results"],
        state=state, left_out=first["left_out"],
        torch=targets.beside_torch_rows(trained, 1.0 if quick else 7 * min_time),
    )  # fmt: skip


def tables(runs: Sequence[Results]) -> dict[str, str]:
    """All tables by name, as Markdown; large tables are one for each machine, one below the other."""

    def each(make: Callable[[Results], str]) -> str:
        found = {run.processor: text for run in runs if (text := make(run))}
        return "\n\n".join(f"**{name}**\n\n{text}" for name, text in found.items()) or "(Not in these runs.)"

    return {
        "machine": "\n".join(map(machine, runs)),
        "naive": loops(),
        "naive-serial": loops(only=naive.naive.py_func),
        "against-naive": against_naive(runs),
        "in-situ": each(lambda run: in_situ(run.training)),
        "in-situ-with-sleep": each(lambda run: in_situ(run.training_with_sleep)),
        "float32": each(lambda run: steps(run, "float32")),
        "float64": each(lambda run: steps(run, "float64")),
        "limit": each(limit),
        "arrays": each(lambda run: steps(run, "float32", many=True)),
        "bfloat16": each(state),
        "losses": each(losses),
        "targets": targets.table(runs),
        "summary": summary(runs),
        "range": speedups(runs),
        "worth": worth(runs),
    }


def loops(only: Callable[..., None] | None = None) -> str:
    """The source of the naive loops, or of one of them, without the list of public names."""
    if only is not None:
        return f"```python\nimport numpy as np\nfrom numba import njit\n\n\n{inspect.getsource(only).rstrip()}\n```"
    source = inspect.getsource(naive).partition("\n\n")[2]
    code = re.sub(r"__all__ = .*\n\n", "", source).rstrip()
    return f"```python\n{code}\n```"


def machine(run: Results) -> str:
    """The machine, its software and the date."""
    about = run.machine
    caches = ", ".join(f"{level} {size}" for level, size in about["caches"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    found = ", ".join(f"{name}={value}" for name, value in about["environment"].items())
    variables = f"Environment variables: {found}." if found else "No relevant environment variables set."
    warnings = "".join(f" **Warning: {warning}.**" for warning in run.quiet.get("warnings", ()))
    quick = " **A quick run, to try the tables out: not for comparing.**" if run.quick else ""
    note = f" {run.note}" if run.note else ""
    return (
        f"- **{run.processor}**, {run.date[:10]}: {about['processors']} processors, {caches}{', ' * bool(caches)}"
        f"{about['system']}; {versions}; BLAS {'; '.join(about['blas'])}; threading layer {about['threading_layer']}, "
        f"{run.settings['threads']} threads. {variables}{note}{warnings}{quick}"
    )


def cell(row: StepRow | TrainingRow, median: float) -> str:
    """A time, and half of the middle half of all times in percent."""
    return f"{format_seconds(median)} ± {50 * (row['three_quarters'] - row['quarter']) / median:.0f} %"


def case_of(row: StepRow) -> tuple[int, str, str]:
    """The case of a row; only rows of one case are compared."""
    return row["arrays"], row["shape"], row["dtype"]


def cases_of(rows: Sequence[StepRow]) -> list[tuple[int, str, str]]:
    """The cases of rows, by dtype and size."""
    sizes = {case_of(row): (row["dtype"], row["params"]) for row in rows}
    return sorted(sizes, key=lambda case: sizes[case])


def steps(run: Results, dtype: str, many: bool = False) -> str:
    """Times of a step: a row for each way, a column for each case; bold where a way beats ours."""
    rows = [row for row in run.steps if row["dtype"] == dtype and (row["arrays"] > 1) == many]
    if not rows:
        return ""
    cases = cases_of(rows)
    found = {(row["label"], row["threads"], case_of(row)): row for row in rows}
    body = []
    for label, threads in dict.fromkeys((row["label"], row["threads"]) for row in rows):
        line = [f"{label}, {threads} thread{'s' * (threads > 1)}" if label.startswith("limit") else label]
        for case in cases:
            row = found.get((label, threads, case))
            time = "–" if row is None else cell(row, row["seconds"])
            line.append(f"**{time}**" if row is not None and beaten(row, rows) else time)
        body.append(line)
    names = [f"{int(shape):,}" if arrays == 1 else f"{arrays:,} × {shape}" for arrays, shape, _ in cases]
    return markdown([f"{dtype}, a step", *names], body)


def beaten(row: StepRow, rows: Sequence[StepRow]) -> list[StepRow]:
    """Our defaults on the same case that this way beats by more than `MARGIN`.

    `auto` is compared with everything, our own kernels included, but for 16-bit state, which is another result;
    `auto-list` with our own kernels that get lists, and with other libraries.
    """
    kernel = row["kernel"]
    if kernel in ("limit", "auto", "auto-list", "parallel-bfloat16"):
        return []
    rivals = ["auto-list"] if kernel.endswith("-list") else ["auto"] if kernel in OURS else ["auto", "auto-list"]
    same = [each for each in rows if case_of(each) == case_of(row) and each["kernel"] in rivals]
    return [ours for ours in same if MARGIN * row["seconds"] < ours["seconds"]]


def limit(run: Results) -> str:
    """Percent of the machine's limit, and the bound that makes it."""
    rows = [row for row in run.steps if row["kernel"] != "limit" and row["arrays"] == 1]
    cases = cases_of(rows)
    if not rows:
        return ""
    bounds = {case_of(row): row["bound"] for row in rows if row["kernel"] in ("auto", "parallel")}
    body = [["bound for all threads", *(bounds.get(case, "–") for case in cases)]]
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {case_of(row): row["percent_of_limit"] for row in rows if row["label"] == label}
        body.append([label, *(f"{found[case]:.0f}" if found.get(case) is not None else "–" for case in cases)])
    return markdown(["% of the limit", *(f"{int(shape):,} {dtype}" for _, shape, dtype in cases)], body)


def against_naive(runs: Sequence[Results]) -> str:
    """How many times as fast as the naive loop our kernels are, machine beside machine."""
    pairs = {"serial": "naive", "parallel": "naive-parallel"}
    columns = [
        (run, ours, theirs, f"{run.processor}: {ours}")
        for run in runs if any(row["kernel"] == "naive" for row in run.steps)
        for kernel, theirs in pairs.items() for ours in (kernel, f"{kernel}-list")
    ]  # fmt: skip
    body = []
    for _, shape, dtype in cases_of([row for run, *_ in columns for row in run.steps if row["arrays"] == 1]):
        case = Case(1, (int(shape),), dtype)
        values = [targets.faster(case, ours, theirs)(run) for run, ours, theirs, _ in columns]
        body.append([f"{int(shape):,} {dtype}", *("–" if value is None else f"{value:.2f}×" for value in values)])
    header = ["times as fast as the naive loop", *(name.replace("-list", " list") for *_, name in columns)]
    return markdown(header, body) if body else "(Not in these runs.)"


def in_situ(rows: Sequence[TrainingRow]) -> str:
    """Whole training steps."""
    body = []
    for row in rows:
        over = row["over_no_optimizer"]
        body.append(
            [
                f"{row['network']}, {row['dtype']}" if row["kernel"] == "reference" else "",
                LABELS[row["kernel"]],
                row["gradients"],
                cell(row, row["step_seconds"]),
                format_seconds(row["optimizer_seconds"]),
                f"{row['times_faster']:.2f}×",
                "–" if over is None else f"{over:.2f}×",
            ]
        )
    header = ["network", "optimizer", "gradients", "training step", "optimizer's part", "speedup", "vs no optimizer"]
    return markdown(header, body) if body else ""


def state(run: Results) -> str:
    """The effect of 16-bit state on training: mean and standard deviation over seeds."""
    body = []
    for row in run.state:
        figures = map("{:.4f} ± {:.4f}".format, row["mean"], row["deviation"])
        body.append([row["setting"], row["cache"], *figures])
    header = ["cache", "training loss", "test loss", "test accuracy"]
    return markdown([f"digits, {run.state[0]['seeds']} seeds", *header], body) if body else ""


def losses(run: Results) -> str:
    """Every cell in which another way is faster than ours, with our default and theirs."""
    lines = []
    for row in run.steps:
        for ours in beaten(row, run.steps):
            what = f"{row['arrays']:,} × {row['shape']}, {row['dtype']}"
            times = [cell(each, each["seconds"]) for each in (row, ours)]
            lines.append([what, row["label"], ours["label"], *times, f"{ours['seconds'] / row['seconds']:.2f}×"])
    for row in run.training:
        for other in faster_trainings(row, run.training):
            what = f"training step of {row['network']}, {row['dtype']}, gradients as {row['gradients']}"
            times = [cell(each, each["step_seconds"]) for each in (other, row)]
            ratio = f"{row['step_seconds'] / other['step_seconds']:.2f}×"
            lines.append([what, LABELS[other["kernel"]], LABELS["auto"], *times, ratio])
    if not run.steps and not run.training:
        return ""
    header = ["case", "faster", "slower", "faster time", "slower time", "ratio"]
    return markdown(header, lines) if lines else "None in this run."


def faster_trainings(row: TrainingRow, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
    """Trainings of the same network with another optimizer that are faster than `auto` by more than `MARGIN`."""
    if row["kernel"] != "auto":
        return []
    return [
        other
        for other in rows
        if (other["network"], other["dtype"]) == (row["network"], row["dtype"])
        and (other["gradients"] == row["gradients"] or other["kernel"] == "reference")
        and other["kernel"] != "none"
        and MARGIN * other["step_seconds"] < row["step_seconds"]
    ]


def summary(runs: Sequence[Results]) -> str:
    """The few numbers for a first page: whole training steps with the defaults, float32."""
    body = []
    for run in runs:
        for base in trained(run, "reference", "float32"):
            mine = [row for row in trained(run, "auto", "float32") if row["network"] == base["network"]]
            faster = [f"{format_seconds(row['step_seconds'])} ({row['times_faster']:.2f}×)" for row in mine]
            part = [f"{base['optimizer_seconds'] / row['optimizer_seconds']:.1f}×" for row in mine]
            theirs = format_seconds(base["step_seconds"])
            body.append([run.processor, base["network"], theirs, *faster, " / ".join(part)])
    header = ["processor", "layers of the network", "NumPy class", "`step(list)`", "`step()`", "optimizer alone"]
    return markdown(header, body)


def trained(run: Results, kernel: str, dtype: str | None = None) -> list[TrainingRow]:
    """The rows of training steps with one optimizer, of one dtype or of all."""
    return [row for row in run.training if row["kernel"] == kernel and dtype in (None, row["dtype"])]


def ratios(run: Results, ours: str, theirs: str, *, part: bool = False) -> list[float]:
    """How many times as fast training steps are, or the optimizer's part of them, for each network and dtype."""

    def speed(row: TrainingRow) -> float:
        return 1 / row["optimizer_seconds"] if part else row["times_faster"]

    found = {(row["network"], row["dtype"], row["gradients"]): speed(row) for row in trained(run, theirs)}
    rows = [(row, "list" if theirs == "reference" else row["gradients"]) for row in trained(run, ours)]
    cases = [(speed(row), (row["network"], row["dtype"], gradients)) for row, gradients in rows]
    return [value / found[case] for value, case in cases if case in found]


def range_of(values: Sequence[float | None], form: str = ".2f") -> str:
    """The least and the greatest of some ratios, such as "1.22 to 2.47×"."""
    found = sorted(value for value in values if value is not None)
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (found[0], found[-1]))) + "×" if found else "–"


def speedups(runs: Sequence[Results]) -> str:
    """The one sentence for a first page: ranges over all machines, networks, dtypes and kinds of gradients."""
    whole, part = (
        range_of([value for run in runs for value in ratios(run, "auto", "reference", part=part)], ".1f").rstrip("×")
        for part in (False, True)
    )
    return (
        f"In the benchmarks, whole training steps are {whole} times as fast as with the NumPy code. The optimizer's "
        f"part alone is {part} times as fast."
    )


def worth(runs: Sequence[Results]) -> str:
    """What fastrms is compared with, and how many times as fast it is, machine beside machine."""
    small, large = (
        [Case(1, (size,), dtype) for size in sizes for dtype in ("float32", "float64")]
        for sizes in ((1_000, 10_000), (1_000_000, 10_000_000, 50_000_000))
    )
    many = [Case(*MANY_ARRAYS, "float32")]

    def isolated(cases: Sequence[Case], ours: Sequence[str], theirs: str) -> Callable[[Results], list[float | None]]:
        return lambda run: [targets.faster(case, way, theirs)(run) for case in cases for way in ours]

    def training(ours: str, theirs: str, *, part: bool = False) -> Callable[[Results], list[float]]:
        return lambda run: ratios(run, ours, theirs, part=part)

    serial = ("serial", "serial-list")
    rows: list[tuple[str, str, Callable[[Results], Sequence[float | None]]]] = [
        ("a training step", "the NumPy class", training("auto", "reference")),
        ("the optimizer's part of it", "the NumPy class", training("auto", "reference", part=True)),
        ("a training step", "the loop, called for each array", training("auto", "naive")),
        ("a training step with `parallel`", "the same with `serial`", training("parallel", "serial")),
        ("one flat array of 1,000 or 10,000 elements", "the loop", isolated(small, serial, "naive")),
        ("one flat array of 1,000,000 or more", "the loop", isolated(large, serial, "naive")),
        ("1,000 arrays of 10×10", "the NumPy class", isolated(many, serial, "reference")),
        ("1,000 arrays of 10×10", "the loop, called for each array", isolated(many, serial, "naive")),
    ]
    body = [[what, against, *(range_of(value(run)) for run in runs)] for what, against, value in rows]
    table = markdown(["times as fast with fastrms", "compared with", *(run.processor for run in runs)], body)
    return table.replace("---:", "---", 1)  # the second column is text


if __name__ == "__main__":
    sys.exit(main())
