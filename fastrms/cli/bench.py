"""``fastrms bench``: time kernels and other libraries, each beside the limit of the machine."""

import argparse
import datetime
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrms.bench import cases
from fastrms.cli.common import (
    CommandError,
    make_console,
    make_folder,
    positive,
    require,
    save_figure,
    say,
    start_threads,
    whole_number,
)
from fastrms.cli.progress import show_progress

if TYPE_CHECKING:
    from rich.console import Console

    from fastrms.bench.implementations import Contender
    from fastrms.bench.in_situ import InSituRow
    from fastrms.bench.measure import Entry, Row, Where
    from fastrms.bench.workers import Remote

__all__ = ["STEM", "STEM_IN_SITU", "add_command", "run"]

STEM, STEM_IN_SITU = "fastrms-bench", "fastrms-bench-in-situ"

# Names that --kernels takes; here as well as in `contenders`, whose import takes time that --help need not.
KERNELS = (
    "auto", "auto-list", "serial", "parallel", "parallel-bfloat16", "numpy", "numpy-in-place", "reference", "numexpr",
    "torch", "torch-foreach", "torch-compile", "optax",
)  # fmt: skip
IN_SITU_KERNELS = ("auto", "serial", "parallel")

_DESCRIPTION = """
Time one RMSProp step: kernels of fastrms, NumPy, and other libraries where they are installed, over sizes and dtypes.
Results are checked to be equal first. Beside each time stands how near it is to the limit of this machine: a loop that
moves the same memory (20 bytes a float32 parameter) on as many threads. Where there is a GPU, its own tables: a step
there beside a copy of as many bytes. Writes fastrms-bench.json, .csv and .png.
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``bench`` and its options to the subcommands."""
    parser = commands.add_parser(
        "bench", help="time kernels and other libraries beside the limit of this machine", description=_DESCRIPTION
    )
    add = parser.add_argument
    sizes = " ".join(f"{size:.0e}".replace("+0", "") for size in cases.SIZES)
    add("--sizes", nargs="+", type=_count, metavar="N", help=f"elements of one flat array (default: {sizes})")
    add("--arrays", type=_count, metavar="N", help="many arrays in place of one: how many")
    add("--shape", nargs="+", type=whole_number(1), metavar="N", help="with --arrays: shape of each (default: 10 10)")
    add("--in-situ", action="store_true", help="whole training steps of networks, against the reference class")
    add(
        "--networks",
        nargs="+",
        metavar="A-B-C",
        help=f"with --in-situ: widths, joined by '-' (default: {' '.join(cases.NETWORKS)})",
    )
    add("--dtypes", nargs="+", choices=cases.DTYPES, help="of all arrays (default: both, with --quick float32)")
    add("--kernels", nargs="+", choices=KERNELS, help="what to time (default: all that is installed)")
    add("--kernel", action="append", default=[], metavar="MODULE:FUNCTION", help=
        "time your own kernel too, called as f(params, grads, cache, lr, decay_rate, epsilon) with 1 array each and "
        "Python floats; it updates params and cache in place")  # fmt: skip
    add("--threads", type=whole_number(1), metavar="N", help="threads of whatever has some (default: those of Numba)")
    add("--min-time", type=positive, metavar="S", help="seconds to spend on each way (default: 1, with --quick 0.1)")
    add("--timeout", type=positive, default=300, metavar="S", help="for one answer of a library (default: %(default)s)")
    add("--output", type=Path, default=Path(), metavar="DIR", help="folder for results (default: this folder)")
    add("--quick", action="store_true", help="fewer and smaller cases, less time, no torch.compile: within a minute")
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    """A type for argparse: a whole number of at least 1, also as 1e6."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (1 <= value <= 1e12 and value == int(value)):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to 1e12, such as 1000000 or 1e6, got {text!r}"
        )
    return int(value)


def run(args: argparse.Namespace) -> int:
    """Carry out ``fastrms bench`` and return 0.

    Raises
    ------
    KeyboardInterrupt
        Ctrl-C; says in which case, and whether results are kept.
    CommandError
        Options do not go together; a package, kernel or folder cannot be used; or a kernel computes something else.
    """
    _check(args)
    require("bench", "rich", *([] if args.in_situ else ["matplotlib"]))
    stem = STEM_IN_SITU if args.in_situ else STEM
    make_folder(args.output, *(f"{stem}.{kind}" for kind in ("json", "csv", "png")[: 2 if args.in_situ else 3]))
    start_threads()
    import numba

    limit = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if args.threads is not None and args.threads > limit:
        raise CommandError(
            f"--threads: expected at most {limit}, which Numba starts with here (NUMBA_NUM_THREADS), got {args.threads}"
        )
    args.min_time = args.min_time or (0.1 if args.quick else 1.0)
    args.dtypes = args.dtypes or (["float32"] if args.quick else list(cases.DTYPES))
    console = make_console()
    return (_run_in_situ if args.in_situ else _run_flat)(args, console, args.threads or limit)


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""

    def refuse(option: str, why: str) -> None:
        if getattr(args, option.removeprefix("--").replace("-", "_")):
            raise CommandError(f"{option}: {why}")

    if args.in_situ:
        for option in ("--sizes", "--arrays", "--shape", "--kernel"):
            refuse(option, "not with --in-situ, which trains networks with kernels of fastrms")
        for kernel in args.kernels or ():
            if kernel not in IN_SITU_KERNELS:
                raise CommandError(f"--kernels: with --in-situ expected some of {IN_SITU_KERNELS}, got {kernel!r}")
    else:
        refuse("--networks", "only with --in-situ")
    if args.arrays:
        refuse("--sizes", "not with --arrays, whose size --shape gives")
    else:
        refuse("--shape", "only with --arrays, which says how many")


def _run_flat(args: argparse.Namespace, console: "Console", threads: int) -> int:
    from fastrms.bench import device, measure, report
    from fastrms.bench.implementations import CONTENDERS, load_kernel

    own = {name: load_kernel(name) for name in args.kernel}
    chosen, skipped = _choose(args)
    chosen |= own
    shape = tuple(args.shape or cases.MANY_ARRAYS[1])
    sizes = args.sizes or (cases.QUICK_SIZES if args.quick else cases.SIZES)
    todo = [
        cases.Case(args.arrays, shape, dtype) if args.arrays else cases.Case(1, (size,), dtype)
        for dtype in args.dtypes
        for size in ([0] if args.arrays else sizes)
    ]
    rows: list[Row] = []

    def on_skip(name: str, why: str) -> None:
        skipped[f"{name} ({todo[done].name})"] = why
        say(console, f"left out: {CONTENDERS[name].label}: {why}")

    for name, why in skipped.items():
        say(console, f"left out: {CONTENDERS[name].label}: {why}")
    done, interrupted = 0, False
    remotes: dict[str, Remote] = {}
    on_device: list[Row] = []
    has_device = args.kernels is None and device.can_measure()
    try:
        with show_progress(console, len(todo)) as on_progress:
            on_progress(0, "starting")
            entries, limits = _entries(chosen, threads, args.timeout, remotes)
            for case in todo:
                first = len(rows)
                try:
                    measure.measure(
                        case, entries, limits, args.min_time, rows=rows, on_skip=on_skip,
                        on_progress=on_progress,
                    )  # fmt: skip
                finally:
                    if len(rows) > first:
                        report.print_rows(console, case.name, rows[first:])
                if has_device:
                    try:
                        device.measure_device(case, args.min_time, on_device)
                        report.print_rows(console, f"{case.name}, on the GPU", on_device[-2:])
                    except CommandError:
                        raise
                    except Exception as error:  # of CUDA: too little memory, for instance
                        text = (str(error).strip() or type(error).__name__).splitlines()[0]
                        say(console, f"left out: {case.name} on the GPU: {text}")
                done += 1
                on_progress.case_done()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        for remote in remotes.values():
            remote.end(0 if interrupted else 2)
    if interrupted and not rows:
        return _finish(console, [], interrupted, done, len(todo))
    paths = report.write_results(args.output, STEM, _about(args, threads, skipped, not interrupted), rows + on_device)
    if rows:
        paths.append(_save_plot(args.output / f"{STEM}.png", rows))
    return _finish(console, paths, interrupted, done, len(todo))


def _run_in_situ(args: argparse.Namespace, console: "Console", threads: int) -> int:
    from fastrms.bench import in_situ, report

    names = args.networks or (cases.QUICK_NETWORKS if args.quick else list(cases.NETWORKS))
    todo = [(name, _widths(name), dtype) for dtype in args.dtypes for name in names]
    rows: list[InSituRow] = []
    done, interrupted = 0, False
    try:
        with show_progress(console, len(todo)) as on_progress:
            for name, widths, dtype in todo:
                first = len(rows)
                try:
                    in_situ.measure_training(
                        name, widths, dtype, args.kernels or in_situ.KERNELS, args.threads, args.min_time, rows=rows,
                        on_progress=on_progress,
                    )  # fmt: skip
                finally:
                    if len(rows) > first:
                        report.print_training_rows(console, f"{name}, {dtype}", rows[first:])
                done += 1
                on_progress.case_done()
    except KeyboardInterrupt:
        interrupted = True
    if interrupted and not rows:
        return _finish(console, [], interrupted, done, len(todo))
    paths = report.write_results(args.output, STEM_IN_SITU, _about(args, threads, {}, not interrupted), rows)
    return _finish(console, paths, interrupted, done, len(todo))


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


def _choose(args: argparse.Namespace) -> "tuple[dict[str, Contender], dict[str, str]]":
    """The ways to time, and why others are left out."""
    from fastrms.bench.implementations import CONTENDERS, missing

    chosen, skipped = {}, {}
    for name, contender in CONTENDERS.items():
        if args.kernels is not None and name not in args.kernels:
            continue
        if absent := missing(contender):
            if args.kernels is not None:
                raise CommandError(f"--kernels: {name}: {' and '.join(absent)} not installed")
            skipped[name] = f"{' and '.join(absent)} not installed"
        elif not any(contender.takes(dtype) for dtype in args.dtypes):
            if args.kernels is not None:
                raise CommandError(f"--kernels: {name}: expected float32 among --dtypes, got {' '.join(args.dtypes)}")
            skipped[name] = "for float32 only"
        elif args.kernels is None and args.quick and not contender.in_quick:
            skipped[name] = f"takes long to compile; with --quick ask for it: --kernels {name}"
        elif args.kernels is not None or args.arrays or contender.for_one:
            chosen[name] = contender
    return chosen, skipped


def _entries(
    chosen: "dict[str, Contender]", threads: int, timeout: float, remotes: "dict[str, Remote]"
) -> "tuple[dict[str, Entry], dict[str, Entry]]":
    """The ways and the machine's limit, each with where it runs; processes are started and added to `remotes`."""
    from fastrms.bench.measure import Entry
    from fastrms.bench.workers import LIMIT_PARALLEL, LIMIT_SERIAL, Remote, Session

    here = Session(threads)
    entries: dict[str, Entry] = {}
    for name, contender in chosen.items():
        where: Where = here
        if contender.process != "here":
            if contender.process not in remotes:
                remotes[contender.process] = Remote(contender.process, threads, timeout)
            where = remotes[contender.process]
        # 16-bit state takes 2 bytes less to read and to write, of 20.
        moves = 1.0 if contender.cache_dtype is None else 0.8
        entries[name] = Entry(contender.label, threads if contender.many_threads else 1, where, contender.takes, moves)
    limits = {LIMIT_SERIAL: Entry("limit of this machine", 1, here)}
    if threads > 1:
        limits[LIMIT_PARALLEL] = Entry("limit of this machine", threads, here)
    return entries, limits


def _about(args: argparse.Namespace, threads: int, skipped: dict[str, str], complete: bool) -> dict[str, Any]:
    from fastrms.bench import machine

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        # Of the last minute, this program's own work included: other programs' work makes threads wait for one another.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "settings": {"threads": threads, "min_time": args.min_time, "quick": args.quick, "in_situ": args.in_situ},
        "left_out": skipped,
        "complete": complete,
    }


def _save_plot(path: Path, rows: "list[Row]") -> Path:
    from fastrms.plots import plot_throughput

    figure, _ = plot_throughput([dict(vars(row)) for row in rows])
    save_figure(figure, path)
    return path


def _finish(console: "Console", paths: list[Path], interrupted: bool, done: int, cases_: int) -> int:
    if paths:
        say(console, f"\nResults: {', '.join(map(str, paths))}")
    if interrupted:
        kept = "what was measured is kept" if paths else "nothing was measured yet"
        raise KeyboardInterrupt(f"in case {done + 1} of {cases_}; {kept}")
    return 0
