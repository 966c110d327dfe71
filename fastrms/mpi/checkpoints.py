"""Checkpoints of an optimizer that is divided among ranks: those of `fastrms.RMSProp`, which know nothing of ranks."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from fastrms.buffers import Array
from fastrms.mpi.communicator import Bounds, Communicator
from fastrms.mpi.waiting import check_timeout
from fastrms.optimizer import RMSProp
from fastrms.options import ParamGroup

__all__ = ["Unsharded"]

_Optimizer = Any  # a ShardedRMSProp, which is an `Unsharded` and imports this file


class Unsharded:
    """The methods of `fastrms.mpi.ShardedRMSProp` that store and restore it."""

    _ranks: Communicator
    _together: Callable[[str], AbstractContextManager[bool]]

    def state_dict(self) -> dict[str, Any]:
        """All that makes the next steps what they would have been, of all ranks, as from `RMSProp.state_dict`.

        All ranks call it, and each gets all of it.

        Returns
        -------
        state : dict
            Which an `RMSProp`, or this class with any number of ranks, can load.
        """
        with self._together("state_dict"):
            whole = _whole(self, on_all=True)
            assert whole is not None
            for own, all_, bounds in _segments(self, whole):
                all_[bounds[self._ranks.rank] : bounds[self._ranks.rank + 1]] = own
                self._ranks.all_gather(all_, bounds)
            return whole.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Take over a state of rank 0: parameters, each rank's part of the state, and options. All ranks call it.

        Parameters
        ----------
        state : dict
            From `state_dict`, of `RMSProp` or of this class with any number of ranks. Only that of rank 0 is looked
            at; others may give None.

        Raises
        ------
        CheckpointError
            On all ranks, as from `RMSProp.load_state_dict`. Nothing is changed then.
        """
        with self._together("load_state_dict"):
            whole = _whole(self)
            _on_first(self._ranks, lambda: whole.load_state_dict(state) if whole else None)
            _distribute(self, whole)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state of all ranks to one file, as `RMSProp.save` does. All ranks call it, and rank 0 writes.

        Rank 0 needs memory for all of the state meanwhile.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz or .safetensors. That of rank 0 counts.

        Raises
        ------
        CheckpointError, OSError
            On all ranks, as from `RMSProp.save`.
        """
        with self._together("save"):
            whole = _whole(self)
            for own, all_, bounds in _segments(self, whole):
                self._ranks.gather(own, all_, bounds)
            _on_first(self._ranks, lambda: whole.save(path) if whole else None)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a file of `save`, or of `RMSProp.save`. All ranks call it, and rank 0 reads.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz or .safetensors. That of rank 0 counts.

        Raises
        ------
        CheckpointError, OSError
            On all ranks, as from `RMSProp.load`. Nothing is changed then.
        """
        with self._together("load"):
            whole = _whole(self)
            _on_first(self._ranks, lambda: whole.load(path) if whole else None)
            _distribute(self, whole)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        lr: float | Callable[[int], float] | None = None,
        kernel: str = "auto",
        num_threads: int | None = None,
        comm: Any = None,
        reduction: str = "mean",
        timeout: float | str | None = "auto",
    ) -> Any:
        """Make the optimizer that a file is of, with its parameters, their structure and all options.

        All ranks call it, and rank 0 reads the file, of this class or of `RMSProp`.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz or .safetensors. That of rank 0 counts.
        lr : float or callable, optional
            The rate of the groups whose own rate was a function, which no file can hold; required if there are such
            groups. If there are none, `lr` replaces the saved rates of all groups.
        kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
            As for `ShardedRMSProp`.
        num_threads : int or None, default None
            As for `ShardedRMSProp`.
        comm : mpi4py.MPI.Intracomm or None, default None
            As for `ShardedRMSProp`.
        reduction : {"mean", "sum"}, default "mean"
            As for `ShardedRMSProp`; it is not saved.
        timeout : float, None or "auto", default "auto"
            As for `ShardedRMSProp`.

        Returns
        -------
        optimizer : ShardedRMSProp
            With parameters of its own, and this rank's part of the state.

        Raises
        ------
        CheckpointError, OSError
            On all ranks, as from `RMSProp.from_checkpoint`.
        """
        ranks = Communicator(comm, "ShardedRMSProp.from_checkpoint", check_timeout(timeout))
        whole: RMSProp | None = None

        def read() -> None:
            nonlocal whole
            if ranks.rank == 0:
                whole = RMSProp.from_checkpoint(path, lr=lr, kernel="numpy")

        with ranks.leaving():
            _on_first(ranks, read)
            layout, grouped, cache_dtype = ranks.control.bcast(
                None
                if whole is None
                else (whole.buffers["params"].layout, whole.backend.state.grouped, whole.cache_dtype)
            )
        params = layout.structure(np.zeros(leaf.shape, layout.dtype_of(leaf)) for leaf in layout.leaves)
        options = {"kernel": kernel, "num_threads": num_threads, "cache_dtype": cache_dtype}
        groups = [{"params": part} for part in params] if grouped else params
        made: Any = cls
        opt = made(groups, comm=comm, reduction=reduction, timeout=timeout, **options)
        with opt._ranks.leaving():
            if lr is not None:
                opt.lr = lr
            _distribute(opt, whole)
        return opt


def _on_first(ranks: Communicator, act: Callable[[], None]) -> None:
    """Do something on rank 0, and raise on all ranks what it raises."""
    error: BaseException | None = None
    try:
        if ranks.rank == 0:
            act()
    except BaseException as caught:  # Ctrl-C and sys.exit() too, as the others wait here
        error = caught
    ranks.broadcast_error(error)


def _whole(opt: _Optimizer, on_all: bool = False) -> RMSProp | None:
    """Return an ordinary optimizer like `opt`, without the state of other ranks; on rank 0, or on all."""
    whole, error = None, None
    try:
        if on_all or opt.rank == 0:
            whole = _new_whole(opt)
    except Exception as caught:  # for want of memory
        error = caught
    opt._ranks.agree(error)
    return whole


def _new_whole(opt: _Optimizer) -> RMSProp:
    options = {"global_clip_norm": opt.global_clip_norm, "nonfinite": opt.nonfinite, "cache_dtype": opt.cache_dtype}
    if opt.backend.state.grouped:
        whole = RMSProp([dict(group) for group in opt.param_groups], kernel="numpy", **options)
    else:
        own = {name: value for name, value in opt.param_groups[0].items() if name != "params"}
        whole = RMSProp(opt.params, kernel="numpy", **own, **options)
    for name in _state_of(opt):
        if name not in whole.buffers:  # of an option that was on before
            whole.buffers[name] = whole.backend.new_buffer(name)
    whole.backend.state.counts.take_over(opt.backend.state.counts)
    return whole


def _state_of(opt: RMSProp) -> list[str]:
    return sorted(name for name in opt.buffers if name not in ("params", "grads"))


def _segments(opt: _Optimizer, whole: RMSProp | None) -> Iterator[tuple[Array, Any, Bounds]]:
    """Each segment of the state: this rank's part, that of the whole (None where it is not), and where parts begin."""
    for name in _state_of(opt):
        for number, own in enumerate(opt.buffers[name].segments):
            yield own, None if whole is None else whole.buffers[name].segments[number], opt._shards.bounds[number]


def _distribute(opt: _Optimizer, whole: RMSProp | None) -> None:
    """Take over everything from an ordinary optimizer that rank 0 has."""
    metadata = None
    if whole is not None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in whole.param_groups]
        for group in groups:
            group["lr"] = None if callable(group["lr"]) else group["lr"]
        numbers = (whole.global_clip_norm, whole.nonfinite, whole.backend.state.counts)
        metadata = groups, numbers, _state_of(whole)
        for mine, theirs in zip(opt.buffers["params"].segments, whole.buffers["params"].segments, strict=True):
            mine[...] = theirs
    groups, numbers, names = opt._ranks.control.bcast(metadata)
    opt._broadcast_params()
    for name in names:
        if name not in opt.buffers:
            opt.buffers[name] = opt.backend.new_buffer(name)
    for own, all_, bounds in _segments(opt, whole):
        opt._ranks.scatter(all_, own, bounds)
    state = opt.backend.state
    state.global_clip_norm, state.nonfinite, counts = numbers
    state.counts.take_over(counts)
    for number, (group, values) in enumerate(zip(opt.param_groups, groups, strict=True)):
        values["lr"] = group["lr"] if values["lr"] is None else values["lr"]
        group.assign(ParamGroup(values, f"param_groups[{number}]", group.dtypes, opt.cache_dtype))
    opt.backend.options_changed()
