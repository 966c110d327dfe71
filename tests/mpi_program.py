"""What tests/test_mpi.py runs under mpiexec: ``mpiexec -n P python tests/mpi_program.py CASE...``.

Each case is a function here; rank 0 prints "ok CASE" after it. An exception on any rank ends all of them.
"""

import copy
import functools
import gc
import itertools
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, leaves
from mpi4py import MPI

import fastrms
from fastrms import RankError, RMSProp, StructureError, mpi
from fastrms.mpi import buckets, channels, communicator

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
KERNELS = ["numpy", "serial", "parallel"] if JIT else ["numpy"]
STEPS = 5

# Parts of ranks begin at multiples of 16 elements, so that sizes around these have whole, cut and empty parts.
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

OPTIONS = [
    {},
    {"momentum": 0.9, "nesterov": True},
    {"centered": True, "bias_correction": True},
    {"weight_decay": 0.1, "maximize": True, "eps_in_sqrt": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "initial_scale": 1.0},
    {"clip_value": 2.0},
    {"clip_norm": 3.0},
    {"global_clip_norm": 5.0},
    {"clip_value": 4.0, "clip_norm": 9.0, "global_clip_norm": 11.0, "nonfinite": "raise"},
    {"lr": lambda step: 0.1 / (step + 1), "momentum": 0.5, "lr_in_momentum": True, "nonfinite": "skip"},
]


class ShardedRMSProp(mpi.ShardedRMSProp):
    """Which takes sums, unless it is told otherwise: of whole numbers they are exact, in any order and any part."""

    def __init__(self, *args, reduction="sum", **options):
        super().__init__(*args, reduction=reduction, **options)


def params_of(layout, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, (shape, dtype) in layout.items()}


def gradients_of(layout, step, whole_numbers=True):
    """The gradients of each rank, which all ranks know: whole numbers, whose sums are exact in any order."""
    rng = np.random.default_rng([step, SIZE])
    draw = (lambda shape: rng.integers(-5, 6, shape)) if whole_numbers else (lambda shape: rng.normal(size=shape))
    return [{name: np.asarray(draw(shape)).astype(dtype) for name, (shape, dtype) in layout.items()}
            for _ in range(SIZE)]  # fmt: skip


def add(gradients):
    """Their sum, where None counts as zeros unless all are None."""
    total = {}
    for name in gradients[0]:
        arrays = [each[name] for each in gradients if each[name] is not None]
        total[name] = None if not arrays else sum(arrays[1:], start=arrays[0])
    return total


def same(opt, alone, what=""):
    """Whether all of the two is the same, to the bit, on every rank."""
    for ours, theirs in zip(leaves(opt.params), leaves(alone.params), strict=True):
        assert_same_bits(ours, theirs, f"params, {what}")
    ours, theirs = opt.state_dict(), alone.state_dict()
    assert ours["arrays"].keys() == theirs["arrays"].keys()
    for name, array in theirs["arrays"].items():
        assert_same_bits(ours["arrays"][name], array, f"{name}, {what}")
    assert {k: v for k, v in ours.items() if k != "arrays"} == {k: v for k, v in theirs.items() if k != "arrays"}


def take(opt, gradients, way, rng):
    """A step with this rank's gradients, given in one of some ways."""
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
    """The error that a call raises, after a look at its class and its message."""
    with pytest.raises(kind, match=re.escape(text)) as caught:
        function(*arguments)
    assert caught.type is kind
    return caught.value


def raises_on(rank, kind, text, function, *arguments):
    """As `raises` on one rank; the others are told of it."""
    if rank == RANK:
        return raises(kind, text, function, *arguments)
    error = raises(RankError, f"rank {rank} of {SIZE} cannot go on: {kind.__name__}: ", function, *arguments)
    assert text in str(error), str(error)
    return error


def bits():
    """All options, layouts and ways to give gradients, on all kernels."""
    rng = np.random.default_rng(RANK)
    kernels, ways = itertools.cycle(KERNELS), itertools.cycle(["dict", "buffer", "ready"])
    for (name, layout), options in itertools.product(LAYOUTS.items(), OPTIONS):
        kernel, way = next(kernels), next(ways)
        params = params_of(layout)
        opt = ShardedRMSProp(params, kernel=kernel, **options)
        alone = RMSProp(params, kernel=kernel, **options)
        for step in range(STEPS):
            gradients = gradients_of(layout, step)
            assert take(opt, gradients[RANK], way, rng) is opt.params
            alone.step(add(gradients))
        same(opt, alone, f"{name}, {options}, {kernel}, {way}")


def bfloat16():
    layout = LAYOUTS["even"] | {"x": ((55, 3), np.float32)}
    params = params_of(layout)
    made = [cls(params, cache_dtype="bfloat16", momentum=0.9, kernel=KERNELS[-1]) for cls in (ShardedRMSProp, RMSProp)]
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        made[0].step(gradients[RANK])
        made[1].step(add(gradients))
    assert leaves(made[0].cache)[0].dtype == np.uint16
    same(*made)


def groups():
    """Parameter groups of nestings, with options of their own, which change meanwhile."""
    layout = LAYOUTS["mixed"]
    names = [["W", "b"], ["c"], ["d", "e", "f"]]

    def grouped(items):
        return [[items["W"], {"b": items["b"]}], items["c"], (items["d"], [items["e"], items["f"]])]

    params = params_of(layout)
    parts = grouped(params)
    own = [{"lr": 0.1, "momentum": 0.9}, {"clip_norm": 3.0}, {"centered": True, "weight_decay": 0.1}]
    made = [cls([{"params": part} | options for part, options in zip(parts, own, strict=True)], global_clip_norm=20.0)
            for cls in (ShardedRMSProp, RMSProp)]  # fmt: skip
    keys = [(0, 0), (0, 1, "b"), (1,), (2, 0), (2, 1, 0), (2, 1, 1)]
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        mine = gradients[RANK]
        if step % 2:
            for key, name in zip(keys, itertools.chain(*names), strict=True):
                made[0].ready(key, mine[name])
            made[0].step()
        else:
            made[0].step(grouped(mine))
        made[1].step(grouped(add(gradients)))
        for opt in made:
            opt.param_groups[1]["lr"] = 0.01 * step
            opt.param_groups[2]["momentum"] = 0.5 * (step > 1)
    assert made[0].param_groups[0]["params"] is made[0].params[0]
    same(*made)
    if SIZE > 1:
        raises(StructureError, "key: expected one of (0, 0), (0, 1, 'b'), 1, (2, 0)", made[0].ready, 7, mine["W"])


def none():
    """None on all ranks skips; on some it counts as zeros; in every way to give gradients."""
    layout = LAYOUTS["mixed"]
    for way, options in itertools.product(["dict", "ready"], [{}, {"global_clip_norm": 3.0, "nonfinite": "raise"}]):
        rng = np.random.default_rng(RANK)
        params = params_of(layout)
        made = [cls(params, bias_correction=True, momentum=0.9, **options) for cls in (ShardedRMSProp, RMSProp)]
        for step in range(STEPS):
            gradients = gradients_of(layout, step)
            for rank, k in itertools.product(range(SIZE), range(len(layout))):
                if (step + k) % 3 == 0 or (step + k + rank) % 2 == 0:
                    gradients[rank][list(layout)[k]] = None
            take(made[0], gradients[RANK], way, rng)
            made[1].step(add(gradients))
        assert made[1]._skipped.any()
        same(*made, way)


def sums():
    """With any gradients: the update is that of their sum as it was added up, and all ranks have the same bits."""
    layout = LAYOUTS["odd"] | LAYOUTS["mixed"]
    for options in ({}, {"clip_norm": 2.0, "global_clip_norm": 3.0}):
        params = params_of(layout)
        made = [cls(params, momentum=0.9, **options) for cls in (ShardedRMSProp, RMSProp)]
        for step in range(STEPS):
            gradients = gradients_of(layout, step, whole_numbers=False)
            made[0].step(gradients[RANK])
            total = made[1].buffers["grads"].like()
            for all_, own, bounds in zip(total.segments, made[0]._own["grads"].segments, made[0]._bounds, strict=True):
                all_[bounds[RANK] : bounds[RANK + 1]] = own
                made[0]._ranks.all_gather(all_, bounds)
            np.testing.assert_allclose(total.views["W"], add(gradients)["W"], rtol=1e-4, atol=1e-5)
            made[1].step(total.views)
            for ours, theirs in zip(leaves(made[0].params), leaves(made[1].params), strict=True):
                if options:
                    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
                else:
                    assert_same_bits(ours, theirs)
            mine = [view.tobytes() for view in leaves(made[0].params)]
            assert COMM.bcast(mine) == mine


def large_norms():
    """Norms whose squares leave the range of float64 where those of the elements do not, of parameters cut anywhere."""
    for scale in (2.0**507, 2.0**-480):
        layout = {"a": ((490,), np.float64), "b": ((700,), np.float64), "c": ((3,), np.float64)}
        params = params_of(layout)
        options = {"clip_norm": 3.0 * scale, "global_clip_norm": 4.0 * scale, "kernel": KERNELS[0]}
        made = [cls(params, **options) for cls in (ShardedRMSProp, RMSProp)]
        for step in range(STEPS):
            gradients = gradients_of(layout, step)
            for each in gradients:
                each["a"] *= scale
                each["b"] *= scale
                each["c"] *= scale
            made[0].step(gradients[RANK])
            made[1].step(add(gradients))
        assert all(np.isfinite(view).all() and view.any() for view in leaves(made[1].cache))
        same(*made)


def mean():
    layout = LAYOUTS["odd"]
    params = params_of(layout)
    opt, alone = mpi.ShardedRMSProp(params, clip_value=1.2), RMSProp(params, clip_value=1.2)
    assert opt.reduction == "mean"  # by default
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        opt.step(gradients[RANK])
        alone.step({name: total / total.dtype.type(SIZE) for name, total in add(gradients).items()})
    same(opt, alone)


def nonfinite():
    layout = LAYOUTS["mixed"]
    for options in ({}, {"clip_norm": 1.0}, {"clip_value": 0.5, "global_clip_norm": 1.0}):
        params = params_of(layout)
        raising, skipping = (ShardedRMSProp(params, nonfinite=word, **options) for word in ("raise", "skip"))
        alone = RMSProp(params, **options)
        for step in range(3):
            gradients = gradients_of(layout, step)
            spoilt = {name: gradient.copy() for name, gradient in gradients[RANK].items()}
            if RANK == SIZE - 1:
                spoilt["W"][12, 6] = spoilt["W"][0, 0] = np.nan
                spoilt["f"][-1] = np.inf
            error = raises(fastrms.NonfiniteError, "W']: 2 NaN and 0 inf among 91 values; gradients['f']: 0 NaN and 1",
                           raising.step, spoilt)  # fmt: skip
            assert error.counts == {"['W']": 2, "['f']": 1}
            assert skipping.step(spoilt) is skipping.params
            assert skipping.skipped_steps == step + 1
            for opt in (raising, skipping):
                opt.step(gradients[RANK])
            alone.step(add(gradients))
        for opt in (raising, skipping):
            for ours, theirs in zip(leaves(opt.params), leaves(alone.params), strict=True):
                assert_same_bits(ours, theirs)
    # Its sum is not finite though no gradient is.
    opt = ShardedRMSProp([np.ones(40, np.float32)], nonfinite="skip")
    opt.step([np.full(40, 3e38, np.float32)])
    assert opt.skipped_steps == (SIZE > 1)


def ready():
    """Buckets of some elements each, handed over in any order, by one rank or all."""
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 20, 2  # so that both kinds of reductions are used
    layout = LAYOUTS["mixed"]
    params = params_of(layout)
    made = [cls(params, momentum=0.9) for cls in (ShardedRMSProp, ShardedRMSProp, RMSProp)]
    opt, other, alone = made
    rng = np.random.default_rng(RANK)
    for step in range(2 * STEPS):
        gradients = gradients_of(layout, step)
        mine = gradients[RANK]
        keys = [(each, key) for each in (opt, other) for key in mine]
        rng.shuffle(keys)  # of two optimizers, in an order that differs between ranks
        for each, key in keys:
            if each is opt and (step % 3 == 2 and RANK == 0):
                continue  # this rank gives a list
            if key == "W":
                each.grads["W"][...] = mine["W"]
                each.ready(key, each.grads["W"])
            else:
                each.ready(key, mine[key])
        opt.step(mine if step % 3 == 2 and RANK == 0 else None)
        other.step()
        alone.step(add(gradients))
        same(opt, alone)
        same(other, alone)

    # What is wrong, where it is handed over, and in the step.
    before = [view.copy() for view in leaves(opt.params)]
    raises(StructureError, "key: expected one of 'W', 'b', 'c', 'd', 'e', 'f', got 'w'", opt.ready, "w", mine["W"])
    raises(StructureError, "key: expected one of", opt.ready, ["W"], mine["W"])
    raises(StructureError, "gradients['W']: expected shape (13, 7), got (7, 13)", opt.ready, "W", mine["W"].T)
    raises(fastrms.DtypeError, "gradients['b']: expected an array", opt.ready, "b", "text")
    assert not opt._handover.begun
    last = SIZE - 1
    for key in mine:
        if last != RANK or key not in ("b", "d"):
            opt.ready(key, mine[key])
    if last != RANK:
        raises(StructureError, "gradients['b']: expected once before each step", opt.ready, "b", mine["b"])
    raises_on(last, StructureError, "got none for ['b'], ['d']; hand over None", opt.step)
    for key in mine:
        opt.ready(key, mine[key])
    raises_on(last, StructureError, "expected step() without an argument after ready()", opt.step,
              mine if last == RANK else None)  # fmt: skip
    if last == RANK:
        opt.ready("f", mine["f"])
    opt.discard()
    opt.discard()
    for ours, theirs in zip(leaves(opt.params), before, strict=True):
        assert_same_bits(ours, theirs)
    for way in ("ready", "dict"):
        take(opt, mine, way, rng)
        alone.step(add(gradients))
        same(opt, alone)
    assert opt._ranks.channel.requests == []
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 1 << 20, 4
    # A single array has no key of its own.
    single = ShardedRMSProp(np.ones(20))
    single.ready((), np.ones(20))
    assert single.step() is single.params


def long_messages():
    """What is longer than one message may be, with a limit that these arrays reach."""
    communicator.MAX_ELEMENTS, communicator.BLOCK_SIZE = 10, 7
    layout = LAYOUTS["odd"] | LAYOUTS["mixed"]
    params = params_of(layout, seed=RANK)
    opt, alone = ShardedRMSProp(params, centered=True), RMSProp(params_of(layout), centered=True)
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        opt.step(gradients[RANK])
        alone.step(add(gradients))
    same(opt, alone)
    state = opt.state_dict()
    opt.step(gradients[RANK])
    opt.load_state_dict(state)
    same(opt, alone)
    communicator.MAX_ELEMENTS, communicator.BLOCK_SIZE = 2**28 - 1, 1 << 22


def checkpoints():
    """In memory and in files, of this class and of RMSProp, with an option that was on before."""
    layout = LAYOUTS["mixed"]
    folder = Path(COMM.bcast(os.environ["MPI_TEST_FOLDER"])) / f"of-{SIZE}"
    if RANK == 0:
        folder.mkdir(exist_ok=True)
    params = params_of(layout)
    options = {"momentum": 0.9, "bias_correction": True, "lr": 0.01}
    opt, alone = ShardedRMSProp(params, **options), RMSProp(params, **options)

    def go_on(*optimizers, steps=3):
        for step in range(steps):
            gradients = gradients_of(layout, step)
            for each in gradients:
                each["d"] = each["d"] if step else None  # so that bias correction has to know
            total = add(gradients)
            for each in optimizers:
                each.step(gradients[RANK] if isinstance(each, ShardedRMSProp) else total)

    go_on(opt, alone)
    for each in (opt, alone):
        each.param_groups[0]["momentum"] = 0.0  # its buffer stays
    for name in ("run.npz", "run.safetensors"):
        opt.save(folder / name)
        if RANK == 0:
            alone.save(folder / f"alone-{name}")
        COMM.Barrier()
        by_one = RMSProp(params, lr=0.5)
        by_one.load(folder / name)
        later = ShardedRMSProp(params_of(layout, seed=7), lr=lambda step: 0.5)
        later.load(folder / f"alone-{name}" if RANK == 0 else "only rank 0 reads")
        made = ShardedRMSProp.from_checkpoint(folder / name, kernel=KERNELS[0], reduction="sum")
        assert mpi.ShardedRMSProp.from_checkpoint(folder / name).reduction == "mean"
        twin = RMSProp.from_checkpoint(folder / name)
        expected = RMSProp(params)
        expected.load_state_dict(alone.state_dict())
        go_on(by_one, later, made, twin, expected)
        for each in (by_one, later, made, twin):
            for ours, theirs in zip(leaves(each.params), leaves(expected.params), strict=True):
                assert_same_bits(ours, theirs, name)
            assert (each.steps, each.lr) == (6, 0.01)
        same(later, expected)
        same(made, expected)
    scheduled = ShardedRMSProp.from_checkpoint(folder / "run.npz", lr=lambda step: 0.1)
    assert scheduled.lr(3) == 0.1
    grouped = ShardedRMSProp([{"params": [np.ones(40)], "lr": 0.3}, {"params": [np.ones(3)]}])
    grouped.save(folder / "grouped.npz")
    assert [g["lr"] for g in ShardedRMSProp.from_checkpoint(folder / "grouped.npz").param_groups] == [0.3, 0.001]
    grouped.param_groups[1]["lr"] = lambda step: 0.2
    grouped.save(folder / "grouped.npz")
    for lr in (0.7, lambda step: 0.1):
        made = ShardedRMSProp.from_checkpoint(folder / "grouped.npz", lr=lr)
        assert [group["lr"] for group in made.param_groups] == [0.3, lr]
    turned = ShardedRMSProp(dict(reversed(params.items())), **options)
    turned.load(folder / "run.npz")
    for name, array in opt.params.items():
        assert_same_bits(turned.params[name], array, name)

    before = opt.state_dict()["arrays"]
    raises(fastrms.CheckpointError, "expected a name that ends in", opt.save, folder / "run.txt")
    raises(fastrms.CheckpointError, "params['W']: expected shape [13, 7], got", opt.load_state_dict,
           RMSProp({name: np.ones(2, d) for name, (_, d) in layout.items()}).state_dict())  # fmt: skip
    raises(FileNotFoundError, "none.npz", opt.load, folder / "none.npz")
    raises(FileNotFoundError, "none.npz", ShardedRMSProp.from_checkpoint, folder / "none.npz")
    for name, array in opt.state_dict()["arrays"].items():
        assert_same_bits(array, before[name])
    raises(TypeError, "cannot be copied or pickled", pickle.dumps, opt)
    raises(TypeError, "cannot be copied or pickled", copy.copy, opt)


def save():
    """What `resume` goes on with, on another number of ranks."""
    layout = LAYOUTS["odd"]
    opt = ShardedRMSProp(params_of(layout), momentum=0.9, centered=True, bias_correction=True)
    for step in range(3):
        # The same sum for any number of ranks.
        opt.step(gradients_of_all(layout, step) if RANK == SIZE - 1 else dict.fromkeys(layout))
    opt.save(Path(os.environ["MPI_TEST_FOLDER"]) / "across.npz")


def resume():
    layout = LAYOUTS["odd"]
    opt = ShardedRMSProp.from_checkpoint(Path(os.environ["MPI_TEST_FOLDER"]) / "across.npz", reduction="sum")
    for step in range(3, 6):
        opt.step(gradients_of_all(layout, step) if RANK == SIZE - 1 else dict.fromkeys(layout))
    opt.save(Path(os.environ["MPI_TEST_FOLDER"]) / f"resumed-{SIZE}.npz")


def gradients_of_all(layout, step):
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=shape).astype(dtype) for name, (shape, dtype) in layout.items()}


def start():
    """What has to be the same on all ranks when the optimizer is made, and what is then said."""
    layout = LAYOUTS["mixed"]
    opt = ShardedRMSProp(params_of(layout, seed=RANK))
    for ours, theirs in zip(leaves(opt.params), leaves(params_of(layout)), strict=True):
        assert_same_bits(ours, theirs)
    ShardedRMSProp(params_of(layout), check_params="raise")
    called = []
    scheduled = ShardedRMSProp(params_of(layout), lr=lambda step: called.append(step) or 0.1)
    for _ in range(2):
        scheduled.step(params_of(layout))
    assert called == [0, 1]  # once a step, and not before
    raises(fastrms.OptionTypeError, "comm: expected an intracommunicator", lambda: ShardedRMSProp(np.ones(3), comm=7))
    raises(fastrms.OptionError, "reduction: expected one of", lambda: ShardedRMSProp(np.ones(3), reduction="max"))
    raises(fastrms.OptionError, "check_params: expected", lambda: ShardedRMSProp(np.ones(3), check_params="no"))
    raises(TypeError, "unexpected keyword argument 'moment'", lambda: ShardedRMSProp(np.ones(3), moment=0.9))
    if SIZE == 1:
        return
    last = SIZE - 1
    different = params_of(layout)
    different["c"][1, 2] += last == RANK
    others = f"on all ranks, got others than on rank 0 on rank {last}"
    raises(StructureError, f"params['c']: expected the same values {others}",
           lambda: ShardedRMSProp(different, check_params="raise"))  # fmt: skip
    raises(StructureError, f"params: expected the same structure, shapes, dtypes and check_params {others}",
           lambda: ShardedRMSProp(np.ones(3 + (last == RANK))))  # fmt: skip
    raises(fastrms.OptionError, f"options: expected the same {others}",
           lambda: ShardedRMSProp(np.ones(3), momentum=0.5 * (last == RANK)))  # fmt: skip
    rate = 2.0 if last == RANK else 0.9
    raises_on(last, fastrms.OptionError, "decay_rate: expected", lambda: ShardedRMSProp(np.ones(3), 0.1, rate))
    raises_on(0, fastrms.DtypeError, "params['a']: expected float32 or float64, got int64",
              lambda: ShardedRMSProp({"a": np.ones(3, np.int64 if RANK == 0 else np.float64)}))  # fmt: skip


def errors_in_steps():
    """Every rank raises, its own error or one that names the rank; nothing has changed, and the next step works."""
    layout = LAYOUTS["mixed"]
    params = params_of(layout)
    opt, alone = ShardedRMSProp(params, momentum=0.9), RMSProp(params, momentum=0.9)
    last = SIZE - 1
    for step, (kind, text, change) in enumerate([
        (StructureError, "gradients['c']: expected shape (3, 30), got (2,)", {"c": np.ones(2)}),
        (fastrms.DtypeError, "gradients['b']: expected an array", {"b": "text"}),
        (StructureError, "gradients: unknown 'x'", {"x": np.ones(3)}),
    ]):  # fmt: skip
        gradients = gradients_of(layout, step)
        raises_on(last, kind, text, opt.step, gradients[RANK] | (change if last == RANK else {}))
        opt.step(gradients[RANK])
        alone.step(add(gradients))
        same(opt, alone)
    mine = opt.params["W"]
    if RANK == 0:
        opt.params["W"] = mine.copy()
    raises_on(0, StructureError, "params['W']: expected the view that was there", opt.step, gradients[RANK])
    opt.params["W"] = mine
    opt.lr = lambda step: 1 / 0 if last == RANK else 0.1
    raises_on(last, ZeroDivisionError, "division", opt.step, gradients[RANK])
    opt.lr = 0.1
    opt.nonfinite = "raise"
    with np.errstate(over="raise"):  # the cast gives inf, whatever NumPy's settings are
        raises(fastrms.NonfiniteError, "gradients['c']: 0 NaN and 90 inf among 90 values", opt.step,
               gradients[RANK] | {"c": np.full((3, 30), 1e300 if last == RANK else 1)})  # fmt: skip
    opt.nonfinite = "propagate"
    if SIZE > 1:
        opt.lr = 0.1 + RANK
        raises(fastrms.OptionError, "lr: expected the same on all ranks, got others than on rank 0 on rank", opt.step,
               gradients[RANK])  # fmt: skip
        opt.lr = 0.1
        opt.param_groups[0]["epsilon"] = 1e-8 + 1e-3 * (last == RANK)
        raises(fastrms.OptionError, f"options: expected the same on all ranks, got others than on rank 0 on "
               f"rank {last};", opt.step, gradients[RANK])  # fmt: skip
        opt.param_groups[0]["epsilon"] = 1e-8
    alone.lr = 0.1
    opt.step(gradients[RANK])
    alone.step(add(gradients))
    same(opt, alone)
    # What a user writes into the parameters is what the next step starts from.
    opt.params["W"][...] = alone.params["W"][...] = 2.0
    opt.step(gradients[RANK])
    alone.step(add(gradients))
    same(opt, alone)


def different_calls():
    """Ranks that are in different calls all raise, nothing has changed, and they can go on."""
    folder = Path(COMM.bcast(os.environ["MPI_TEST_FOLDER"]))
    layout = LAYOUTS["mixed"]
    params = params_of(layout)
    opt, alone = ShardedRMSProp(params, momentum=0.9), RMSProp(params, momentum=0.9)
    state = opt.state_dict()
    last = SIZE - 1

    def call(name):
        return {
            "step": lambda: opt.step(gradients[RANK]),
            "save": lambda: opt.save(folder / "different.npz"),
            "load": lambda: opt.load(folder / "different.npz"),
            "load_state_dict": lambda: opt.load_state_dict(state),
        }.get(name, lambda: getattr(opt, name)())

    calls = ["step", "discard", "state_dict", "load_state_dict", "save", "load"]
    pairs = list(itertools.permutations(calls, 2)) if SIZE == 2 else [("save", "step"), ("step", "load")]
    for number, (mine, theirs) in enumerate(pairs if SIZE > 1 else ()):
        gradients = gradients_of(layout, number)
        begun = number % 3 == 0
        if begun:  # what was handed over is there when all ranks step
            for key, gradient in gradients[RANK].items():
                opt.ready(key, gradient)
        one, others = ("step", "state_dict") if begun else (mine, theirs)
        error = raises(RankError, "expected the same call on all ranks, got ", call(one if last == RANK else others))
        assert f"{one}() on rank {last}; nothing was changed" in str(error), str(error)
        assert f"on rank{'s 0,' if SIZE > 2 else ' 0,'} " in str(error), str(error)
        opt.step(None if begun else gradients[RANK])
        alone.step(add(gradients))
        same(opt, alone, f"{mine}, {theirs}")
    assert not (folder / "different.npz").exists()

    # Options and kinds of state that differ are found by what sends or receives them.
    if SIZE > 1:
        if last == RANK:
            opt.param_groups[0]["centered"] = True
            opt.param_groups[0]["centered"] = False  # and keeps its mean gradient
        for name in ("state_dict", "save", "load", "load_state_dict"):
            raises(fastrms.OptionError, "options or kinds of state: expected the same on all ranks, got others than on "
                   f"rank 0 on rank {last}", call(name))  # fmt: skip
        opt.param_groups[0]["centered"] = True
        opt.param_groups[0]["epsilon"] = 1e-8 + 1e-3 * (last == RANK)
        raises(fastrms.OptionError, "options or kinds of state: expected", opt.state_dict)
        opt.load_state_dict(alone.state_dict())  # which mends options
        assert (opt.epsilon, opt.param_groups[0]["centered"]) == (1e-8, False)
        opt.state_dict()


def timeouts():
    """How long ranks wait: what may be given, and that a rank which comes in time is waited for."""
    os.environ.pop("FASTRMS_MPI_TIMEOUT", None)
    given = [("auto", 600.0), (None, None), (0, None), (np.inf, None), (2, 2.0), (np.float32(0.5), 0.5)]
    for value, expected in given:
        assert ShardedRMSProp(np.ones(3), timeout=value).timeout == expected
    os.environ["FASTRMS_MPI_TIMEOUT"] = "17"
    opt = ShardedRMSProp(np.ones(3), lr=0.1)
    assert (opt.timeout, ShardedRMSProp(np.ones(3), timeout=3).timeout) == (17, 3)
    os.environ["FASTRMS_MPI_TIMEOUT"] = "0"
    assert ShardedRMSProp(np.ones(3)).timeout is None
    os.environ["FASTRMS_MPI_TIMEOUT"] = "soon"
    raises(fastrms.OptionError, "the environment variable FASTRMS_MPI_TIMEOUT: expected a number of seconds >= 0, got "
           "'soon'", lambda: ShardedRMSProp(np.ones(3)))  # fmt: skip
    del os.environ["FASTRMS_MPI_TIMEOUT"]
    for value, kind in [(-1, fastrms.OptionError), (np.nan, fastrms.OptionError), (True, fastrms.OptionTypeError),
                        ("1", fastrms.OptionTypeError), ([2], fastrms.OptionTypeError)]:  # fmt: skip
        raises(kind, 'timeout: expected a number of seconds >= 0, None or "auto", got', setattr, opt, "timeout", value)
        raises_on(SIZE - 1, kind, "timeout: expected a number of seconds >= 0",
                  lambda value=value: ShardedRMSProp(np.ones(3), timeout=value if SIZE - 1 == RANK else 5))  # fmt: skip
    assert opt.timeout == 17
    for opt.timeout in (20, None):
        time.sleep(0.2 * RANK)
        opt.step(np.ones(3))
    opt._ranks._meeting = None  # as with a library of MPI 3, which has no persistent collectives
    time.sleep(0.2 * RANK)
    opt.step(np.ones(3))
    assert opt.steps == 3


class Calls:
    """A gradient, or a mapping of gradients, that does something when it is looked at."""

    def __init__(self, item, do):
        self.item, self.do = item, do

    def __array__(self, dtype=None, copy=None):
        self.do()
        return self.item


class Lazily(Calls, Mapping):
    def __getitem__(self, key):
        self.do()
        return self.item[key]

    def __iter__(self):
        return iter(self.item)

    def __len__(self):
        return len(self.item)


def scheduled(opt, gradients, do):
    """A step whose learning rate is found by a function that does something."""
    rate = opt.lr
    opt.lr = lambda step: do() or rate
    try:
        opt.step(gradients)
    finally:
        if callable(opt.lr):
            opt.lr = rate


def pairs(these, those):
    """All pairs on 1 and 2 ranks; on more, where ranks wait for cores, each of these and each of those once."""
    if SIZE <= 2:
        return itertools.product(these, those)
    return itertools.islice(zip(itertools.cycle(these), itertools.cycle(those)), max(len(these), len(those)))


PLACES = {
    "lr": scheduled,
    "__array__": lambda opt, gradients, do: opt.step(gradients | {"b": Calls(gradients["b"], do)}),
    "__getitem__": lambda opt, gradients, do: opt.step(Lazily(gradients, do)),
}


def users_code():
    """What a step calls may raise on one rank, set options on all, and not ask for what ranks do together."""
    folder = Path(COMM.bcast(os.environ["MPI_TEST_FOLDER"]))
    layout = LAYOUTS["mixed"]
    params = params_of(layout)
    last = SIZE - 1
    opt, alone = ShardedRMSProp(params, lr=0.01), RMSProp(params, lr=0.01)
    state = opt.state_dict()

    def fail():
        raise LookupError("no such batch")

    asked = {
        "raise": fail,
        "step": lambda: opt.step(),
        "ready": lambda: opt.ready("W", params["W"]),
        "discard": lambda: opt.discard(),
        "state_dict": lambda: opt.state_dict(),
        "load_state_dict": lambda: opt.load_state_dict(state),
        "save": lambda: opt.save(folder / "within.npz"),
        "load": lambda: opt.load(folder / "within.npz"),
    }
    step = 0
    for (place, call), name in pairs(PLACES.items(), asked):
        # An error of an array's own method is one about that array.
        kind = LookupError if name == "raise" else fastrms.StepInProgressError
        text = "no such batch" if name == "raise" else f"{name}: expected a call between two steps"
        gradients = gradients_of(layout, step := step + 1)
        # On one rank, as its data may be different, and on all.
        for on_all in (False, True) if SIZE > 1 else (True,):
            for_this = asked[name] if on_all or last == RANK else lambda: None
            own = fastrms.DtypeError if place == "__array__" else kind
            with pytest.raises(own if on_all or last == RANK else RankError, match=text):
                call(opt, gradients[RANK], for_this)
        opt.step(gradients[RANK])
        alone.step(add(gradients))
        same(opt, alone, f"{place}, {name}")
    assert not (folder / "within.npz").exists()

    changes = [("lr", 0.5, 0.02), ("momentum", 0.9, 0.5), ("centered", True, False), ("weight_decay", 0.1, 0.2),
               ("clip_norm", 0.01, 0.02), ("nonfinite", "raise", "skip")]  # fmt: skip
    for (place, call), (name, value, other) in pairs(PLACES.items(), changes):
        opt, alone = ShardedRMSProp(params, lr=0.01), RMSProp(params, lr=0.01)
        for step in range(3):
            gradients = gradients_of(layout, step)
            if step == 1:
                call(opt, gradients[RANK], functools.partial(setattr, opt, name, value))
                call(alone, add(gradients), functools.partial(setattr, alone, name, value))
            else:
                opt.step(gradients[RANK])
                alone.step(add(gradients))
            same(opt, alone, f"{place}, {name}")
        if SIZE > 1:  # on one rank only
            with pytest.raises(fastrms.OptionError, match="expected the same on all ranks, got others than on rank 0"):
                call(opt, gradients[RANK], functools.partial(setattr, opt, name, other if last == RANK else value))

    # The memory of a gradient goes while the rate is found.
    opt = ShardedRMSProp([np.ones(200_000), np.ones(3)])
    mine = [np.ones(200_000), np.ones(3)]
    opt.lr = lambda step: mine[0].resize(4, refcheck=False) or 0.1
    raises(StructureError, "gradients[0]: expected shape (200000,), got (4,)", opt.step, mine)


def aliases():
    """Gradients that lie in the optimizer's own gradient buffer, in other places, through wrappers that hide it."""
    wrappers = [
        lambda view: np.lib.stride_tricks.as_strided(view),
        lambda view: np.asarray(memoryview(view)),
        lambda view: np.frombuffer(view, view.dtype).reshape(view.shape),
        lambda view: np.from_dlpack(view),
        lambda view: np.lib.stride_tricks.sliding_window_view(view, view.shape).reshape(view.shape),
    ]
    params = params_of({"a": ((40,), np.float64), "b": ((40,), np.float64), "c": ((40,), np.float64)})
    for wrap, way in pairs(wrappers, ["list", "ready"]):
        opt, alone = ShardedRMSProp(params), RMSProp(params)
        for step in range(3):
            gradients = gradients_of(dict.fromkeys(params, ((40,), np.float64)), step)
            for name, gradient in gradients[RANK].items():
                opt.grads[name][...] = gradient
            a, b, c = (wrap(opt.grads[name]) for name in "abc")
            if way == "list":
                opt.step({"a": b, "b": c, "c": a})  # all are read before any is written
                alone.step(add([{"a": each["b"], "b": each["c"], "c": each["a"]} for each in gradients]))
            else:  # each is what lies there when it is handed over
                opt.ready("a", b)
                opt.ready("b", wrap(opt.grads["b"])[::-1])
                opt.ready("c", a)
                opt.step()
                alone.step(add([{"a": each["b"], "b": each["b"][::-1], "c": each["b"]} for each in gradients]))
        same(opt, alone, way)


def memory():
    """An option for whose state there is no memory on one rank is not set there, and the others find that."""
    import resource  # not on Windows

    last = SIZE - 1
    opt, alone = (cls([np.broadcast_to(np.float32(0), count)])
                  for cls, count in ((ShardedRMSProp, 2_000_000 * SIZE), (RMSProp, 1)))  # fmt: skip

    def step(count):
        opt.grads[0][...] = count
        opt.step()
        alone.step([np.full(1, count * SIZE, np.float32)])
        assert opt.params[0].min() == opt.params[0].max() == alone.params[0][0]

    step(1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if last == RANK:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000, before[1]))
            held = []
            with suppress(MemoryError):  # what was freed before has no place for the state any more
                held.extend(np.empty(2_000_000, np.float32) for _ in range(1000))
            for set_momentum in (lambda: setattr(opt, "momentum", 0.9),
                                 lambda: opt.param_groups[0].__setitem__("momentum", 0.9),
                                 lambda: opt.param_groups[0].update(nesterov=True, momentum=0.9)):  # fmt: skip
                with pytest.raises(MemoryError):
                    set_momentum()
                assert opt.param_groups[0]["momentum"] == 0
                assert not opt.param_groups[0]["nesterov"]
        else:
            opt.param_groups[0]["momentum"] = 0.9
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    if SIZE > 1:
        raises(fastrms.OptionError, f"options: expected the same on all ranks, got others than on rank 0 on "
               f"rank {last}", opt.step)  # fmt: skip
    opt.param_groups[0]["momentum"] = alone.param_groups[0]["momentum"] = 0.9
    step(2)
    step(3)


def signals_and_threads():
    """What comes in the midst of a step: a signal handler asks for a call, a thread sets an option."""
    opt, alone = ShardedRMSProp(np.ones(50), lr=0.1), RMSProp(np.ones(50), lr=0.1)
    folder = Path(COMM.bcast(os.environ["MPI_TEST_FOLDER"]))
    refused = []

    def handler(number, frame):
        for call in (lambda: opt.save(folder / "handler.npz"), opt.state_dict, opt.discard, opt.step):
            with pytest.raises(fastrms.StepInProgressError, match="expected a call between two steps"):
                call()
            refused.append(opt.steps)
        # Ranks have compared their options, in a step, and not in `state_dict`, where it does no harm.
        for name, value in (("lr", 0.2), ("momentum", 0.5), ("nonfinite", "skip"), ("kernel", "numpy")) * in_step[0]:
            kept = getattr(opt, name)
            with pytest.raises(fastrms.StepInProgressError, match="options: expected to be set between two steps"):
                setattr(opt, name, value)
            assert getattr(opt, name) == kept
            refused.append(name)

    before = signal.signal(signal.SIGALRM, handler)
    in_step = [True]
    for call in (lambda: opt.step(np.ones(50)), opt.state_dict):  # rank 0 waits in it
        if RANK == 0 and SIZE > 1:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(0.3 * (RANK > 0))
        call()
        in_step[0] = False
    signal.signal(signal.SIGALRM, before)
    assert len(refused) == (12 if RANK == 0 and SIZE > 1 else 0)
    alone.step(np.full(50, float(SIZE)))
    same(opt, alone)

    threads = []

    def rate(step):
        threads.append(threading.Thread(target=lambda: setattr(opt, "momentum", 0.5)))
        threads[-1].start()
        threads[-1].join(0.1)
        assert threads[-1].is_alive()  # it waits for the end of the step
        assert opt.param_groups[0]["momentum"] == 0
        return 0.1

    opt.lr = rate
    opt.step(np.ones(50))
    threads[0].join()
    alone.step(np.full(50, float(SIZE)))
    opt.lr, alone.momentum = 0.1, 0.5
    same(opt, alone)
    opt.step(np.ones(50))
    alone.step(np.full(50, float(SIZE)))
    same(opt, alone)


def attributes():
    """Unknown attributes and arguments are refused; those of this class can be set."""
    opt = mpi.ShardedRMSProp([np.ones(3)])
    for name in ("learning_rate", "momentun", "reductions", "time_out", "world_size"):
        with pytest.raises(AttributeError, match=name):
            setattr(opt, name, 1)
    for name in ("reduction", "rank", "size", "shard", "buffers"):
        with pytest.raises(AttributeError):
            setattr(opt, name, getattr(opt, name))
    opt.momentum, opt.weight_decay, opt.clip_norm, opt.timeout = 0.9, 0.1, 1.0, 30
    assert [opt.param_groups[0][name] for name in ("momentum", "weight_decay", "clip_norm")] == [0.9, 0.1, 1.0]
    for name, meant in (("learning_rate", "lr"), ("alpha", "decay_rate"), ("tiemout", "timeout")):
        with pytest.raises(fastrms.OptionTypeError, match=f"{name}: .*{meant}"):
            mpi.ShardedRMSProp([np.ones(3)], **{name: 0.1})


def sizes():
    """State is 1/P a rank."""
    opt = ShardedRMSProp([np.ones((300, 111), np.float32), np.ones(5000)], momentum=0.9, centered=True)
    opt.step([np.ones((300, 111)), np.ones(5000)])
    for name in ("cache", "momentum_buffer", "grad_avg"):
        for segment, size in zip(opt.buffers[name].segments, (33300, 5000), strict=True):
            assert size / SIZE - 16 * SIZE <= segment.size <= size / SIZE + 16
            assert COMM.allreduce(segment.size) == size
        assert opt.buffers[name].nbytes <= (33300 * 4 + 5000 * 8) / SIZE + 400
    assert [part.stop - part.start for part in opt.shard] == [s.size for s in opt.buffers["cache"].segments]
    assert SIZE == 1 or all(view.ndim == 1 for view in opt.cache)
    assert f"rank={RANK} of {SIZE})" in repr(opt)
    if SIZE > 1:  # the sum of gradients is of the shard, parameters lie among all parameters
        assert opt._own["grads"].size == opt.buffers["cache"].size
        assert np.shares_memory(opt._own["params"].segments[0], opt.buffers["params"].segments[0])
    assert opt.check() == []
    assert len(opt.explain()) == 2


def cores():
    """The cores that a rank may use, shared with the ranks that may use them too."""
    count = len(os.sched_getaffinity(0))
    most = fastrms.kernels.threads.max_threads()
    assert ShardedRMSProp(np.ones(3)).num_threads == min(most, max(1, count // SIZE))
    assert ShardedRMSProp(np.ones(3), num_threads=1).num_threads == 1
    COMM.Barrier()
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(own)[RANK % len(own)]})  # as Open MPI does
    half = COMM.Dup()
    assert ShardedRMSProp(np.ones(3), comm=half).num_threads == 1
    COMM.Barrier()
    os.sched_setaffinity(0, own)


def communicators():
    """Some ranks among themselves, messages of the user's own meanwhile, and more optimizers than communicators."""
    part = COMM.Split(RANK % 2)
    params = params_of(LAYOUTS["odd"])
    opt, alone = ShardedRMSProp(params, comm=part), RMSProp(params)
    assert (opt.size, opt.rank) == (part.size, part.rank)
    mail = np.zeros(1)
    request = COMM.Irecv(mail, source=(RANK + 1) % SIZE, tag=MPI.ANY_TAG)
    gradients = gradients_of(LAYOUTS["odd"], 0)
    opt.step(gradients[RANK])
    COMM.Send(np.full(1, RANK + 1.0), dest=(RANK - 1) % SIZE)
    request.Wait()
    assert mail[0] == (RANK + 1) % SIZE + 1
    alone.step(add(gradients[RANK % 2 :: 2]))
    same(opt, alone)
    pool = channels.pool_of(COMM).channels
    gc.collect()
    before = len(pool)
    for k in range(1500 if SIZE == 2 else 10):
        one = ShardedRMSProp(np.ones(3), kernel="numpy")
        if k == 5:
            one.ready((), np.ones(3))  # and no step
    assert len(pool) <= before + 3


if __name__ == "__main__":
    if not JIT:
        np.seterr(all="ignore")  # the kernels run on NumPy's scalars, which warn where compiled code does not
    for case in sys.argv[1:]:
        globals()[case]()
        COMM.Barrier()
        if RANK == 0:
            print("ok", case, flush=True)
