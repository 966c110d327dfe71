"""The two optimizers of the tests in `tests/torch`, side by side."""

import torch
from helpers import JIT

from fastrms.torch import RMSprop

# Those of PyTorch's own tests of RMSprop.
CONFIGS = [
    {},
    {"lr": 1e-3},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "centered": True},
    {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
    {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
]
SHAPES = [(10, 5), (), (7,), (0, 3), (2, 3, 4)]
STEPS = 200 if JIT else 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def give(params, step, skip=()):
    for k, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + k)
        p.grad = None if k in skip else torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def pair(ours=(), dtype=torch.float64, **options):
    """The same parameters twice, one with each optimizer."""
    mine, theirs = parameters(dtype), parameters(dtype)
    return mine, RMSprop(mine, **options, **dict(ours)), theirs, torch.optim.RMSprop(theirs, **options)


def assert_near(ours, theirs, dtype=torch.float64):
    tolerance = TOLERANCE[dtype]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def assert_same_state(ours, theirs, dtype=torch.float64):
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine["state"].keys() == other["state"].keys()
    for key, state in other["state"].items():
        assert mine["state"][key].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(mine["state"][key][name], value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert mine["param_groups"] == other["param_groups"]
