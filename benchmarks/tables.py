"""Write the tables of results into README.md and docs/performance.md, and print the targets.

    python benchmarks/tables.py             # measure (some 20 minutes), write, print
    python benchmarks/tables.py --quick     # a few minutes, for trying it out
    python benchmarks/tables.py --from DIR  # write again what was measured before and kept with --keep DIR

A table goes between ``<!-- table: NAME -->`` and ``<!-- end -->``; what else is on a page stays. No number on those
pages is written by hand.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrms.bench.cases import MANY_ARRAYS
from fastrms.plots import format_seconds

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

# What is run, each in a process of its own.
RUNS = {
    "flat": [],
    "arrays": ["--arrays", str(MANY_ARRAYS[0]), "--shape", *map(str, MANY_ARRAYS[1])],
    "in-situ": ["--in-situ"],
}
# Training with 16-bit state, which is no time.
TRAINING = Path(__file__).parent / "bench_bfloat16.py"
# What each of them writes.
FILES = {
    "flat": "fastrms-bench.json",
    "arrays": "fastrms-bench.json",
    "in-situ": "fastrms-bench-in-situ.json",
    "bfloat16": "training.json",
}

OURS = ("auto", "auto-list", "serial", "parallel", "parallel-bfloat16", "numpy")

Results = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure or read, write, print; exit status 0 also where a target is missed, which is a result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="with fewer cases and less time")
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="do not measure; read what is there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to leave what was measured")
    parser.add_argument("--pages", nargs="+", type=Path, default=PAGES, help="where to write (default: README, docs)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.source or args.keep or Path(temporary)
        if args.source is None:
            measure(folder, args.quick)
        results = {name: json.loads((folder / name / FILES[name]).read_text(encoding="utf-8")) for name in FILES}
    written = fill(args.pages, tables(results))
    print(f"\nwritten: {', '.join(written) or 'nothing, no page has a marker'}\n")
    print(targets_table(results))
    return 0


def measure(folder: Path, quick: bool) -> None:
    """Run `fastrms bench` for each of `RUNS`."""
    for name, arguments in RUNS.items():
        more = ["--quick"] if quick else ["--min-time", "2"]
        command = [sys.executable, "-m", "fastrms", "bench", *arguments, *more, "--output", str(folder / name)]
        print("\n$", *command[1:], flush=True)
        subprocess.run(command, check=True)
    path = folder / "bfloat16" / FILES["bfloat16"]
    path.parent.mkdir(parents=True, exist_ok=True)
    print("\n$", TRAINING, path, flush=True)
    subprocess.run([sys.executable, str(TRAINING), str(path)], check=True)


def fill(pages: tuple[Path, ...] | list[Path], parts: dict[str, str]) -> list[str]:
    """Write each table between its markers, wherever they are, and return where that was."""
    written = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"<!-- table: (\S+) -->", text):
            if name not in parts:
                raise SystemExit(f"{page}: table: expected one of {', '.join(parts)}, got {name!r}")
            marker = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
            text, found = re.subn(marker, lambda m, n=name: f"{m[1]}\n{parts[n]}\n\n{m[2]}", text, flags=re.DOTALL)
            if not found:
                raise SystemExit(f"{page}: table {name}: expected <!-- end --> after it, found none")
            written.append(f"{name} in {page.name}")
        page.write_text(text, encoding="utf-8")
    return written


def tables(results: Results) -> dict[str, str]:
    """All tables by name, as Markdown."""
    return {
        "machine": machine(results["flat"]),
        "in-situ": in_situ(results["in-situ"]["results"]),
        "float32": flat(results["flat"]["results"], "float32"),
        "float64": flat(results["flat"]["results"], "float64"),
        "limit": limit(results["flat"]["results"]),
        "arrays": flat(results["arrays"]["results"], "float32"),
        "bfloat16": training(results["bfloat16"]),
        "losses": losses(results),
        "targets": targets_table(results),
        "summary": summary(results),
    }


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table with its first column flush left and numbers flush right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def machine(run: dict[str, Any]) -> str:
    """What it was measured on, with and when."""
    about = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    settings = ", ".join(f"{name}={value}" for name, value in about["environment"].items()) or "none that matters"
    quick = " **A quick run, to try the tables out: not for comparing.**" if run["settings"]["quick"] else ""
    return (
        f"Measured on {run['date'][:10]} on {about['processor']}, {about['processors']} processors, {about['system']}; "
        f"{versions}; BLAS {'; '.join(about['blas'])}; threading layer {about['threading_layer']}, "
        f"{run['settings']['threads']} threads. Environment: {settings}.{quick}"
    )


def cell(row: dict[str, Any], key: str = "seconds") -> str:
    """A time, and half of the middle half of all times in percent."""
    spread = 50 * (row["three_quarters"] - row["quarter"]) / row[key]
    return f"{format_seconds(row[key])} ± {spread:.0f} %"


def flat(rows: list[dict[str, Any]], dtype: str) -> str:
    """Times of a step: a row for each way, a column for each case; bold where it beats what we do by default."""
    rows = [row for row in rows if row["dtype"] == dtype]
    if not rows:
        return f"(No {dtype} in this run.)"
    cases = list(dict.fromkeys((row["arrays"], row["shape"]) for row in rows))
    found = {(row["label"], row["threads"], row["arrays"], row["shape"]): row for row in rows}
    body = []
    for label, threads in dict.fromkeys((row["label"], row["threads"]) for row in rows):
        line = [label if label != "limit of this machine" else f"{label}, {threads} thread{'s' * (threads > 1)}"]
        for case in cases:
            row = found.get((label, threads, *case))
            lost = row is not None and beats_us(row, rows)
            line.append("–" if row is None else f"**{cell(row)}**" if lost else cell(row))
        body.append(line)
    names = [f"{int(shape):,}" if arrays == 1 else f"{arrays:,} × {shape}" for arrays, shape in cases]
    return markdown([f"{dtype}, a step", *names], body)


def ours_for(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Our default on the same case: with the gradients as other ways get them."""
    same = [r for r in rows if all(r[key] == row[key] for key in ("arrays", "shape", "dtype"))]
    by_kernel = {r["kernel"]: r for r in same}
    return by_kernel.get("auto-list", by_kernel.get("auto"))


def beats_us(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether another library's time is below that of our default."""
    ours = ours_for(row, rows)
    return row["kernel"] not in (*OURS, "limit") and ours is not None and row["seconds"] < ours["seconds"]


def limit(rows: list[dict[str, Any]]) -> str:
    """Percent of the machine's limit."""
    rows = [row for row in rows if row["kernel"] != "limit"]
    cases = list(dict.fromkeys((row["dtype"], row["params"]) for row in rows))
    body = []
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {(r["dtype"], r["params"]): r["percent_of_limit"] for r in rows if r["label"] == label}
        body.append([label, *(f"{found[case]:.0f}" if found.get(case) is not None else "–" for case in cases)])
    return markdown(["% of the limit", *(f"{size:,} {dtype}" for dtype, size in cases)], body)


def in_situ(rows: list[dict[str, Any]]) -> str:
    """Whole training steps."""
    body = []
    for row in rows:
        base = row["kernel"] == "reference"
        body.append(
            [
                f"{row['network']}, {row['dtype']}" if base else "",
                "reference class" if base else f"fastrms {row['kernel']}",
                row["gradients"],
                cell(row, "step_seconds"),
                format_seconds(row["optimizer_seconds"]),
                f"{row['times_faster']:.2f}×",
            ]
        )
    return markdown(["network", "optimizer", "gradients", "training step", "of which optimizer", "faster"], body)


def training(rows: list[dict[str, Any]]) -> str:
    """What 16-bit state does to training: mean and standard deviation over seeds."""
    body = []
    for row in rows:
        figures = map("{:.4f} ± {:.4f}".format, row["mean"], row["deviation"])
        body.append([row["setting"], row["cache"], *figures])
    seeds = rows[0]["seeds"]
    return markdown([f"digits, {seeds} seeds", "cache", "training loss", "test loss", "test accuracy"], body)


def losses(results: Results) -> str:
    """Every cell in which somebody else is faster than what we do by default."""
    lines = []
    for name in ("flat", "arrays"):
        rows = results[name]["results"]
        for row in rows:
            if beats_us(row, rows):
                ours = ours_for(row, rows)
                assert ours is not None
                what = f"{row['arrays']:,} × {row['shape']}, {row['dtype']}"
                lines.append([what, row["label"], cell(row), cell(ours), f"{ours['seconds'] / row['seconds']:.2f}×"])
    for row in results["in-situ"]["results"]:
        if row["kernel"] != "reference" and row["times_faster"] < 1:
            what = f"{row['network']}, {row['dtype']}, gradients as {row['gradients']}"
            theirs = next(r for r in results["in-situ"]["results"] if r["kernel"] == "reference"
                          and all(r[key] == row[key] for key in ("network", "dtype")))  # fmt: skip
            label = f"reference class, against kernel {row['kernel']}"
            times = [cell(theirs, "step_seconds"), cell(row, "step_seconds")]
            lines.append([what, label, *times, f"{1 / row['times_faster']:.2f}×"])
    if not lines:
        return "None in this run."
    return markdown(["case", "who is faster", "their time", "ours", "by"], lines)


def summary(results: Results) -> str:
    """The few numbers for a first page: whole training steps with the defaults, float32."""
    body = []
    for row in results["in-situ"]["results"]:
        if row["kernel"] == "reference" and row["dtype"] == "float32":
            mine = {
                r["gradients"]: r
                for r in results["in-situ"]["results"]
                if (r["network"], r["dtype"], r["kernel"]) == (row["network"], "float32", "auto")
            }
            faster = [f"{format_seconds(mine[g]['step_seconds'])} ({mine[g]['times_faster']:.2f}×)" for g in mine]
            body.append([row["network"], format_seconds(row["step_seconds"]), *faster])
    header = ["a training step of", "NumPy reference", "fastrms, `step(list)`", "fastrms, gradients in `opt.grads`"]
    return markdown(header, body)


def _flat_ratio(run: str, params: int, ours: str, *theirs: str) -> Callable[[Results], float | None]:
    """How many times as fast `ours` is as the best of `theirs`; or, for "limit", the fraction of the limit."""

    def value(results: Results) -> float | None:
        rows = [r for r in results[run]["results"] if r["params"] == params and r["dtype"] == "float32"]
        mine = [r for r in rows if r["kernel"] == ours]
        others = [r["seconds"] for r in rows if r["kernel"] in theirs]
        if not mine or not others:
            return None
        return mine[0]["percent_of_limit"] / 100 if theirs == ("limit",) else min(others) / mine[0]["seconds"]

    return value


def _in_situ_ratio(network: str, gradients: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        for row in results["in-situ"]["results"]:
            key = (row["network"], row["dtype"], row["kernel"], row["gradients"])
            if key == (network, "float32", "auto", gradients):
                return float(row["times_faster"])
        return None

    return value


MIDDLE, LARGE = "784-512-512-10", "784-2048-2048-10"
TORCH = ("torch", "torch-foreach")
BIG, SMALL, TINY = 50_000_000, 100_000, 1_000

# What is to be reached, with 2 processors: what, at least, and how it follows from the results.
TARGETS: list[tuple[str, float, Callable[[Results], float | None]]] = [
    (f"training step of {MIDDLE}, lists, against the reference class", 1.8, _in_situ_ratio(MIDDLE, "list")),
    (f"training step of {LARGE}, lists", 2.3, _in_situ_ratio(LARGE, "list")),
    (f"training step of {MIDDLE}, gradients in `opt.grads`", 1.9, _in_situ_ratio(MIDDLE, "buffer")),
    (f"training step of {LARGE}, gradients in `opt.grads`", 2.7, _in_situ_ratio(LARGE, "buffer")),
    ("5e7, parallel: fraction of the limit", 0.92, _flat_ratio("flat", BIG, "parallel", "limit")),
    ("5e7, parallel, against the reference class", 14, _flat_ratio("flat", BIG, "parallel", "reference")),
    ("5e7, parallel, against torch.optim's best", 4, _flat_ratio("flat", BIG, "parallel", *TORCH)),
    ("5e7, parallel, against optax under jit", 1.6, _flat_ratio("flat", BIG, "parallel", "optax")),
    ("5e7, parallel, against torch.compile", 0.97, _flat_ratio("flat", BIG, "parallel", "torch-compile")),
    ("5e7, parallel, with `cache_dtype=\"bfloat16\"`, against float32", 1.15,
     _flat_ratio("flat", BIG, "parallel-bfloat16", "parallel")),
    ("1e5 against the reference class", 5, _flat_ratio("flat", SMALL, "auto", "reference")),
    ("1e5 against torch.optim's best", 3, _flat_ratio("flat", SMALL, "auto", *TORCH)),
    ("1e5 against torch.compile", 2, _flat_ratio("flat", SMALL, "auto", "torch-compile")),
    ("1,000 in one array, `step()`, against the reference class", 2.5, _flat_ratio("flat", TINY, "auto", "reference")),
    ("1,000 × 10x10, `step(list)`, against the reference class", 45,
     _flat_ratio("arrays", SMALL, "auto-list", "reference")),
    ("1,000 × 10x10, `step(list)`, against torch.optim's best", 30, _flat_ratio("arrays", SMALL, "auto-list", *TORCH)),
    ("1,000 × 10x10, `step(list)`, against torch.compile", 35,
     _flat_ratio("arrays", SMALL, "auto-list", "torch-compile")),
    ("1,000 × 10x10, `step(list)`, against optax under jit", 45, _flat_ratio("arrays", SMALL, "auto-list", "optax")),
    ("1,000 × 10x10, in `opt.grads`, against the reference class", 70,
     _flat_ratio("arrays", SMALL, "auto", "reference")),
]  # fmt: skip


def targets_table(results: Results) -> str:
    """Each target with what was reached."""
    body = []
    for what, least, of in TARGETS:
        value = of(results)
        verdict = "not in this run" if value is None else "reached" if value >= least else "**missed**"
        body.append([what, f"{least:g}", "–" if value is None else f"{value:.3g}", verdict])
    return markdown(["float32", "at least", "measured", ""], body)


if __name__ == "__main__":
    sys.exit(main())
