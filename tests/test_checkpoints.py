"""Checkpoints: what is loaded goes on as if nothing had happened, and what is damaged or hostile changes nothing."""

import io
import json
import os
import random
import signal
import time
import tracemalloc
import warnings
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT, same_structure, steps
from test_contract import OPTIONS
from test_nonfinite import everything

from fastrms import CheckpointError, RMSProp, heads

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
    ids=str,
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
    with pytest.raises(CheckpointError, match=r"lr: it was a function, which no file holds"):
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


CHANGES = {
    "no dict": (lambda s: [], "expected what RMSProp.state_dict"),
    "another dict": (lambda s: {"steps": 3}, "expected what RMSProp.state_dict"),
    "newer": (lambda s: s | {"version": heads.VERSION + 1}, "needs a newer fastrms"),
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
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(name, tmp_path):
    _, path, _ = saved(tmp_path, "npz")
    rewritten(path, HOSTILE[name])
    opt = RMSProp([np.zeros(40), np.zeros((3, 4), np.float32)], momentum=0.9)
    before = everything(opt)
    tracemalloc.start()
    if name not in ("structure", "leaf"):  # which load does not need
        with pytest.raises(CheckpointError, match=r"state\.npz: "):
            opt.load(path)
    with pytest.raises(CheckpointError, match=r"state\.npz: "):
        RMSProp.from_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
    assert everything(opt) == before


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


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "checkpoints").iterdir()), ids=lambda p: p.name)
def test_files_of_older_versions(path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp.from_checkpoint(path)
    assert (opt.steps, opt.skipped_steps) == (3, 0)
    assert opt.params["W"].shape == (2, 3)
    np.testing.assert_allclose(opt.cache["b"], [0.271, 0.271])  # three steps with a gradient of 1
    np.testing.assert_allclose(opt.momentum_buffer["b"], opt.momentum_buffer["b"][0])
    assert opt.param_groups[0]["momentum"] == 0.5
