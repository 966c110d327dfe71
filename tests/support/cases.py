"""Tables of cases that several test files share: sizes, kernels, options, layouts, gradients, keys."""

import enum
import itertools
import sys
from typing import NamedTuple

import ml_dtypes
import numba
import numpy as np
import pytest
from helpers import JIT, wide

from fastrms import DtypeError, StructureError
from fastrms.kernels import cpu, norms

EDGES = sorted({edge * k + d for edge in (cpu.MIN_SHARE, norms.CHUNK) for k in (1, 2, 3) for d in (-1, 0, 1)})

SIZES = [0, 1, 7, 8, 15, 16, 17, 63, 64, 65, *(EDGES if JIT else EDGES[:3])]

# Every way in which the same step can be run.
WAYS = {
    "numpy": {"kernel": "numpy"},
    "serial": {"kernel": "serial"},
    "parallel-1": {"kernel": "parallel", "num_threads": 1},
    "parallel-2": {"kernel": "parallel", "num_threads": 2},
    "auto": {"kernel": "auto"},
}
if numba.config.BOUNDSCHECK:  # an IndexError in a parallel loop is lost, so that these could not fail
    WAYS = {name: way for name, way in WAYS.items() if not name.startswith("parallel")}

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


# What every backend is tested with: layouts of parameters, options, and kinds of gradients.


class Leaf(NamedTuple):
    """An array of a layout."""

    shape: tuple
    dtype: type


def f(*shape):
    return Leaf(shape, np.float32)


def d(*shape):
    return Leaf(shape, np.float64)


LARGE = -1  # elements that are worked on in several parts; how many there are depends on the backend

LAYOUTS = {
    "array": f(4, 3),
    "number": d(),
    "one element": [d(1)],
    "empty": [f(0, 2), d(0)],
    "list": [f(4, 3), d(), d(0), f(7)],
    "tuple": (d(5), f(2, 3)),
    "dict": {"W": f(3, 5), 7: d(4), None: f(2)},
    "nested": [{"W": f(3, 2)}, (d(4), [d(), f(1, 2)])],
    "groups": [{"params": {"W": f(3, 2)}, "lr": 0.5}, {"params": [d(4), f()], "momentum": 0.5}, {"params": f(3)}],
    "many small": [f(k % 4) if k % 3 else d(2) for k in range(40)],
    "one large": f(LARGE),
    "large and small": [f(4, 3), d(), d(0), f(7), f(LARGE)],
    "two large": [f(3), d(LARGE), f(LARGE), d(2, 2)],
}


def drawn(layout, rng, low=-3, high=1, large=9001, whole=False):
    """Numbers of both signs, of magnitudes from 10**low to 10**high, or whole ones, in the structure of a layout."""
    if isinstance(layout, Leaf):
        shape = [large if size == LARGE else size for size in layout.shape]
        numbers = np.asarray(wide(rng, shape, np.float64, low, high))
        return (np.rint(numbers) if whole else numbers).astype(layout.dtype)
    if isinstance(layout, dict):
        return {key: drawn(part, rng, low, high, large, whole) if key not in OPTIONS and key != "lr" else part
                for key, part in layout.items()}  # fmt: skip
    return type(layout)(drawn(part, rng, low, high, large, whole) for part in layout)


def of_gradients(layout):
    """The layout of gradients for parameters in a layout, which may have groups."""
    if isinstance(layout, list) and isinstance(layout[0], dict) and "params" in layout[0]:
        return [group["params"] for group in layout]
    return layout


# Each option alone, with another one that it needs, and sets of them.
OPTION_SETS = {
    "defaults": {},
    **{"-".join(sorted(names)): {name: OPTIONS[name] for name in sorted(names)} for names in combinations()[-12:]},
    **{name: {name: value} for name, value in OPTIONS.items()},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "lr_in_momentum": {"momentum": 0.5, "lr_in_momentum": True},
    "decoupled_weight_decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "all state": {"momentum": 0.5, "centered": True, "initial_scale": 0.5, "bias_correction": True, "maximize": True},
    "all norms": {"clip_norm": 3.0, "global_clip_norm": 2.0, "clip_value": 0.5},
    "all checks": {"nonfinite": "raise", "clip_norm": 9.0, "centered": True},
    "skipping": {"nonfinite": "skip", "global_clip_norm": 5.0, "bias_correction": True},
    "all options": OPTIONS,
    "schedule": {"lr": lambda step: 0.1 / (step + 1), "momentum": 0.5},
    "bfloat16": {"cache_dtype": "bfloat16", "momentum": 0.9, "centered": True, "initial_scale": 0.1},
}

# How a gradient that is an array may be given, but for its values.
GRADIENTS = {
    "as it is": lambda g: g,
    "read-only": lambda g: np.frombuffer(g.tobytes(), g.dtype).reshape(g.shape),
    "Fortran order": lambda g: np.array(g, order="F"),
    "every second": lambda g: np.repeat(g, 2, axis=-1)[..., ::2] if g.ndim else g,
    "backwards": lambda g: np.ascontiguousarray(g[::-1])[::-1] if g.ndim else g,
    "broadcast": lambda g: np.broadcast_to(g.ravel()[:1].reshape([1] * g.ndim), g.shape) if g.size else g,
    "other byte order": lambda g: g.astype(g.dtype.newbyteorder()),
    "float64": lambda g: g.astype(np.float64),
    "float16": lambda g: g.astype(np.float16),
    "bfloat16": lambda g: g.astype(ml_dtypes.bfloat16),
    "long double": lambda g: g.astype(np.longdouble),
    "int8": lambda g: g.astype(np.int8),
    "uint32": lambda g: np.abs(g).astype(np.uint32),
    "list": lambda g: g.tolist(),
}

# For parameters of the shapes (2,) and (3,).
WRONG_GRADIENTS = {
    "few": ([np.ones(2)], StructureError, "gradients: expected 2 items, got 1"),
    "many": ([np.ones(2)] * 3, StructureError, "gradients: expected 2 items, got 3"),
    "shape": ([np.ones(2), np.ones(2)], StructureError, r"gradients\[1\]: expected shape \(3,\), got \(2,\)"),
    "column": ([np.ones(2), np.ones((3, 1))], StructureError, r"gradients\[1\]: expected shape \(3,\), got \(3, 1\)"),
    "complex": ([np.ones(2), np.ones(3, complex)], DtypeError, r"gradients\[1\]: .* got complex128"),
    "object": ([np.ones(2), np.ones(3, object)], DtypeError, r"gradients\[1\]: .* got dtype object"),
    "bool": ([np.ones(2), np.ones(3, bool)], DtypeError, r"gradients\[1\]: .* got bool"),
    "text": ([np.ones(2), "abc"], DtypeError, r"gradients\[1\]: expected an array, got str object"),
    "dict": ({"a": np.ones(2)}, StructureError, "gradients: expected a list or tuple of 2 items"),
    "array": (np.ones(5), StructureError, "gradients: expected a list or tuple of 2 items"),
    "iterator": (iter([np.ones(2), np.ones(3)]), StructureError, "got list_iterator object"),
    "none": ([None], StructureError, "gradients: expected 2 items, got 1"),
}
