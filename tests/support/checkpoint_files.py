"""Checkpoints that several test files make, change and bring to another optimizer."""

import io
import zipfile

import numpy as np
import pytest

from fastrms import RMSProp

KINDS = ["dict", "npz", "safetensors"]


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


def saved(tmp_path, kind):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp([np.arange(40.0), np.ones((3, 4), np.float32)], momentum=0.9)
    opt.step([np.ones(40), np.ones((3, 4), np.float32)])
    path = tmp_path / f"state.{kind}"
    opt.save(path)
    return opt, path, path.read_bytes()


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
