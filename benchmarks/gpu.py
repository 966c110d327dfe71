"""fastrms on a GPU beside the GPU's own copy, torch.optim.RMSprop(foreach=True), and that compiled; in turns.

    python benchmarks/gpu.py            # print the table
    python benchmarks/gpu.py --write    # and put it into docs/cuda.md

Needs an NVIDIA GPU with 8 GB of free memory, "fastrms[cuda]" and a torch that can use the GPU; installs nothing.
Results are compared before anything is timed.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from pages import fill, markdown

sys.path.pop(0)

from fastrms import RMSProp
from fastrms.bench.measure import time_in_turns
from fastrms.plots import format_seconds

PAGE = Path(__file__).parent.parent / "docs" / "cuda.md"

OURS, COPY = 'fastrms, kernel="cuda"', "a copy of as many bytes"
FOREACH, COMPILED = "torch.optim, foreach=True", "the same under torch.compile"
LARGE, MANY = "1 × 100,000,000", "1,000 × 10x10"
CASES: dict[str, list[tuple[int, ...]]] = {LARGE: [(100_000_000,)], MANY: [(10, 10)] * 1000}
# Case, the way to compare with, and how many times as fast ours should be at least.
TARGETS = [(LARGE, COPY, 0.9), (LARGE, FOREACH, 2.0), (LARGE, COMPILED, 1.0), (MANY, FOREACH, 5.0)]

OPTIONS = {"lr": 1e-3, "decay_rate": 0.9, "epsilon": 1e-8}


def missing() -> str:
    """The requirement that is missing, or ""."""
    from fastrms.cuda import why_not

    if reason := why_not():
        return reason
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "the torch that is installed cannot use the GPU"


def ways(case: str) -> dict[str, tuple[Callable[[], Any], Callable[[], list[Any]]]]:
    """Each way of a case: a step, and a function that returns the parameters."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(0)

    def random() -> list[Any]:
        return [torch.randn(shape, device="cuda", generator=generator) for shape in CASES[case]]

    start, gradients = random(), random()
    made: dict[str, tuple[Callable[[], Any], Callable[[], list[Any]]]] = {}

    # PyTorch's default stream is the default one of the device, on which an optimizer works unless it is told.
    own: Any = RMSProp(start, kernel="cuda", **OPTIONS)
    made[OURS] = (
        lambda: own.step(gradients),
        lambda: [torch.as_tensor(view, device="cuda") for view in own.params],
    )
    for way in (FOREACH, COMPILED):
        params = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        theirs = torch.optim.RMSprop(params, lr=OPTIONS["lr"], alpha=OPTIONS["decay_rate"], eps=OPTIONS["epsilon"],
                                     foreach=True)  # fmt: skip
        step = theirs.step
        if way == COMPILED:
            step = torch.compile(lambda optimizer=theirs: optimizer.step(), fullgraph=False)
        made[way] = step, lambda params=params: [p.data for p in params]
    if case == LARGE:
        # Reads parameters, cache and gradients, writes parameters and cache: 20 bytes a parameter. A copy reads and
        # writes each byte.
        size = 10 * len(start[0])
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        made[COPY] = lambda: target.copy_(source), list
    return made


def measure(case: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step of each way, turn by turn, from the first call until the device is done."""
    import torch

    made = ways(case)
    for step, _ in made.values():
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    expected = made[FOREACH][1]()
    for way in (OURS, COMPILED):
        for ours, theirs in zip(made[way][1](), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    steps = {way: step for way, (step, _) in made.items()}
    return time_in_turns(steps, seconds / len(steps), turn=seconds / 40, wait=torch.cuda.synchronize)


def rows(times: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """The lines of the table."""
    lines = []
    for case, other, target in TARGETS:
        ours, theirs = (statistics.median(times[case][way]) for way in (OURS, other))
        spread = max(times[case][OURS]) / min(times[case][OURS])
        lines.append(
            [f"{case} float32, against {other}", format_seconds(ours), format_seconds(theirs), f"{theirs / ours:.3g}×",
             f"{target:g}×", "reached" if theirs / ours >= target else "**missed**", f"{spread:.2f}×"]
        )  # fmt: skip
    return lines


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/cuda.md")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case (default: 20)")
    args = parser.parse_args()
    if reason := missing():
        print(f"benchmarks/gpu.py: expected a GPU, and a torch that can use it: {reason}", file=sys.stderr)
        return 1
    import torch

    from fastrms.bench import device

    table = markdown(
        ["step", "fastrms", "the other", "speedup", "target", "", "slowest / fastest turn"],
        rows({case: measure(case, args.seconds) for case in CASES}),
    )
    facts = "; ".join(f"{name} {text}" for name, text in device.facts())
    table = f"Measured on: {facts}; torch {torch.__version__}.\n\n{table}"
    print(table)
    if args.write:
        fill([PAGE], {"gpu": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
