"""Tables of cases that several test files share: sizes, kernels, options, keys."""

import enum
import itertools
import sys

import numpy as np
import pytest
from helpers import JIT

from fastrms.kernels import cpu, norms

EDGES = sorted({edge * k + d for edge in (cpu.BLOCK, norms.CHUNK) for k in (1, 2, 3) for d in (-1, 0, 1)})

SIZES = [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, *(EDGES if JIT else EDGES[:3])]

# Every way in which the same step can be run.
WAYS = {
    "numpy": {"kernel": "numpy"},
    "serial": {"kernel": "serial"},
    "parallel-1": {"kernel": "parallel", "num_threads": 1},
    "parallel-2": {"kernel": "parallel", "num_threads": 2},
    "auto": {"kernel": "auto"},
}

# One value each that turns the option on.
OPTIONS = {
    "momentum": 0.9,
    "nesterov": True,
    "centered": True,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "maximize": True,
    "eps_in_sqrt": True,
    "initial_scale": 1.0,
    "bias_correction": True,
    "lr_in_momentum": True,
    "clip_value": 0.5,
    "clip_norm": 2.0,
    "global_clip_norm": 1.5,
    "flush_subnormals": False,
}


def combinations():
    """All combinations of up to three options, and 300 random ones of any number."""
    chosen = [set(names) for count in range(4) for names in itertools.combinations(OPTIONS, count)]
    generator = np.random.default_rng(0)
    chosen += [{name for name in OPTIONS if generator.random() < 0.5} for _ in range(300)]
    return [names for names in chosen if "nesterov" not in names or "momentum" in names]


class Text(enum.StrEnum):
    W = "W"


class Number(enum.IntEnum):
    ONE = 1


class Name(str):
    """Text of a class of its own."""


# Keys that a file would give back as others, though they may be equal: another repr, or another type.
OTHER_KEYS = [
    np.str_("W"), np.float64(1.5), np.int64(3), np.bool_(True), Text.W, Number.ONE, Name("W"), float("nan"), (1, 2),
    b"W", frozenset(),
]  # fmt: skip

KEYS = ["W", "", "\ud800", 1, -(2**70), True, 1.5, -0.0, float("inf"), None]

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and links of POSIX")
