"""A model of the time that a step of `fastrms.mpi` takes on many ranks, and its fit to measured times."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# By ranks and size: seconds of a step, and of the communication in it.
Times = Mapping[int, Mapping[int, tuple[float, float]]]

ITEMSIZE = np.dtype(np.float32).itemsize
# Rows of the batch of all ranks, for the time of the gradients: 6 floating-point operations a parameter and row.
ROWS = 4096


@dataclass(frozen=True)
class Machine:
    """The parameters of the model."""

    latency: float  # seconds of one message
    bandwidth: float  # bytes a second that a rank sends
    rate: float  # parameters a second that a rank updates
    overhead: float  # seconds of a step without parameters, on several ranks
    alone: float  # the same on one rank
    flops: float  # floating-point operations a second of a rank in matrix products

    def update(self, size: int, ranks: int) -> float:
        """Return the seconds in which a rank updates its shard."""
        return (self.overhead if ranks > 1 else self.alone) + size / ranks / self.rate

    def communication(self, size: int, ranks: int) -> float:
        """Return the seconds of reduce-scatter and all-gather, and of the small all-reduce ahead of them."""
        rounds = math.ceil(math.log2(ranks))
        return 3 * rounds * self.latency + bytes_of_rank(size, ranks) / self.bandwidth

    def step(self, size: int, ranks: int) -> float:
        """Return the seconds of a step."""
        return self.update(size, ranks) + self.communication(size, ranks)

    def gradients(self, size: int, ranks: int, rows: int = ROWS) -> float:
        """Return the seconds in which a rank computes the gradients of its rows of the batch."""
        return 6 * size * rows / ranks / self.flops

    def takes_over(self, size: int) -> int | None:
        """Return the least power of two, up to 2**24, at which communication takes longer than everything else."""
        for ranks in (1 << k for k in range(1, 25)):
            if self.communication(size, ranks) > self.gradients(size, ranks) + self.update(size, ranks):
                return ranks
        return None


def bytes_of_rank(size: int, ranks: int) -> float:
    """Return the bytes that a rank sends in a step: gradients of all other shards, and its own shard to all others."""
    return 2 * (ranks - 1) / ranks * size * ITEMSIZE


def fit(times: Times, flops_of_rank: float, cores: int) -> Machine:
    """Fit the model to measured times, with the least relative errors.

    Only up to as many ranks as cores: more ranks wait for cores.
    """
    updates, communications = [], []
    for ranks, by_size in times.items():
        if ranks > cores:
            continue
        for size, (whole, communication) in by_size.items():
            updates.append(([float(ranks > 1), float(ranks == 1), size / ranks], whole - communication))
            if ranks > 1:
                rounds = math.ceil(math.log2(ranks))
                communications.append(([3.0 * rounds, bytes_of_rank(size, ranks)], communication))
    overhead, alone, per_parameter = solve(updates)
    latency, per_byte = solve(communications)
    return Machine(latency, 1 / per_byte, 1 / per_parameter, overhead, alone, flops_of_rank)


def solve(rows: list[tuple[list[float], float]]) -> list[float]:
    """Return the nonnegative factors with the least sum of squares of relative errors."""
    from scipy.optimize import nnls

    matrix = np.array([[x / value for x in factors] for factors, value in rows])
    scale = matrix.max(axis=0)
    found = nnls(matrix / scale, np.ones(len(rows)))[0] / scale
    return [float(max(x, 1e-30)) for x in found]
