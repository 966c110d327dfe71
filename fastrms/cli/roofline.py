"""The machine's own limit: a loop with the memory traffic of a step and next to no arithmetic.

A step reads parameters, cache and gradients, and writes parameters and cache: five numbers a parameter, 20 bytes in
float32. No implementation that keeps all three in that dtype can move fewer. How fast this machine moves them is
measured here and not looked up, in the same run, at the same size and with the same number of threads.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms.kernels.cpu import jit

__all__ = ["percent_of_limit", "rates", "touch_parallel", "touch_serial"]

Array = NDArray[Any]

# Elements in one work item, as in the kernels of fastrms.
_BLOCK = 4096


@jit()
def touch_serial(params: Array, grads: Array, cache: Array, half: Any) -> None:
    """Read the three arrays and write the first and the last, once, on one thread."""
    # Averages: whatever the values are, they neither grow nor become subnormal, however often this runs.
    for i in range(params.size):
        c = half * (cache[i] + grads[i])
        cache[i] = c
        params[i] = half * (params[i] + c)


@jit(parallel=True)
def touch_parallel(params: Array, grads: Array, cache: Array, half: Any) -> None:
    """The same on all threads of Numba."""
    for block in numba.prange((params.size + _BLOCK - 1) // _BLOCK):
        low = block * _BLOCK
        high = min(low + _BLOCK, params.size)
        p, g, v = params[low:high], grads[low:high], cache[low:high]
        for i in range(p.size):
            c = half * (v[i] + g[i])
            v[i] = c
            p[i] = half * (p[i] + c)


def rates(params: int, traffic: int, seconds: float) -> tuple[float, float]:
    """Billions of parameters and of bytes a second, for a step of `params` parameters that moves `traffic` bytes."""
    return params / seconds / 1e9, traffic / seconds / 1e9


def percent_of_limit(seconds: float, threads: int, limits: dict[int, float]) -> float:
    """How near a time comes to the limit: 100 is as fast as the machine moves the bytes.

    Parameters
    ----------
    seconds : float
    threads : int
        How many the measured way may use.
    limits : dict of int to float
        Seconds of the limit by number of threads. A way with many threads may use just one of them too, and small
        arrays are faster so: its limit is the best of those with as many threads or fewer.
    """
    return 100 * float(np.min([limit for number, limit in limits.items() if number <= threads])) / seconds
