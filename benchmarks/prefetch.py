"""Time the naive loop against the distance at which it prefetches: 0 (left to the processor), and several.

    python benchmarks/prefetch.py                   # 1e6 and 2e7 float32, on one thread (a minute)
    python benchmarks/prefetch.py --parallel --sizes 5e7 --dtypes float32 float64

The loop runs in strips of 8 cache lines, each after requests for the lines of the three arrays that come so many lines
later. The best distance depends on the processor: an Intel Xeon gains up to 30 %, an AMD EPYC (Zen 4) loses up to 50 %.
"""

import sys
from pathlib import Path

import numba

sys.path.insert(0, str(Path(__file__).parent))
from placement import memory_for, place, run

sys.path.pop(0)

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Array, Case, make_arrays
from fastrms.bench.measure import time_in_turns
from fastrms.bench.naive import naive, naive_parallel
from fastrms.kernels import threads
from fastrms.kernels.access import prefetch

STRIP = 8
DISTANCES = (0, 8, 16, 24, 32, 48, 64, 96)
# Elements of a work item with many threads.
BLOCK = 1 << 16


@numba.njit(error_model="numpy")
def ahead(params, grads, cache, lr, decay_rate, rest, epsilon, distance):
    """Update in strips, with requests for memory that is `distance` cache lines ahead; 0 means no requests."""
    line = 64 // params.itemsize
    strip = STRIP * line
    for start in range(0, params.size, strip):
        stop = min(start + strip, params.size)
        if distance and stop + distance * line <= params.size:
            for i in range(start + distance * line, stop + distance * line, line):
                prefetch(params, i)
                prefetch(grads, i)
                prefetch(cache, i)
        naive(params[start:stop], grads[start:stop], cache[start:stop], lr, decay_rate, rest, epsilon)


@numba.njit(error_model="numpy", parallel=True)
def ahead_parallel(params, grads, cache, lr, decay_rate, rest, epsilon, distance):
    """Do the same on all threads, block by block."""
    for block in numba.prange((params.size + BLOCK - 1) // BLOCK):
        low, high = block * BLOCK, min(params.size, (block + 1) * BLOCK)
        ahead(params[low:high], grads[low:high], cache[low:high], lr, decay_rate, rest, epsilon, distance)


def measure(size: int, dtype: str, parallel: bool, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step in each turn, by distance; the first one is of the loop without strips."""
    threads.start_threads()
    (params,), (grads,) = make_arrays(Case(1, (size,), dtype))
    # Where 4K aliasing does not disturb: see placement.py.
    arrays: list[Array] = [place(memory_for(each), 64, each) for each in (params, grads, grads * grads)]
    numbers = [params.dtype.type(number) for number in (LR, DECAY_RATE, 1 - DECAY_RATE, EPSILON)]
    loop, strips = (naive_parallel, ahead_parallel) if parallel else (naive, ahead)
    steps = {"no strips": lambda: loop(*arrays, *numbers)}
    for distance in DISTANCES:
        steps[f"{distance} lines"] = lambda distance=distance: strips(*arrays, *numbers, distance)
    return time_in_turns(steps, seconds, turn=0.01)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    return run(__doc__, argv, "prefetched ahead", measure)


if __name__ == "__main__":
    sys.exit(main())
