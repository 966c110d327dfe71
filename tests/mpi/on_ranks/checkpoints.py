"""Checkpoints in memory and in files, of this class and of RMSProp, on this and on another number of ranks."""

import copy
import pickle

import numpy as np
from helpers import assert_same_bits
from on_ranks.shared import (
    COMM,
    KERNELS,
    LAST,
    LAYOUTS,
    RANK,
    SIZE,
    ShardedRMSProp,
    add,
    assert_same,
    assert_same_params,
    folder,
    gradients_of,
    gradients_of_all,
    params_of,
    raises,
)

import fastrms
from fastrms import RMSProp, mpi

LAYOUT = LAYOUTS["mixed"]
OPTIONS = {"momentum": 0.9, "bias_correction": True, "lr": 0.01}


def own_folder():
    """Return a folder of this test for this number of ranks."""
    path = folder() / f"of-{SIZE}"
    if RANK == 0:
        path.mkdir(exist_ok=True)
    COMM.Barrier()
    return path


def take_steps(*optimizers):
    for step in range(3):
        gradients = gradients_of(LAYOUT, step)
        for each in gradients:
            each["d"] = each["d"] if step else None  # so that bias correction has to know
        total = add(gradients)
        for opt in optimizers:
            opt.step(gradients[RANK] if isinstance(opt, ShardedRMSProp) else total)


def files_of_both_classes():
    """Each class reads the other's files, with the momentum buffer of an option that was on before."""
    params = params_of(LAYOUT)
    opt, alone = ShardedRMSProp(params, **OPTIONS), RMSProp(params, **OPTIONS)
    take_steps(opt, alone)
    for each in (opt, alone):
        each.param_groups[0]["momentum"] = 0.0  # its buffer stays
    path = own_folder()
    for name in ("run.npz", "run.safetensors"):
        opt.save(path / name)
        if RANK == 0:
            alone.save(path / f"alone-{name}")
        COMM.Barrier()
        by_one = RMSProp(params, lr=0.5)
        by_one.load(path / name)
        later = ShardedRMSProp(params_of(LAYOUT, seed=7), lr=lambda step: 0.5)
        later.load(path / f"alone-{name}" if RANK == 0 else "only rank 0 reads")
        made = ShardedRMSProp.from_checkpoint(path / name, kernel=KERNELS[0], reduction="sum")
        assert mpi.ShardedRMSProp.from_checkpoint(path / name).reduction == "mean"
        twin = RMSProp.from_checkpoint(path / name)
        expected = RMSProp(params)
        expected.load_state_dict(alone.state_dict())
        take_steps(by_one, later, made, twin, expected)
        for each in (by_one, later, made, twin):
            assert_same_params(each, expected, name)
            assert (each.steps, each.lr) == (6, 0.01)
        assert_same(later, expected)
        assert_same(made, expected)
    turned = ShardedRMSProp(dict(reversed(params.items())), **OPTIONS)
    turned.load(path / "run.npz")
    for name, array in opt.params.items():
        assert_same_bits(turned.params[name], array, name)


def learning_rates_that_are_functions():
    """A file does not have them: `from_checkpoint` puts `lr` in their place."""
    path = own_folder()
    ShardedRMSProp(params_of(LAYOUT), **OPTIONS).save(path / "rate.npz")
    scheduled = ShardedRMSProp.from_checkpoint(path / "rate.npz", lr=lambda step: 0.1)
    assert scheduled.lr(3) == 0.1
    grouped = ShardedRMSProp([{"params": [np.ones(40)], "lr": 0.3}, {"params": [np.ones(3)]}])
    grouped.save(path / "grouped.npz")
    made = ShardedRMSProp.from_checkpoint(path / "grouped.npz")
    assert [group["lr"] for group in made.param_groups] == [0.3, 0.001]
    grouped.param_groups[1]["lr"] = lambda step: 0.2
    grouped.save(path / "grouped.npz")
    for lr in (0.7, lambda step: 0.1):
        made = ShardedRMSProp.from_checkpoint(path / "grouped.npz", lr=lr)
        assert [group["lr"] for group in made.param_groups] == [0.3, lr]


def refused_checkpoints_change_nothing():
    path = own_folder()
    opt = ShardedRMSProp(params_of(LAYOUT), **OPTIONS)
    take_steps(opt)
    before = opt.state_dict()["arrays"]
    raises(fastrms.CheckpointError, "expected a name that ends in", opt.save, path / "run.txt")
    raises(fastrms.CheckpointError, "params['W']: expected shape [13, 7], got", opt.load_state_dict,
           RMSProp({name: np.ones(2, d) for name, (_, d) in LAYOUT.items()}).state_dict())  # fmt: skip
    raises(FileNotFoundError, "none.npz", opt.load, path / "none.npz")
    raises(FileNotFoundError, "none.npz", ShardedRMSProp.from_checkpoint, path / "none.npz")
    kept = opt.params["W"]
    opt.params["W"] = np.full_like(kept, 7.0)  # a step refuses it, and nothing is saved of it
    for name, array in opt.state_dict()["arrays"].items():
        assert_same_bits(array, before[name])
    opt.params["W"] = kept
    raises(TypeError, "cannot be copied or pickled", pickle.dumps, opt)
    raises(TypeError, "cannot be copied or pickled", copy.copy, opt)


# A run that goes on with another number of ranks: `save` and `resume` are programs of their own.


def save():
    layout = LAYOUTS["odd"]
    opt = ShardedRMSProp(params_of(layout), momentum=0.9, centered=True, bias_correction=True)
    for step in range(3):
        opt.step(gradients_of_all(layout, step) if RANK == LAST else dict.fromkeys(layout))
    opt.save(folder() / "across.npz")


def resume():
    layout = LAYOUTS["odd"]
    opt = ShardedRMSProp.from_checkpoint(folder() / "across.npz", reduction="sum")
    for step in range(3, 6):
        opt.step(gradients_of_all(layout, step) if RANK == LAST else dict.fromkeys(layout))
    opt.save(folder() / f"resumed-{SIZE}.npz")
