"""Two training runs of a network, with two optimizers in turn: losses, times, and a comparison of their bits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrms._types import HostKernel
from fastrms.demo.mlp import Array, Labels, loss_and_gradients
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = [
    "Batches", "Optimizer", "Ratio", "Training", "compare", "first_difference", "ratio_of_times",
    "ratios_spread", "rest_differs", "train_both", "train_in_turns",
]  # fmt: skip

Batch = tuple[Array, Labels]

# The steps of one training run before it is the turn of the other: few, so that other load of the machine slows both.
# After a turn, the caches hold the data of the other run.
TURN = 10

# Forward and backward run the same code in both training runs. A larger difference comes from the machine.
REST_TOLERANCE = 0.1
# The largest quotient of the quartiles of the ratio of two steps on a machine that is not busy.
SPREAD_TOLERANCE = 2.0


@dataclass(frozen=True)
class Batches:
    """The batches of each epoch: the rows of a training set in a new order."""

    x: Array  # (rows, features)
    y: Labels  # (rows,)
    size: int  # rows of a batch; the last one of an epoch has the rest
    epochs: int
    rng: np.random.Generator  # shuffles the rows

    @property
    def per_epoch(self) -> int:
        """The number of batches of an epoch."""
        return -(-len(self.y) // self.size)

    def __iter__(self) -> Iterator[list[Batch]]:
        for _ in range(self.epochs):
            order = self.rng.permutation(len(self.y))
            x, y = self.x[order], self.y[order]
            yield [(x[k : k + self.size], y[k : k + self.size]) for k in range(0, len(y), self.size)]


class Optimizer(Protocol):
    """An optimizer of a list of arrays."""

    @property
    def params(self) -> Any:
        """The parameters, which a step replaces or changes in place."""
        ...

    def step(self, gradients: Any, /) -> object:
        """Take one step."""
        ...


@dataclass
class Training:
    """A training run: its optimizer, and the loss and times of each step."""

    optimizer: Optimizer
    # Arrays for the gradients. With the gradient buffer of an `RMSProp`, it steps in place. None: new arrays.
    out: Sequence[Array] | None = None
    losses: list[np.floating[Any]] = field(default_factory=list)  # of each batch, before its step
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)  # the optimizer's part of each step

    def compute(self, x: Array, y: Labels) -> tuple[np.floating[Any], Sequence[Array | None]]:
        """Return the loss and the gradients of a batch (`fastrms.demo.mlp.loss_and_gradients` has the shapes)."""
        return loss_and_gradients(self.optimizer.params, x, y, self.out)

    def step(self, x: Array, y: Labels) -> None:
        """Train on one batch."""
        optimizer = self.optimizer
        start = perf_counter()
        loss, gradients = self.compute(x, y)
        computed = perf_counter()
        in_place = gradients is self.out and isinstance(optimizer, RMSProp)
        optimizer.step(None if in_place else gradients)
        end = perf_counter()
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - computed)
        self.losses.append(loss)

    def turn(self, batches: Sequence[Batch], on_step: Callable[["Training"], None]) -> None:
        """Train on batches; call `on_step` with this training run after each batch."""
        for x, y in batches:
            self.step(x, y)
            on_step(self)

    @property
    def step_time(self) -> float:
        """The median time of a step, in seconds."""
        return float(np.median(self.step_seconds))

    @property
    def optimizer_time(self) -> float:
        """The median time of the optimizer in a step, in seconds."""
        return float(np.median(self.optimizer_seconds))

    @property
    def rest_seconds(self) -> NDArray[np.float64]:
        """The time of forward and backward in each step, shape (steps,)."""
        return np.subtract(self.step_seconds, self.optimizer_seconds)


class Ratio(NamedTuple):
    """The median and the quartiles of ratios."""

    median: float
    quarter: float
    three_quarters: float


def train_both(
    start: Sequence[Array],
    batches: Batches,
    *,
    lr: float,
    kernel: HostKernel,
    into_buffer: bool,
    on_step: Callable[[Training], None] = lambda training: None,
) -> tuple[Training, Training]:
    """Train with the NumPy reference and with fastrms, from the same parameters `start` on the same batches.

    With `into_buffer`, gradients are written into the gradient buffer of fastrms instead of new arrays. `on_step` is
    called with a training run after each of its steps; its time is not measured. Return the run of the reference and
    the run of fastrms. Both end with the first epoch that has a loss of inf or NaN.
    """

    def new_pair() -> tuple[Training, Training]:
        fast = RMSProp(list(start), lr=lr, kernel=kernel)
        return Training(ReferenceRMSProp(start, lr=lr)), Training(fast, fast.grads if into_buffer else None)

    return train_in_turns(new_pair, batches, on_step)


def train_in_turns(
    new_pair: Callable[[], tuple[Training, Training]],
    batches: Batches,
    on_step: Callable[[Training], None],
    agree: Callable[[bool], bool] = bool,
) -> tuple[Training, Training]:
    """Train a pair in turns of `TURN` steps on the same batches, until a loss is not finite.

    The second training run of a turn is the first of the next turn. The first pair from `new_pair` takes one step,
    which compiles, and is dropped. The second pair is trained and returned. `agree` is called after each epoch with
    whether its losses are finite, and returns whether to continue: MPI ranks end together.
    """
    with np.errstate(all="ignore"):  # the losses are checked below
        for training in new_pair():
            training.turn([(batches.x[: batches.size], batches.y[: batches.size])], lambda training: None)
        pair = new_pair()
        order = pair
        for epoch in batches:
            for first in range(0, len(epoch), TURN):
                for training in order:
                    training.turn(epoch[first : first + TURN], on_step)
                order = order[::-1]
            if not agree(all(bool(np.isfinite(each.losses[-len(epoch) :]).all()) for each in pair)):
                break
    return pair


def ratio_of_times(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Return how many times as long the first took as the second, from their times for the same batches."""
    return Ratio(*map(float, np.quantile(np.divide(first, second), (0.5, 0.25, 0.75))))


def rest_differs(first: Training, second: Training) -> bool:
    """Return whether forward and backward differ in time by so much that the machine must have been busy."""
    ratio = float(np.median(first.rest_seconds)) / float(np.median(second.rest_seconds))
    return max(ratio, 1 / ratio) > 1 + REST_TOLERANCE


def ratios_spread(first: Training, second: Training) -> bool:
    """Return whether the ratio of times varies so much from step to step that the machine must have been busy."""
    step = ratio_of_times(first.step_seconds, second.step_seconds)
    return step.three_quarters > SPREAD_TOLERANCE * step.quarter


def compare(reference: Training, fast: Training) -> tuple[bool, str]:
    """Return whether losses and parameters of two training runs have the same bits, and a text about the outcome.

    Losses are compared up to the first that is not finite in both.
    """
    steps = len(reference.losses)
    a, b = np.array(reference.losses), np.array(fast.losses)
    finite = np.isfinite(a) & np.isfinite(b)
    # No rule says which bits a NaN has.
    numbers = steps if finite.all() else int(np.argmin(finite))
    if (step := first_difference(a[:numbers], b[:numbers])) is not None:
        gap = abs(float(a[step]) - float(b[step]))
        return False, (
            f"the losses differ first at step {step + 1} of {steps}: {a[step]} with the reference and {b[step]} "
            f"with fastrms, a difference of {gap:.3g}"
        )
    if numbers < steps and np.isfinite(a[numbers]) != np.isfinite(b[numbers]):
        return False, f"the loss at step {numbers + 1} is {a[numbers]} with the reference and {b[numbers]} with fastrms"
    if numbers == steps:
        for k, (p, q) in enumerate(zip(reference.optimizer.params, fast.optimizer.params, strict=True)):
            if (at := first_difference(p, q)) is not None:
                gap = float(np.max(np.abs(p.astype(np.float64) - q)))
                return False, (
                    f"the losses of all {steps} steps have the same bits, but the final parameters differ, first in "
                    f"{'b' if k % 2 else 'W'}{k // 2 + 1} (flat index {at}); the largest difference there is {gap:.3g}"
                )
    return True, f"The losses of all {steps} steps and the final parameters have the same bits."


def first_difference(a: NDArray[Any], b: NDArray[Any]) -> int | None:
    """Return the first flat index at which two arrays of the same shape and dtype differ in bits, or None.

    Unlike ``==``, tells 0.0 from -0.0 and finds NaN equal to the same NaN.
    """
    bits = f"u{a.dtype.itemsize}"
    different = np.flatnonzero(np.ravel(a).view(bits) != np.ravel(b).view(bits))
    return int(different[0]) if len(different) else None
