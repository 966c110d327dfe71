"""Time the naive loop against the place of its arrays within a page of 4 KiB.

    python benchmarks/placement.py                  # 1e6 and 2e7 float32, on one thread (two minutes)
    python benchmarks/placement.py --parallel --sizes 5e7 --dtypes float32 float64

A processor compares the low 12 bits of the address of a load with those of the stores before it. Where they are equal,
the load waits although its address is another one (4K aliasing). The loop loads gradients after it stored parameters
and cache, so their offsets in a page decide. All places take turns on the same memory.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from fastrms.bench import machine
from fastrms.bench.cases import DTYPES, Array, Case, make_arrays
from fastrms.bench.measure import quartiles, time_in_turns
from fastrms.bench.plain import NaiveLoop
from fastrms.plots import format_seconds

PAGE = 4096
# Offsets in a page, in bytes, of parameters, gradients and cache: a large fresh NumPy array begins 16 bytes in.
PLACES = [
    (64, 16, 64), (0, 16, 0), (64, 64, 64), (0, 16, 64), (0, 16, 2048), (0, 1360, 2720),
    # Gradients from before parameters and cache to half a page after them.
    *((0, offset % PAGE, 0) for offset in (-256, -64, -16, 0, 32, 64, 128, 256, 1024, 2048)),
]  # fmt: skip


def place(memory: Array, offset: int, values: Array) -> Array:
    """A copy of the values that begins so many bytes into a page; `memory` has two pages more than they have."""
    start = -memory.ctypes.data % PAGE + offset
    view = memory[start : start + values.nbytes].view(values.dtype)
    view[:] = values
    return view


def memory_for(values: Array) -> Array:
    """Memory for values at any offset; NumPy asks for huge pages where it is large."""
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


def report(header: str, columns: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A table: medians, half of the middle half in percent, and how many times the column's best that is."""
    names = list(next(iter(columns.values())))
    lines = [[header, *columns], ["---", *["---:"] * len(columns)]]
    best = {column: min(quartiles(times)[1] for times in found.values()) for column, found in columns.items()}
    for name in names:
        cells = []
        for column, found in columns.items():
            low, median, high = quartiles(found[name])
            spread = 50 * (high - low) / median
            cells.append(f"{format_seconds(median)} ± {spread:.0f} % ({median / best[column]:.2f}×)")  # noqa: RUF001
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about() -> str:
    """The processor and its caches."""
    caches = ", ".join(f"{level} {size}" for level, size in machine.caches().items())
    return f"{machine.processor()} ({machine.microarchitecture()}), {machine.processors()} processors; {caches}\n"


def arguments(doc: str | None, argv: list[str] | None) -> argparse.Namespace:
    """The options of this experiment and of prefetch.py."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 2e7], help="elements (default: 1e6 2e7)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--parallel", action="store_true", help="the loop with prange")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line and column (default: 3)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = arguments(__doc__, argv)
    print(about())
    columns = {
        f"{int(size):,} {dtype}": measure(int(size), dtype, args.parallel, args.seconds)
        for dtype in args.dtypes
        for size in args.sizes
    }
    print(report("bytes into a page: parameters, gradients, cache", columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
