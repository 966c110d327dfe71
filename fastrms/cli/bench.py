"""``fastrms bench``: options, tables and files of the benchmark in `fastrms.bench`."""

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastrms.bench import cases, device, machine, quiet
from fastrms.bench.implementations import IMPLEMENTATIONS, Implementation, of_function
from fastrms.bench.in_situ import LABELS, TrainingRow
from fastrms.bench.in_situ import WAYS as IN_SITU_WAYS
from fastrms.bench.measure import StepRow
from fastrms.bench.run import Output, Results, run_steps, run_training
from fastrms.cli.common import (
    CommandError,
    find_object,
    is_plain,
    make_console,
    make_folder,
    make_table,
    number,
    positive,
    print_table,
    require,
    save_figure,
    say,
    start_threads,
    whole_number,
    writing,
)  # fmt: skip
from fastrms.cli.progress import show_progress
from fastrms.kernels.threads import max_threads
from fastrms.plots import format_seconds, plot_throughput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["STEM", "STEM_IN_SITU", "add_command", "run"]

R = TypeVar("R", bound=Mapping[str, object])

STEM, STEM_IN_SITU = "fastrms-bench", "fastrms-bench-in-situ"

_DESCRIPTION = """
Time one RMSProp step over sizes and dtypes: kernels of fastrms, NumPy, and other libraries that are installed. Results
are first checked to be equal. Each time is compared with the limit of this machine on the same number of threads: the
time of the slower of two loops. One loop moves the same memory (20 bytes per float32 parameter). The other computes the
same square roots and divisions in the cache. If there is a GPU, further tables compare a step on the GPU with a copy of
the same number of bytes. Writes fastrms-bench.json, .csv and .png.
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``bench`` and its options to the subcommands."""
    parser = commands.add_parser(
        "bench",
        help="time kernels and other libraries, and compare them with the limit of this machine",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    sizes = " ".join(f"{size:.0e}".replace("+0", "") for size in cases.SIZES)
    add("--sizes", nargs="+", type=_count, metavar="N", help=f"elements of one flat array (default: {sizes})")
    add("--arrays", type=_count, metavar="N", help="time N small arrays instead of one flat array")
    add("--shape", nargs="+", type=whole_number(1), metavar="N", help=
        "with --arrays: shape of each array (default: 10 10)")  # fmt: skip
    add("--in-situ", action="store_true", help=
        "time whole training steps of networks, compared with the reference class")  # fmt: skip
    add("--networks", nargs="+", metavar="A-B-C",
        help=f"with --in-situ: layer widths joined by '-' (default: {' '.join(cases.NETWORKS)})")  # fmt: skip
    add("--dtypes", nargs="+", choices=cases.DTYPES, help="dtypes of all arrays (default: both, with --quick float32)")
    add("--kernels", nargs="+", choices=tuple(IMPLEMENTATIONS), metavar="NAME", help=
        f"implementations to time: {', '.join(IMPLEMENTATIONS)} (default: all that are installed)")  # fmt: skip
    add("--kernel", action="append", default=[], metavar="MODULE:FUNCTION", help=
        "also time your own kernel, called as f(params, grads, cache, lr, decay_rate, epsilon) with one array of each "
        "and Python floats; it must update params and cache in place")  # fmt: skip
    add("--threads", type=whole_number(1), metavar="N", help=
        "threads of each implementation that uses threads (default: as many as Numba)")  # fmt: skip
    add("--min-time", type=positive, metavar="S", help=
        "seconds of measurement per implementation and case (default: 1, with --quick 0.1)")  # fmt: skip
    add("--timeout", type=positive, default=300, metavar="S", help=
        "seconds to wait for an answer of another library (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, default=Path(), metavar="DIR", help=
        "folder for the results, created if it does not exist (default: the current folder)")  # fmt: skip
    add("--quick", action="store_true", help=
        "fewer and smaller cases, shorter measurements, no torch.compile; takes about a minute")  # fmt: skip
    parser.set_defaults(run=run)


def _whole(text: str) -> int:
    """Return the whole number that `text` gives, as 1000000 or 1e6, or 0."""
    value = float(text)
    return int(value) if value.is_integer() else 0


_count = number(_whole, lambda value: 1 <= value <= 1e12, "a whole number from 1 to 1e12, such as 1000000 or 1e6")


def run(args: argparse.Namespace) -> int:
    """Run ``fastrms bench`` and return 0.

    After Ctrl-C, raise a KeyboardInterrupt. Its message names the case, and says whether results are saved.
    """
    _check(args)
    require("bench", "rich", *([] if args.in_situ else ["matplotlib"]))
    stem, kinds = (STEM_IN_SITU, ["json", "csv"]) if args.in_situ else (STEM, ["json", "csv", "png"])
    make_folder(args.output, *(f"{stem}.{kind}" for kind in kinds))
    start_threads()
    limit = max_threads()
    if args.threads is not None and args.threads > limit:
        raise CommandError(
            f"--threads: expected at most {limit}, the number of threads that Numba started (NUMBA_NUM_THREADS), got "
            f"{args.threads}"
        )
    args.min_time = args.min_time or (0.1 if args.quick else 1.0)
    args.dtypes = args.dtypes or (["float32"] if args.quick else list(cases.DTYPES))
    console, threads = make_console(), args.threads or limit
    session = _Session(console, threads, machine.describe(), quiet.look(threads))
    for line in session.header():
        say(console, line)
    return (_run_training if args.in_situ else _run_steps)(args, session)


@dataclass(frozen=True)
class _Session:
    """The terminal, the number of threads, and the machine at the start."""

    console: "Console"
    threads: int
    about: machine.Description
    quiet: quiet.Quiet

    def header(self) -> Iterator[str]:
        """Yield lines about the machine, and warnings."""
        about = self.about
        sizes = ", ".join(f"{level} {size}" for level, size in about["caches"].items()) or "caches unknown"
        yield f"{about['processor']} ({about['microarchitecture']}), {about['processors']} processors; {sizes}"
        yield ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        load = "unknown" if self.quiet.load is None else f"{self.quiet.load:.2f}"
        yield f"{self.threads} threads, threading layer {about['threading_layer']}; load over the last minute: {load}"
        for warning in self.quiet.warnings():
            yield f"warning: {warning}"


def _run_steps(args: argparse.Namespace, session: _Session) -> int:
    console, threads = session.console, session.threads
    implementations, skipped = _choose(args)
    todo = _cases(args)
    for name, why in skipped.items():
        say(console, f"skipped: {IMPLEMENTATIONS[name].label}: {why}")
    with _output(console, len(todo), _step_table) as output:
        results = run_steps(
            todo, implementations, threads, min_time=args.min_time, timeout=args.timeout,
            with_device=args.kernels is None and device.can_measure(), output=output,
        )  # fmt: skip
    results.left_out = skipped | results.left_out
    paths = _write(args, STEM, results, session)
    if host_rows := [row for row in results.rows if row["threads"]]:
        paths.append(args.output / f"{STEM}.png")
        save_figure(plot_throughput(host_rows)[0], paths[-1])
    return _finish(console, paths, results, len(todo))


def _run_training(args: argparse.Namespace, session: _Session) -> int:
    console = session.console
    names = args.networks or (cases.QUICK_NETWORKS if args.quick else list(cases.NETWORKS))
    todo = [cases.Network(name, _widths(name), dtype) for dtype in args.dtypes for name in names]
    with _output(console, len(todo), _training_table) as output:
        results = run_training(todo, args.kernels or IN_SITU_WAYS, args.threads, args.min_time, output)
    return _finish(console, _write(args, STEM_IN_SITU, results, session), results, len(todo))


@contextmanager
def _output(
    console: "Console", total: int, make: "Callable[[Console, str, Sequence[R]], Table]"
) -> Iterator[Output[R]]:
    """Show a progress bar inside the block, and provide the output of a benchmark."""

    def on_rows(title: str, rows: Sequence[R]) -> None:
        say(console)
        print_table(console, make(console, title, rows))

    with show_progress(console, total) as on_progress:
        yield Output(on_progress, on_rows, lambda what, why: say(console, f"skipped: {what}: {why}"))


def _check(args: argparse.Namespace) -> None:
    """Reject combinations of options that contradict each other."""

    def refuse(option: str, why: str) -> None:
        if getattr(args, option.removeprefix("--").replace("-", "_")):
            raise CommandError(f"{option}: {why}")

    if args.in_situ:
        for option in ("--sizes", "--arrays", "--shape", "--kernel"):
            refuse(option, "cannot be combined with --in-situ, which trains networks")
        for kernel in args.kernels or ():
            if kernel not in IN_SITU_WAYS:
                raise CommandError(f"--kernels: with --in-situ, expected names out of {IN_SITU_WAYS}, got {kernel!r}")
    else:
        refuse("--networks", "needs --in-situ")
    if args.arrays:
        refuse("--sizes", "cannot be combined with --arrays; --shape sets the size of the arrays")
    else:
        refuse("--shape", "needs --arrays, the number of arrays")


def _cases(args: argparse.Namespace) -> list[cases.Case]:
    if args.arrays:
        shape = tuple(args.shape or cases.MANY_ARRAYS[1])
        return [cases.Case(args.arrays, shape, dtype) for dtype in args.dtypes]
    sizes = args.sizes or (cases.QUICK_SIZES if args.quick else cases.SIZES)
    return [cases.Case(1, (size,), dtype) for dtype in args.dtypes for size in sizes]


def _widths(name: str) -> tuple[int, ...]:
    if name in cases.NETWORKS:
        return cases.NETWORKS[name]
    parts = name.split("-")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CommandError(
            f"--networks: expected widths of at least 1 joined by '-', such as 64-32-10, or one of "
            f"{', '.join(cases.NETWORKS)}, got {name!r}"
        )
    return tuple(map(int, parts))


def _choose(args: argparse.Namespace) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the implementations to time, and the reasons to leave out others."""
    own = {}
    for name in args.kernel:
        function = find_object("--kernel", name)
        if not callable(function):
            raise CommandError(f"--kernel: {name}: expected a function, got {type(function).__name__}")
        own[name] = of_function(name, function)
    chosen, skipped = {}, {}
    asked = args.kernels is not None
    for name, implementation in IMPLEMENTATIONS.items():
        if asked and name not in args.kernels:
            continue
        if missing := implementation.missing():
            why = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        elif not set(implementation.dtypes) & set(args.dtypes):
            why = f"expected float32 among --dtypes, got {' '.join(args.dtypes)}" if asked else "supports float32 only"
        elif not asked and args.quick and not implementation.in_quick:
            why = f"takes long to compile; to include it with --quick, add --kernels {name}"
        else:
            chosen[name] = implementation
            continue
        if asked:
            raise CommandError(f"--kernels: {name}: {why}")
        skipped[name] = why
    return chosen | own, skipped


def _step_table(console: "Console", title: str, rows: Sequence[StepRow]) -> "Table":
    plain = is_plain(console)
    headers = ["time", "middle half", "Gparam/s", "GB/s", "% of limit", "threads", "checked"]
    table = make_table(console, title, *headers)
    for row in rows:
        percent = row["percent_of_limit"]
        table.add_row(
            row["label"], format_seconds(row["seconds"], plain=plain), _middle_half(row, plain),
            _digits(row["gparam_per_s"]), _digits(row["gbyte_per_s"]),
            "-" if math.isnan(percent) else f"{percent:.0f} {row['bound']}", str(row["threads"]), row["check"],
        )  # fmt: skip
    return table


def _training_table(console: "Console", title: str, rows: Sequence[TrainingRow]) -> "Table":
    plain = is_plain(console)
    table = make_table(
        console,
        title,
        "gradients",
        "training step",
        "middle half",
        "of which optimizer",
        "speed-up",
        "over no optimizer",
    )
    for row in rows:
        step, optimizer = (format_seconds(row[key], plain=plain) for key in ("step_seconds", "optimizer_seconds"))
        ratios = [f"{row[key]:.2f}x" for key in ("times_faster", "over_no_optimizer")]
        table.add_row(LABELS[row["kernel"]], row["gradients"], step, _middle_half(row, plain), optimizer, *ratios)
    return table


def _middle_half(row: StepRow | TrainingRow, plain: bool) -> str:
    return " to ".join(format_seconds(seconds, plain=plain) for seconds in (row["quarter"], row["three_quarters"]))


def _digits(value: float) -> str:
    """Return a number with about three digits."""
    return f"{value:.3f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _write(args: argparse.Namespace, stem: str, results: Results[R], session: _Session) -> list[Path]:
    """Write the JSON and the CSV file and return their paths; after an interruption without rows, write nothing."""
    if results.interrupted and not results.rows:
        return []
    settings = {"threads": session.threads, "min_time": args.min_time, "quick": args.quick, "in_situ": args.in_situ}
    document = results.document(session.about, session.quiet, settings)
    paths = [args.output / f"{stem}.json", args.output / f"{stem}.csv"]
    with writing(paths[0]) as place:
        place.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8", newline="")
    with writing(paths[1]) as place, place.open("w", encoding="utf-8", newline="") as stream:
        if results.rows:
            writer = csv.DictWriter(stream, list(results.rows[0]))
            writer.writeheader()
            writer.writerows(results.rows)
    return paths


def _finish(console: "Console", paths: Sequence[Path], results: Results[R], total: int) -> int:
    if paths:
        say(console, f"\nResults: {', '.join(map(str, paths))}")
    if results.interrupted:
        kept = "results so far are saved" if paths else "there are no results yet"
        raise KeyboardInterrupt(f"in case {results.done + 1} of {total}; {kept}")
    return 0
