"""The roofline of this machine: a loop with the memory traffic of a step and almost no arithmetic.

A step reads parameters, cache and gradients, and writes parameters and cache: five numbers a parameter, 20 bytes in
float32. An implementation with all three in that dtype cannot move fewer. The roofline is measured in the same run, at
the same size and with the same number of threads. It is the time of the fastest way to fetch memory (`FETCHES`).
"""

import time
from typing import Any

import numba
import numpy as np

from fastrms.bench.cases import Array
from fastrms.bench.problem import Problem, Runner
from fastrms.kernels import threads
from fastrms.kernels.access import prefetch
from fastrms.kernels.compiled import inner, jit
from fastrms.kernels.cpu import LINES_AHEAD, STRIP_LINES, block_size

__all__ = ["FETCHES", "make_runner", "touch_parallel", "touch_serial"]

Scalar = np.floating[Any]

# Ways to fetch memory, as (cache lines in a strip, cache lines ahead): left to the processor, or prefetched ahead of
# each strip as in the kernels. The fastest one depends on size and threads, by up to 10 %.
FETCHES = ((0, 0), (STRIP_LINES, LINES_AHEAD), (4, 32))
# Timings of each of them.
FETCH_TRIALS = 9


@inner
def _touch(params: Array, grads: Array, cache: Array, half: Scalar) -> None:
    # Averages neither grow nor become subnormal, however often the loop runs.
    for i in range(params.size):
        c = half * (cache[i] + grads[i])
        cache[i] = c
        params[i] = half * (params[i] + c)


@inner
def _touch_in_strips(
    params: Array, grads: Array, cache: Array, half: Scalar, strip_lines: int, lines_ahead: int
) -> None:
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
def touch_serial(params: Array, grads: Array, cache: Array, half: Scalar, strip_lines: int, lines_ahead: int) -> None:
    """Read the three arrays and write parameters and cache, once, on one thread, fetched in one of the `FETCHES`."""
    _touch_in_strips(params, grads, cache, half, strip_lines, lines_ahead)


@jit(parallel=True)
def touch_parallel(params: Array, grads: Array, cache: Array, half: Scalar, strip_lines: int, lines_ahead: int) -> None:
    """Do the same on all threads of Numba."""
    size = block_size(params.size)
    for block in numba.prange((params.size + size - 1) // size):
        low = block * size
        high = min(low + size, params.size)
        _touch_in_strips(params[low:high], grads[low:high], cache[low:high], half, strip_lines, lines_ahead)


def make_runner(problem: Problem, parallel: bool) -> Runner:
    """Return a runner of the roofline on the memory of the problem's shared optimizer, fetched in the fastest way."""
    optimizer = problem.optimizer()
    p, g, c = (optimizer.buffers[name].segments[0] for name in ("params", "grads", "cache"))
    touch = touch_parallel if parallel else touch_serial
    half = problem.scalar(0.5)

    def seconds(fetch: tuple[int, int]) -> float:
        start = time.perf_counter()
        touch(p, g, c, half, *fetch)
        return time.perf_counter() - start

    with threads.limit_threads(problem.threads):
        trials = [[seconds(fetch) for fetch in FETCHES] for _ in range(FETCH_TRIALS)]
    fetch = FETCHES[int(np.argmin(np.median(trials, axis=0)))]

    def step() -> None:
        touch(p, g, c, half, *fetch)

    def limited_step() -> None:
        before = numba.get_num_threads()
        numba.set_num_threads(problem.threads)
        step()
        numba.set_num_threads(before)

    all_threads = not parallel or problem.threads == numba.get_num_threads()
    return Runner(step if all_threads else limited_step, lambda: ((), ()))
