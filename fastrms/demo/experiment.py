"""The experiment of the demo: a data set, a network to train on it, and the batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from fastrms.demo import data, mlp
from fastrms.demo.training import Batches, Training
from fastrms.plots import plot_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Experiment", "network_name"]


@dataclass(frozen=True)
class Experiment:
    """A network, its data and its batches; `prepare` makes it."""

    dataset: data.Dataset
    sizes: list[int]  # inputs, width of each hidden layer, outputs
    batches: Batches
    rng: np.random.Generator  # draws the parameters to start from

    @classmethod
    def prepare(
        cls, path: Path | None, hidden: Sequence[int], dtype: str, *, batch_size: int, epochs: int, seed: int
    ) -> Self:
        """Load the file at `path`, or the digits if it is None, and fit network and batches to the data."""
        x, y = data.load_digits() if path is None else data.load_file(path)
        dataset = data.split(x, y, dtype, seed, "the digits" if path is None else str(path))
        start_rng, batch_rng = np.random.default_rng(seed).spawn(2)
        rows = len(dataset.train_y)
        batches = Batches(dataset.train_x, dataset.train_y, min(batch_size, rows), epochs, batch_rng)
        return cls(dataset, [x.shape[1], *hidden, dataset.classes], batches, start_rng)

    def start(self) -> list[mlp.Array]:
        """Draw the parameters to start from, in the dtype of the data."""
        return mlp.init_params(self.sizes, self.dataset.train_x.dtype, self.rng)

    def evaluate(self, training: Training) -> tuple[float, float]:
        """Return the mean loss over the training rows and the accuracy on the test rows, from 0 to 1."""
        params, dataset = training.optimizer.params, self.dataset
        loss, _ = mlp.evaluate(params, dataset.train_x, dataset.train_y)
        return loss, mlp.evaluate(params, dataset.test_x, dataset.test_y)[1]

    def plot(self, trainings: Mapping[str, Training], conclusion: str) -> "Figure":
        """Draw the losses and times of training runs, by their names, with `conclusion` as the title."""
        figure, _ = plot_training(
            {name: np.array(each.losses) for name, each in trainings.items()},
            {name: (each.step_time, each.optimizer_time) for name, each in trainings.items()},
            title=f"{conclusion}\n(RMSProp, network {network_name(self.sizes)}, {self.dataset.train_x.dtype})",
        )
        return figure


def network_name(sizes: Sequence[int]) -> str:
    """Return the widths of the layers: "64-512-512-10", or "64-[32]*50-10" if there are many."""
    if len(sizes) <= 6:
        return "-".join(map(str, sizes))
    runs = [(width, len(list(run))) for width, run in groupby(sizes)]
    return "-".join(str(width) if length == 1 else f"[{width}]*{length}" for width, length in runs)
