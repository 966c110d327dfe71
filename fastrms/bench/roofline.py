"""The machine's own limit: a loop with the memory traffic of a step and next to no arithmetic.

A step reads parameters, cache and gradients, and writes parameters and cache: five numbers a parameter, 20 bytes in
float32. No implementation that keeps all three in that dtype can move fewer. How fast this machine moves them is
measured here and not looked up, in the same run, at the same size and with the same number of threads.
Memory can be fetched in several ways (`FETCHES`): the limit is the time of the fastest.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms.kernels.access import prefetch
from fastrms.kernels.compiled import inner, jit
from fastrms.kernels.cpu import LINES_AHEAD, STRIP_LINES, block_size

__all__ = ["FETCHES", "percent_of_limit", "rates", "touch_parallel", "touch_serial"]

Array = NDArray[Any]

# Ways to fetch memory, as (lines in a strip, lines ahead): left to the processor, or asked for ahead of each strip as
# the kernels do. Which is fastest differs with size and threads by 10 %, and the limit is the fastest.
FETCHES = ((0, 0), (STRIP_LINES, LINES_AHEAD), (4, 32))


@inner
def _touch(params: Array, grads: Array, cache: Array, half: Any) -> None:
    # Averages: whatever the values are, they neither grow nor become subnormal, however often this runs.
    for i in range(params.size):
        c = half * (cache[i] + grads[i])
        cache[i] = c
        params[i] = half * (params[i] + c)


@inner
def _touch_in_strips(params: Array, grads: Array, cache: Array, half: Any, strip_lines: int, lines_ahead: int) -> None:
    line = 64 // params.itemsize
    strip = strip_lines * line if strip_lines else max(1, params.size)
    ahead = lines_ahead * line
    for start in range(0, params.size, strip):
        stop = min(start + strip, params.size)
        if strip_lines and stop + ahead <= params.size:
            for i in range(start + ahead, stop + ahead, line):
                prefetch(params, i)
                prefetch(grads, i)
                prefetch(cache, i)
        _touch(params[start:stop], grads[start:stop], cache[start:stop], half)


@jit()
def touch_serial(params: Array, grads: Array, cache: Array, half: Any, strip_lines: int, lines_ahead: int) -> None:
    """Read the three arrays and write the first and the last, once, on one thread, fetched as one of `FETCHES`."""
    _touch_in_strips(params, grads, cache, half, strip_lines, lines_ahead)


@jit(parallel=True)
def touch_parallel(params: Array, grads: Array, cache: Array, half: Any, strip_lines: int, lines_ahead: int) -> None:
    """The same on all threads of Numba."""
    size = block_size(params.size)
    for block in numba.prange((params.size + size - 1) // size):
        low = block * size
        high = min(low + size, params.size)
        _touch_in_strips(params[low:high], grads[low:high], cache[low:high], half, strip_lines, lines_ahead)


def rates(params: int, traffic: float, seconds: float) -> tuple[float, float]:
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
