"""Checkpoints: what is loaded goes on as if nothing had happened, and what is damaged or hostile changes nothing."""

import errno
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cases import KEYS, OPTIONS, OTHER_KEYS, posix
from helpers import JIT, assert_same_bits, case_id, everything, leaves, same_structure, steps

from fastrms import CheckpointError, DeviceError, OptionError, OptionTypeError, RMSProp, StorageError
from fastrms.checkpoints import formats, metadata

KINDS = ["dict", "npz", "safetensors"]
MUTATIONS = 10_000


def transfer(opt, other, kind, folder):
    """Bring the state of one optimizer into another."""
    if kind == "dict":
        return other.load_state_dict(opt.state_dict())
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    opt.save(folder / f"state.{kind}")
    return other.load(folder / f"state.{kind}")


def params_of(rng, dtypes=(np.float32, np.float64)):
    return {
        "W": rng.standard_normal((20, 5)).astype(dtypes[0]),
        "layers": [rng.standard_normal((3, 2)).astype(dtypes[1]), np.asarray(rng.standard_normal()).astype(dtypes[0])],
        "empty": np.zeros((0, 4), dtypes[0]),
    }


def draw(rng, dtypes=(np.float32, np.float64)):
    return params_of(rng, dtypes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        *({name: value} | ({"momentum": 0.9} if name == "nesterov" else {}) for name, value in OPTIONS.items()),
        {},
        OPTIONS,
        {"cache_dtype": "bfloat16", "momentum": 0.9, "centered": True},
        {"nonfinite": "skip"},
        {"lr": lambda step: 0.01 / (1 + step)},
    ],
    ids=case_id,
)
def test_resuming_gives_the_bits_of_never_stopping(options, kind, tmp_path):
    dtypes = (np.float32, np.float32) if "cache_dtype" in options else (np.float32, np.float64)
    rng, count = np.random.default_rng(1), steps(200)
    params = params_of(rng, dtypes)
    gradients = [draw(rng, dtypes) for _ in range(count)]
    for t in range(0, count, 3):
        gradients[t]["W"] = None  # sat out: counts for the correction of the bias
    options = {"lr": 0.01} | options
    whole = RMSProp(params, **options)
    for gradient in gradients:
        whole.step(gradient)
    for stop in (0, 1, count // 2, count - 1):
        first = RMSProp(params, **options)
        for gradient in gradients[:stop]:
            first.step(gradient)
        second = RMSProp(draw(np.random.default_rng(2), dtypes), **options)
        second.step(gradients[0])
        transfer(first, second, kind, tmp_path)
        for gradient in gradients[stop:]:
            second.step(gradient)
        assert everything(second) == everything(whole)


def test_options_are_taken_over_and_views_stay(rng, tmp_path):
    opt = RMSProp([{"params": [np.ones(3)], "lr": 0.5}, {"params": np.ones(2), "centered": True}], global_clip_norm=2.0)
    opt.step()
    other = RMSProp([{"params": [np.zeros(3)]}, {"params": np.zeros(2), "momentum": 0.9}])
    views = other.params[0][0], other.cache[1], other.grads[1], other.momentum_buffer[1]
    other.step([[np.ones(3)], np.ones(2)])
    other.load_state_dict(opt.state_dict())
    assert views[0] is other.params[0][0]
    assert views[1] is other.cache[1]
    assert views[0].tolist() == [1.0] * 3
    assert views[3].tolist() == [0.0] * 2  # state that the loaded one has not is as new
    assert [group["lr"] for group in other.param_groups] == [0.5, 1e-3]
    assert [group["centered"] for group in other.param_groups] == [False, True]
    assert other.global_clip_norm == 2.0
    assert other.steps == 1
    views[0][...] = 7.0
    assert other.buffers["params"].flat[0] == 7.0
    gradients = [[rng.standard_normal(3)], rng.standard_normal(2)]
    opt.params[0][0][...] = 7.0
    opt.step(gradients)
    other.step(gradients)
    assert other.params[1].tobytes() == opt.params[1].tobytes()


def test_a_state_is_a_copy_of_plain_things(rng):
    opt = RMSProp(params_of(rng), momentum=0.9)
    opt.step(draw(rng))
    state = opt.state_dict()
    before = {name: array.tobytes() for name, array in state["arrays"].items()}
    opt.step(draw(rng))
    assert {name: array.tobytes() for name, array in state["arrays"].items()} == before
    arrays = state.pop("arrays")
    assert all(type(array) is np.ndarray for array in arrays.values())
    assert json.loads(json.dumps(state)) == state
    assert state["parameters"][1] == {"path": "['layers'][0]", "shape": [3, 2], "dtype": "float64", "group": 0}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_an_optimizer_from_a_file_alone(kind, rng, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"state.{kind}"
    trees = [
        np.ones((2, 3)),
        [np.ones(3, np.float32), (np.zeros(()), {"a": np.ones((0, 2)), 3: [np.ones(2)]})],
        params_of(rng),
        [{"params": [np.ones(3)], "momentum": 0.5}, {"params": {"b": np.ones(2)}, "lr": 0.25}],
    ]
    for tree in trees:
        opt = RMSProp(tree, centered=True, nonfinite="skip", global_clip_norm=3.0)
        opt.step()
        opt.save(path)
        found = RMSProp.from_checkpoint(path)
        assert same_structure(opt.params, found.params)
        assert everything(found) == everything(opt)
        assert found.nonfinite == "skip"
        assert found.global_clip_norm == 3.0
        assert [dict(g) | {"params": 0} for g in found.param_groups] == [
            dict(g) | {"params": 0} for g in opt.param_groups
        ]
    assert RMSProp.from_checkpoint(path, lr=0.125, kernel="serial").param_groups[1]["lr"] == 0.125


def test_what_a_file_cannot_hold_is_said(tmp_path):
    path = tmp_path / "state.npz"
    RMSProp([np.ones(2)], lr=lambda step: 0.1).save(path)
    with pytest.raises(CheckpointError, match=r"lr: expected a rate for the groups whose rate was a function"):
        RMSProp.from_checkpoint(path)
    schedule = lambda step: 0.5  # noqa: E731
    assert RMSProp.from_checkpoint(path, lr=schedule).lr is schedule
    RMSProp({(1, 2): np.ones(2)}).save(path)
    with pytest.raises(CheckpointError, match=r"structure: cannot be rebuilt; make an RMSProp and use load"):
        RMSProp.from_checkpoint(path)
    RMSProp({(1, 2): np.zeros(2)}).load(path)
    point = namedtuple("point", "x y")
    RMSProp(point(np.ones(2), np.ones(1))).save(path)
    assert type(RMSProp.from_checkpoint(path).params) is tuple


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_keys_that_come_back(key, kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"state.{kind}"
    RMSProp({key: [np.ones(2)], "b": {key: np.ones(1)}}).save(path)
    params = RMSProp.from_checkpoint(path).params
    for found in (next(iter(params)), next(iter(params["b"]))):
        assert (type(found), repr(found)) == (type(key), repr(key))


@pytest.mark.parametrize("key", OTHER_KEYS, ids=repr)
def test_keys_that_a_file_cannot_give_back(key, tmp_path):
    path = tmp_path / "state.npz"
    opt = RMSProp([{key: np.ones(2)}])
    opt.step([{key: np.ones(2)}])
    opt.save(path)
    with pytest.raises(CheckpointError, match="structure: cannot be rebuilt; make an RMSProp and use load"):
        RMSProp.from_checkpoint(path)
    again = RMSProp([{key: np.zeros(2)}])
    again.load(path)
    assert everything(again) == everything(opt)


def test_keys_that_no_other_process_can_find(tmp_path):
    for key in (np.ones, object(), (1, object())):
        with pytest.raises(CheckpointError, match=r"params: expected keys whose repr, .*; got .* at 0x"):
            RMSProp([np.ones(1), {key: np.ones(2)}]).save(tmp_path / "state.npz")
    assert list(tmp_path.iterdir()) == []


# As an optimizer has them, and as another has them whose dicts came in another order.
ORDERS = {
    "dict": ({"a": (3,), "b": (2, 2), "c": (), "d": (3,)}, {"d": (3,), "b": (2, 2), "a": (3,), "c": ()}),
    "neighbours": ({"a": (3,), "b": (4,), "c": (5,)}, {"c": (5,), "a": (3,), "b": (4,)}),
    "deep": ([{"x": {"a": (3,), "b": (0,)}, "y": (3,)}, (2,)], [{"y": (3,), "x": {"b": (0,), "a": (3,)}}, (2,)]),
    "groups": (
        [{"params": {"a": (3,), "b": (3,)}}, {"params": {"c": (2,), "d": (1,)}, "momentum": 0.5}],
        [{"params": {"b": (3,), "a": (3,)}}, {"params": {"d": (1,), "c": (2,)}, "momentum": 0.5}],
    ),
}  # fmt: skip


def filled(tree, rng, dtypes):
    """Arrays for shapes, with a dtype that depends on the key or place of each."""
    if isinstance(tree, dict):
        return {
            key: item if key == "momentum" else filled(item, rng, dtypes[::-1] if key in ("b", "y") else dtypes)
            for key, item in tree.items()
        }
    if isinstance(tree, list):
        return [filled(item, rng, dtypes) for item in tree]
    return np.asarray(rng.standard_normal(tree)).astype(dtypes[0])


def reordered(tree, like):
    """`tree` with the keys of dicts in the order of `like`."""
    if isinstance(like, dict):
        return {key: reordered(tree[key], item) for key, item in like.items()}
    if isinstance(like, list):
        return [reordered(*pair) for pair in zip(tree, like, strict=True)]
    return tree


@pytest.mark.parametrize("storage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", ["ff", "fd", "bfloat16"])
@pytest.mark.parametrize("name", ORDERS)
def test_keys_in_another_order_are_matched_by_path(name, dtypes, kind, storage, rng, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrms.backends.pages.PART_BYTES", 8)
    shapes, others = ORDERS[name]
    options = {"momentum": 0.5, "centered": True, "bias_correction": True}
    if dtypes == "bfloat16":
        dtypes, options["cache_dtype"] = "ff", "bfloat16"
    start = filled(shapes, rng, dtypes)
    first = RMSProp(start, **options)
    grads = [group["params"] for group in start] if name == "groups" else start
    order = [group["params"] for group in others] if name == "groups" else others
    first.step(grads)
    first.step(first.buffers["grads"].layout.structure([None, *leaves(grads)[1:]]))  # sat out
    second = RMSProp(reordered(start, others), **options, **({"storage": tmp_path / "run"} if storage else {}))
    views = second.params
    transfer(first, second, kind, tmp_path)
    assert second.params is views
    for step in range(3):
        if step:
            first.step(grads)
            second.step(reordered(grads, order))
        for buffer in ("params", "cache", "momentum_buffer", "grad_avg"):
            ours, theirs = first.buffers[buffer].views, second.buffers[buffer].views
            for one, other in zip(leaves(reordered(ours, order)), leaves(theirs), strict=True):
                assert_same_bits(one, other, buffer)
    assert second.steps == first.steps == 4


class SameText:
    """A key whose repr other keys have too; `state_dict` takes it, as nothing is looked up in another process."""

    def __repr__(self):
        return "key"


def test_keys_of_the_same_text_are_matched_in_their_order():
    first = RMSProp({SameText(): np.ones(2), SameText(): np.full(3, 2.0), "b": np.full(1, 3.0)})
    second = RMSProp({"b": np.zeros(1), SameText(): np.zeros(2), SameText(): np.zeros(3)})
    second.load_state_dict(first.state_dict())
    assert [view.tolist() for view in second.params.values()] == [[3], [1, 1], [2, 2, 2]]


def test_other_keys_are_still_an_error():
    state = RMSProp({"a": np.ones(2), "b": np.ones(2)}).state_dict()
    opt = RMSProp({"b": np.zeros(2), "c": np.zeros(2)})
    with pytest.raises(CheckpointError, match=r"params\['c'\]: expected path \"\['c'\]\", got \"\['a'\]\""):
        opt.load_state_dict(state)
    opt = RMSProp({"b": np.zeros(2), "a": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"params\['a'\]: expected shape \[3\], got \[2\]"):
        opt.load_state_dict(state)
    assert (opt.params["b"] == 0).all()


@pytest.mark.parametrize("kind", ["npz", "storage"])
def test_only_groups_whose_rate_was_not_saved_get_the_one_that_is_given(kind, tmp_path):
    schedule, other = (lambda step: 0.5), (lambda step: 0.25)
    path = tmp_path / f"state.{kind}"
    storage = {"storage": path} if kind == "storage" else {}

    def resumed(opt, **options):
        if kind == "storage":
            opt.close()
            return RMSProp.reopen(path, **options)
        opt.save(path)
        return RMSProp.from_checkpoint(path, **options)

    groups = [{"params": [np.ones(2)], "lr": schedule}, {"params": [np.ones(2)], "lr": 0.125}]
    opt = RMSProp(groups, **storage)
    for given in (other, 0.75, other):
        opt = resumed(opt, lr=given)
        assert [group["lr"] for group in opt.param_groups] == [given, 0.125]
        opt.param_groups[0]["lr"] = schedule
    opt.param_groups[0]["lr"] = 0.5
    opt = resumed(opt)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.125]
    opt = resumed(opt, lr=0.0625)  # nothing is missing: instead of what was saved
    assert [group["lr"] for group in opt.param_groups] == [0.0625, 0.0625]
    opt.step([[np.ones(2)], [np.ones(2)]])
    opt.close()


MISTAKES = {
    "no GPU": ({"kernel": "cuda"}, DeviceError, "kernel: expected a GPU"),
    "kernel": ({"kernel": "fast"}, OptionError, "kernel: expected one of"),
    "threads": ({"num_threads": 999}, OptionError, "num_threads: expected 1 to"),
    "a text for threads": ({"num_threads": "2"}, OptionTypeError, "num_threads: expected an integer"),
    "lr": ({"lr": -1}, OptionError, "lr: expected a number"),
    "a text for lr": ({"lr": "0.1"}, OptionTypeError, "lr: expected a number"),
    "lr for float32": ({"lr": 1e39}, OptionError, "lr: 1e\\+39 is too large for float32"),
    "a used folder": ({"storage": "used"}, StorageError, "storage: expected a new or empty folder, got one with"),
    "a flag for storage": ({"storage": True}, OptionTypeError, "storage: expected the path"),
    "no folder": ({"storage": "no/where"}, FileNotFoundError, "storage: expected a folder to make another one in"),
}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_callers_is_not_called_a_bad_file(mistake, kind, tmp_path, monkeypatch):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    arguments, error, message = MISTAKES[mistake]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis").touch()
    if "cuda" in arguments.values():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    RMSProp([np.ones(2), np.ones(2, "f")]).save(f"state.{kind}")
    for options in (arguments, {"lr": 0.5} | arguments):
        with pytest.raises(error, match=message) as caught:
            RMSProp.from_checkpoint(f"state.{kind}", **options)
        assert type(caught.value) is error
        assert "checkpoint" not in str(caught.value)
    assert sorted(item.name for item in tmp_path.iterdir()) == [f"state.{kind}", "used"]


def test_a_closed_optimizer_is_not_called_a_bad_file(tmp_path):
    opt = RMSProp([np.ones(2)], storage=tmp_path / "run")
    opt.save(tmp_path / "state.npz")
    opt.close()
    with pytest.raises(StorageError, match="one that was closed"):
        opt.load(tmp_path / "state.npz")


def test_a_disk_or_memory_that_fails_is_not_called_a_bad_file(tmp_path, monkeypatch):
    opt = RMSProp([np.ones(2)])
    opt.save(tmp_path / "state.npz")
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError("no room")):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(formats, "checksum", fail)
        for load in (opt.load, RMSProp.from_checkpoint):
            with pytest.raises(type(error)) as caught:
                load(tmp_path / "state.npz")
            assert caught.value is error


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_storage(tmp_path):
    _, path, _ = saved(tmp_path, "npz")
    rewritten(path, lambda e: e | {"params/float64": np.zeros(40)})  # another checksum
    with pytest.raises(CheckpointError, match="it is damaged"):
        RMSProp.from_checkpoint(path, storage=tmp_path / "run")
    assert [item.name for item in tmp_path.iterdir()] == ["state.npz"]


OTHERS = {
    "path": ({"V": np.ones(3), "b": np.ones(2)}, {}, r"params\['W'\]: expected path \"\['W'\]\", got \"\['V'\]\""),
    "shape": ({"W": np.ones((3, 1)), "b": np.ones(2)}, {}, r"params\['W'\]: expected shape \[3\], got \[3, 1\]"),
    "dtype": ({"W": np.ones(3, "f"), "b": np.ones(2)}, {}, r"params\['W'\]: expected dtype 'float64', got 'float32'"),
    "count": ({"W": np.ones(3)}, {}, "parameters: expected 2, got 1"),
    "groups": ([{"params": np.ones(3)}, {"params": np.ones(2)}], {}, "param_groups: expected 1, got 2"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_optimizer(name, kind, tmp_path):
    params, options, message = OTHERS[name]
    opt = RMSProp({"W": np.zeros(3), "b": np.zeros(2)})
    before = everything(opt)
    with pytest.raises(CheckpointError, match=message):
        transfer(RMSProp(params, **options), opt, kind, tmp_path)
    assert everything(opt) == before


def test_other_state_dtype():
    opt = RMSProp([np.zeros(3, np.float32)])
    with pytest.raises(CheckpointError, match="cache_dtype: expected None, got 'bfloat16'"):
        opt.load_state_dict(RMSProp([np.zeros(3, np.float32)], cache_dtype="bfloat16").state_dict())


def with_skipped(state, counts):
    return state | {"arrays": state["arrays"] | {"skipped": np.array(counts, np.int64)}}


CHANGES = {
    "no dict": (lambda s: [], "expected what RMSProp.state_dict"),
    "another dict": (lambda s: {"steps": 3}, "expected what RMSProp.state_dict"),
    "newer": (lambda s: s | {"version": metadata.VERSION + 1}, "needs a newer fastrms"),
    "version 0": (lambda s: s | {"version": 0}, "version: expected 1 to"),
    "no version": (lambda s: s | {"version": None}, "version: expected 1 to"),
    "steps": (lambda s: s | {"steps": -1}, "steps: expected a number of steps, got -1"),
    "bool": (lambda s: s | {"steps": True}, "steps: expected a number of steps, got True"),
    "huge": (lambda s: s | {"skipped_steps": 2**63}, "skipped_steps: expected a number of steps"),
    "groups": (lambda s: s | {"param_groups": [3]}, "param_groups: expected a list of dicts"),
    "option": (lambda s: s | {"param_groups": [s["param_groups"][0] | {"decay_rate": 2.0}]}, "decay_rate: expected"),
    "unknown": (lambda s: s | {"param_groups": [{"speed": 1}]}, "'speed' is no option of a parameter group"),
    "number": (lambda s: s | {"param_groups": [{3: 1}]}, "3 is no option of a parameter group"),
    "norm": (lambda s: s | {"global_clip_norm": "x"}, "global_clip_norm: expected a number"),
    "nonfinite": (lambda s: s | {"nonfinite": "x"}, "nonfinite: expected one of"),
    "no run": (lambda s: s | {"steps": 2**63 - 1}, "steps: expected a number of steps, got 9223372036854775807"),
    "skips": (lambda s: s | {"skipped_steps": 2**62}, "skipped_steps: expected a number of steps, got"),
    "sat out": (lambda s: with_skipped(s, [1, 0]), r"skipped\[0\]: expected 0 to 0, .*; got 1"),
    "negative": (lambda s: with_skipped(s, [0, -1]), r"skipped\[1\]: expected 0 to 0, .*; got -1"),
    "lowest": (lambda s: with_skipped(s | {"steps": 5}, [-(2**63), 0]), r"skipped\[0\]: expected 0 to 5, .*; got -922"),
    "highest": (lambda s: with_skipped(s | {"steps": 5}, [0, 2**63 - 1]), r"skipped\[1\]: .*; got 9223372036854775807"),
    "key": (lambda s: s | {"parameters": [{"path": []}, {}]}, "cannot be read as a checkpoint: TypeError"),
    "grouped": (lambda s: s | {"grouped": 1}, "grouped: expected True or False"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "structure"}, "structure: expected in a state"),
    "arrays": (lambda s: s | {"arrays": None}, "arrays: expected a dict"),
    "array": (lambda s: s | {"arrays": s["arrays"] | {"params/float64": [0.0] * 5}}, "expected an array, got a list"),
    "size": (lambda s: s | {"arrays": s["arrays"] | {"params/float64": np.ones(4)}}, r"float64 of shape \(5,\), got"),
    "kind": (lambda s: s | {"arrays": s["arrays"] | {"params/float64": np.ones(5, "f")}}, "got float32 of"),
    "object": (lambda s: s | {"arrays": s["arrays"] | {"params/float64": np.array([None] * 5)}}, "got object of"),
    "masked": (lambda s: s | {"arrays": s["arrays"] | {"params/float64": np.ma.ones(5)}}, "got a MaskedArray"),
    "extra": (lambda s: s | {"arrays": s["arrays"] | {"more": np.ones(5)}}, "got also 'more'"),
    "none": (lambda s: s | {"arrays": {}}, r"arrays\['skipped'\]: expected int64 of shape \(2,\), got none"),
    "momentum": (lambda s: s | {"param_groups": [s["param_groups"][0] | {"momentum": 0.9}]}, "momentum_buffer/float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_state_changes_nothing(name):
    change, message = CHANGES[name]
    opt = RMSProp({"W": np.zeros(3), "b": np.zeros(2)})
    before = everything(opt), dict(opt.param_groups[0]), opt.global_clip_norm
    with pytest.raises(CheckpointError, match=message):
        opt.load_state_dict(change(RMSProp({"W": np.ones(3), "b": np.ones(2)}).state_dict()))
    assert (everything(opt), dict(opt.param_groups[0]), opt.global_clip_norm) == before


def saved(tmp_path, kind):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp([np.arange(40.0), np.ones((3, 4), np.float32)], momentum=0.9)
    opt.step([np.ones(40), np.ones((3, 4), np.float32)])
    path = tmp_path / f"state.{kind}"
    opt.save(path)
    return opt, path, path.read_bytes()


@pytest.mark.skipif(not JIT, reason="no compiled code takes part")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_ten_thousand_damaged_files(kind, tmp_path):
    good, path, data = saved(tmp_path, kind)
    opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
    new, same = everything(opt), 0
    loaded = everything(good)
    generator = random.Random(0)
    for number in range(MUTATIONS):
        mutated = bytearray(data)
        what = number % 4
        if what == 0:
            mutated = mutated[: generator.randrange(len(data))]
        elif what == 1:
            mutated[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        elif what == 2:
            for _ in range(generator.randrange(2, 20)):
                mutated[generator.randrange(len(data))] = generator.randrange(256)
        else:
            first, second = sorted(generator.randrange(len(data)) for _ in range(2))
            mutated[first:second] = generator.randbytes(generator.randrange(50))
        path.write_bytes(mutated)
        try:
            opt.load(path)
        except CheckpointError:
            assert everything(opt) == new
        else:  # a date in the archive, for instance
            assert everything(opt) == loaded
            opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
            same += 1
    assert same < 0.1 * MUTATIONS


def rewritten(path, change):
    """Write the arrays of a file again after `change`, which may also give bytes for an entry."""
    with np.load(path) as archive:
        entries = dict(archive)
    entries = change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in entries.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=True) if isinstance(array, np.ndarray) else None
            archive.writestr(f"{name}.npy", data.getvalue() or array)


def with_head(entries, **changes):
    head = json.loads(bytes(entries["head"])) | changes
    return entries | {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}


def with_array(entries, name, values):
    array = np.array(values, entries[name].dtype)
    checksums = json.loads(bytes(entries["head"]))["checksums"] | {name: formats.checksum([array])}
    return with_head(entries, checksums=checksums) | {name: array}


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Bomb:
    def __reduce__(self):
        return os.abort, ()


SCALAR = {"path": "", "shape": [], "dtype": "float64", "group": 0}
HOSTILE = {
    "pickle": lambda e: e | {"params/float64": np.array([Bomb()] * 40)},
    "pickled head": lambda e: e | {"head": np.array([Bomb()])},
    "absurd shape": lambda e: e | {"params/float64": header(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}")},
    "large shape": lambda e: e | {"cache/float64": header(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }")},
    "code in a header": lambda e: e | {"cache/float64": header("__import__('os').abort()")},
    "deep header": lambda e: e | {"cache/float64": header("[" * 5000)},
    "deep signs": lambda e: e | {"cache/float64": header("-" * 9000 + "1")},
    "deep head": lambda e: e | {"head": np.frombuffer(b"[" * 60_000, np.uint8)},
    "no json": lambda e: e | {"head": np.frombuffer(b"\xff\xfe{}", np.uint8)},
    "no head": lambda e: {name: array for name, array in e.items() if name != "head"},
    "wrong dtype": lambda e: e | {"params/float64": np.ones(40, "c16")},
    "text": lambda e: e | {"params/float64": np.array(["x"] * 40)},
    "checksum": lambda e: e | {"params/float64": np.zeros(40)},
    "checksums": lambda e: with_head(e, checksums=None),
    "steps": lambda e: with_head(e, steps=1e308),
    "shape in head": lambda e: with_head(e, parameters=[SCALAR | {"shape": [2**62]}]),
    "shapes in head": lambda e: with_head(e, parameters=[SCALAR | {"shape": [0, 2**62, 2**62]}]),
    "dimensions": lambda e: with_head(e, parameters=[SCALAR | {"shape": [1] * 70}]),
    "structure": lambda e: with_head(e, structure=["dict", [[[1], 0]]]),
    "leaf": lambda e: with_head(e, structure=["list", [0, 7]]),
    "order": lambda e: with_head(e, structure=["list", [1, 0]]),
    "twice": lambda e: with_head(e, structure=["list", [0, 0]]),
    "a key twice": lambda e: with_head(e, structure=["dict", [["[0]", 0], ["[0]", 1]]]),
    "groups": lambda e: with_head(e, structure=["list", [["dict", [["params", 0]]], ["dict", [["a", 1]]]]]),
    "no list of groups": lambda e: with_head(e, structure=0, grouped=True),
    "nothing": lambda e: with_head(e, structure=["list", []]),
    "steps of no run": lambda e: with_head(e, steps=2**62),
    "skipped": lambda e: with_array(e, "skipped", [5, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(name, tmp_path):
    _, path, _ = saved(tmp_path, "npz")
    rewritten(path, HOSTILE[name])
    opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
    before = everything(opt)
    tracemalloc.start()
    # Structure is what load does not need.
    if name not in ("structure", "leaf", "order", "twice", "a key twice", "groups", "no list of groups", "nothing"):
        with pytest.raises(CheckpointError, match=r"state\.npz: "):
            opt.load(path)
    with pytest.raises(CheckpointError, match=r"state\.npz: "):
        RMSProp.from_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
    assert everything(opt) == before


def test_sizes_beyond_the_end_of_the_file(tmp_path):
    _, path, data = saved(tmp_path, "npz")
    size = (40 * 8 + 128).to_bytes(4, "little")
    assert data.count(size) >= 4
    path.write_bytes(data.replace(size, (1 << 30).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"npz: .*expected an entry inside the file, got one of 1073741824"):
        RMSProp.from_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_a_compressed_bomb_and_a_large_file(tmp_path):
    size = 1 << 20
    opt = RMSProp([np.zeros(size)])
    path = tmp_path / "state.npz"
    RMSProp([np.ones(size)]).save(path)
    expected = 2 * 8 * size
    tracemalloc.start()
    opt.load(path)
    usual = tracemalloc.get_traced_memory()[1]
    with np.load(path) as archive:
        entries = dict(archive)
    tracemalloc.reset_peak()
    np.savez_compressed(path, **entries)
    with pytest.raises(CheckpointError, match="not compressed"):
        opt.load(path)
    np.savez(path, **(entries | {"more": np.zeros(8 * size)}))
    del entries
    tracemalloc.reset_peak()
    with pytest.raises(CheckpointError, match="expected at most"):
        opt.load(path)
    large = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert usual < 2 * expected
    assert large < 2 * expected


def test_names_and_places(tmp_path):
    opt = RMSProp([np.zeros(3)])
    with pytest.raises(CheckpointError, match=r"expected a name that ends in \.npz or \.safetensors"):
        opt.save(tmp_path / "state.pt")
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match=r"expected a folder to write to, got none: '.*nowhere'"):
        opt.save(tmp_path / "nowhere" / "state.npz")
    opt.save(str(tmp_path / "state.npz"))
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    (tmp_path / "usual").unlink()
    assert (tmp_path / "state.npz").stat().st_mode == usual
    assert [item.name for item in tmp_path.iterdir()] == ["state.npz"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    opt = RMSProp([np.zeros(3)])
    path = tmp_path / "state.npz"
    opt.save(path)
    before = path.read_bytes()
    opt.step([np.ones(3)])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(OSError, match="No space left"):
                opt.save(path)
        assert path.read_bytes() == before
        assert [item.name for item in tmp_path.iterdir()] == ["state.npz"]


@posix
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o640, 0o644, 0o777])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_mode_of_a_file_that_is_saved_over_stays(kind, mode, tmp_path):
    opt, path, _ = saved(tmp_path, kind)
    path.chmod(mode)
    opt.step()
    opt.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert RMSProp.from_checkpoint(path).steps == 2


@posix
def test_what_replaces_a_private_file_is_private_from_the_first_byte_on(tmp_path):
    path = tmp_path / "state.npz"
    path.touch(0o600)
    with formats.replaced(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only the superuser gives files away")
def test_the_owner_of_a_file_that_is_saved_over_stays(tmp_path):
    opt, path, _ = saved(tmp_path, "npz")
    os.chown(path, 1234, 5678)
    path.chmod(0o640)
    opt.save(path)
    about = path.stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (1234, 5678, 0o640)


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs a user to become")
def test_another_group_that_cannot_be_kept_gets_no_rights():
    program = """if True:
        import os, sys
        from pathlib import Path
        from fastrms.checkpoints import formats
        os.setgroups([]); os.setgid(1235); os.setuid(1234)
        with formats.replaced(Path(sys.argv[1])) as temporary:
            temporary.write_text("new")
    """
    with tempfile.TemporaryDirectory() as folder:  # others cannot look into pytest's own
        os.chmod(folder, 0o777)
        path = Path(folder, "state.npz")
        path.touch()
        os.chown(path, 1234, 5678)
        path.chmod(0o6664)  # the bits that lend the rights of owner and group go too
        subprocess.run([sys.executable, "-c", program, path], check=True)
        about = path.stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (1234, 1235, 0o644)


@posix
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_saving_to_a_link_replaces_what_it_leads_to(kind, tmp_path):
    opt, path, _ = saved(tmp_path, kind)
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / f"target.{kind}"
    path.rename(target)
    path.symlink_to(Path("there", target.name))
    chain = tmp_path / f"chain.{kind}"
    chain.symlink_to(path.name)
    opt.step()
    opt.save(chain)
    assert chain.is_symlink()
    assert path.is_symlink()
    assert not target.is_symlink()
    assert RMSProp.from_checkpoint(target).steps == 2
    target.unlink()
    opt.save(path)  # also where there is nothing yet
    assert path.is_symlink()
    assert RMSProp.from_checkpoint(target).steps == 2
    assert sorted(item.name for item in (tmp_path / "there").iterdir()) == [target.name]


@posix
def test_what_must_not_be_replaced_is_refused_and_stays(tmp_path):
    opt, path, before = saved(tmp_path, "npz")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"expected a file that can be written, got one that is read-only: .*npz"):
        opt.save(path)
    assert path.read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(IsADirectoryError, match="expected a file, got a folder"):
        opt.save(tmp_path / "folder.npz")
    (tmp_path / "null.npz").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("null.npz", "pipe.npz"):
        with pytest.raises(OSError, match="expected an ordinary file, got a device"):
            opt.save(tmp_path / name)
    (tmp_path / "circle.npz").symlink_to("circle.npz")
    with pytest.raises(OSError, match="got a link that leads to itself"):
        opt.save(tmp_path / "circle.npz")
    (tmp_path / "dangling.npz").symlink_to("nowhere/state.npz")
    with pytest.raises(FileNotFoundError, match=r"expected a folder to write to, got none: '.*nowhere'"):
        opt.save(tmp_path / "dangling.npz")
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("letter", ["x", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"])
def test_names_as_long_as_the_system_allows(letter, kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp([np.ones(3)])
    for length in (1, 41, 42, 64, 233, 234, 255):
        stem = letter * ((length - len(kind) - 1) // len(os.fsencode(letter)))
        path = tmp_path / f"{stem}.{kind}" if stem else tmp_path / f"a.{kind}"
        opt.save(path)
        opt.save(path)
        assert RMSProp.from_checkpoint(path).steps == 0
        path.unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_killed_two_hundred_times_while_saving(kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors.numpy")
    path = tmp_path / f"state.{kind}"
    size = 20_000
    opt = RMSProp([np.zeros(size)])
    start = time.perf_counter()
    for _ in range(5):
        opt.save(path)
    saving = (time.perf_counter() - start) / 5  # of a disk that may be busy
    generator = random.Random(0)
    seen = set()
    for _ in range(200):
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
            child = os.fork()
        if child == 0:
            while True:  # until killed
                opt.steps += 1
                opt.params[0][...] = opt.steps
                opt.save(path)
                os.write(writing, b".")
        os.read(reading, 1 << 16)  # it has begun, which takes long where this process is large
        time.sleep(generator.uniform(0, 4 * saving))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        opt.load(path)
        assert (opt.params[0] == opt.steps).all()
        seen.add(opt.steps)
        os.close(reading)
        os.close(writing)
    assert len(seen) == 200  # each child saved at least once, and was killed at one of the next times


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "checkpoints").glob("*.*")), ids=lambda p: p.name)
def test_files_of_older_versions(path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp.from_checkpoint(path)
    assert (opt.steps, opt.skipped_steps) == (3, 0)
    assert opt.params["W"].shape == (2, 3)
    np.testing.assert_allclose(opt.cache["b"], [0.271, 0.271])  # three steps with a gradient of 1
    np.testing.assert_allclose(opt.momentum_buffer["b"], opt.momentum_buffer["b"][0])
    assert opt.param_groups[0]["momentum"] == 0.5


@dataclass(frozen=True)
class Named:
    kind: str
    name: str = field(repr=False)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            (Named("w", "first"), Named("w", "second")),
            r"expected keys that load\(\) can tell apart by",
        ),
        ((frozenset({"a", "b"}), 1), "the same in all processes; got frozenset"),
        ((("w", frozenset({"a", "b"})), 1), r"the same in all processes; got \('w', frozenset"),
    ],
    ids=["alike", "set", "set in a tuple"],
)
def test_keys_whose_text_is_no_name_are_refused(keys, message, tmp_path):
    opt = RMSProp(dict.fromkeys(keys, np.ones(2)) | {keys[1]: np.zeros(2)})
    with pytest.raises(CheckpointError, match=message):
        opt.save(tmp_path / "state.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_made_is_named_as_it_was_given(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    opt = RMSProp([np.ones(2)])
    monkeypatch.setattr(formats.os, "open", refuse)  # what the superuser may do is no test of it
    with pytest.raises(PermissionError, match=r"one that is read-only: '.*state\.npz'$"):
        opt.save(tmp_path / "state.npz")
