"""The same training twice, with two optimizers in turn, and the time of each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.demo.mlp import loss_and_gradients
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["Training", "first_difference", "train_both"]

Array = NDArray[Any]


@dataclass
class Training:
    """One training: its optimizer, and what was measured at each step.

    Attributes
    ----------
    optimizer : ReferenceRMSProp or RMSProp
    out : sequence of ndarray or None
        Where gradients are written, for an optimizer that then takes its step without arguments. None: each step
        hands a new list of gradients to the optimizer.
    losses : list of scalar
        The loss of each batch, ahead of its step.
    step_seconds, optimizer_seconds : list of float
        Seconds of each step: of all of it, and of the optimizer alone.
    """

    optimizer: ReferenceRMSProp | RMSProp
    out: Sequence[Array] | None = None
    losses: list[np.floating[Any]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)

    def step(self, x: Array, y: NDArray[np.intp]) -> None:
        """Train on one batch (`fastrms.demo.mlp.loss_and_gradients` has the shapes)."""
        optimizer = self.optimizer
        start = perf_counter()
        loss, gradients = loss_and_gradients(optimizer.params, x, y, self.out)
        computed = perf_counter()
        # What lies in `out` is in the optimizer's own buffer already.
        optimizer.step(gradients) if self.out is None else optimizer.step()  # type: ignore[call-arg]
        end = perf_counter()
        self.losses.append(loss)
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - computed)

    @property
    def step_time(self) -> float:
        """Median time of a whole step, in seconds."""
        return float(np.median(self.step_seconds))

    @property
    def optimizer_time(self) -> float:
        """Median time of the optimizer in a step, in seconds."""
        return float(np.median(self.optimizer_seconds))


def train_both(
    start: Sequence[Array],
    x: Array,
    y: NDArray[np.intp],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    kernel: str,
    into_buffer: bool,
    rng: np.random.Generator,
    on_step: Callable[[Training], None] = lambda training: None,
) -> tuple[Training, Training]:
    """Train from the same start, on the same batches, with the NumPy reference and with fastrms.

    The two take turns epoch by epoch, and who goes first changes with each, so that whatever else the machine does
    hits both alike. What has to be compiled is compiled ahead, by a step of optimizers that are thrown away.

    Parameters
    ----------
    start : sequence of ndarray
        Parameters to start from; not changed.
    x, y : ndarray
        Rows to train on, and their classes.
    epochs, batch_size : int
        The last batch of an epoch has what is left, fewer rows perhaps.
    lr : float
    kernel : str
        As for `fastrms.RMSProp`.
    into_buffer : bool
        Write the gradients straight into the buffer of fastrms, instead of giving it a list of arrays.
    rng : numpy.random.Generator
        Shuffles the rows for each epoch.
    on_step : callable
        Called with the training after each of its steps, while no time is taken.

    Returns
    -------
    reference, fast : Training
        Where a loss is not finite they end with that epoch, since what follows trains nothing.
    """

    def new_pair() -> tuple[Training, Training]:
        fast = RMSProp(list(start), lr=lr, kernel=kernel)
        return Training(ReferenceRMSProp(start, lr=lr)), Training(fast, fast.grads if into_buffer else None)

    with np.errstate(all="ignore"):  # the caller looks at the losses
        for training in new_pair():
            training.step(x[:batch_size], y[:batch_size])
        pair = new_pair()
        batches = -(-len(y) // batch_size)
        for epoch in range(epochs):
            order = rng.permutation(len(y))
            shuffled_x, shuffled_y = x[order], y[order]
            for training in pair if epoch % 2 == 0 else pair[::-1]:
                for first in range(0, len(y), batch_size):
                    training.step(shuffled_x[first : first + batch_size], shuffled_y[first : first + batch_size])
                    on_step(training)
            if not all(np.isfinite(training.losses[-batches:]).all() for training in pair):
                break
    return pair


def first_difference(a: Array, b: Array) -> int | None:
    """The first flat index at which two arrays of the same shape and dtype have different bits, or None.

    Unlike ``==``, tells 0.0 from -0.0 and finds NaN equal to the same NaN.
    """
    bits = f"u{a.dtype.itemsize}"
    different = np.flatnonzero(np.ravel(a).view(bits) != np.ravel(b).view(bits))
    return int(different[0]) if len(different) else None
