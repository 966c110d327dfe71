"""``fastrms demo``: train a perceptron with the NumPy reference and with fastrms, and print the comparison."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import fastrms
from fastrms._checks import HOST_KERNELS
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
from fastrms.cli.progress import show_progress
from fastrms.demo import mlp, training
from fastrms.demo.experiment import Experiment, network_name
from fastrms.demo.training import Training
from fastrms.errors import FastrmsError
from fastrms.kernels import threads
from fastrms.optimizer import RMSProp
from fastrms.plots import format_seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PLOT_NAME", "add_command", "run"]

PLOT_NAME = "fastrms-demo.png"

# Default width of each hidden layer, rows of a batch and learning rate. On ranks, gradients have to take longer than
# messages, and wider layers need a smaller rate.
HIDDEN, BATCH, LR = (512, 512), 64, 1e-3
HIDDEN_MPI, BATCH_MPI, LR_MPI = (1024, 1024), 512, 3e-4

# Two layers of more units than this fit no machine's memory, and NumPy's own limits are near.
MAX_UNITS = 1_000_000

_DESCRIPTION = """
Train a multi-layer perceptron, written in plain NumPy, on handwritten digits (the copy in scikit-learn; nothing is
downloaded). It is trained twice, from the same start with the same batches: with RMSProp in NumPy and with fastrms.
Both training runs must have the same losses, bit for bit; otherwise the exit status is 1. Prints a table of losses,
accuracies and times, and saves a plot.
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``demo`` and its options to the subcommands."""
    parser = commands.add_parser(
        "demo",
        help="train a network twice, with the NumPy reference and with fastrms, and compare both",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    count = whole_number(1)
    default = "(default: %(default)s)"
    add("--hidden", nargs="+", type=whole_number(1, MAX_UNITS), metavar="UNITS", help=
        "width of each hidden layer (default: 512 512, with --mpi 1024 1024)")  # fmt: skip
    add("--epochs", type=count, default=20, metavar="N", help=f"number of passes over the training set {default}")
    add("--batch-size", type=count, metavar="N", help=
        "rows in a batch, limited to the rows of the training set (default: 64, with --mpi 512)")  # fmt: skip
    add("--lr", type=positive, help=f"learning rate (default: {LR:g}, with --mpi {LR_MPI:g})")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help=
        f"seed of the split into training and test rows, the initial parameters and the batches {default}")  # fmt: skip
    add("--dtype", choices=("float32", "float64"), default="float32", help=f"dtype of parameters and data {default}")
    add("--kernel", choices=HOST_KERNELS, default="auto", help=f"kernel that runs the update of fastrms {default}")
    what = "give fastrms a list of new arrays, as the reference gets, or write gradients into its buffer"
    add("--gradients", choices=("list", "buffer"), default="list", help=f"{what} {default}")
    add("--data", type=Path, metavar="FILE.npz", help=
        "your own data instead of the digits: arrays X (rows, features) and y (rows), the labels")  # fmt: skip
    add("--output", type=Path, default=Path(), metavar="DIR", help=
        f"folder for {PLOT_NAME}, created if it does not exist (default: the current folder)")  # fmt: skip
    add("--mpi", action="store_true", help=
        "under mpiexec: train on all ranks, each with a part of the rows of a batch, and compare with one "
        "process")  # fmt: skip
    add("--quiet", action="store_true", help="print only errors; the plot is still written")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``fastrms demo`` and return 0; raise CommandError if the training diverges or the two differ."""
    require("demo", "matplotlib", "rich", "sklearn")
    start_threads()
    hidden, batch, lr = (HIDDEN_MPI, BATCH_MPI, LR_MPI) if args.mpi else (HIDDEN, BATCH, LR)
    args.hidden, args.batch_size, args.lr = args.hidden or list(hidden), args.batch_size or batch, args.lr or lr
    if not args.mpi:
        return _run(args, ("NumPy reference", "fastrms"), training.train_both, training.compare)
    require("mpi", "mpi4py")
    try:
        from fastrms.demo import data_parallel
        from fastrms.mpi.ending import end_all
    except ImportError as error:  # for want of an MPI library, for instance
        raise CommandError(str(error)) from None
    comm = data_parallel.comm
    args.quiet = args.quiet or comm.rank > 0
    names = "one process", _count(comm.size, "rank")
    try:
        return _run(args, names, data_parallel.train_one_and_all, data_parallel.compare)
    except (CommandError, FastrmsError, MemoryError) as error:
        if comm.size == 1:
            raise
        time.sleep(comm.rank > 0)  # rank 0 speaks for ranks with the same error
        sys.stderr.write(f"fastrms demo: error: {error}\n")
        end_all()
        return 1


def _run(
    args: argparse.Namespace,
    names: tuple[str, str],
    train: Callable[..., tuple[Training, Training]],
    compare: Callable[[Training, Training], tuple[bool, str]],
) -> int:
    """Train twice with `train`, print and plot both trainings, and fail if `compare` finds that they differ."""
    experiment = Experiment.prepare(
        args.data, args.hidden, args.dtype, batch_size=args.batch_size, epochs=args.epochs, seed=args.seed
    )
    make_folder(args.output, PLOT_NAME)
    console = make_console(args.quiet)
    _print_description(console, args, experiment)
    steps = experiment.batches.per_epoch
    with show_progress(console, 2 * args.epochs * steps) as on_progress:

        def on_step(each: Training) -> None:
            on_progress.case_done()
            epoch = (len(each.losses) - 1) // steps + 1
            on_progress(0, f"epoch {epoch} of {args.epochs}, loss {each.losses[-1]:.4f}")

        first, second = train(
            experiment.start(), experiment.batches, lr=args.lr, kernel=args.kernel,
            into_buffer=args.gradients == "buffer", on_step=on_step,
        )  # fmt: skip

    if not first.losses:
        return 0  # rank 0 alone has the first training, and compares
    same, text = compare(first, second)
    if same and not (finite := np.isfinite(first.losses)).all():
        step = int(np.argmin(finite))
        raise CommandError(
            f"the training diverged: the loss is {first.losses[step]} at step {step + 1}; "
            f"use a smaller --lr than {args.lr:g}"
        )
    trainings = dict(zip(names, (first, second), strict=True))
    conclusion = _conclusion(same, args.mpi, names, first, second)
    if not args.quiet:
        _print_results(console, experiment, trainings, conclusion)
        _print_optimizer(console, args.mpi, second)
        if warning := _warning(args.mpi, first, second):
            say(console, warning, "yellow")
    path = args.output / PLOT_NAME
    save_figure(experiment.plot(trainings, conclusion), path)
    if same:
        say(console, text, "green")
    say(console, f"Plot: {path}")
    if not same:
        raise CommandError(f"the two training runs differ: {text}")
    return 0


def _conclusion(same: bool, mpi: bool, names: tuple[str, str], first: Training, second: Training) -> str:
    """Return what a newcomer should learn from the demo, in one line."""
    losses = (
        "different losses" if not same else "the same losses up to rounding" if mpi else "the same losses, bit for bit"
    )
    if (not mpi and training.rest_differs(first, second)) or training.ratios_spread(first, second):
        return f"Result: {losses}. The machine was too busy to compare times."
    step = training.ratio_of_times(first.step_seconds, second.step_seconds)
    optimizer = training.ratio_of_times(first.optimizer_seconds, second.optimizer_seconds).median
    if mpi:
        return f"Result: {losses}. With {names[1]}, a training step is {_spread(step)} as fast as on one process."
    return (
        f"Result: {losses}. With {names[1]}, a training step is {_spread(step)} as fast, its optimizer part "
        f"{_times(optimizer)}."
    )


def _print_description(console: "Console", args: argparse.Namespace, experiment: Experiment) -> None:
    dataset, batches = experiment.dataset, experiment.batches
    how = "on one process and on all ranks" if args.mpi else "with the NumPy reference and with fastrms"
    expected = "the same losses up to rounding" if args.mpi else "the same losses, bit for bit, in less time"
    say(console, f"fastrms {fastrms.__version__}: train one network twice with RMSProp, {how}. Expect {expected}.")
    source = "handwritten digits" if args.data is None else str(args.data)
    rows = f"{len(dataset.train_y):,} rows to train, {len(dataset.test_y):,} to test"
    say(console, f"Data: {source}; {rows}, {dataset.classes} classes")
    size = mlp.count_params(experiment.sizes)
    say(console, f"Network: {network_name(experiment.sizes)}, {size:,} parameters, {args.dtype}")
    steps = f"{_count(args.epochs, 'epoch')} of {_count(batches.per_epoch, 'step')}"
    say(console, f"Training: {steps}, {batches.size:,} rows a batch")
    limit = _count(threads.max_threads(), "thread")
    shared = " shared by the ranks of a machine" if args.mpi else ""
    gradients = "as a list" if args.gradients == "list" else "written into its buffer"
    say(console, f"fastrms: kernel {args.kernel}, up to {limit}{shared}, gradients {gradients}")


def _print_results(console: "Console", experiment: Experiment, trainings: dict[str, Training], conclusion: str) -> None:
    pair = tuple(trainings.values())
    losses, accuracies = zip(*(experiment.evaluate(each) for each in pair), strict=True)
    steps = [each.step_time for each in pair]
    optimizers = [each.optimizer_time for each in pair]

    table = make_table(console, "", *trainings, "speed-up", "middle half")
    table.add_row("final training loss", *(f"{loss:.6g}" for loss in losses), "", "")
    table.add_row("test accuracy", *(f"{accuracy:.2%}" for accuracy in accuracies), "", "")
    rows = ("training step", steps, "step_seconds"), ("of which optimizer", optimizers, "optimizer_seconds")
    for label, times, name in rows:
        cells = [format_seconds(time, plain=is_plain(console)) for time in times]
        ratio = training.ratio_of_times(*(getattr(each, name) for each in pair))
        spread = f"{_times(ratio.quarter)} to {_times(ratio.three_quarters)}"
        table.add_row(label, *cells, _times(ratio.median), spread)
    shares = [f"{part / whole:.1%}" for part, whole in zip(optimizers, steps, strict=True)]
    table.add_row("optimizer's share", *shares, "", "")
    say(console)
    say(console, conclusion, "bold")
    say(console)
    print_table(console, table)
    say(console)
    say(
        console,
        "Times are medians. Speed-up: median over pairs of steps on the same batch; middle half: its quartiles.",
    )


def _print_optimizer(console: "Console", mpi: bool, fast: Training) -> None:
    assert isinstance(fast.optimizer, RMSProp)
    say(console, f"Kernel{' of rank 0' if mpi else ''}: {fast.optimizer.explain()[0]}")
    if mpi:
        from fastrms.demo.data_parallel import use_of_ranks

        say(console, use_of_ranks(fast.optimizer))


def _warning(mpi: bool, first: Training, second: Training) -> str | None:
    """Return a warning if the machine was busy. Without MPI, forward and backward run the same code in both runs."""
    if training.ratios_spread(first, second):
        step = training.ratio_of_times(first.step_seconds, second.step_seconds)
        return (
            f"warning: the speed-up of a step varied too much, from {_times(step.quarter)} to "
            f"{_times(step.three_quarters)} (quartiles). The machine was busy: do not trust the times; run the demo "
            "again."
        )
    if mpi or not training.rest_differs(first, second):
        return None
    times = [format_seconds(float(np.median(each.rest_seconds)), plain=True) for each in (first, second)]
    return (
        f"warning: forward and backward took {times[0]} with the NumPy reference and {times[1]} with fastrms, although "
        "both run the same code. The machine was busy: do not trust the speed-up; run the demo again."
    )


def _spread(ratio: training.Ratio) -> str:
    return f"{_times(ratio.median)} ({_times(ratio.quarter)} to {_times(ratio.three_quarters)})"


def _times(ratio: float) -> str:
    """Return a ratio with at least two digits, such as "1.65x" or "0.030x"."""
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:#.2g}x"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
