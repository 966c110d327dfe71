"""Buffers in files: the bits of buffers in memory, and what can happen to files."""

import collections
import copy
import errno
import gc
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import KEYS, OTHER_KEYS, posix
from helpers import JIT, assert_same_bits, assert_same_optimizers, contents, leaves, same_structure, wide

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
from fastrms.kernels import norms, pointers

STATE = ("params", "cache", "momentum_buffer", "grad_avg")


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of one page, so that small arrays are cut."""
    monkeypatch.setattr(fastrms.backends.pages, "PART_BYTES", 4096)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def arrays(rng, dtypes):
    """Of sizes around those of parts and of the chunks of norms, and empty ones."""
    sizes = [(3,), (0,), (norms.CHUNK * 2 + 5,), (), (70, 41), (1, 9001), (2, 0, 3), (2500,)]
    return [np.asarray(wide(rng, shape, dtypes[i % len(dtypes)], -2, 2)) for i, shape in enumerate(sizes)]


# What is on, and the dtypes of parameters.
CASES = {
    "default": ({}, "f"),
    "two dtypes": ({}, "fd"),
    "momentum": ({"momentum": 0.9, "nesterov": True, "initial_scale": 0.5}, "f"),
    "centered": ({"centered": True, "bias_correction": True, "weight_decay": 0.1}, "df"),
    "all state": ({"momentum": 0.5, "centered": True, "clip_value": 1.0, "maximize": True}, "fd"),
    "bfloat16": ({"momentum": 0.9, "centered": True, "initial_scale": 0.1, "cache_dtype": "bfloat16"}, "f"),
    "norm": ({"clip_norm": 0.5}, "fd"),
    "global norm": ({"global_clip_norm": 0.1, "nonfinite": "skip"}, "fd"),
    "both norms": ({"clip_norm": 3.0, "global_clip_norm": 2.0, "clip_value": 0.5, "nonfinite": "raise"}, "d"),
    "schedule": ({"lr": lambda step: 0.1 / (step + 1), "decoupled_weight_decay": True, "weight_decay": 0.1}, "f"),
}


# The interpreter would take minutes for the compiled ones.
@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel", "auto"] if JIT else ["numpy"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_in_memory(case, kernel, path, small_parts, rng):
    options, dtypes = CASES[case]
    start = arrays(rng, dtypes)
    inside = RMSProp(start, kernel=kernel, **options)
    opt = RMSProp(start, kernel=kernel, storage=path, **options)
    assert_same_optimizers(opt, inside)
    for step in range(8):
        gradients = [np.asarray(wide(rng, p.shape, p.dtype, -30, 3)) for p in start]
        if step == 2:
            gradients[2] = gradients[5] = None
        if step == 3:
            gradients[4] = gradients[4].astype(np.float16)  # has to be cast, so all go through the gradient buffer
        if step == 4:
            gradients = [None, *gradients[1:3], *[None] * 5]
        if step == 5 and "nonfinite" in options:
            gradients[5][0, 8999] = np.nan
        for optimizer in (inside, opt):
            try:
                if step in (6, 5):
                    optimizer.buffers["grads"].gather(gradients)
                    optimizer.step()
                else:
                    optimizer.step(gradients)
            except FloatingPointError:
                assert options["nonfinite"] == "raise"
        if step == 6:
            opt.close()
            lr = {"lr": options["lr"]} if callable(options.get("lr")) else {}
            opt = RMSProp.reopen(path, kernel=kernel, **lr)
        assert_same_optimizers(opt, inside)
    assert opt.steps == 8 - ("nonfinite" in options)
    opt.close()


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
    with pytest.raises(StructureError, match=r"storage: expected dicts whose keys are None, str, .* cannot give back"):
        RMSProp([np.ones(1), {"a": {key: np.ones(2)}}], storage=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_current_folder_changes(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("one", "other")]
    opts = []
    for number, place in enumerate(places):
        place.mkdir()
        monkeypatch.chdir(place)
        opts.append(RMSProp([np.full(3, float(number))], lr=0.5 + number, storage="run"))
        assert opts[-1].storage == place / "run"
    for number, opt in enumerate(opts):
        opt.step([np.ones(3)])
        opt.param_groups[0]["momentum"] = 0.5  # makes a file, and changes the head
        opt.param_groups[0]["weight_decay"] = number + 0.25
        opt.flush()
        opt.close()
    for number, place in enumerate(places):
        monkeypatch.chdir(place)
        opt = RMSProp.reopen("run")
        monkeypatch.chdir(tmp_path)
        assert (opt.lr, opt.param_groups[0]["weight_decay"]) == (0.5 + number, number + 0.25)
        opt.step([np.ones(3)])
        opt.close()
        assert RMSProp.reopen(place / "run").steps == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["one", "other"]


@posix
def test_a_link_to_the_folder_that_leads_elsewhere_later(tmp_path):
    latest = tmp_path / "latest"
    opts = []
    for name in ("one", "other"):
        latest.unlink(missing_ok=True)
        latest.symlink_to(name)
        opts.append(RMSProp([np.ones(3)], storage=latest))
    opts[0].param_groups[0]["momentum"] = 0.5
    for opt in opts:
        opt.close()
    with RMSProp.reopen(tmp_path / "one") as one, RMSProp.reopen(latest) as other:
        assert [opt.param_groups[0]["momentum"] for opt in (one, other)] == [0.5, 0.0]


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
    with pytest.raises(StorageError, match=r"lr: expected a rate for the groups .*; give it: reopen\(path, lr="):
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


def test_folders_that_are_refused_stay_as_they_are(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="expected the path of a folder, got that of a file"):
        RMSProp([np.ones(2)], storage=tmp_path / "file")
    with pytest.raises(StorageError, match=r"expected a new or empty folder, got one with 'thesis\.tex' in it"):
        RMSProp([np.ones(2)], storage=tmp_path / "folder")
    with pytest.raises(StorageError, match=r"expected a folder with head\.json, got none; it was not finished"):
        RMSProp.reopen(tmp_path / "folder")
    for nothing in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(StorageError, match=r"expected a folder with head\.json, got none$"):
            RMSProp.reopen(nothing)
    with pytest.raises(FileNotFoundError, match="expected a folder to make another one in"):
        RMSProp([np.ones(2)], storage=tmp_path / "no" / "where")
    RMSProp([np.ones(2)], storage=path).close()
    before = contents(path)
    with pytest.raises(StorageError, match=r"got one with an optimizer in it: .*; RMSProp\.reopen\(path\) goes on"):
        RMSProp([np.ones(2)], storage=path)
    assert contents(path) == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder", "run"]
    assert contents(tmp_path / "folder") == {"thesis.tex": b"mine"}


def rewrite(path, **changes):
    head = json.loads((path / "head.json").read_text())
    (path / "head.json").write_text(json.dumps(head | changes))


def recount(path, place, count):
    counts = np.memmap(path / "counts.bin", np.int64)
    counts[place] = count
    counts.flush()


DAMAGE = {
    "no JSON": (lambda path: (path / "head.json").write_text("{"), "cannot be read"),
    "not a head": (lambda path: (path / "head.json").write_text("[]"), "cannot be read"),
    "newer": (lambda path: rewrite(path, version=99), "version: expected 1 to 1, got 99"),
    "a checkpoint's": (lambda path: rewrite(path, storage=None), "expected a dict with 'clean' and 'buffers'"),
    "newer storage": (
        lambda path: rewrite(path, storage={"version": 2, "clean": True, "buffers": ["params", "grads", "cache"]}),
        "storage: expected version 1, got 2",
    ),
    "no cache": (
        lambda path: rewrite(path, storage={"version": 1, "clean": True, "buffers": ["params", "grads"]}),
        "expected the buffers of an optimizer",
    ),
    "other buffers": (
        lambda path: rewrite(
            path, storage={"version": 1, "clean": True, "buffers": ["params", "grads", "cache", "../x"]}
        ),
        "expected the buffers of an optimizer",
    ),
    "no structure": (lambda path: rewrite(path, structure=None), "cannot be rebuilt"),
    "another structure": (lambda path: rewrite(path, structure=["list", [0]]), "do not fit"),
    "groups": (
        lambda path: rewrite(path, param_groups=[{"speed": 1, "lr": 1.0}]),
        "'speed' is no option of a parameter group",
    ),
    "no group": (lambda path: rewrite(path, param_groups=[]), "cannot be read"),
    "shorter": (lambda path: os.truncate(path / "cache.bin", 5), r"cache\.bin: expected 4,096 bytes, got 5"),
    "counts": (lambda path: os.truncate(path / "counts.bin", 5), r"counts\.bin: expected 4,096 bytes, got 5"),
    "option": (lambda path: rewrite(path, param_groups=[{"momentum": 2.0}]), "cannot be read: momentum: expected"),
    "order": (lambda path: rewrite(path, structure=["list", [1, 0]]), "structure: cannot be rebuilt"),
    "no steps": (lambda path: recount(path, 1, -1), r"counts\.bin: steps: expected a number of steps, got -1"),
    "steps of no run": (
        lambda path: recount(path, 1, 2**63 - 1),
        r"counts\.bin: steps: expected .*, got 92233720368",
    ),
    "skips of no run": (
        lambda path: recount(path, 2, 2**62),
        "skipped_steps: expected a number of steps, got 461",
    ),
    "sat out": (
        lambda path: recount(path, 3, 1),
        r"counts\.bin: skipped\[0\]: expected 0 to 0, .*; got 1: the file",
    ),
    "sat out less": (lambda path: recount(path, 4, -5), r"counts\.bin: skipped\[1\]: expected 0 to 0, .*; got -5"),
    "gone": (lambda path: (path / "params.bin").unlink(), r"params\.bin"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_and_left_alone(damage, path):
    if os.sysconf("SC_PAGESIZE") != 4096:
        pytest.skip("sizes in messages are those of 4 KiB pages")
    RMSProp([np.ones(2), np.ones(3)], storage=path).close()
    spoil, message = DAMAGE[damage]
    spoil(path)
    before = contents(path)
    for _ in range(2):  # and it is not left locked
        with pytest.raises(OSError, match=message):
            RMSProp.reopen(path)
    assert contents(path) == before


def test_counts_of_a_process_that_was_killed_are_used_as_far_as_they_go_together(path):
    with RMSProp([np.ones(2), np.ones(3)], storage=path, bias_correction=True) as opt:
        opt.step([None, np.ones(3)])
    head = json.loads((path / "head.json").read_text())
    rewrite(path, storage=head["storage"] | {"clean": False})
    recount(path, 3, 2)  # more than there were steps
    with RMSProp.reopen(path, after_crash="use") as opt:
        assert (opt.steps, opt.backend.state.counts.absent.tolist()) == (1, [1, 0])
        opt.step([np.ones(2), np.ones(3)])
        assert np.isfinite(opt.params[0]).all()
    rewrite(path, storage=head["storage"] | {"clean": False})
    recount(path, 3, -1)
    with pytest.raises(StorageError, match="got -1"):
        RMSProp.reopen(path, after_crash="use")


# What is in the folder, and is shared with another place or must not be written.


@posix
@pytest.mark.parametrize("name", ["params.bin", "grads.bin", "cache.bin", "counts.bin", "head.json", "lock"])
@pytest.mark.parametrize("how", ["link", "hard link", "pipe"])
def test_files_that_are_also_elsewhere_are_refused(name, how, tmp_path):
    for folder in ("one", "other"):
        RMSProp([np.ones(3)], storage=tmp_path / folder).close()
    file, other = tmp_path / "one" / name, tmp_path / "other" / name
    file.unlink()
    if how == "link":
        file.symlink_to(Path("..", "other", name))
    elif how == "hard link":
        os.link(other, file)
    else:
        os.mkfifo(file)
    before = contents(tmp_path / "other")
    for after_crash in ("raise", "use"):
        with pytest.raises(StorageError, match=r"expected a file of this folder( alone)?, got"):
            RMSProp.reopen(tmp_path / "one", after_crash=after_crash)
    assert contents(tmp_path / "other") == before
    if how == "link":
        RMSProp.reopen(tmp_path / "other").close()


@posix
def test_a_new_buffer_does_not_go_where_a_link_leads(path, tmp_path):
    opt = RMSProp([np.ones(3)], storage=path)
    (tmp_path / "thesis").write_text("mine")
    (path / "momentum_buffer.bin").symlink_to("../thesis")
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.ones(3)])
    opt.close()
    assert (tmp_path / "thesis").read_text() == "mine"
    assert not (path / "momentum_buffer.bin").is_symlink()
    RMSProp.reopen(path).close()


@posix
@pytest.mark.parametrize("name", ["params.bin", "counts.bin", "lock"])
def test_read_only_files_are_refused(name, path):
    RMSProp([np.ones(3)], storage=path).close()
    (path / name).chmod(0o444)
    before = contents(path)
    with pytest.raises(PermissionError):
        RMSProp.reopen(path)
    assert contents(path) == before
    (path / name).chmod(0o600)
    RMSProp.reopen(path).close()


# No room, and disks that fail.


def test_a_buffer_that_cannot_be_made_leaves_the_folder_as_it_was(path, monkeypatch):
    opt = RMSProp([np.ones(3)], storage=path)
    opt.step([np.ones(3)])
    opt.flush()
    names = sorted(contents(path))

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("posix_fallocate", "ftruncate") if hasattr(os, "posix_fallocate") else ("ftruncate",):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            if function == "ftruncate":
                patch.delattr(os, "posix_fallocate", raising=False)
            with pytest.raises(OSError, match="expected room for") as caught:
                opt.param_groups[0]["momentum"] = 0.5
            assert caught.value.errno == errno.ENOSPC
            assert sorted(contents(path)) == names
    with monkeypatch.context() as patch:
        patch.setattr(fastrms.backends.mapped.mmap, "mmap", full)
        with pytest.raises(OSError, match="No space"):
            opt.param_groups[0]["momentum"] = 0.5
        assert sorted(contents(path)) == names
    assert opt.momentum_buffer is None
    with RMSProp([np.ones(3)]) as inside:
        inside.step([np.ones(3)])
        assert opt.param_groups[0]["momentum"] == 0
        opt.step([np.ones(3)])
        inside.step([np.ones(3)])
        opt.close()
        assert_same_optimizers(RMSProp.reopen(path), inside)


def test_what_a_killed_process_left_of_a_buffer_is_made_anew(path):
    opt = RMSProp([np.ones(3)], storage=path)
    (path / "momentum_buffer.bin").write_bytes(b"x" * 100)
    opt.param_groups[0]["momentum"] = 0.5
    assert opt.momentum_buffer[0].tolist() == [0, 0, 0]
    opt.close()
    RMSProp.reopen(path).close()


def test_an_error_of_the_disk_in_a_step_counts_nothing(path, monkeypatch):
    opt = RMSProp([np.ones(3), np.ones(2)], storage=path, bias_correction=True)

    def broken(*arguments):
        raise OSError(errno.EIO, "cannot be read or written")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(opt.backend.storage.pages, "call_in_parts", broken)
            with pytest.raises(OSError, match="cannot be read or written"):
                opt.step([None, np.ones(2)])
        assert (opt.steps, opt.backend.state.counts.absent.tolist()) == (0, [0, 0])
        assert opt.backend.storage.counts[1:5].tolist() == [0, 0, 0, 0]
    opt.step([None, np.ones(2)])
    assert opt.backend.storage.counts[:5].tolist() == [0, 1, 0, 1, 0]
    opt.close()
    with RMSProp.reopen(path) as opt:
        assert (opt.steps, opt.backend.state.counts.absent.tolist()) == (1, [1, 0])
        opt.step([np.ones(3), np.ones(2)])
        assert np.isfinite(opt.params[0]).all()


def test_a_step_that_was_not_taken_is_counted_in_the_folder_at_once(path):
    opt = RMSProp([np.ones(3)], storage=path, nonfinite="skip")
    opt.step([np.ones(3)])
    opt.flush()
    opt.step([np.full(3, np.nan)])
    assert np.fromfile(path / "counts.bin", np.int64)[:3].tolist() == [0, 1, 1]
    assert not json.loads((path / "head.json").read_text())["storage"]["clean"]
    opt.close()
    with RMSProp.reopen(path) as opt:
        assert (opt.steps, opt.skipped_steps) == (1, 1)


def test_what_cannot_be_removed_does_not_hide_the_error(path, monkeypatch):
    unlink = Path.unlink

    def refuses(self, missing_ok=False):
        if self.name in ("params.bin", "head.json") and self.exists():
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(self, missing_ok)

    path.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        patch.setattr(
            fastrms.backends.storage.Storage, "_write_metadata", lambda *a, **k: (_ for _ in ()).throw(KeyError("mine"))
        )
        with pytest.raises(KeyError, match="mine"):
            RMSProp([np.ones(3)], storage=path)
    assert list(contents(path)) == ["params.bin"]


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
        with pytest.raises(StorageError, match=r"one that was closed; RMSProp\.reopen\(path\) goes on"):
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


@pytest.mark.parametrize("case", ["all state", "bfloat16"])
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_checkpoints_between_memory_and_storage(case, ending, tmp_path, small_parts, rng):
    options, dtypes = CASES[case]
    start = arrays(rng, dtypes)
    gradients = [np.asarray(wide(rng, p.shape, p.dtype, -2, 2)) for p in start]
    inside, opt = RMSProp(start, **options), RMSProp(start, storage=tmp_path / "a", **options)
    for optimizer in (inside, opt):
        optimizer.step(gradients)
        optimizer.save(tmp_path / f"{optimizer is opt}.{ending}")
    assert (tmp_path / f"True.{ending}").stat().st_size == (tmp_path / f"False.{ending}").stat().st_size
    for name, array in inside.state_dict()["arrays"].items():
        assert_same_bits(opt.state_dict()["arrays"][name], array)
    elsewhere = RMSProp.from_checkpoint(tmp_path / f"False.{ending}", storage=tmp_path / "b")
    assert_same_optimizers(elsewhere, inside)
    assert_same_optimizers(RMSProp.from_checkpoint(tmp_path / f"True.{ending}"), inside)
    opt.step(gradients)
    views = leaves(opt.params)
    opt.load(tmp_path / f"False.{ending}")
    assert_same_optimizers(opt, inside)
    assert [id(view) for view in leaves(opt.params)] == [id(view) for view in views]
    opt.step(gradients)
    opt.load_state_dict(inside.state_dict())
    assert_same_optimizers(opt, inside)
    opt.close()
    with RMSProp.reopen(tmp_path / "a") as again:
        again.step(gradients)
        inside.step(gradients)
        assert_same_optimizers(again, inside)


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


def test_the_folder_has_what_its_page_says(path):
    RMSProp([np.ones(2)], storage=path, momentum=0.5, centered=True).close()
    page = (Path(__file__).parent.parent / "docs" / "storage.md").read_text(encoding="utf-8")
    for item in path.iterdir():
        assert f"`{item.name}`" in page


@pytest.mark.parametrize("what", ["removed", "moved", "replaced"])
def test_a_folder_in_the_place_of_the_one_that_was_opened_is_left_alone(what, rng, tmp_path):
    path = tmp_path / "run"
    first = RMSProp([np.ones(300)], lr=0.5, storage=path)
    first.step([np.ones(300)])
    if what == "moved":
        path.rename(tmp_path / "moved")
    else:
        shutil.rmtree(path)
    second = None
    if what == "replaced":
        second = RMSProp([np.zeros(300)], lr=0.001, storage=path)
        second.step([np.ones(300)])
        second.flush()
        before = {file.name: file.read_bytes() for file in path.iterdir()}
    for call in (lambda: setattr(first, "momentum", 0.9), first.flush, first.close):
        with pytest.raises(StorageError, match="expected the folder that was opened, got none or another one in its"):
            call()
    assert first.momentum == 0
    if second is None:
        assert not path.exists()
    else:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
        second.close()
        again = RMSProp.reopen(path)
        assert (again.lr, again.steps) == (0.001, 1)
        again.close()


def test_an_empty_path_is_no_folder():
    with pytest.raises(OptionError, match="storage: expected the path of a folder or None, got ''"):
        RMSProp([np.ones(2)], storage="")


def test_a_folder_of_an_older_version(tmp_path):
    """It was written before the buffers of an optimizer belonged to a backend."""
    folder = shutil.copytree(Path(__file__).parent / "checkpoints" / "folder1", tmp_path / "run")
    with RMSProp.reopen(folder) as opt:
        assert (opt.steps, opt.skipped_steps, opt.lr, opt.momentum) == (4, 0, 0.01, 0.5)
        expected = RMSProp({"W": np.ones((2, 3)), "b": np.zeros(2, np.float32)}, lr=0.01, momentum=0.5)
        for gradient in (np.ones(2), np.ones(2), np.ones(2), None):
            expected.step({"W": np.ones((2, 3)), "b": gradient})
        for optimizer in (opt, expected):
            optimizer.step({"W": np.full((2, 3), 0.5), "b": np.ones(2)})
        for name in STATE[:3]:
            for key, view in opt.buffers[name].views.items():
                assert_same_bits(view, expected.buffers[name].views[key], name)
