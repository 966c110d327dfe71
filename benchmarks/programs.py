"""Time arrays in place, one parameter at a time, and rows, each next to a step over views; and the memory of training.

    python benchmarks/programs.py            # print the tables (about three minutes)
    python benchmarks/programs.py --write    # and put them into docs/programs.md

The ways of a table take turns in one process. Memory is the largest resident memory of a process that does nothing but
train, without the memory that it had before it made its parameters.

`python -m pytest benchmarks` runs it for a moment.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import resident
from pages import fill, markdown, this_machine

sys.path.pop(0)

from fastrms import RMSProp
from fastrms.bench import machine
from fastrms.bench.measure import quartiles, time_in_turns
from fastrms.demo.mlp import init_params
from fastrms.plots import format_seconds

PAGE = Path(__file__).parent.parent / "docs" / "programs.md"
Step = Callable[[], object]

SIZES, ROWS = (784, 2048, 2048, 10), 128  # of the network that is trained, and rows of a batch
MEMORY_SIZES = (784, *[4096] * 5, 10)  # several layers, so that no single gradient is most of the memory
WORDS, WIDTH, BATCH = 50_000, 100, 1024  # of a table of word vectors, and words of a batch


def backward(params: Sequence[Any], x: Any, y: Any) -> Iterator[tuple[int, Any]]:
    """Yield number and gradient of each parameter of a ReLU network with a squared error, the last layer first."""
    outputs = [x]
    for k in range(0, len(params), 2):
        z = outputs[-1] @ params[k] + params[k + 1]
        outputs.append(np.maximum(z, 0, out=z) if k + 2 < len(params) else z)
    delta = (outputs[-1] - y) / len(x)
    for k in reversed(range(0, len(params), 2)):
        inputs = outputs[k // 2]
        before = delta @ params[k].T * (inputs > 0) if k else None
        yield k, inputs.T @ delta
        yield k + 1, delta.sum(axis=0)
        delta = before


def listed(params: Sequence[Any], x: Any, y: Any) -> list[Any]:
    """Return all gradients of `backward`, in the order of the parameters."""
    return [gradient for _, gradient in sorted(backward(params, x, y), key=lambda item: item[0])]


def training(sizes: Sequence[int], dtype: str) -> dict[str, Step]:
    """Training steps of one network in the three ways, and without an optimizer."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((ROWS, n)).astype(dtype) for n in (sizes[0], sizes[-1]))
    arrays = init_params(sizes, dtype, rng)
    views, single = RMSProp(arrays, kernel="serial"), RMSProp(arrays, kernel="serial")
    held = RMSProp(init_params(sizes, dtype, rng), kernel="serial", in_place=True)

    def one_at_a_time() -> None:
        for number, gradient in backward(single.params, x, y):
            single.step_parameter(number, gradient)

    return {
        "no optimizer": lambda: listed(arrays, x, y),
        "views, a list of gradients": lambda: views.step(listed(views.params, x, y)),
        "in place, a list of gradients": lambda: held.step(listed(held.params, x, y)),
        "`step_parameter`": one_at_a_time,
    }


def steps(arrays: int, shape: tuple[int, ...], kernel: str) -> dict[str, Step]:
    """Steps over arrays of one shape, without training."""
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal(shape).astype(np.float32) for _ in range(arrays)]
    views, held, single = (
        RMSProp([np.ones(shape, np.float32) for _ in gradients], kernel=kernel, in_place=in_place)
        for in_place in (False, True, False)
    )

    def one_at_a_time() -> None:
        for number, gradient in enumerate(gradients):
            single.step_parameter(number, gradient)

    return {
        "views, `step()`": views.step,
        "views, `step(list)`": lambda: views.step(gradients),
        "in place, `step()`": held.step,
        "in place, `step(list)`": lambda: held.step(gradients),
        "`step_parameter` for each": one_at_a_time,
    }


def rows() -> dict[str, Step]:
    """Updates of a table of word vectors for one batch of words."""
    rng = np.random.default_rng(0)
    words = np.minimum(rng.zipf(1.3, BATCH), WORDS) - 1  # frequent words come often
    gradient = rng.standard_normal((BATCH, WIDTH)).astype(np.float32)
    lazy, dense, buffer = (RMSProp(np.ones((WORDS, WIDTH), np.float32), kernel="serial") for _ in range(3))

    def dense_step() -> None:
        whole = np.zeros((WORDS, WIDTH), np.float32)
        np.add.at(whole, words, gradient)
        dense.step(whole)

    def buffer_step() -> None:
        buffer.zero_grad()
        np.add.at(buffer.grads, words, gradient)
        buffer.step()

    return {
        f"`step_rows`, {len(set(words.tolist()))} rows": lambda: lazy.step_rows((), words, gradient),
        "dense gradient, `step(gradient)`": dense_step,
        "dense gradient, `opt.grads`": buffer_step,
    }


def table(cases: dict[str, dict[str, Step]], seconds: float, baseline: int) -> str:
    """A row for each way, a column for each case; each time also as a multiple of that of way number `baseline`."""
    times = {case: time_in_turns(ways, seconds, min(0.05, seconds)) for case, ways in cases.items()}
    medians = {case: [quartiles(turns)[1] for turns in found.values()] for case, found in times.items()}
    names = list(next(iter(cases.values())))
    body = [
        [name, *(f"{format_seconds(of[k])} ({of[k] / of[baseline]:.2f}×)" for of in medians.values())]
        for k, name in enumerate(names)
    ]
    return markdown(["", *cases], body)


def memory(sizes: Sequence[int]) -> str:
    """Resident memory of training, a process for each way."""
    body = []
    for way in list(training((2, 2, 1), "float32"))[1:]:
        command = [sys.executable, __file__, "--child", way, "--sizes", *map(str, sizes)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        body.append([way, f"{int(printed) / 1e6:.0f} MB"])
    return markdown(["", "memory of training"], body)


def child(way: str, sizes: Sequence[int]) -> None:
    """Train for some steps, and print the bytes of memory that this took."""
    RMSProp(np.ones(3, np.float32), kernel="serial").step(np.ones(3, np.float32))
    one = RMSProp(np.ones(3, np.float32), kernel="serial")
    one.step_parameter((), np.ones(3, np.float32))
    before = resident.restart()
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((ROWS, n)).astype(np.float32) for n in (sizes[0], sizes[-1]))
    arrays = [
        rng.standard_normal(shape, np.float32) * np.float32(0.01)
        for pair in pairwise(sizes)
        for shape in (pair, pair[1:])
    ]
    opt = RMSProp(arrays, kernel="serial", in_place=way.startswith("in place"))
    params = opt.params
    del arrays
    for _ in range(3):
        if way.startswith("`step_parameter"):
            for number, gradient in backward(params, x, y):
                opt.step_parameter(number, gradient)
                del gradient
        else:
            opt.step(listed(params, x, y))
    print(resident.peak() - before)


def measure(seconds: float, quick: bool = False) -> dict[str, str]:
    """All tables by name."""
    sizes = (20, 30, 10) if quick else SIZES
    network = "-".join(map(str, sizes))
    many = 10 if quick else 1000
    dtypes = ("float32", "float64")
    large = (4, (1000,)) if quick else (10, (1000, 1000))
    small = {f"{many:,} × 10×10, {kernel}": steps(many, (10, 10), kernel) for kernel in ("serial", "parallel")}
    large_cases = {f"{large[0]} × {'×'.join(map(str, large[1]))}, serial": steps(*large, "serial")}
    caches = ", ".join(f"{level} {size}" for level, size in machine.caches().items())
    return {
        "machine": this_machine(caches, f"NumPy {np.__version__}"),
        "steps": table(small | large_cases, seconds, 1),
        "training": table({f"{network}, {dtype}": training(sizes, dtype) for dtype in dtypes}, seconds, 1),
        "memory": memory(sizes if quick else MEMORY_SIZES),
        "rows": table({f"{WORDS:,} × {WIDTH}, {BATCH:,} words": rows()}, seconds, 0),
    }


def main() -> None:
    """Measure, print, and with ``--write`` write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/programs.md")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each way (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small cases, to try it out")
    parser.add_argument("--child", metavar="WAY", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.sizes)
        return
    tables = measure(args.seconds, args.quick)
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")
    if args.write:
        fill([PAGE], tables)


def test_it_runs() -> None:
    """Small cases, for a moment."""
    tables = measure(0.01, quick=True)
    assert all(tables.values())


if __name__ == "__main__":
    main()
