"""Gradients and states that alias the optimizer's own memory: the result is that of a copy."""

import ctypes
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import everything, need_torch
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from fastrms import RMSProp


@pytest.mark.parametrize("where", ["params", "cache", "momentum_buffer", "grads"])
def test_gradients_that_lie_in_the_optimizers_own_memory(where, rng):
    params = [rng.standard_normal(100), rng.standard_normal(100)]
    opt, other = (RMSProp(params, momentum=0.9, weight_decay=0.1) for _ in range(2))
    opt.step(params)
    other.step(params)
    flat, other_flat = opt.buffers[where].flat, other.buffers[where].flat
    # Shifted by some elements, so that a step that reads while it writes would see what it has written.
    opt.step([flat[3:103], flat[50:150]])
    other.step([other_flat[3:103].copy(), other_flat[50:150].copy()])
    assert everything(opt) == everything(other)


def by_pickle(array):
    buffers = []
    text = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=buffers)


class Wrapped:
    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return as_strided(self._array)


# The same memory, of which `.base` is something else.
WRAPPERS = {
    "as_strided": as_strided,
    "backwards twice": lambda a: as_strided(a)[::-1][::-1],
    "memoryview": lambda a: np.asarray(memoryview(a)),
    "frombuffer": lambda a: np.frombuffer(a, a.dtype).reshape(a.shape),
    "from_dlpack": np.from_dlpack,
    "sliding window": lambda a: sliding_window_view(a, a.shape)[(0,) * a.ndim],
    "ctypes": lambda a: np.ctypeslib.as_array((ctypes.c_double * a.size).from_address(a.ctypes.data)).reshape(a.shape),
    "array interface": lambda a: np.asarray(SimpleNamespace(__array_interface__=a.__array_interface__)),
    "out-of-band pickle": by_pickle,
    "__array__": Wrapped,
    "torch": lambda a: need_torch().from_numpy(a).numpy(),
}


@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
@pytest.mark.parametrize("stored", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize(
    "wrapper", [pytest.param(name, marks=[pytest.mark.torch] if name == "torch" else []) for name in WRAPPERS]
)
def test_gradients_that_alias_the_optimizers_memory_through_a_wrapper(wrapper, stored, kernel, rng, tmp_path):
    wrap = WRAPPERS[wrapper]
    params = [rng.standard_normal((3, 40)) for _ in range(4)]
    options = {"momentum": 0.5, "kernel": kernel}
    opt = RMSProp(params, storage=tmp_path / "run" if stored else None, **options)
    other = RMSProp(params, **options)
    for o in (opt, other):
        o.param_groups[0]["centered"] = True  # a buffer that was not there when the runs were made
        for view, value in zip(o.grads, params, strict=True):
            view[...] = value
        o.step()
    opt.step([wrap(opt.grads[1]), wrap(opt.grads[0]), wrap(opt.params[3]), wrap(opt.grad_avg[1])])
    other.step([other.grads[k].copy() for k in (1, 0)] + [other.params[3].copy(), other.grad_avg[1].copy()])
    assert everything(opt) == everything(other)
    # Shifted within what the update writes.
    for name in ("params", "grad_avg", "momentum_buffer"):
        flat = opt.buffers[name].flat
        opt.step([wrap(flat[k : k + 120].reshape(3, 40)) for k in (1, 5, 110, 300)])
        flat = other.buffers[name].flat.copy()
        other.step([flat[k : k + 120].reshape(3, 40) for k in (1, 5, 110, 300)])
        assert everything(opt) == everything(other), name
    if stored:
        opt.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped where")
@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("kind", [np.memmap, np.ndarray])
@pytest.mark.parametrize("name", ["params", "grads", "cache"])
def test_gradients_in_another_mapping_of_the_same_file(name, kind, mode, kernel, rng, tmp_path):
    params = [rng.standard_normal(700), rng.standard_normal(700)]
    opt, other = RMSProp(params, kernel=kernel, storage=tmp_path / "run"), RMSProp(params, kernel=kernel)
    for o in (opt, other):
        o.grads[0][...], o.grads[1][...] = params
        o.step()
    start = opt.buffers[name].block.ctypes.data - opt.buffers[name]._memory.ctypes.data
    again = np.memmap(tmp_path / "run" / f"{name}.bin", np.float64, mode, start, shape=1400).view(kind)
    assert np.array_equal(again, other.buffers[name].flat)
    flat = other.buffers[name].flat.copy()
    for one, two in ((slice(700, 1400), slice(0, 700)), (slice(3, 703), slice(690, 1390))):
        opt.step([again[one], again[two]])
        other.step([flat[one], flat[two]])
        assert everything(opt) == everything(other)
        flat = np.array(again)
    opt.close()


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "files"])
def test_a_state_that_aliases_the_optimizers_memory_is_loaded_as_it_was(stored, rng, tmp_path):
    params = [rng.standard_normal(30), rng.standard_normal(20)]
    opt = RMSProp(params, momentum=0.9, storage=tmp_path / "run" if stored else None)
    opt.step(params)
    old = opt.state_dict()
    state_dict = opt.state_dict()
    names = [f"{name}/float64" for name in ("params", "cache", "momentum_buffer")]
    turned = dict(zip(names, names[1:] + names[:1], strict=True))
    for name, source in turned.items():
        state_dict["arrays"][name] = as_strided(opt.buffers[source.split("/")[0]].flat)
    opt.load_state_dict(state_dict)
    for name, source in turned.items():
        assert np.array_equal(opt.buffers[name.split("/")[0]].flat, old["arrays"][source]), name
    if stored:
        opt.close()
