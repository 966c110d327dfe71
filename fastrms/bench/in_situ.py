"""Whole training steps of networks, as ``fastrms bench --in-situ`` measures them.

A kernel's time alone says little about training. Matrix products run on all cores between two steps of the
optimizer; their threads still spin when it begins, and its threads still spin when the next product does. So what
counts is the time of whole steps. Ways take turns of some steps, the first of which are dropped: they show what the
way before left behind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.bench.cases import BATCH_SIZE, LR
from fastrms.bench.workers import SETTLE_FROM, SETTLE_SECONDS, SETTLE_STEPS
from fastrms.cli.common import CommandError
from fastrms.demo.mlp import count_params, init_params
from fastrms.demo.training import Training, first_difference
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["KERNELS", "TURN", "InSituRow", "measure_training"]

Array = NDArray[Any]

KERNELS = ("auto", "serial", "parallel")

# Steps in a turn, and how many of them are dropped.
TURN, DROPPED = 12, 3
MIN_TURNS, MAX_TURNS = 4, 60
# Steps of every way whose losses are compared ahead of timing.
CHECKED_STEPS = 2 * TURN
BATCHES = 16


@dataclass(frozen=True)
class InSituRow:
    """Medians of one way to train: of whole steps and of the optimizer in them, with quartiles of whole steps."""

    network: str
    dtype: str
    params: int
    kernel: str
    gradients: str
    step_seconds: float
    quarter: float
    three_quarters: float
    optimizer_seconds: float
    times_faster: float
    steps: int
    check: str


class _Way:
    """One training, and the batch that comes next in it."""

    def __init__(self, training: Training, data: tuple[Array, NDArray[np.intp]]) -> None:
        self.training = training
        self._x, self._y = data
        self._next = 0
        self.kept: list[int] = []

    def steps(self, number: int) -> None:
        for _ in range(number):
            rows = slice(self._next, self._next + BATCH_SIZE)
            self.training.step(self._x[rows], self._y[rows])
            self._next = (self._next + BATCH_SIZE) % len(self._y)

    def turn(self) -> None:
        done = len(self.training.step_seconds)
        self.steps(TURN)
        self.kept += range(done + DROPPED, done + TURN)

    def settle(self) -> None:
        """Give "auto" the time that it needs to choose, and go back to where training was."""
        optimizer = self.training.optimizer
        assert isinstance(optimizer, RMSProp)
        flats = [optimizer.buffers[name].flat for name in ("params", "cache")]
        before = [flat.copy() for flat in flats]
        end = perf_counter() + SETTLE_SECONDS
        while perf_counter() < end:
            self.steps(TURN)
        self.steps(SETTLE_STEPS)
        for flat, values in zip(flats, before, strict=True):
            flat[...] = values

    def times(self) -> tuple[Array, Array]:
        step, optimizer = self.training.step_seconds, self.training.optimizer_seconds
        return np.array([step[i] for i in self.kept]), np.array([optimizer[i] for i in self.kept])


def measure_training(
    network: str,
    sizes: Sequence[int],
    dtype: str,
    kernels: Sequence[str],
    threads: int | None,
    min_time: float,
    *,
    on_progress: Callable[[float, str], None] = lambda share, what: None,
    rows: list[InSituRow],
) -> None:
    """Train one network in every way in turn, and append a row for each to `rows`, also after an interruption.

    Parameters
    ----------
    network : str
        Its name.
    sizes : sequence of int
        Inputs, hidden layers, outputs.
    dtype : str
    kernels : sequence of str
        Kernels of fastrms; each gets its gradients as lists and in its buffer.
    threads : int or None
        Threads of fastrms' parallel kernel. Matrix products have those of NumPy's BLAS.
    min_time : float
        Seconds to spend on each way.
    on_progress : callable
        Called with the share that is done, from 0 to 1, and what is done now.
    rows : list of InSituRow
        Where results go.

    Raises
    ------
    CommandError
        The losses of two ways differ.
    """
    what = f"{network}, {dtype}"
    rng = np.random.default_rng(0)
    start = init_params(sizes, dtype, rng)
    x = rng.standard_normal((BATCHES * BATCH_SIZE, sizes[0])).astype(dtype)
    y = rng.integers(0, sizes[-1], len(x)).astype(np.intp)

    def new(kernel: str, gradients: str) -> _Way:
        if kernel == "reference":
            return _Way(Training(ReferenceRMSProp(start, lr=LR)), (x, y))
        optimizer = RMSProp(start, lr=LR, kernel=kernel, num_threads=threads)
        return _Way(Training(optimizer, optimizer.grads if gradients == "buffer" else None), (x, y))

    ways = {("reference", "list"): new("reference", "list")}
    ways |= {(kernel, gradients): new(kernel, gradients) for gradients in ("list", "buffer") for kernel in kernels}
    oracle = next(iter(ways.values())).training
    for k, ((kernel, gradients), way) in enumerate(ways.items()):
        on_progress(0.3 * k / len(ways), f"{what}: checking {kernel}, {gradients}")
        way.steps(CHECKED_STEPS)
        step = first_difference(np.array(oracle.losses), np.array(way.training.losses))
        if step is not None:
            raise CommandError(
                f"{what}: kernel {kernel}, gradients as {gradients}: expected the losses of the reference, got another "
                f"one at step {step + 1}"
            )
        if kernel == "auto" and count_params(sizes) >= SETTLE_FROM:
            way.settle()
    try:
        begin = perf_counter()
        budget = min_time * len(ways)
        for k in range(MAX_TURNS):
            spent = perf_counter() - begin
            if k >= MIN_TURNS and spent >= budget:
                break
            on_progress(0.3 + 0.7 * min(1.0, spent / budget), f"{what}: turn {k + 1} of all ways")
            # Who comes first and who after whom changes with each round.
            order = list(ways.values())
            order = order[k % len(order) :] + order[: k % len(order)]
            for way in order if k % 2 == 0 else order[::-1]:
                way.turn()
    finally:
        rows += _rows(network, dtype, count_params(sizes), ways)


def _rows(network: str, dtype: str, params: int, ways: Mapping[tuple[str, str], _Way]) -> list[InSituRow]:
    """A row for every way that had a turn."""
    rows: list[InSituRow] = []
    base = float("nan")
    for (kernel, gradients), way in ways.items():
        if not way.kept:
            continue
        steps, optimizer = way.times()
        quarter, median, three_quarters = np.quantile(steps, [0.25, 0.5, 0.75]).tolist()
        base = median if kernel == "reference" else base
        rows.append(
            InSituRow(
                network=network,
                dtype=dtype,
                params=params,
                kernel=kernel,
                gradients=gradients,
                step_seconds=median,
                quarter=quarter,
                three_quarters=three_quarters,
                optimizer_seconds=float(np.median(optimizer)),
                times_faster=base / median,
                steps=len(steps),
                check="same bits",
            )
        )
    return rows
