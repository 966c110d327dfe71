"""Make backends on the host, with new buffers or with those of an opened folder."""

from collections.abc import Mapping
from os import PathLike

import numpy as np

from fastrms._checks import shown
from fastrms._state import OptimizerState, Settings
from fastrms._types import Options
from fastrms.backends.base import Backend, Memory, Ranks
from fastrms.backends.host import HostBackend
from fastrms.backends.memory import Ram
from fastrms.backends.storage import Storage
from fastrms.buffers.bfloat16 import to_bfloat16
from fastrms.buffers.held import HeldArrays
from fastrms.errors import StructureError
from fastrms.options import parameter_groups

__all__ = ["add_group", "new_host_backend", "new_sharded_backend"]


def new_host_backend(state: OptimizerState, storage: str | PathLike[str] | Storage | None = None) -> HostBackend:
    """Return a backend with new buffers, or with those of a Storage that `Storage.open` returned.

    `state` has initial values, and no buffers yet.
    """
    if storage is None:
        backend = _with_new_buffers(state, Ram(), None)
    else:
        folder = Storage.of(storage, state.layout)
        with folder.making(state):
            if folder.reopened:
                for name in ("params", "grads"):
                    state.buffers[name] = folder.new_buffer(name, state.layout)
                backend = HostBackend(state, folder)
                for name in folder.names[2:]:
                    state.buffers[name] = backend.new_buffer(name)
                backend.add_state(state.param_groups)
            else:
                backend = _with_new_buffers(state, folder, None)
    state.forget_arrays()
    return backend


def add_group(backend: Backend, group: Options) -> None:
    """Add a parameter group to an optimizer. The group is given as an item of the list that a constructor takes."""
    state = backend.state
    number = len(state.param_groups) if state.grouped else 1
    if not isinstance(group, Mapping) or "params" not in group:
        raise StructureError(f"group: expected a dict with the key 'params', got {shown(group)}")
    if parameter_groups(group["params"]) is not None:
        raise StructureError(
            "group: expected one parameter group, got groups under 'params'; add each of them by a call"
        )
    options = {**state.defaults, **{name: value for name, value in group.items() if name != "params"}}
    settings = Settings(
        options, state.kernel, state.num_threads, state.cache_dtype, state.nonfinite, state.global_clip_norm
    )
    name = f"params[{number}]"
    new = OptimizerState(backend.params_on_host(group["params"], name), settings, state.in_place, number)
    arrays = [item for item in new.layout.flatten(new.arrays, "params") if isinstance(item, np.ndarray)]
    if any(any(buffer.aliases(arrays)) for buffer in state.buffers.values()):
        raise StructureError(
            f"{name}: expected new parameters, got an array that shares memory with a parameter of another "
            "group, or with gradients or state"
        )
    try:
        with backend.adding(new) as memory:
            new_buffer = _with_new_buffers(new, memory, backend.ranks_of(new)).new_buffer
            new.add_buffers(state.buffers, new_buffer)
            made = {name: backend.new_buffer(name) for name in new.buffers if name not in state.buffers}
            backend.take_in(new, made)
    finally:
        backend.settle_parameters()


def new_sharded_backend(state: OptimizerState, ranks: Ranks) -> HostBackend:
    """Return a backend with new buffers in memory. It updates the shard of this rank."""
    backend = _with_new_buffers(state, Ram(), ranks)
    state.forget_arrays()
    return backend


def _with_new_buffers(state: OptimizerState, memory: Memory, ranks: Ranks | None) -> HostBackend:
    """Return a backend with new buffers in `memory`, with the initial values."""
    if state.in_place:
        arrays = state.layout.flatten(state.arrays, state.name)
        state.buffers["params"] = HeldArrays(state.layout, arrays, name=state.name)
    else:
        state.buffers["params"] = memory.new_buffer("params", state.layout)
        state.buffers["params"].gather(state.arrays, "params")
    state.buffers["grads"] = memory.new_buffer("grads", state.layout)
    backend = HostBackend(state, memory, ranks)
    state.buffers["cache"] = backend.new_buffer("cache")
    for cache, k in zip(state.buffers["cache"].leaves, state.group_of, strict=True):
        if start := state.param_groups[k]["initial_scale"]:  # new memory is 0
            flat = cache.reshape(-1)
            for part in memory.parts(flat):
                flat[part] = start if state.cache_dtype is None else to_bfloat16(start)
    backend.add_state(state.param_groups)
    return backend
