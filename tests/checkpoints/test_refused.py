"""Checkpoints: a state that does not fit, or cannot be, changes nothing; mistakes are not called bad files."""

import errno

import numpy as np
import pytest
from checkpoint_files import KINDS, rewritten, saved, transfer
from helpers import everything

from fastrms import CheckpointError, DeviceError, OptionError, OptionTypeError, RMSProp, StorageError
from fastrms.checkpoints import formats, metadata

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
    "no folder": (
        {"storage": "no/where"},
        FileNotFoundError,
        "storage: expected a folder in which to make the new one",
    ),
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
    with pytest.raises(StorageError, match="a closed one"):
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
    with pytest.raises(CheckpointError, match="the array is damaged"):
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
    "unknown": (lambda s: s | {"param_groups": [{"speed": 1}]}, "'speed' is not an option of a parameter group"),
    "number": (lambda s: s | {"param_groups": [{3: 1}]}, "3 is not an option of a parameter group"),
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
    "missing": (lambda s: {k: v for k, v in s.items() if k != "structure"}, "structure: missing in the state"),
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
