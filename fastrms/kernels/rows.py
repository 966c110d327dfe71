"""Sums of gradients that are for the same row of a parameter."""

import numpy as np
from numpy.typing import NDArray

from fastrms._types import Array
from fastrms.kernels.compiled import jit

__all__ = ["add_up_rows"]


@jit()
def _add_up(gradients, order, first, sums):
    """Write the sum of the rows order[first[k]], ..., order[first[k + 1] - 1] of `gradients` to row k of `sums`."""
    for k in range(first.size):
        stop = first[k + 1] if k + 1 < first.size else order.size
        for j in range(sums.shape[1]):
            sums[k, j] = gradients[order[first[k]], j]
        for i in range(first[k] + 1, stop):
            for j in range(sums.shape[1]):
                sums[k, j] += gradients[order[i], j]


def add_up_rows(gradients: Array, order: NDArray[np.int64], first: NDArray[np.int64], kernel: str) -> Array:
    """Return sums of rows of `gradients`, which has the shape (n, width).

    Sum k adds the rows ``order[first[k]]``, ..., ``order[first[k + 1] - 1]`` one after another, so its bits are always
    the same. The last sum ends with the last row of `order`.
    """
    if kernel == "numpy":
        sums: Array = gradients[order[first]]
        sum_of = np.repeat(np.arange(len(first)), np.diff(first, append=len(order)))
        others = np.ones(len(order), bool)
        others[first] = False
        with np.errstate(all="ignore"):
            np.add.at(sums, sum_of[others], gradients[order[others]])
        return sums
    sums = np.empty((len(first), gradients.shape[1]), gradients.dtype)
    _add_up(gradients, order, first, sums)
    return sums
