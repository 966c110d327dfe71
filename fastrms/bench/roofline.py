"""The rooflines of this machine: the traffic of a step without its arithmetic, and its arithmetic without traffic.

Memory: a step reads parameters, cache and gradients, and writes parameters and cache: five numbers a parameter, 20
bytes in float32. An implementation with all three in that dtype cannot move fewer. The bound is the time of the fastest
way to fetch memory (`FETCHES`).

Divider: a step takes a square root and a division for each parameter. In the caches a processor is bound by the unit
that computes these, and not by memory. The bound is the time of both on arrays that stay in the first-level cache.

Both are measured in the same run, at the same size and with the same number of threads. The slower one is the limit.
"""

import time
from typing import Any

import numba
import numpy as np

from fastrms.bench.cases import EPSILON, Array
from fastrms.bench.problem import Problem, Runner
from fastrms.kernels import threads
from fastrms.kernels.access import prefetch
from fastrms.kernels.compiled import inner, jit
from fastrms.kernels.cpu import share

__all__ = [
    "FETCHES", "divide_parallel", "divide_serial", "divider", "divider_speedup", "memory", "touch_parallel",
    "touch_serial",
]  # fmt: skip

Scalar = np.floating[Any]

# Ways to fetch memory, as (cache lines in a strip, cache lines ahead): left to the processor, or prefetched ahead of
# each strip. The fastest one depends on processor, size and threads, by up to a half.
FETCHES = ((0, 0), (8, 48), (4, 32))
# Timings of each of them.
FETCH_TRIALS = 9

# Elements of the arrays of a thread in the loop of the divider: 16 KiB in float64, half of a small first-level cache.
CHUNK = 1024


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
    size = share(params.size)
    for k in numba.prange((params.size + size - 1) // size):
        low = k * size
        high = min(low + size, params.size)
        _touch_in_strips(params[low:high], grads[low:high], cache[low:high], half, strip_lines, lines_ahead)


def memory(problem: Problem, parallel: bool) -> Runner:
    """Return a runner of the memory traffic of a step, on the shared optimizer's memory, fetched in the fastest way."""
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

    return Runner(problem.limited(step) if parallel else step, lambda: ((), ()))


@inner
def _divide(values: Array, grads: Array, epsilon: Scalar, size: int) -> None:
    # The values converge to grads ** (2 / 3), however often the loop runs.
    for start in range(0, size, values.size):
        count = min(values.size, size - start)
        v, g = values[:count], grads[:count]
        for i in range(count):
            v[i] = g[i] / (np.sqrt(v[i]) + epsilon)


@jit()
def divide_serial(values: Array, grads: Array, epsilon: Scalar, size: int) -> None:
    """Take `size` square roots and divisions on the first row of each array, shape (rows, `CHUNK`)."""
    _divide(values[0], grads[0], epsilon, size)


@jit(parallel=True)
def divide_parallel(values: Array, grads: Array, epsilon: Scalar, size: int) -> None:
    """Do the same on all threads of Numba; each row has an equal share."""
    rows = values.shape[0]
    share = (size + rows - 1) // rows
    for row in numba.prange(rows):
        _divide(values[row], grads[row], epsilon, max(0, min(share, size - row * share)))


def _divider_arrays(dtype: str, rows: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    values, grads = (np.abs(rng.standard_normal((2, rows, CHUNK))) + 0.01).astype(dtype)
    return values, grads


def divider(problem: Problem, parallel: bool) -> Runner:
    """Return a runner of the square roots and divisions of a step."""
    values, grads = _divider_arrays(problem.case.dtype, problem.threads if parallel else 1)
    divide = divide_parallel if parallel else divide_serial
    epsilon, size = problem.scalar(EPSILON), problem.case.params

    def step() -> None:
        divide(values, grads, epsilon, size)

    return Runner(problem.limited(step) if parallel else step, lambda: ((), ()))


# Seconds of a turn of `divider_speedup`.
TURN = 0.03


def divider_speedup(turns: int = 8, size: int = 1_000_000) -> float:
    """Return how many times faster two threads divide than one: near 2, unless a processor is busy or shared.

    The first half of a turn does not count. After a pause the system takes some milliseconds to put two threads on two
    processors.
    """
    values, grads = _divider_arrays("float32", 2)
    epsilon = np.float32(EPSILON)
    seconds: tuple[list[float], list[float]] = [], []
    with threads.limit_threads(2):
        for divide in (divide_serial, divide_parallel):
            divide(values, grads, epsilon, size)  # compiles
        for _ in range(turns):
            for divide, taken in zip((divide_serial, divide_parallel), seconds, strict=True):
                in_turn = []
                begin = time.perf_counter()
                while (start := time.perf_counter()) < begin + TURN:
                    divide(values, grads, epsilon, size)
                    in_turn.append(time.perf_counter() - start)
                taken += in_turn[len(in_turn) // 2 :]
    one, two = (float(np.median(taken)) for taken in seconds)
    return one / two
