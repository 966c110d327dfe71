"""Buffers in files: the bits of buffers in memory, and what can happen to files."""

import collections
import copy
import gc
import pickle

import numpy as np
import pytest
from cases import KEYS, LARGE, OPTION_SETS, OTHER_KEYS, drawn, f
from helpers import JIT, assert_same_bits, assert_same_optimizers, contents, same_structure

import fastrms.backends.mapped
import fastrms.backends.pages
from fastrms import (
    DeviceError,
    DtypeError,
    FastrmsError,
    OptionError,
    OptionTypeError,
    RMSProp,
    StorageError,
    StructureError,
)
from fastrms.kernels import pointers

STATE = ("params", "cache", "momentum_buffer", "grad_avg")


# What is on, and the dtypes of parameters.


# The interpreter would take minutes for the compiled ones.


def test_a_float64_norm_outside_the_range_of_squares(path, small_parts, rng):
    for size in (1e-200, 1e200):
        start = [np.ones(20_001), np.ones(3)]
        gradients = [size * rng.standard_normal(p.shape) for p in start]
        inside = RMSProp(start, clip_norm=1.0)
        opt = RMSProp(start, clip_norm=1.0, storage=path / str(size)) if path.mkdir(exist_ok=True) is None else None
        for optimizer in (inside, opt):
            optimizer.buffers["grads"].gather(gradients)
            optimizer.step()
        assert_same_optimizers(opt, inside)
        opt.close()


Layer = collections.namedtuple("Layer", "W b")
STRUCTURES = {
    "array": np.ones((3, 5000), np.float32),
    "0-d": np.float64(2.0),
    "empty": np.ones((0, 3)),
    "dict": {"W": np.ones((70, 70)), 3: np.zeros(2, np.float32), None: {"deep": [np.ones(1)]}},
    "tuple": (np.ones(3), [np.ones(2)]),
    "not contiguous": [np.ones((70, 80)).T, np.arange(20_000.0)[::-2], np.arange(3, dtype=">f4")],
    "three dimensions": [np.arange(24_000, dtype="f").reshape(2, 60, 200).transpose(2, 0, 1)],
    "groups": [{"params": [np.ones(9000)], "lr": 0.5}, {"params": {"b": np.ones(3)}, "momentum": 0.5}],
    "one group": [{"params": [np.ones(9000, "f")], "initial_scale": 1.5}],
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure_values_and_options_come_back(structure, path, small_parts):
    params = STRUCTURES[structure]
    with RMSProp(params, lr=0.25, storage=str(path)) as opt:
        inside = RMSProp(params, lr=0.25)
        assert opt.storage == path
        assert inside.storage is None
        opt.step(opt.params)
        inside.step(inside.params)
    with RMSProp.reopen(str(path)) as again:
        given = [group["params"] for group in params] if "group" in structure else params
        assert same_structure(given, again.params)
        assert_same_optimizers(again, inside)
        assert repr(again) == repr(inside)
    with RMSProp.reopen(path, lr=0.125) as again:
        assert {group["lr"] for group in again.param_groups} == {0.125}


def test_a_namedtuple_comes_back_as_a_tuple(path):
    RMSProp(Layer(np.ones(2), np.ones(1)), storage=path).close()
    assert type(RMSProp.reopen(path).params) is tuple


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_keys_that_come_back(key, path):
    RMSProp({key: [np.ones(2)], "b": {key: np.ones(1)}}, storage=path).close()
    with RMSProp.reopen(path) as opt:
        for found in (next(iter(opt.params)), next(iter(opt.params["b"]))):
            assert (type(found), repr(found)) == (type(key), repr(key))


@pytest.mark.parametrize("key", OTHER_KEYS, ids=repr)
def test_keys_that_would_not_come_back_are_refused_before_anything_is_made(key, tmp_path):
    with pytest.raises(StructureError, match=r"storage: expected dicts whose keys are None, str, .* cannot restore"):
        RMSProp([np.ones(1), {"a": {key: np.ones(2)}}], storage=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", ["all state", "bfloat16", "all norms", "skipping"])
def test_a_run_that_is_reopened_between_steps_has_the_bits_of_memory(options, path, small_parts, rng):
    options, layout = OPTION_SETS[options], [f(3), f(LARGE), f(2, 2)]
    start = drawn(layout, rng)
    opt, inside = RMSProp(start, storage=path, **options), RMSProp(start, **options)
    for t in range(4):
        gradients = drawn(layout, rng)
        if t == 1:
            gradients[0] = None
        if t == 2 and "nonfinite" in options:
            gradients[1][-1] = np.nan
        for optimizer in (opt, inside):
            optimizer.step(gradients)
        assert_same_optimizers(opt, inside)
        opt.close()
        opt = RMSProp.reopen(path)
    assert_same_optimizers(opt, inside)
    opt.close()


def test_options_that_change_and_state_that_is_added_later(path):
    opt, inside = RMSProp([np.ones(9)], storage=path), RMSProp([np.ones(9)])
    gradient = [np.linspace(-1, 1, 9)]
    for optimizer in (opt, inside):
        optimizer.step(gradient)
        optimizer.param_groups[0]["momentum"] = 0.5
        optimizer.step(gradient)
        optimizer.param_groups[0]["momentum"] = 0.0  # its buffer stays
        optimizer.global_clip_norm, optimizer.nonfinite = 0.25, "skip"
        optimizer.step([np.full(9, np.nan)])
    opt.close()
    opt = RMSProp.reopen(path)
    assert (opt.global_clip_norm, opt.nonfinite, opt.skipped_steps) == (0.25, "skip", 1)
    assert_same_optimizers(opt, inside)
    for optimizer in (opt, inside):
        optimizer.param_groups[0]["momentum"] = 0.5
        optimizer.param_groups[0]["centered"] = True
        optimizer.step(gradient)
    assert_same_optimizers(opt, inside)


@pytest.mark.skipif(not JIT or not pointers.available(), reason="gradients are copied on this interpreter")
def test_gradients_in_memory_are_read_where_they_lie(path, rng):
    start = [rng.standard_normal(n).astype("f") for n in [3] * 50 + [9000]]
    opt, inside = RMSProp(start, storage=path), RMSProp(start)
    opt.buffers["grads"].flat[...] = np.nan
    for _ in range(3):
        opt.step(start)
        inside.step(start)
    assert np.isnan(opt.buffers["grads"].flat).all()
    assert_same_optimizers(opt, inside)


def test_a_learning_rate_that_is_a_function_has_to_be_given_again(path):
    RMSProp([np.ones(2)], lr=lambda step: 0.5, storage=path).close()
    with pytest.raises(
        StorageError, match=r"lr: expected a learning rate for the groups .*; got None. Pass it: reopen\(path, lr="
    ):
        RMSProp.reopen(path)
    with RMSProp.reopen(path, lr=lambda step: 0.25 / (step + 1)) as opt:
        opt.step([np.ones(2)])
        assert opt.lr(0) == 0.25


def test_what_cannot_be_made_leaves_nothing(tmp_path):
    path = tmp_path / "new"
    for error, arguments in (
        (DtypeError, {"params": [np.ones(2), np.ones(2, int)]}),
        (OptionError, {"params": [np.ones(2)], "lr": -1.0}),
        (StructureError, {"params": {(1, 2): np.ones(2)}}),
    ):
        with pytest.raises(error):
            RMSProp(**arguments, storage=path)
        assert not path.exists()
    path.mkdir()  # an empty folder that was there stays
    with pytest.raises(OptionError):
        RMSProp([np.ones(2)], momentum=2, storage=path)
    assert contents(path) == {}
    RMSProp([np.ones(2)], storage=path).close()


class Breaks:
    """An array that can be looked at, and is gone when it is to be copied."""

    def __init__(self):
        self.looks = 0

    def __array__(self, dtype=None, copy=None):
        self.looks += 1
        if self.looks > 1:
            raise OSError("the disk is gone")
        return np.ones(3)


def test_an_error_while_parameters_are_copied_leaves_nothing(tmp_path):
    with pytest.raises(FastrmsError, match="the disk is gone"):
        RMSProp([np.ones(2), Breaks()], storage=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(path):
    RMSProp([np.ones(2)], storage=path).close()
    with pytest.raises(OptionError, match="after_crash: expected one of"):
        RMSProp.reopen(path, after_crash="ignore")
    with pytest.raises(OptionError, match="kernel: expected one of"):
        RMSProp.reopen(path, kernel="fast")
    with pytest.raises(OptionError, match="lr: expected a number"):
        RMSProp.reopen(path, lr=-1)
    with pytest.raises(OptionError, match="num_threads: expected 1 to"):
        RMSProp.reopen(path, num_threads=999)
    with pytest.raises((OptionError, DeviceError), match="cuda"):
        RMSProp.reopen(path, kernel="cuda")
    for wrong in (True, 3, b"path", ["path"]):
        with pytest.raises(OptionTypeError, match="storage: expected the path of a folder or None, got"):
            RMSProp([np.ones(2)], storage=wrong)
    RMSProp.reopen(path).close()


# How it ends.


def test_an_error_in_a_step_shows_when_it_is_opened_again(path, small_parts, monkeypatch):
    opt = RMSProp([np.ones(9000)], storage=path, kernel="numpy")
    opt.step([np.ones(9000)])
    monkeypatch.setattr(opt.backend.storage.pages, "release", lambda array: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    monkeypatch.undo()
    opt.close()
    with pytest.raises(StorageError, match="a step was under way, 1 steps were finished"):
        RMSProp.reopen(path)
    with RMSProp.reopen(path, after_crash="use") as opt:
        opt.step([np.ones(9000)])
    RMSProp.reopen(path).close()


def test_an_optimizer_that_nobody_has_any_more_is_closed(path):
    opt = RMSProp([np.ones(3)], storage=path)
    opt.step([np.ones(3)])
    view = opt.params[0]
    value = view.copy()
    del opt
    with RMSProp.reopen(path) as again:
        assert_same_bits(again.params[0], value)
        again.step([np.ones(3)])
        assert_same_bits(again.params[0], view)  # both show the same file
        assert (view != value).all()


def test_closed(path):
    opt = RMSProp([np.ones(9000)], storage=path)
    opt.step([np.ones(9000)])
    whole, part = opt.params[0], opt.params[0][5:]
    values = whole.copy()
    opt.close()
    opt.close()
    state = RMSProp([np.zeros(9000)]).state_dict()
    for call in (
        "step()",
        "step([whole])",
        "flush()",
        "load_state_dict(state)",
        "param_groups[0].update(momentum=0.5)",
    ):
        with pytest.raises(StorageError, match=r"a closed one; RMSProp\.reopen\(path\) opens it again"):
            eval(f"opt.{call}", {"opt": opt, "whole": whole, "state": state})
    with pytest.raises(ValueError, match="read-only"):
        whole[...] = 0
    assert_same_bits(opt.state_dict()["arrays"]["params/float64"], values)
    del opt
    gc.collect()
    assert_same_bits(whole, values)
    for item in list(path.iterdir()):
        item.unlink()
    path.rmdir()
    assert_same_bits(part, values[5:])  # the file lives as long as a view of it


# Copies and checkpoints.


def test_no_copies_that_would_be_in_memory(path):
    opt = RMSProp([np.ones(3)], storage=path)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(StorageError, match="cannot be copied or pickled; use save"):
            copied(opt)
    buffer = pickle.loads(pickle.dumps(opt.buffers["params"]))  # a buffer alone can be, into memory
    assert_same_bits(buffer.flat, np.ones(3))
    assert type(buffer) is fastrms.FlatBuffer
    assert opt.buffers["params"].like().flat.tolist() == [0, 0, 0]


def test_a_damaged_checkpoint_changes_nothing(tmp_path, small_parts):
    opt = RMSProp([np.ones(9000)], storage=tmp_path / "a")
    opt.step([np.ones(9000)])
    opt.save(tmp_path / "a.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[40_000] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    opt.step([np.ones(9000)])
    values = opt.params[0].copy()
    with pytest.raises(FastrmsError):
        opt.load(tmp_path / "a.npz")
    assert_same_bits(opt.params[0], values)
    assert opt.steps == 2
