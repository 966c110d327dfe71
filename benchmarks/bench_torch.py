"""fastrms.torch.RMSprop beside torch.optim.RMSprop, each of its settings, in one process and in turns.

    python benchmarks/bench_torch.py            # print the table
    python benchmarks/bench_torch.py --write    # and put it into docs/torch.md

`python -m pytest benchmarks` runs it for a moment and compares what the sides computed.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pages import fill, markdown, this_machine
from results import TorchRow

sys.path.pop(0)

from fastrms.bench.measure import time_in_turns
from fastrms.plots import format_seconds

PAGE = Path(__file__).parent.parent / "docs" / "torch.md"
WAYS = ("fastrms.torch", "torch.optim, foreach=True", "torch.optim, foreach=False")


def optimizer(way: str, params: Any) -> Any:
    """One of the three, with the same options."""
    import torch

    from fastrms.torch import RMSprop

    return RMSprop(params) if way == WAYS[0] else torch.optim.RMSprop(params, foreach=way == WAYS[1])


def step_alone(
    shape: tuple[int, ...], count: int, zeroed: bool = False
) -> Callable[[str], tuple[Callable[[], Any], Any]]:
    """A case: the step over so many parameters of a shape, with gradients that are there, or are set to 0 after it."""

    def make(way: str) -> tuple[Callable[[], Any], Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn(shape, generator=generator)
        own = optimizer(way, params)

        def step_and_zero() -> None:
            own.step()
            own.zero_grad(set_to_none=False)

        return step_and_zero if zeroed else own.step, params

    return make


def training_step(*sizes: int) -> Callable[[str], tuple[Callable[[], Any], Any]]:
    """A case: a whole training step of a perceptron, with batches of 64."""

    def make(way: str) -> tuple[Callable[[], Any], Any]:
        import torch

        torch.manual_seed(0)
        layers: list[Any] = []
        for a, b in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        model = torch.nn.Sequential(*layers[:-1])
        x, y = torch.randn(64, sizes[0]), torch.randint(sizes[-1], (64,))
        own = optimizer(way, model.parameters())

        def step() -> None:
            own.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            own.step()

        return step, list(model.parameters())

    return make


# What is measured, and how much faster than the better of PyTorch's settings it should be.
CASES = {
    "step, 1,000 × 10x10": (step_alone((10, 10), 1000), 25.0),
    "step and zero_grad(set_to_none=False), 1,000 × 10x10": (step_alone((10, 10), 1000, zeroed=True), 1.0),
    "step, 1 × 10,000,000": (step_alone((10_000_000,), 1), 4.0),
    "training step of 64-32-10": (training_step(64, 32, 10), 1.0),
    "training step of 64-[32]x50-10": (training_step(64, *[32] * 50, 10), 1.0),
    "training step of 784-512-512-10": (training_step(784, 512, 512, 10), 1.0),
}


def measure(name: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of a step, turn by turn, of each way, after a look that some steps of each did the same."""
    import torch

    made = {way: CASES[name][0](way) for way in WAYS}
    for step, _ in made.values():
        for _ in range(5):
            step()
    # Now, because roundings that differ lead trainings apart in the long run.
    for way in WAYS[1:]:
        for ours, theirs in zip(made[WAYS[0]][1], made[way][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    # Without turns until "auto" has found out which kernel is faster, because it looks at the time between its steps.
    end = time.perf_counter() + min(4.0, seconds / 4)
    while time.perf_counter() < end:
        made[WAYS[0]][0]()
    # Then turns that are long enough for the threads of the last way to sleep, and short enough that all ways meet slow
    # times: next to another program, two of PyTorch's threads share a processor for tenths of a second, and steps take
    # up to a hundred times as long.
    return time_in_turns({way: step for way, (step, _) in made.items()}, seconds / len(WAYS), min(0.1, seconds / 100))


def result(name: str, times: dict[str, list[float]], busy: bool = False, one_thread: bool = False) -> TorchRow:
    """Medians, and how much faster than the better of PyTorch's two ours is."""
    median = {way: statistics.median(values) for way, values in times.items()}
    ratio = min(median[way] for way in WAYS[1:]) / median[WAYS[0]]
    least = CASES[name][1]
    return {"case": name, "busy": busy, "one_thread": one_thread, "seconds": median, "ratio": ratio, "least": least}


def row(found: TorchRow) -> list[str]:
    """A line of the table."""
    verdict = "reached" if found["ratio"] >= found["least"] else "**missed**"
    times = (format_seconds(found["seconds"][way]) for way in WAYS)
    return [found["case"], *times, f"{found['ratio']:.3g}×", f"{found['least']:g}×", verdict]


def main() -> int:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/torch.md")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each case (default: 15)")
    args = parser.parse_args()
    header = ["", *WAYS, "faster by", "at least", ""]
    import torch

    note = this_machine(f"PyTorch {torch.__version__}")
    body = [row(result(name, measure(name, args.seconds))) for name in CASES]
    table = f"{markdown(header, body)}\n\n{note}"
    print(table)
    if args.write:
        fill([PAGE], {"torch": table}, others=["released"])
    return 0


@pytest.mark.parametrize("name", CASES)
def test_beside_torch(name, capsys):
    pytest.importorskip("torch")
    line = row(result(name, measure(name, 0.5)))
    with capsys.disabled():
        print("\n" + " | ".join(line))


if __name__ == "__main__":
    sys.exit(main())
