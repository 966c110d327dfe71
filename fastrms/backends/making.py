"""Make backends on the host, with new buffers or with those of an opened folder."""

from os import PathLike

from fastrms._state import OptimizerState
from fastrms.backends.base import Memory, Ranks
from fastrms.backends.host import HostBackend
from fastrms.backends.memory import Ram
from fastrms.backends.storage import Storage
from fastrms.kernels.reference import to_bfloat16

__all__ = ["new_host_backend", "new_sharded_backend"]


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


def new_sharded_backend(state: OptimizerState, ranks: Ranks) -> HostBackend:
    """Return a backend with new buffers in memory. It updates the shard of this rank."""
    backend = _with_new_buffers(state, Ram(), ranks)
    state.forget_arrays()
    return backend


def _with_new_buffers(state: OptimizerState, memory: Memory, ranks: Ranks | None) -> HostBackend:
    """Return a backend with new buffers in `memory`, with the initial values."""
    for name in ("params", "grads"):
        state.buffers[name] = memory.new_buffer(name, state.layout)
    state.buffers["params"].gather(state.arrays, "params")
    backend = HostBackend(state, memory, ranks)
    state.buffers["cache"] = backend.new_buffer("cache")
    for cache, k in zip(state.buffers["cache"].leaves, state.group_of, strict=True):
        if start := state.param_groups[k]["initial_scale"]:  # new memory is 0
            flat = cache.reshape(-1)
            for part in memory.parts(flat):
                flat[part] = start if state.cache_dtype is None else to_bfloat16(start)
    backend.add_state(state.param_groups)
    return backend
