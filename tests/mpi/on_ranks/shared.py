"""Layouts, gradients and comparisons, which the cases of all modules use."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, assert_same_state, leaves
from mpi4py import MPI

from fastrms import RankError, mpi

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
LAST = SIZE - 1
KERNELS = ["numpy", "serial", "parallel"] if JIT else ["numpy"]
STEPS = 5

# Shards begin at multiples of 16 elements: sizes around these give whole, cut and empty shards.
LAYOUTS = {
    "mixed": {
        "W": ((13, 7), np.float32), "b": ((5,), np.float64), "c": ((3, 30), np.float32), "d": ((), np.float32),
        "e": ((0, 2), np.float64), "f": ((49,), np.float64),
    },
    "fewer than ranks": {"a": ((1,), np.float32), "b": ((2,), np.float64)},
    "one": {"a": ((200,), np.float32)},
    "even": {"a": ((16 * 12,), np.float32)},
    "odd": {"a": ((16 * 12 + 1,), np.float64), "b": ((1000,), np.float32)},
}  # fmt: skip


class ShardedRMSProp(mpi.ShardedRMSProp):
    """The class with another default: sums of whole numbers are exact in any order, and means are not."""

    def __init__(self, *args, reduction="sum", **options):
        super().__init__(*args, reduction=reduction, **options)


def folder():
    """Return the folder of this test, the same on all ranks."""
    return Path(COMM.bcast(os.environ["MPI_TEST_FOLDER"]))


def params_of(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, (shape, dtype) in layout.items()}


def gradients_of(layout, step, whole_numbers=True):
    """Return a list with the gradients of each rank: whole numbers, whose sums are exact in any order."""
    rng = np.random.default_rng([step, SIZE])
    draw = (lambda shape: rng.integers(-5, 6, shape)) if whole_numbers else (lambda shape: rng.normal(size=shape))
    return [{name: np.asarray(draw(shape)).astype(dtype) for name, (shape, dtype) in layout.items()}
            for _ in range(SIZE)]  # fmt: skip


def gradients_of_all(layout, step):
    """Return the sum of the gradients of all ranks, the same for any number of ranks."""
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=shape).astype(dtype) for name, (shape, dtype) in layout.items()}


def add(gradients):
    """Return the sum of the ranks' gradients. None counts as zeros, unless it is None on all ranks."""
    total = {}
    for name in gradients[0]:
        arrays = [each[name] for each in gradients if each[name] is not None]
        total[name] = None if not arrays else sum(arrays[1:], start=arrays[0])
    return total


def assert_same_params(opt, alone, what="params"):
    for ours, theirs in zip(leaves(opt.params), leaves(alone.params), strict=True):
        assert_same_bits(ours, theirs, what)


def assert_same(opt, alone, what=""):
    """Check that parameters, state, options and counts of two optimizers are the same, on this rank."""
    assert_same_params(opt, alone, f"params, {what}")
    assert_same_state(opt, alone, what)


def take_step(opt, gradients, way, rng):
    """Take a step with this rank's gradients, which are passed as a dict, in the buffer, or one by one."""
    if way == "dict":
        return opt.step(dict(reversed(gradients.items())))
    if way == "buffer":
        for name, gradient in gradients.items():
            opt.grads[name][...] = gradient
        return opt.step()
    keys = list(gradients)
    rng.shuffle(keys)  # differs between ranks
    for key in keys:
        opt.ready(key if rng.integers(2) else (key,), gradients[key])
    return opt.step()


def raises(kind, text, function, *arguments):
    """Check the class and the message of the error that a call raises, and return it."""
    with pytest.raises(kind, match=re.escape(text)) as caught:
        function(*arguments)
    assert caught.type is kind
    return caught.value


def raises_on(rank, kind, text, function, *arguments):
    """Check that a call raises an error on one rank, and a RankError with its message on the others."""
    if rank == RANK:
        return raises(kind, text, function, *arguments)
    error = raises(RankError, f"rank {rank} of {SIZE} cannot continue: {kind.__name__}: ", function, *arguments)
    assert text in str(error), str(error)
    return error


def some_pairs(these, those):
    """Return all pairs on 1 and 2 ranks; on more, where ranks wait for cores, each item at least once."""
    if SIZE <= 2:
        return itertools.product(these, those)
    return itertools.islice(zip(itertools.cycle(these), itertools.cycle(those)), max(len(these), len(those)))
