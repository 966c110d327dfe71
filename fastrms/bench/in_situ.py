"""The timing of whole training steps, for ``fastrms bench --in-situ`` and ``fastrms info``.

Matrix products run on all cores between two steps of the optimizer. Their threads still spin when the optimizer begins,
and its threads still spin when the next product begins. Therefore a kernel's time alone says little, and whole steps
are timed. Trainings take turns. The first steps of a turn are dropped, since the training before affects them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from fastrms._types import HostKernel
from fastrms.backends.tuner import Tuner
from fastrms.bench.cases import BATCH_SIZE, LR, Array, Network
from fastrms.bench.errors import BenchmarkError
from fastrms.bench.measure import Progress, quartiles, take_turns
from fastrms.bench.plain import NaiveLoop, NoOptimizer, NumpyInPlace
from fastrms.bench.workers import SETTLE_FROM, settle
from fastrms.demo.mlp import count_params, init_params
from fastrms.demo.training import Optimizer, Training, first_difference
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["KERNELS", "LABELS", "WAYS", "TrainingRow", "measure_training", "train_with_auto"]

KERNELS: tuple[HostKernel, ...] = ("auto", "serial", "parallel")
# The ways to train that can be chosen.
WAYS = (*KERNELS, "naive", "naive-parallel", "numpy-in-place")
# The way without a choice: gradients are computed and left.
NONE = "none"
LABELS: dict[str, str] = {
    NONE: "no optimizer",
    **{kernel: f"fastrms {kernel}" for kernel in KERNELS},
    "naive": "naive loop",
    "naive-parallel": "naive loop, prange",
    "numpy-in-place": "NumPy in place",
    "reference": "reference class",
}

# Steps in a turn, and the number of first steps that are dropped.
TURN, DROPPED = 12, 3
MIN_TURNS, MAX_TURNS = 4, 60
# Steps of every training whose losses are compared before timing.
CHECKED_STEPS = 2 * TURN
BATCHES = 16

# The longest time to wait for the choice of "auto": on a busy machine, its kernels take long to compile.
TRIAL_SECONDS = 15.0


class TrainingRow(TypedDict):
    """The result of one training."""

    network: str
    dtype: str
    params: int
    kernel: str  # one of `LABELS`
    gradients: str  # "list" for new arrays, or "buffer" for the same arrays in each step
    step_seconds: float  # median of a whole step
    quarter: float
    three_quarters: float
    optimizer_seconds: float  # median
    times_faster: float  # than the reference class
    over_no_optimizer: float  # in units of the step without an optimizer and with the same kind of gradients
    steps: int
    check: str


# Seconds of a step by way and kind of gradients.
Medians = Mapping[tuple[str, str], float]


class _Trainer:
    """A training, its next batch, and the times of the steps that count."""

    def __init__(self, training: Training, data: tuple[Array, NDArray[np.intp]]) -> None:
        self.training = training
        self._x, self._y = data
        self._next = 0
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def steps(self, number: int) -> None:
        for _ in range(number):
            rows = slice(self._next, self._next + BATCH_SIZE)
            self.training.step(self._x[rows], self._y[rows])
            self._next = (self._next + BATCH_SIZE) % len(self._y)

    def turn(self) -> None:
        self.steps(TURN)
        self.step_seconds += self.training.step_seconds[DROPPED - TURN :]
        self.optimizer_seconds += self.training.optimizer_seconds[DROPPED - TURN :]

    def settle(self) -> None:
        """Train until "auto" has chosen its kernel, and restore parameters and cache."""
        optimizer = self.training.optimizer
        assert isinstance(optimizer, RMSProp)
        flats = [optimizer.buffers[name].flat for name in ("params", "cache")]
        before = [flat.copy() for flat in flats]
        settle(lambda: self.steps(1))
        for flat, values in zip(flats, before, strict=True):
            flat[...] = values


def measure_training(
    network: Network,
    ways: Sequence[str],
    threads: int | None,
    min_time: float,
    *,
    on_progress: Progress = lambda share, what: None,
    rows: list[TrainingRow],
) -> None:
    """Train a network in turns in all `ways` (`WAYS`), and append rows to `rows`, also after an interruption.

    Each way trains twice: with gradients as lists of new arrays, and with gradients in the same arrays in each step,
    for fastrms its gradient buffer. The reference class and a training without an optimizer are added. `threads` limits
    the parallel kernel, not matrix products. `min_time` is in seconds, for each training. Raise BenchmarkError if
    losses differ from the reference's.
    """
    start, x, y = _start(network, BATCHES)
    trainers = {
        key: _Trainer(_training(*key, start, threads), (x, y))
        for key in [("reference", "list"), *((way, g) for g in ("list", "buffer") for way in (NONE, *ways))]
    }
    reference = trainers["reference", "list"].training
    for k, ((way, gradients), trainer) in enumerate(trainers.items()):
        on_progress(0.3 * k / len(trainers), f"{network.name}: checking {way}, {gradients}")
        trainer.steps(CHECKED_STEPS)
        step = first_difference(np.array(reference.losses), np.array(trainer.training.losses))
        if step is not None and way != NONE:
            raise BenchmarkError(
                f"{network.name}: {LABELS[way]}, gradients as {gradients}: expected the losses of the reference, got "
                f"a different loss at step {step + 1}"
            )
        if way == "auto" and count_params(network.widths) >= SETTLE_FROM:
            trainer.settle()
    try:
        for key, share in take_turns(list(trainers), min_time, MIN_TURNS, MAX_TURNS):
            on_progress(0.3 + 0.7 * share, f"{network.name}: {', '.join(key)}")
            if key[0] == NONE:  # gradients of other parameters would be other work: they hold zeros and tiny numbers
                for own, param in zip(trainers[key].training.optimizer.params, reference.optimizer.params, strict=True):
                    own[...] = param
            trainers[key].turn()
    finally:
        measured = {key: trainer for key, trainer in trainers.items() if trainer.step_seconds}
        medians = {key: quartiles(trainer.step_seconds)[1] for key, trainer in measured.items()}
        rows += [_row(network, *key, trainer, medians) for key, trainer in measured.items()]


def _training(way: str, gradients: str, start: Sequence[Array], threads: int | None) -> Training:
    """Return a new training from `start`; see `measure_training`."""
    params = [param.copy() for param in start]
    cache = [np.zeros_like(param) for param in start]
    make: dict[str, Callable[[], Optimizer]] = {
        NONE: lambda: NoOptimizer(params),
        "naive": lambda: NaiveLoop(params, cache),
        "naive-parallel": lambda: NaiveLoop(params, cache, parallel=True),
        "numpy-in-place": lambda: NumpyInPlace(params, cache),
        "reference": lambda: ReferenceRMSProp(start, lr=LR),
        **{kernel: partial(RMSProp, start, lr=LR, kernel=kernel, num_threads=threads) for kernel in KERNELS},
    }
    optimizer = make[way]()
    if gradients == "list":
        return Training(optimizer)
    own = optimizer.grads if isinstance(optimizer, RMSProp) else [np.zeros_like(param) for param in start]
    return Training(optimizer, own)


def _row(network: Network, kernel: str, gradients: str, trainer: _Trainer, medians: Medians) -> TrainingRow:
    quarter, median, three_quarters = quartiles(trainer.step_seconds)
    return {
        "network": network.network,
        "dtype": network.dtype,
        "params": count_params(network.widths),
        "kernel": kernel,
        "gradients": gradients,
        "step_seconds": median,
        "quarter": quarter,
        "three_quarters": three_quarters,
        "optimizer_seconds": float(np.median(trainer.optimizer_seconds)),
        # The reference has the first turn. An interruption may come before the turn without an optimizer.
        "times_faster": medians["reference", "list"] / median,
        "over_no_optimizer": median / medians.get((NONE, gradients), math.nan),
        "steps": len(trainer.step_seconds),
        "check": "not compared" if kernel == NONE else "same bits",
    }


def _start(network: Network, batches: int) -> tuple[list[Array], Array, NDArray[np.intp]]:
    """Return parameters to start from, and inputs and classes of some batches, all random."""
    rng = np.random.default_rng(0)
    start = init_params(network.widths, network.dtype, rng)
    x = rng.standard_normal((batches * BATCH_SIZE, network.widths[0])).astype(network.dtype)
    return start, x, rng.integers(0, network.widths[-1], len(x)).astype(np.intp)


def train_with_auto(network: Network, seconds: float) -> tuple[Training, RMSProp]:
    """Train for `seconds`, and return the training and its optimizer.

    If `seconds` are enough for a trial to begin, train until "auto" has chosen, or for `TRIAL_SECONDS` more.
    """
    start, x, y = _start(network, 1)
    optimizer = RMSProp(start)
    training = Training(optimizer)
    end = perf_counter() + seconds
    limit = end + TRIAL_SECONDS if seconds >= Tuner.FIRST_LOOK else end
    while (now := perf_counter()) < end or (now < limit and not optimizer.backend.decided):
        training.step(x, y)
    return training, optimizer
