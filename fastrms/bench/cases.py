"""The sizes, array counts and networks that `fastrms bench` and `benchmarks/` measure, and their data."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BATCH_SIZE", "DECAY_RATE", "DTYPES", "EPSILON", "LR", "MANY_ARRAYS", "NETWORKS", "QUICK_NETWORKS", "QUICK_SIZES",
    "SIZES", "Array", "Case", "Network", "make_arrays",
]  # fmt: skip

Array = NDArray[np.floating[Any]]

DTYPES = ("float32", "float64")

# Elements of one flat array: the smallest fits into the first-level cache, the largest only into main memory.
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
QUICK_SIZES = (1_000, 100_000, 1_000_000)

# The number of arrays, and the shape of each.
MANY_ARRAYS = (1_000, (10, 10))

# Widths of the networks of --in-situ: inputs, hidden layers, outputs.
NETWORKS: Mapping[str, tuple[int, ...]] = {
    "64-32-10": (64, 32, 10),
    "784-512-512-10": (784, 512, 512, 10),
    "784-2048-2048-10": (784, 2048, 2048, 10),
    "64-[32]x50-10": (64, *[32] * 50, 10),
}
QUICK_NETWORKS = ("64-32-10", "784-512-512-10")
BATCH_SIZE = 64

# The options of every implementation, so that all compute the same numbers.
LR, DECAY_RATE, EPSILON = 1e-3, 0.9, 1e-8


@dataclass(frozen=True)
class Case:
    """The parameters of one measurement: `arrays` arrays of `shape` and `dtype`."""

    arrays: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def params(self) -> int:
        """Return the number of elements in all arrays."""
        return self.arrays * prod(self.shape)

    @property
    def traffic(self) -> int:
        """Return the bytes that a step moves: parameters and cache are read and written, gradients are read."""
        return 5 * self.params * np.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """Return the title of the table, such as "one array of 100,000, float32"."""
        if self.arrays == 1 and len(self.shape) == 1:
            return f"one array of {self.params:,}, {self.dtype}"
        number = "one array" if self.arrays == 1 else f"{self.arrays:,} arrays"
        return f"{number} of {'x'.join(map(str, self.shape))}, {self.dtype}"


@dataclass(frozen=True)
class Network:
    """A perceptron to train: its name, its widths (inputs, hidden layers, outputs) and its dtype."""

    network: str
    widths: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """Return the title of the table, such as "64-32-10, float32"."""
        return f"{self.network}, {self.dtype}"


def make_arrays(case: Case, seed: int = 0) -> tuple[list[Array], list[Array]]:
    """Return parameters and gradients of a case: the same numbers in every process."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(case.dtype).type

    def draw() -> list[Array]:
        return [rng.standard_normal(case.shape, kind) for _ in range(case.arrays)]

    params, grads = draw(), draw()
    for grad in grads:
        # No square is subnormal. Other libraries are slow with subnormal numbers, which is another measurement.
        grad += np.copysign(kind(0.01), grad)
    return params, grads
