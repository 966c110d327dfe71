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

# Two layers of more units than this fit no machine's memory, and NumPy's own limits are near.
MAX_UNITS = 1_000_000

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
    count = whole_number(1)
    default = "(default: %(default)s)"
    add("--hidden", nargs="+", type=whole_number(1, MAX_UNITS), default=[512, 512], metavar="UNITS", help=
        "width of each hidden layer (default: 512 512)")  # fmt: skip
    add("--epochs", type=count, default=20, metavar="N", help=f"how often to go through the training set {default}")
    add("--batch-size", type=count, default=64, metavar="N", help=
        f"rows in a batch; at most the whole training set is taken {default}")  # fmt: skip
    add("--lr", type=positive, default=1e-3, help=f"learning rate {default}")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N", help=
        f"of the split, the start and the batches {default}")  # fmt: skip
    add("--dtype", choices=("float32", "float64"), default="float32", help=f"of parameters and data {default}")
    add("--kernel", choices=HOST_KERNELS, default="auto", help=f"what runs the update of fastrms {default}")
    what = "hand fastrms a list of new arrays, as the reference gets, or write them into its buffer"
    add("--gradients", choices=("list", "buffer"), default="list", help=f"{what} {default}")
    add("--data", type=Path, metavar="FILE.npz", help=
        "your own data in place of the digits: X (rows, features) and y, a label for each row")  # fmt: skip
    add("--output", type=Path, default=Path(), metavar="DIR", help=
        f"folder for {PLOT_NAME}, made if it is missing (default: this folder)")  # fmt: skip
    add("--mpi", action="store_true", help=
        "under mpiexec: train on all ranks, each with its rows of a batch, and compare with one process")  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but errors; the plot is still made")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``fastrms demo`` and return 0; raise CommandError if the training diverges or the two differ."""
    require("demo", "matplotlib", "rich", "sklearn")
    start_threads()
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
    _print_description(console, args, names, experiment)
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
    if not args.quiet:
        _print_results(console, experiment, trainings)
        _print_optimizer(console, args.mpi, second)
    path = args.output / PLOT_NAME
    save_figure(experiment.plot(trainings), path)
    if same:
        say(console, text, "green")
    say(console, f"Plot: {path}")
    if not same:
        raise CommandError(f"the two trainings are not the same: {text}")
    return 0


def _print_description(
    console: "Console", args: argparse.Namespace, names: tuple[str, str], experiment: Experiment
) -> None:
    dataset, batches = experiment.dataset, experiment.batches
    pair, version = " and ".join(names), fastrms.__version__
    say(console, f"RMSProp, fastrms {version}, {pair}" if args.mpi else f"RMSProp, {pair} {version}")
    source = "handwritten digits" if args.data is None else str(args.data)
    rows = f"{len(dataset.train_y):,} rows to train, {len(dataset.test_y):,} to test"
    say(console, f"Data: {source}; {rows}, {dataset.classes} classes")
    size = mlp.count_params(experiment.sizes)
    say(console, f"Network: {network_name(experiment.sizes)}, {size:,} parameters, {args.dtype}")
    steps = f"{_count(args.epochs, 'epoch')} of {_count(batches.per_epoch, 'step')}"
    say(console, f"Training: {steps}, {batches.size:,} rows a batch")
    limit = _count(threads.max_threads(), "thread")
    shared = ", which ranks share" if args.mpi else ""
    gradients = "as a list" if args.gradients == "list" else "written into its buffer"
    say(console, f"fastrms: kernel {args.kernel}, up to {limit}{shared}, gradients {gradients}")


def _print_results(console: "Console", experiment: Experiment, trainings: dict[str, Training]) -> None:
    pair = trainings.values()
    losses, accuracies = zip(*(experiment.evaluate(each) for each in pair), strict=True)
    steps = [each.step_time for each in pair]
    optimizers = [each.optimizer_time for each in pair]

    table = make_table(console, "", *trainings, "speed-up")
    table.add_row("final training loss", *(f"{loss:.6g}" for loss in losses), "")
    table.add_row("test accuracy", *(f"{accuracy:.2%}" for accuracy in accuracies), "")
    for label, times in (("training step", steps), ("of which optimizer", optimizers)):
        cells = [format_seconds(time, plain=is_plain(console)) for time in times]
        table.add_row(label, *cells, f"{times[0] / times[1]:.2f}x")
    shares = [f"{part / whole:.1%}" for part, whole in zip(optimizers, steps, strict=True)]
    table.add_row("optimizer's share", *shares, "")
    say(console)
    print_table(console, table)
    say(console)


def _print_optimizer(console: "Console", mpi: bool, fast: Training) -> None:
    assert isinstance(fast.optimizer, RMSProp)
    say(console, f"Kernel{' of rank 0' if mpi else ''}: {fast.optimizer.explain()[0]}")
    if mpi:
        from fastrms.demo.data_parallel import traffic

        say(console, traffic(fast.optimizer))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
