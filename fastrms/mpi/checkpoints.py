"""Checkpoints of an optimizer that is divided among ranks, in the format of `fastrms.RMSProp`."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np

from fastrms._types import HostKernel, LearningRate, Reduction
from fastrms.buffers import Array
from fastrms.buffers.joined import JoinedBuffer
from fastrms.buffers.pytree import P
from fastrms.mpi.communicator import Bounds, Communicator
from fastrms.mpi.shards import Shards
from fastrms.mpi.waiting import check_timeout
from fastrms.optimizer import RMSProp
from fastrms.options import ParamGroup

__all__ = ["Unsharded"]


class Unsharded(RMSProp[P]):
    """The methods of `fastrms.mpi.ShardedRMSProp` that save and restore it. All ranks call each together."""

    _ranks: Communicator
    _shards: Shards

    def _together(self, call: str) -> AbstractContextManager[bool]:
        """Return a context for a call that all ranks make together, as `Shards.together`."""
        return self._shards.together(self._turns, call)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks on each rank, as `RMSProp.state_dict` does. All ranks call it.

        Returns
        -------
        state : dict
            The whole state. `RMSProp` can load it, and so can this class with any number of ranks.
        """
        with self._together("state_dict"):
            whole = _whole(self, on_all=True)
            assert whole is not None
            for own, all_, bounds in _segments(self, whole):
                assert all_ is not None
                all_[bounds[self._ranks.rank] : bounds[self._ranks.rank + 1]] = own
                self._ranks.all_gather(all_, bounds)
            return whole.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Load a state from rank 0 into all ranks: parameters, the state of each shard, options. All ranks call it.

        Parameters
        ----------
        state : dict
            A result of `state_dict`, of `RMSProp` or of this class with any number of ranks. Ranks other than 0 may
            pass None.

        Raises
        ------
        CheckpointError
            As from `RMSProp.load_state_dict`, on all ranks. After an error, nothing has changed.
        """
        with self._together("load_state_dict"):
            whole = _whole(self)
            _on_first(self._ranks, lambda: whole.load_state_dict(state) if whole else None)
            _distribute(self, whole)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state of all ranks to one file, as `RMSProp.save` does. All ranks call it, and rank 0 writes.

        Rank 0 needs memory for the whole state.

        Parameters
        ----------
        path : str or path-like
            A file with the suffix .npz or .safetensors. The path on rank 0 counts.

        Raises
        ------
        CheckpointError, OSError
            As from `RMSProp.save`, on all ranks.
        """
        with self._together("save"):
            whole = _whole(self)
            for own, all_, bounds in _segments(self, whole):
                self._ranks.gather(own, all_, bounds)
            _on_first(self._ranks, lambda: whole.save(path) if whole else None)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a file of `save` or of `RMSProp.save`. All ranks call it, and rank 0 reads the file.

        Parameters
        ----------
        path : str or path-like
            A file with the suffix .npz or .safetensors. The path on rank 0 counts.

        Raises
        ------
        CheckpointError, OSError
            As from `RMSProp.load`, on all ranks. After an error, nothing has changed.
        """
        with self._together("load"):
            whole = _whole(self)
            _on_first(self._ranks, lambda: whole.load(path) if whole else None)
            _distribute(self, whole)

    @classmethod
    def from_checkpoint(  # type: ignore[override] # pyright: ignore[reportIncompatibleMethodOverride] # no `storage`
        cls,
        path: str | os.PathLike[str],
        *,
        lr: LearningRate | None = None,
        kernel: HostKernel = "auto",
        num_threads: int | None = None,
        comm: Any = None,
        reduction: Reduction = "mean",
        timeout: float | str | None = "auto",
    ) -> Self:
        """Make an optimizer from a checkpoint, with its parameters, their structure, state and options.

        All ranks call it, and rank 0 reads the file, which is from this class or from `RMSProp`.

        Parameters
        ----------
        path : str or path-like
            A file with the suffix .npz or .safetensors. The path on rank 0 counts.
        lr : float or callable, optional
            The rate of the groups whose saved rate was a function, because a file cannot contain a function. Required
            if there are such groups. If there are none, `lr` replaces the saved rates of all groups.
        kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
            As for `ShardedRMSProp`.
        num_threads : int or None, default None
            As for `ShardedRMSProp`.
        comm : mpi4py.MPI.Intracomm or None, default None
            As for `ShardedRMSProp`.
        reduction : {"mean", "sum"}, default "mean"
            As for `ShardedRMSProp`. It is not saved.
        timeout : float, None or "auto", default "auto"
            As for `ShardedRMSProp`.

        Returns
        -------
        optimizer : ShardedRMSProp
            A new optimizer with its own buffers, and the state of this rank's shard. (To resume with arrays in place,
            make an optimizer with `in_place`, and then call `load`.)

        Raises
        ------
        CheckpointError, OSError
            As from `RMSProp.from_checkpoint`, on all ranks.
        """
        ranks = Communicator(comm, "ShardedRMSProp.from_checkpoint", check_timeout(timeout))
        whole: RMSProp | None = None

        def read() -> None:
            nonlocal whole
            whole = RMSProp.from_checkpoint(path, lr=lr, kernel="numpy")

        with ranks.leaving():
            _on_first(ranks, read)
            sent = None
            if whole is not None:
                sent = whole.buffers["params"].layout, whole.backend.state.grouped, whole.cache_dtype
            layout, grouped, cache_dtype = ranks.control.bcast(sent)
        params = layout.structure(np.zeros(leaf.shape, layout.dtype_of(leaf)) for leaf in layout.leaves)
        options = {"kernel": kernel, "num_threads": num_threads, "cache_dtype": cache_dtype}
        groups = [{"params": part} for part in params] if grouped else params
        made: Callable[..., Self] = cls  # it takes more arguments than `RMSProp`
        opt = made(groups, comm=comm, reduction=reduction, timeout=timeout, **options)  # pyright: ignore[reportCallIssue] # as above
        with opt._ranks.leaving():
            if lr is not None:
                opt.lr = lr
            _distribute(opt, whole)
        return opt


def _on_first(ranks: Communicator, act: Callable[[], None]) -> None:
    """Call a function on rank 0, and raise its error on all ranks."""
    error: BaseException | None = None
    try:
        if ranks.rank == 0:
            act()
    except BaseException as caught:  # Ctrl-C and sys.exit() too, because the other ranks wait
        error = caught
    ranks.broadcast_error(error)


def _whole(opt: Unsharded, on_all: bool = False) -> RMSProp | None:
    """Return an `RMSProp` like `opt`, with empty state, on rank 0 or on all ranks. Return None elsewhere."""
    whole, error = None, None
    try:
        if on_all or opt._ranks.rank == 0:
            whole = _new_whole(opt)
    except Exception as caught:  # lack of memory
        error = caught
    opt._ranks.agree(error)
    return whole


def _new_whole(opt: Unsharded) -> RMSProp:
    """Return an `RMSProp` with the parameters, options and counts of `opt`, and with all its state buffers."""
    options: dict[str, Any] = {
        "global_clip_norm": opt.global_clip_norm,
        "nonfinite": opt.nonfinite,
        "cache_dtype": opt.cache_dtype,
    }
    buffer = opt.buffers["params"]
    params: Any = buffer.layout.structure(buffer.leaves)  # the user may have replaced items of `opt.params`
    if opt.backend.state.grouped:
        # The state of an added group is divided by itself, so here it needs segments of its own too.
        grads = opt.buffers["grads"]
        added = len(grads.parts) - 1 if isinstance(grads, JoinedBuffer) else 0
        groups: list[Any] = [{**group, "params": each} for group, each in zip(opt.param_groups, params, strict=True)]
        first = len(groups) - added
        whole = RMSProp(groups[:first], kernel="numpy", **options)
        for group in groups[first:]:
            whole.add_param_group(group)
    else:
        own = {name: value for name, value in opt.param_groups[0].items() if name != "params"}
        whole = RMSProp(params, kernel="numpy", **own, **options)
    whole.backend.state.add_buffers(_state_of(opt), whole.backend.new_buffer)  # also those of options that are off now
    whole.backend.state.counts.take_over(opt.backend.state.counts)
    return whole


def _state_of(opt: RMSProp) -> list[str]:
    """Return the names of the state buffers. The order is the same on all ranks."""
    return sorted(name for name in opt.buffers if name not in ("params", "grads"))


def _segments(opt: Unsharded, whole: RMSProp | None) -> Iterator[tuple[Array, Array | None, Bounds]]:
    """Yield for each segment of the state this rank's shard, the whole segment or None, and the bounds of shards."""
    for name in _state_of(opt):
        for number, own in enumerate(opt.buffers[name].segments):
            yield own, None if whole is None else whole.buffers[name].segments[number], opt._shards.bounds[number]


def _distribute(opt: Unsharded, whole: RMSProp | None) -> None:
    """Copy parameters, state, options and counts of an `RMSProp` on rank 0 to all ranks."""
    sent = None
    if whole is not None:
        groups = [
            {name: None if callable(value) else value for name, value in group.items() if name != "params"}
            for group in whole.param_groups
        ]
        numbers = (whole.global_clip_norm, whole.nonfinite, whole.backend.state.counts)
        sent = groups, numbers, _state_of(whole)
        for mine, theirs in zip(opt.buffers["params"].leaves, whole.buffers["params"].leaves, strict=True):
            np.asarray(mine)[...] = theirs
    groups, numbers, names = opt._ranks.control.bcast(sent)
    opt._shards.broadcast_params()
    opt.backend.state.add_buffers(names, opt.backend.new_buffer)
    for own, all_, bounds in _segments(opt, whole):
        opt._ranks.scatter(all_, own, bounds)
    state = opt.backend.state
    state.global_clip_norm, state.nonfinite, counts = numbers
    state.counts.take_over(counts)
    for number, (group, values) in enumerate(zip(opt.param_groups, groups, strict=True)):
        values["lr"] = group["lr"] if values["lr"] is None else values["lr"]
        group.assign(ParamGroup(values, f"param_groups[{number}]", group.dtypes, opt.cache_dtype))
    opt.backend.options_changed()
