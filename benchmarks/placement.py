"""Time the naive loop against the place of its arrays within a page of 4 KiB.

    python benchmarks/placement.py                  # 1e6 and 2e7 float32, on one thread (two minutes)
    python benchmarks/placement.py --parallel --sizes 5e7 --dtypes float32 float64

A processor compares the low 12 bits of the address of a load with those of the stores before it. Where they are equal,
the load waits although its address is another one (4K aliasing). The loop loads gradients after it stored parameters
and cache, so their offsets in a page decide. All places take turns on the same memory.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from pages import markdown

sys.path.pop(0)

from fastrms.bench import machine
from fastrms.bench.cases import DTYPES, Array, Case, make_arrays
from fastrms.bench.measure import quartiles, time_in_turns
from fastrms.bench.plain import NaiveLoop
from fastrms.plots import format_seconds

# A function of size, dtype, whether to use all threads, and seconds; it returns the times of all turns by name.
Measure = Callable[[int, str, bool, float], dict[str, list[float]]]

PAGE = 4096
# Offsets in a page, in bytes, of parameters, gradients and cache: a large fresh NumPy array begins 16 bytes in.
PLACES = [
    (64, 16, 64), (0, 16, 0), (64, 64, 64), (0, 16, 64), (0, 16, 2048), (0, 1360, 2720),
    # Gradients from before parameters and cache to half a page after them.
    *((0, offset % PAGE, 0) for offset in (-256, -64, -16, 0, 32, 64, 128, 256, 1024, 2048)),
]  # fmt: skip


def place(memory: Array, offset: int, values: Array) -> Array:
    """A copy of the values in `memory` (`memory_for`) that begins `offset` bytes into a page."""
    start = -memory.ctypes.data % PAGE + offset
    view = memory[start : start + values.nbytes].view(values.dtype)
    view[:] = values
    return view


def memory_for(values: Array) -> Array:
    """Memory for values at any offset; if it is large, NumPy asks for huge pages."""
    return np.zeros(values.nbytes + 2 * PAGE, np.uint8)


def measure(size: int, dtype: str, parallel: bool, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step in each turn, by place."""
    (params,), (grads,) = make_arrays(Case(1, (size,), dtype))
    memories = [memory_for(params) for _ in range(3)]
    steps = {}
    for offsets in PLACES:
        values = (params, grads, grads * grads)
        p, g, c = (place(*each) for each in zip(memories, offsets, values, strict=True))
        steps[", ".join(map(str, offsets))] = NaiveLoop([p], [c], parallel=parallel).bind([g])
    return time_in_turns(steps, seconds, turn=0.01)


def column(times: Mapping[str, Sequence[float]]) -> list[str]:
    """Medians, half of the middle half in percent, and how many times the best median that is."""
    found = [quartiles(taken) for taken in times.values()]
    best = min(median for _, median, _ in found)
    return [f"{format_seconds(median)} ± {50 * (high - low) / median:.0f} % ({median / best:.2f}×)"  # noqa: RUF001
            for low, median, high in found]  # fmt: skip


def run(doc: str | None, argv: list[str] | None, header: str, measure: Measure) -> int:
    """Measure all sizes and dtypes, and print a table: the command line of this experiment and of prefetch.py."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 2e7], help="elements (default: 1e6 2e7)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--parallel", action="store_true", help="the loop with prange")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line and column (default: 3)")
    args = parser.parse_args(argv)
    caches = ", ".join(f"{level} {size}" for level, size in machine.caches().items())
    print(f"{machine.processor()} ({machine.microarchitecture()}), {machine.processors()} processors; {caches}\n")
    times = {
        f"{int(size):,} {dtype}": measure(int(size), dtype, args.parallel, args.seconds)
        for dtype in args.dtypes
        for size in args.sizes
    }
    names = next(iter(times.values()))
    print(markdown([header, *times], list(zip(names, *map(column, times.values()), strict=True))))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    return run(__doc__, argv, "bytes into a page: parameters, gradients, cache", measure)


if __name__ == "__main__":
    sys.exit(main())
