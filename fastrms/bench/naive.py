"""The naive loop: what anyone would write with Numba, in six lines. docs/performance.md shows them as they are."""

import numpy as np
from numba import njit, prange

__all__ = ["naive", "naive_parallel"]


@njit(error_model="numpy")
def naive(params, grads, cache, lr, decay_rate, rest, epsilon):
    for i in range(params.size):
        g = grads[i]
        cache[i] = decay_rate * cache[i] + rest * (g * g)
        params[i] -= lr * g / (np.sqrt(cache[i]) + epsilon)


@njit(error_model="numpy", parallel=True)
def naive_parallel(params, grads, cache, lr, decay_rate, rest, epsilon):
    for i in prange(params.size):
        g = grads[i]
        cache[i] = decay_rate * cache[i] + rest * (g * g)
        params[i] -= lr * g / (np.sqrt(cache[i]) + epsilon)
