"""Checkpoints: all of an optimizer as plain arrays, numbers and text, in memory and in files.

What is loaded may come from elsewhere, or be damaged. So nothing in it is run (no pickle), every count, shape and dtype
is compared with what is expected before memory is taken for it, each array has a checksum, and the optimizer is
changed only when all of it was read and found right. What is saved is written to a temporary file beside the old one,
which it replaces when it has reached the disk: whenever a process ends, there is the old file or the new one.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.archives import Kind, Source, checksum, compare_checksum, opened, write
from fastrms.errors import CheckpointError, FastrmsError
from fastrms.heads import check_head, head_of, kind_of, params_of
from fastrms.options import ParamGroup, check_option

__all__ = ["Checkpointed"]

Array = NDArray[Any]
_Optimizer = Any  # an RMSProp, which is a `Checkpointed` and imports this file

_SKIPPED = "skipped"  # the array of steps that each parameter sat out
# What a file may take around the numbers that are expected in it: in all, and for each array of parameters.
_BESIDES, _BESIDES_EACH = 1 << 16, 1 << 11
_PART = 1 << 18  # numbers that are read at a time where not all can be in memory


class Checkpointed:
    """The methods of `fastrms.RMSProp` that store and restore it."""

    buffers: dict[str, Any]
    _lock: Any

    def _read(self, segment: Any) -> Array:
        """The numbers of a segment of a buffer, where NumPy can use them."""
        array: Array = segment
        return array

    def _write(self, segment: Any, values: Any) -> None:
        """Set the numbers of a segment of a buffer."""
        segment[...] = values

    def state_dict(self) -> dict[str, Any]:
        """All that makes the next steps what they would have been, copied: plain arrays, numbers and text.

        Returns
        -------
        state : dict
            Under ``"arrays"`` parameters and state, dense and 1-D, one array for each dtype (``"cache/float32"``);
            under ``"parameters"`` path, shape, dtype and group of each parameter in the order in which they lie there;
            the options, ``"steps"``, and the ``"version"`` of all this. A learning rate that is a function is None.
        """
        with self._lock:
            return _state_dict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into this optimizer's own buffers, whose views stay as they are, and take over its options.

        Parameters
        ----------
        state : dict
            From `state_dict`, of this or an earlier version. Where it has no learning rate, the present one stays.

        Raises
        ------
        CheckpointError
            Other paths, shapes, dtypes or groups than this optimizer's, options out of range, or no such state at all.
            Nothing is changed then.
        """
        with self._lock:
            _take(self, _Memory(state, self.buffers.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, which appears complete or not at all.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz (`numpy.load` reads it) or .safetensors (needs the package safetensors). A file of
            that name is replaced when the new one has reached the disk.

        Raises
        ------
        CheckpointError
            Another ending.
        OSError
            It cannot be written; an older file is as it was.
        """
        with self._lock:
            _save(self, Path(path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a file of `save` into this optimizer, as `load_state_dict`; it may come from anywhere.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz or .safetensors.

        Raises
        ------
        CheckpointError
            It is damaged, larger than a file of this optimizer can be, no checkpoint, or of another optimizer. Nothing
            is changed then.
        OSError
            It cannot be opened.
        """
        with self._lock:
            _load(self, Path(path))

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        lr: float | Callable[[int], float] | None = None,
        kernel: str = "auto",
        num_threads: int | None = None,
        storage: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Make the optimizer that a file of `save` is of, with its parameters, their structure and all options.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz or .safetensors.
        lr : float or callable, optional
            Instead of what was saved; needed where that was a function, which no file holds.
        kernel : {"auto", "numpy", "serial", "parallel", "cuda"}, default "auto"
            As for `RMSProp`; it is not saved, as it changes no bit.
        num_threads : int or None, default None
            As for `RMSProp`; not saved either.
        storage : path of a new or empty folder, or None, default None
            As for `RMSProp`: where to keep parameters and state, if not in memory.

        Returns
        -------
        optimizer : RMSProp
            With parameters and state of its own.

        Raises
        ------
        CheckpointError
            As for `load`; or the keys of a dict of parameters are not text or numbers.
        """
        return _new_from_file(cls, Path(path), lr, kernel=kernel, num_threads=num_threads, storage=storage)


def _state_dict(opt: _Optimizer) -> dict[str, Any]:
    arrays = {_SKIPPED: opt._skipped.copy()}
    for name, segment in _segments(opt):
        there = opt._read(segment)
        arrays[name] = np.empty_like(there)
        for part in opt._in_parts(there):
            arrays[name][part] = there[part]
    return head_of(opt) | {"arrays": arrays}


def _save(opt: _Optimizer, path: Path) -> None:
    arrays = {name: opt._read(segment) for name, segment in _segments(opt)} | {_SKIPPED: opt._skipped}
    checksums = {name: checksum(array[part] for part in opt._in_parts(array)) for name, array in arrays.items()}
    write(path, arrays, json.dumps(head_of(opt) | {"checksums": checksums}), opt._in_parts)


def _load(opt: _Optimizer, path: Path) -> None:
    layout = opt.buffers["params"].layout
    expected = 4 * layout.nbytes + (_BESIDES_EACH + 8) * len(layout.leaves) + _BESIDES
    with opened(path, expected) as source:
        _take(opt, source)


def _new_from_file(cls: Any, path: Path, lr: Any, **options: Any) -> _Optimizer:
    with opened(path, None) as source:
        head = source.head
        check_head(head)
        params = params_of(head, source.kinds)
        if lr is None and any(group.get("lr") is None for group in head["param_groups"]):
            raise CheckpointError("lr: it was a function, which no file holds; give it: from_checkpoint(path, lr=...)")
        groups = [{"params": part} for part in params] if head["grouped"] else params
        opt = cls(groups, cache_dtype=head["cache_dtype"], **options)
        if lr is not None:
            opt.lr = lr
        _take(opt, source)
    if lr is not None:
        opt.lr = lr
    return opt


def _segments(opt: _Optimizer) -> Iterator[tuple[str, Array]]:
    """The dense arrays of parameters and state, by name: "cache/float32"."""
    for name, buffer in opt.buffers.items():
        if name != "grads":
            for segment in buffer.segments:
                yield f"{name}/{segment.dtype}", segment


def _take(opt: _Optimizer, source: Source) -> None:
    """Check everything that `source` has, then copy it into `opt`."""
    head = source.head
    check_head(head)
    own = head_of(opt)
    for name in ("parameters", "param_groups"):
        if len(head[name]) != len(own[name]):
            raise CheckpointError(f"{name}: expected {len(own[name])}, got {len(head[name])}")
    for mine, theirs in zip(own["parameters"], head["parameters"], strict=True):
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise CheckpointError(f"params{mine['path']}: expected {key} {value!r}, got {theirs.get(key)!r}")
    if head["cache_dtype"] != own["cache_dtype"]:
        raise CheckpointError(f"cache_dtype: expected {own['cache_dtype']!r}, got {head['cache_dtype']!r}")
    groups = []
    for number, (group, options) in enumerate(zip(opt.param_groups, head["param_groups"], strict=True)):
        values = {**options, "lr": group["lr"] if options.get("lr") is None else options["lr"]}
        try:
            groups.append(ParamGroup(values, f"param_groups[{number}]", group.dtypes, opt.cache_dtype))
        except (FastrmsError, TypeError) as error:
            raise CheckpointError(str(error)) from None

    names = ["params", "cache"]
    names += ["momentum_buffer"] if any(group["momentum"] for group in groups) else []
    names += ["grad_avg"] if any(group["centered"] for group in groups) else []
    # State that no option asks for any more is kept: an option may come back.
    names += [name for name in ("momentum_buffer", "grad_avg") if name not in names and _has(source.kinds, name)]
    expected: dict[str, Kind] = {_SKIPPED: (np.dtype(np.int64), opt._skipped.shape)}
    for name in names:
        for segment in opt.buffers["params" if name == "params" else "cache"].segments:
            expected[f"{name}/{segment.dtype}"] = segment.dtype, segment.shape
    for name, (dtype, shape) in expected.items():
        if name not in source.kinds:
            raise CheckpointError(f"arrays[{name!r}]: expected {dtype} of shape {shape}, got none")
        if source.kinds[name] != (dtype, shape):
            found = source.kinds[name]
            raise CheckpointError(f"arrays[{name!r}]: expected {dtype} of shape {shape}, got {found[0]} of {found[1]}")
    if unknown := source.kinds.keys() - expected.keys():
        raise CheckpointError(f"arrays: expected {', '.join(expected)}, got also {sorted(unknown)[0]!r}")
    # What goes into storage may be larger than memory: it is read twice, first to see whether it is right.
    arrays = {name: source.read(name) for name in expected if opt._storage is None or name == _SKIPPED}
    for name in expected.keys() - arrays.keys():
        _verify(source, name, expected[name][1][0])

    # From here on nothing can fail; but for reading again what is to go into storage, which then is marked as torn.
    for name in names:
        if name not in opt.buffers:
            opt.buffers[name] = opt._new_state(name)
    with opt._loading():
        for name, segment in _segments(opt):
            if opt._storage is None:
                opt._write(segment, arrays.get(name, 0))
            elif name in expected:
                for part, numbers in source.parts(name, opt._in_parts(segment)):
                    segment[part] = numbers
            else:
                for part in opt._in_parts(segment):
                    segment[part] = 0
        opt._skipped[...] = arrays[_SKIPPED]
        opt.steps, opt.skipped_steps = head["steps"], head["skipped_steps"]
        opt._global_clip_norm, opt._nonfinite = (
            check_option("global_clip_norm", head["global_clip_norm"]),
            head["nonfinite"],
        )
        for group, loaded in zip(opt.param_groups, groups, strict=True):
            group.take_over(loaded)
    opt._connect()


class _Memory:
    """What `state_dict` returned; arrays that alias `buffers`, which are written in turn, are copied."""

    def __init__(self, state: Any, buffers: Iterable[Any]) -> None:
        check_head(state)
        self.head = state
        arrays = state.get("arrays")
        if not isinstance(arrays, Mapping):
            raise CheckpointError(f"arrays: expected a dict, got {kind_of(arrays)}")
        for name, array in arrays.items():
            if type(array) is not np.ndarray:
                raise CheckpointError(f"arrays[{name!r}]: expected an array, got {kind_of(array)}")
        aliases = np.any([buffer.aliases(list(arrays.values())) for buffer in buffers], axis=0)
        self._arrays = {
            name: array.copy() if alias else array for (name, array), alias in zip(arrays.items(), aliases, strict=True)
        }
        self.kinds = {name: (array.dtype, array.shape) for name, array in self._arrays.items()}

    def read(self, name: str) -> Array:
        array: Array = self._arrays[name]
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]:
        for part in slices:
            yield part, self._arrays[name][part]


def _verify(source: Source, name: str, size: int) -> None:
    """Compare an array with its checksum, as `source.read` does, without having all of it in memory."""
    if not isinstance(source, _Memory):
        slices = (slice(start, min(start + _PART, size)) for start in range(0, size, _PART))
        compare_checksum(source.head, name, (values for _, values in source.parts(name, slices)))


def _has(kinds: Mapping[str, Kind], name: str) -> bool:
    return any(isinstance(key, str) and key.startswith(f"{name}/") for key in kinds)
