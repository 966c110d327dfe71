"""Memory and time of training a transformer with gradients that are dropped at once, and with gradients that stay.

    python benchmarks/bench_released.py            # print the table (some minutes)
    python benchmarks/bench_released.py --write    # and put it into docs/torch.md

Memory is the largest resident memory of a process that makes the model and its optimizer and trains it, without the
memory that it had before. The times of a training step are medians; all ways take turns in one process.

`python -m pytest benchmarks` runs it for a moment and compares the losses of all ways.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import resident
from pages import fill, markdown, this_machine

sys.path.pop(0)

from fastrms.bench.measure import quartiles, time_in_turns
from fastrms.plots import format_seconds

PAGE = Path(__file__).parent.parent / "docs" / "torch.md"
STEPS = 3  # whose memory is measured, and whose losses are compared


class Sizes(NamedTuple):
    """The sizes of a transformer, and of its batch."""

    vocabulary: int = 16_384
    width: int = 512
    layers: int = 12
    batch: int = 1
    length: int = 32


SMALL = Sizes(50, 16, 2, 2, 8)


def step_of(model: Any, optimizer: Any, sizes: Sizes) -> Callable[[], float]:
    """A training step, which returns the loss."""
    import torch

    tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length + 1))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(sizes.length)

    def step() -> float:
        logits = model[2](model[1](model[0](tokens[:, :-1]), mask=mask, is_causal=True))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def transformer(sizes: Sizes) -> Any:
    """A decoder like GPT-2's, without positions: embedding, layers, and a head."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        sizes.width, sizes.width // 8, 4 * sizes.width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return torch.nn.ModuleList([
        torch.nn.Embedding(sizes.vocabulary, sizes.width),
        torch.nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False),
        torch.nn.Linear(sizes.width, sizes.vocabulary, bias=False),
    ])  # fmt: skip


def plain(model: Any) -> Any:
    """PyTorch's optimizer."""
    import torch

    return torch.optim.RMSprop(model.parameters(), lr=1e-4)


def in_backward(model: Any) -> None:
    """PyTorch's way to drop gradients at once: an optimizer for each parameter, called by a hook of it.

    From its tutorial "How to save memory by fusing the optimizer step into the backward pass". There is no optimizer
    for the training loop, for schedulers and for checkpoints.
    """
    import torch

    optimizers = {p: torch.optim.RMSprop([p], lr=1e-4, foreach=False) for p in model.parameters()}

    def hook(p: Any) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(hook)


def ours(model: Any) -> Any:
    """Ours, with gradients that stay."""
    from fastrms.torch import RMSprop

    return RMSprop(model.parameters(), lr=1e-4)


def released(model: Any) -> Any:
    """Ours, with gradients that are dropped."""
    optimizer = ours(model)
    optimizer.release_gradients()
    return optimizer


WAYS = {
    "torch.optim.RMSprop": plain,
    "an optimizer for each parameter": in_backward,
    "fastrms.torch.RMSprop": ours,
    "fastrms.torch.RMSprop, `release_gradients()`": released,
}


def training(way: str, sizes: Sizes) -> Callable[[], float]:
    """The training step of one way."""
    model = transformer(sizes)
    return step_of(model, WAYS[way](model), sizes)


def memory(way: str, sizes: Sizes) -> tuple[int, list[float]]:
    """Bytes that training takes in a process of its own, and the losses."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", way, "--sizes", *map(str, sizes)]
    found, *losses = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(found), list(map(float, losses))


def child(way: str, sizes: Sizes) -> None:
    """Train for some steps, and print what `memory` returns."""
    for each in (training(way, SMALL), training("torch.optim.RMSprop", SMALL)):
        each()  # libraries, threads and compiled code are there
    before = resident.restart()
    step = training(way, sizes)
    losses = [step() for _ in range(STEPS)]
    print(resident.peak() - before, *losses)


def measure(seconds: float, sizes: Sizes) -> str:
    """The table, after a look that the ways have the same losses."""
    import torch

    note = this_machine(f"PyTorch {torch.__version__}")
    bytes_of, losses = zip(*(memory(way, sizes) for way in WAYS), strict=True)
    for each in losses[1:]:
        torch.testing.assert_close(torch.tensor(each), torch.tensor(losses[0]), rtol=1e-2, atol=1e-2)
    assert losses[2] == losses[3], "the bits of both of ours"
    steps = {way: training(way, sizes) for way in WAYS}
    for step in steps.values():
        step()
    times = [quartiles(turns)[1] for turns in time_in_turns(steps, seconds, 0.0).values()]
    body = [
        [way, f"{found / 1e6:.0f} MB", f"{format_seconds(time)} ({time / times[0]:.2f}×)"]
        for way, found, time in zip(WAYS, bytes_of, times, strict=True)
    ]
    count = sum(p.numel() for p in transformer(sizes).parameters())
    header = f"{count / 1e6:.1f} million parameters of float32, {4 * count / 1e6:.0f} MB"
    return f"{markdown([header, 'memory of training', 'training step'], body)}\n\n{note}"


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/torch.md")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each way (default: 30)")
    parser.add_argument("--child", metavar="WAY", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", default=Sizes(), help="of the model and its batch (`Sizes`)")
    args = parser.parse_args()
    if args.child:
        child(args.child, Sizes(*args.sizes))
        return
    table = measure(args.seconds, Sizes(*args.sizes))
    print(table)
    if args.write:
        fill([PAGE], {"released": table}, others=["torch"])


def test_it_runs() -> None:
    """A small model, for a moment."""
    pytest.importorskip("torch")
    assert "release_gradients" in measure(0.01, SMALL)


if __name__ == "__main__":
    main()
