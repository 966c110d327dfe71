"""``fastrms demo``: train a perceptron twice, with the NumPy reference and with fastrms, and compare."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

import fastrms
from fastrms import kernels
from fastrms.cli.common import (
    CommandError,
    is_plain,
    make_console,
    make_folder,
    make_table,
    positive,
    print_table,
    require,
    save_figure,
    say,
    start_threads,
    whole_number,
)
from fastrms.demo import data, mlp
from fastrms.demo.training import Training, first_difference, train_both
from fastrms.kernels import threads
from fastrms.optimizer import RMSProp
from fastrms.plots import format_seconds, plot_training

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PLOT_NAME", "add_command", "run"]

PLOT_NAME = "fastrms-demo.png"

REFERENCE, FAST = "NumPy reference", "fastrms"

# More layers of a million units than two fit no machine's memory, and NumPy's own limits are not far.
MAX_UNITS = 1_000_000

# Seconds between two updates of the progress bar.
REFRESH = 0.1

_DESCRIPTION = """
Train a multi-layer perceptron, written in plain NumPy, on handwritten digits (scikit-learn's copy; nothing is
downloaded): twice, from the same start with the same batches, with RMSProp in NumPy and with fastrms. The losses have
to be the same bits, else the exit status is 1. Prints a table of losses, accuracies and times, and saves a plot.
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``demo`` and its options to the subcommands."""
    parser = commands.add_parser(
        "demo",
        help="train a network twice, with the NumPy reference and with fastrms, and compare",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    default = "(default: %(default)s)"
    add(
        "--hidden",
        nargs="+",
        type=whole_number(1, MAX_UNITS),
        default=[512, 512],
        metavar="UNITS",
        help="width of each hidden layer (default: 512 512)",
    )
    add(
        "--epochs",
        type=whole_number(1),
        default=20,
        metavar="N",
        help=f"how often to go through the training set {default}",
    )
    add(
        "--batch-size",
        type=whole_number(1),
        default=64,
        metavar="N",
        help=f"rows in a batch; at most the whole training set is taken {default}",
    )
    add("--lr", type=positive, default=1e-3, help=f"learning rate {default}")
    add(
        "--seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="N",
        help=f"of the split, the start and the batches {default}",
    )
    add("--dtype", choices=("float32", "float64"), default="float32", help=f"of parameters and data {default}")
    add("--kernel", choices=kernels.KERNELS, default="auto", help=f"what runs the update of fastrms {default}")
    add(
        "--gradients",
        choices=("list", "buffer"),
        default="list",
        help=f"hand fastrms a list of new arrays, as the reference gets, or write them into its buffer {default}",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="your own data in place of the digits: X (rows, features) and y, a label for each row",
    )
    add(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help=f"folder for {PLOT_NAME}, made if it is missing (default: this folder)",
    )
    add(
        "--mpi",
        action="store_true",
        help="under mpiexec: train on all ranks, each with its rows of a batch, and compare with one process",
    )
    add("--quiet", action="store_true", help="print nothing but errors; the plot is still made")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``fastrms demo`` and return 0.

    Raises
    ------
    CommandError
        A package, the data or the output folder cannot be used; the training diverged; or bits differ.
    """
    require("demo", "matplotlib", "rich", "sklearn")
    start_threads()
    if not args.mpi:
        return _run(args, train_both, REFERENCE, FAST)
    require("mpi", "mpi4py")
    try:
        from fastrms.demo import data_parallel
    except ImportError as error:  # no library of MPI, for instance
        raise CommandError(str(error)) from None

    comm = data_parallel.comm
    args.quiet = args.quiet or comm.rank > 0  # all ranks do the same, and the first one tells of it
    with data_parallel.ending_together():
        return _run(args, data_parallel.train_one_and_all, "one process", _count(comm.size, "rank"))


def _run(args: argparse.Namespace, train: Callable[..., tuple[Training, Training]], one: str, other: str) -> int:
    x, y = data.load_digits() if args.data is None else data.load_file(args.data)
    dataset = data.split(x, y, args.dtype, args.seed, "the digits" if args.data is None else str(args.data))
    make_folder(args.output, PLOT_NAME)
    console = make_console()

    start_rng, batch_rng = np.random.default_rng(args.seed).spawn(2)
    sizes = [dataset.train_x.shape[1], *args.hidden, dataset.classes]
    batch_size = min(args.batch_size, len(dataset.train_y))
    batches = -(-len(dataset.train_y) // batch_size)
    version = fastrms.__version__
    pair = f"fastrms {version}, {one} and {other}" if args.mpi else f"{one} and {other} {version}"
    if not args.quiet:
        for line in _describe(args, dataset, sizes, batch_size, batches, pair):
            say(console, line)
    with _progress(console, args.quiet, args.epochs, batches) as on_step:
        reference, fast = train(
            mlp.init_params(sizes, args.dtype, start_rng),
            dataset.train_x,
            dataset.train_y,
            epochs=args.epochs,
            batch_size=batch_size,
            lr=args.lr,
            kernel=args.kernel,
            into_buffer=args.gradients == "buffer",
            rng=batch_rng,
            on_step=on_step,
        )

    if not reference.losses:
        return 0  # the other training is the first rank's
    same, difference = _compare(args, reference, fast)
    if difference is None and not np.isfinite(reference.losses).all():
        step = int(np.argmin(np.isfinite(reference.losses)))
        raise CommandError(
            f"the training diverged: the loss is {reference.losses[step]} at step {step + 1}; "
            f"use a smaller --lr than {args.lr:g}"
        )
    if not args.quiet:
        _print_results(console, dataset, {one: reference, other: fast})
        if isinstance(fast.optimizer, RMSProp):
            say(console, f"Kernel{' of rank 0' if args.mpi else ''}: {fast.optimizer.explain()[0]}")
        if args.mpi:
            from fastrms.demo.data_parallel import what_ranks_cost

            say(console, what_ranks_cost(fast))
    path = args.output / PLOT_NAME
    _save_plot(path, f"RMSProp on a network of {_network(sizes)}, {args.dtype}", {one: reference, other: fast})
    if not args.quiet:
        if difference is None:
            say(console, same, "green")
        say(console, f"Plot: {path}")
    if difference is not None:
        raise CommandError(f"the two trainings are not the same: {difference}")
    return 0


def _describe(
    args: argparse.Namespace, dataset: data.Dataset, sizes: list[int], batch_size: int, batches: int, pair: str
) -> Iterator[str]:
    size = mlp.count_params(sizes)
    source = "handwritten digits" if args.data is None else str(args.data)
    yield f"RMSProp, {pair}"
    yield (
        f"Data: {source}; {len(dataset.train_y):,} rows to train, {len(dataset.test_y):,} to test, "
        f"{dataset.classes} classes"
    )
    yield f"Network: {_network(sizes)}, {size:,} parameters, {args.dtype}"
    yield f"Training: {_count(args.epochs, 'epoch')} of {_count(batches, 'step')}, {batch_size:,} rows a batch"
    yield (
        f"fastrms: kernel {args.kernel}, up to {_count(threads.max_threads(), 'thread')}"
        f"{', which ranks share' if args.mpi else ''}, "
        f"gradients {'as a list' if args.gradients == 'list' else 'written into its buffer'}"
    )


@contextmanager
def _progress(console: "Console", quiet: bool, epochs: int, batches: int) -> Iterator[Callable[[Training], None]]:
    """Show a progress bar on a terminal; gives what `train_both` is to call after each step."""
    if quiet or not console.is_interactive:
        yield lambda training: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("epoch {task.fields[epoch]} of {task.fields[epochs]}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  {task.fields[loss]} "),
        TimeRemainingColumn(),
    ]
    # Drawn between steps, and not by a thread of its own, which would run in the time of a step.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=2 * epochs * batches, epoch=1, epochs=epochs, loss="")
        due = 0.0
        done = 0

        def on_step(training: Training) -> None:
            nonlocal due, done
            done += 1
            if (now := perf_counter()) >= due:
                epoch = (len(training.losses) - 1) // batches + 1
                loss = f"loss {training.losses[-1]:.4f}"
                progress.update(task, completed=done, epoch=epoch, loss=loss, refresh=True)
                due = now + REFRESH

        yield on_step


def _compare(args: argparse.Namespace, reference: Training, fast: Training) -> tuple[str, str | None]:
    """What to say where two trainings are the same, and how they differ where they do."""
    if not args.mpi:
        text = f"Losses of all {len(reference.losses)} steps: the same bits; final parameters too."
        return text, _difference(reference, fast)
    if not np.isfinite(reference.losses).all() and not np.isfinite(fast.losses).all():
        return "", None
    from fastrms.demo.data_parallel import apart

    return apart(reference, fast, args.dtype)


def _difference(reference: Training, fast: Training) -> str | None:
    """Where the bits of the two trainings differ first and by how much, or None where they do not."""
    steps = len(reference.losses)
    a, b = np.array(reference.losses), np.array(fast.losses)
    finite = np.isfinite(a) & np.isfinite(b)
    # NaN has bits of its own, which no rule ties to what it came from: compare as far as there are numbers.
    numbers = steps if finite.all() else int(np.argmin(finite))
    if (step := first_difference(a[:numbers], b[:numbers])) is not None:
        gap = abs(float(a[step]) - float(b[step]))
        return (
            f"the losses differ first at step {step + 1} of {steps}, {a[step]} with the reference and {b[step]} "
            f"with fastrms, by {gap:.3g}"
        )
    if numbers < steps:
        if np.isfinite(a[numbers]) != np.isfinite(b[numbers]):
            return f"the loss at step {numbers + 1} is {a[numbers]} with the reference and {b[numbers]} with fastrms"
        return None
    for k, (p, q) in enumerate(zip(reference.optimizer.params, fast.optimizer.params, strict=True)):
        if (at := first_difference(p, q)) is not None:
            gap = float(np.max(np.abs(p.astype(np.float64) - q)))
            return (
                f"the losses of all {steps} steps are the same bits, but the final parameters differ, first in "
                f"{'b' if k % 2 else 'W'}{k // 2 + 1} (flat index {at}), there by at most {gap:.3g}"
            )
    return None


def _print_results(console: "Console", dataset: data.Dataset, trainings: dict[str, Training]) -> None:
    pair = trainings.values()
    losses = [f"{mlp.evaluate(each.optimizer.params, dataset.train_x, dataset.train_y)[0]:.6g}" for each in pair]
    found = [f"{mlp.evaluate(each.optimizer.params, dataset.test_x, dataset.test_y)[1]:.2%}" for each in pair]
    steps = [each.step_time for each in pair]
    optimizers = [each.optimizer_time for each in pair]
    plain = is_plain(console)

    table = make_table(console, "", *trainings, "speed-up")
    table.add_row("final training loss", *losses, "")
    table.add_row("test accuracy", *found, "")
    table.add_row("training step", *(format_seconds(time, plain=plain) for time in steps), _ratio(steps))
    table.add_row("of which optimizer", *(format_seconds(time, plain=plain) for time in optimizers), _ratio(optimizers))
    shares = [f"{part / whole:.1%}" for part, whole in zip(optimizers, steps, strict=True)]
    table.add_row("optimizer's share", *shares, "")
    say(console)
    print_table(console, table)
    say(console)


def _ratio(times: list[float]) -> str:
    return f"{times[0] / times[1]:.2f}x"


def _network(sizes: list[int]) -> str:
    """The widths of the layers: "64-512-512-10", or "64-[32]*50-10" where there are many of one width."""
    if len(sizes) <= 6:
        return "-".join(map(str, sizes))
    runs = [(width, len(list(run))) for width, run in groupby(sizes)]
    return "-".join(str(width) if length == 1 else f"[{width}]*{length}" for width, length in runs)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _save_plot(path: Path, title: str, pair: dict[str, Training]) -> None:
    figure, _ = plot_training(
        {name: np.array(each.losses) for name, each in pair.items()},
        {name: (each.step_time, each.optimizer_time) for name, each in pair.items()},
        title=title,
    )
    save_figure(figure, path)
