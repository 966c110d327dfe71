"""What is measured: the sizes, the many arrays and the networks, in one table for `fastrms bench` and `benchmarks/`."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BATCH_SIZE",
    "DTYPES",
    "LR",
    "MANY_ARRAYS",
    "NETWORKS",
    "QUICK_NETWORKS",
    "QUICK_SIZES",
    "SIZES",
    "Case",
    "make_arrays",
]

DTYPES = ("float32", "float64")

# Elements of one flat array: from what the first-level cache holds to what only main memory does.
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
QUICK_SIZES = (1_000, 100_000, 1_000_000)

# How many arrays, and the shape of each.
MANY_ARRAYS = (1_000, (10, 10))

# Inputs, hidden layers and outputs of the networks that are trained with --in-situ.
NETWORKS: Mapping[str, tuple[int, ...]] = {
    "64-32-10": (64, 32, 10),
    "784-512-512-10": (784, 512, 512, 10),
    "784-2048-2048-10": (784, 2048, 2048, 10),
    "64-[32]x50-10": (64, *[32] * 50, 10),
}
QUICK_NETWORKS = ("64-32-10", "784-512-512-10")
BATCH_SIZE = 64

# Of every way that is measured, so that all compute the same.
LR, DECAY_RATE, EPSILON = 1e-3, 0.9, 1e-8


@dataclass(frozen=True)
class Case:
    """One problem: `arrays` arrays of `shape`, of `dtype`."""

    arrays: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def params(self) -> int:
        """How many numbers there are in all arrays."""
        return self.arrays * prod(self.shape)

    @property
    def traffic(self) -> int:
        """Bytes that a step has to move: parameters and cache read and written, gradients read."""
        return 5 * self.params * np.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """For a person: "one array of 100,000, float32"."""
        if self.arrays == 1 and len(self.shape) == 1:
            return f"one array of {self.params:,}, {self.dtype}"
        number = "one array" if self.arrays == 1 else f"{self.arrays:,} arrays"
        return f"{number} of {'x'.join(map(str, self.shape))}, {self.dtype}"


def make_arrays(case: Case, seed: int = 0) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Parameters and gradients of a case: the same numbers in every process that asks."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(case.dtype).type

    def draw() -> list[NDArray[Any]]:
        return [rng.standard_normal(case.shape, kind) for _ in range(case.arrays)]

    params, grads = draw(), draw()
    for grad in grads:
        # Far from zero, so that no square is subnormal: peers are slow there, and that is another measurement.
        grad += np.copysign(kind(0.01), grad)
    return params, grads
