"""Checkpoints: all of an optimizer as plain arrays, numbers and text, in memory and in files.

What is loaded may come from elsewhere, or be damaged. So nothing in it is run (no pickle), every count, shape and dtype
is compared with what is expected before memory is taken for it, each array has a checksum, and the optimizer is
changed only when all of it was read and found right. What is saved is written to a temporary file beside the old one,
which it replaces when it has reached the disk: whenever a process ends, there is the old file or the new one.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import check_option
from fastrms.buffers import Layout
from fastrms.checkpoints.formats import Kind, Source, checksum, compare_checksum, opened, reading, write
from fastrms.checkpoints.metadata import (
    check_head,
    check_keys,
    check_skipped,
    get_lr,
    groups_of,
    head_of,
    kind_of,
    params_of,
)
from fastrms.errors import CheckpointError
from fastrms.options import ParamGroup

__all__ = ["Checkpointed"]

Array = NDArray[Any]
_Optimizer = Any  # an RMSProp, which is a `Checkpointed` and imports this file

_SKIPPED = "skipped"  # the array of steps that each parameter sat out
# What a file may take around the numbers that are expected in it: in all, and for each array of parameters.
_BESIDES, _BESIDES_EACH = 1 << 16, 1 << 11
_PART = 1 << 18  # numbers that are read at a time where not all can be in memory


class Checkpointed:
    """The methods of `fastrms.RMSProp` that store and restore it."""

    _buffers: dict[str, Any]
    _between_steps: Any

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
        with self._between_steps("state_dict", changes=False):
            return _state_dict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into this optimizer's own buffers, whose views stay as they are, and take over its options.

        Parameters
        ----------
        state : dict
            From `state_dict`, of this or an earlier version. Where it has no learning rate, the present one stays. The
            keys of dicts may be in another order than here.

        Raises
        ------
        CheckpointError
            Other paths, shapes, dtypes or groups than this optimizer's, options out of range, or no such state at all.
            Nothing is changed then.
        """
        with self._between_steps("load_state_dict"):
            _take(self, _Memory(state, self._buffers.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, which appears complete or not at all.

        Parameters
        ----------
        path : str or path-like
            Its name ends in .npz (`numpy.load` reads it) or .safetensors (needs the package safetensors). A file of
            that name is replaced when the new one has reached the disk; the new one has its mode and owner. Where it
            is a link, its target is replaced.

        Raises
        ------
        CheckpointError
            The name has another ending; or a dict of parameters has keys whose repr is not the same in every process,
            such as functions.
        OSError
            It cannot be written, or is read-only; an older file is as it was.
        """
        with self._between_steps("save", changes=False):
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
        with self._between_steps("load"):
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
            The rate of the groups whose own rate was a function, which no file can hold; required if there are such
            groups. If there are none, `lr` replaces the saved rates of all groups.
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
            As for `load`; or a dict of parameters has keys that no file can restore (others than None and Python's own
            str, int, float and bool); or `lr` is required and missing.
        FastrmsError, OSError
            As for `RMSProp`, for `lr`, `kernel`, `num_threads` and `storage`.
        """
        return _new_from_file(cls, Path(path), lr, kernel=kernel, num_threads=num_threads, storage=storage)


def _state_dict(opt: _Optimizer) -> dict[str, Any]:
    head = head_of(opt)  # first: an option that a signal handler sets meanwhile may bring a buffer, and is not in it
    arrays = {_SKIPPED: opt._skipped.copy()}
    for name, segment in _segments(opt):
        there = opt._read(segment)
        arrays[name] = np.empty_like(there)
        for part in opt._in_parts(there):
            arrays[name][part] = there[part]
    return head | {"arrays": arrays}


def _save(opt: _Optimizer, path: Path) -> None:
    check_keys(opt.params)
    head = head_of(opt)  # first, as in `_state_dict`
    arrays = {name: opt._read(segment) for name, segment in _segments(opt)} | {_SKIPPED: opt._skipped}
    checksums = {name: checksum(array[part] for part in opt._in_parts(array)) for name, array in arrays.items()}
    write(path, arrays, json.dumps(head | {"checksums": checksums}), opt._in_parts)


def _load(opt: _Optimizer, path: Path) -> None:
    layout = opt.buffers["params"].layout
    expected = 4 * layout.nbytes + (_BESIDES_EACH + 8) * len(layout.leaves) + _BESIDES
    with opened(path, expected) as source:
        _take(opt, source)


def _new_from_file(cls: Any, path: Path, lr: Any, **options: Any) -> _Optimizer:
    with opened(path, None) as source:
        with reading():
            head = source.head
            check_head(head)
            params = params_of(head, source.kinds)
        new_lr = get_lr(head["param_groups"], lr, "from_checkpoint")
        if head["grouped"]:
            params = [{"params": p} | ({"lr": lr} if new else {}) for p, new in zip(params, new_lr, strict=True)]
        elif lr is not None:
            options["lr"] = lr
        opt = cls(params, cache_dtype=head["cache_dtype"], **options)
        try:
            _take(opt, source, new_lr)
        except BaseException:
            if opt._storage is not None:
                opt._storage.discard()
            raise
    return opt


def _segments(opt: _Optimizer) -> Iterator[tuple[str, Array]]:
    """The dense arrays of parameters and state, by name: "cache/float32"."""
    for name, buffer in list(opt.buffers.items()):
        if name != "grads":
            for segment in buffer.segments:
                yield f"{name}/{segment.dtype}", segment


def _take(opt: _Optimizer, source: Source, keep_lr: Sequence[bool] | None = None) -> None:
    """Check everything that `source` has, then copy it into `opt`, whose groups can keep their rates."""
    with reading():
        loaded = _checked(opt, source, keep_lr or [False] * len(opt.param_groups))
    # Whole or not at all: all that this may lack memory or room for comes first.
    opt.buffers.update({name: opt._new_state(name) for name in loaded.names if name not in opt.buffers})
    # From here on nothing can fail; but for reading again what is to go into storage, which then is marked as torn.
    head = source.head
    with opt._loading():
        for name, segment in _segments(opt):
            if opt._storage is None:
                opt._write(segment, loaded.arrays.get(name, 0))
            elif name in loaded.moves:
                with reading():
                    _read_in_parts(opt, source, name, segment, loaded.moves[name])
            else:
                for part in opt._in_parts(segment):
                    segment[part] = 0
        opt._skipped[...] = loaded.arrays[_SKIPPED]
        opt.steps, opt.skipped_steps = head["steps"], head["skipped_steps"]
        opt._global_clip_norm, opt._nonfinite = (
            check_option("global_clip_norm", head["global_clip_norm"]),
            head["nonfinite"],
        )
        for group, options in zip(opt.param_groups, loaded.groups, strict=True):
            group.assign(options)
    opt._connect()


# Elements of an array in a file, and where they belong in the segment of that name.
_Moves = list[tuple[slice, slice]]


class _Loaded(NamedTuple):
    """What was checked, and can be taken over."""

    names: list[str]  # of buffers
    groups: list[ParamGroup]
    arrays: dict[str, Array]  # in the order of the optimizer; where that has storage, only `_SKIPPED`
    moves: dict[str, _Moves]


def _checked(opt: _Optimizer, source: Source, keep_lr: Sequence[bool]) -> _Loaded:
    """Look whether all of `source` fits the optimizer, of which nothing is changed."""
    head = source.head
    check_head(head)
    own = head_of(opt)
    for name in ("parameters", "param_groups"):
        if len(head[name]) != len(own[name]):
            raise CheckpointError(f"{name}: expected {len(own[name])}, got {len(head[name])}")
    order = _order(own["parameters"], head["parameters"])
    for mine, number in zip(own["parameters"], order, strict=True):
        theirs = head["parameters"][number]
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise CheckpointError(f"params{mine['path']}: expected {key} {value!r}, got {theirs.get(key)!r}")
    if head["cache_dtype"] != own["cache_dtype"]:
        raise CheckpointError(f"cache_dtype: expected {own['cache_dtype']!r}, got {head['cache_dtype']!r}")
    keep = [old or group.get("lr") is None for old, group in zip(keep_lr, head["param_groups"], strict=True)]
    rates = [group["lr"] if old else None for old, group in zip(keep, opt.param_groups, strict=True)]
    groups = groups_of(head, [group.dtypes for group in opt.param_groups], rates)

    names = ["params", "cache"]
    names += ["momentum_buffer"] if any(group["momentum"] for group in groups) else []
    names += ["grad_avg"] if any(group["centered"] for group in groups) else []
    # State that no option asks for any more is kept: an option may come back.
    names += [name for name in ("momentum_buffer", "grad_avg") if name not in names and _has(source.kinds, name)]
    expected: dict[str, Kind] = {_SKIPPED: (np.dtype(np.int64), opt._skipped.shape)}
    moves: dict[str, _Moves] = {}
    moves_of_segments = _moves(opt.buffers["params"].layout, order)
    for name in names:
        segments = opt.buffers["params" if name == "params" else "cache"].segments
        for segment, there in zip(segments, moves_of_segments, strict=True):
            expected[f"{name}/{segment.dtype}"] = segment.dtype, segment.shape
            moves[f"{name}/{segment.dtype}"] = there
    for name, (dtype, shape) in expected.items():
        if name not in source.kinds:
            raise CheckpointError(f"arrays[{name!r}]: expected {dtype} of shape {shape}, got none")
        if source.kinds[name] != (dtype, shape):
            found = source.kinds[name]
            raise CheckpointError(f"arrays[{name!r}]: expected {dtype} of shape {shape}, got {found[0]} of {found[1]}")
    if unknown := source.kinds.keys() - expected.keys():
        raise CheckpointError(f"arrays: expected {', '.join(expected)}, got also {sorted(unknown)[0]!r}")
    skipped = source.read(_SKIPPED)
    check_skipped(skipped, head["steps"])
    arrays = {_SKIPPED: skipped[order]}
    for name, (_, (size,)) in expected.items():
        if opt._storage is not None:  # this may be larger than memory, and is read twice: first to see if it is right
            _verify(source, name, size)
        elif name in moves:
            arrays[name] = _arranged(source.read(name), moves[name])
    return _Loaded(names, groups, arrays, moves)


def _order(own: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each of our own parameters, which of those that were found has its path: keys of dicts have no order."""
    paths, ours = [parameter.get("path") for parameter in found], [parameter["path"] for parameter in own]
    if paths == ours:
        return list(range(len(ours)))
    numbers: dict[Any, list[int]] = {}
    for number, path in enumerate(paths):
        numbers.setdefault(path, []).append(number)
    order = []
    for path in ours:
        if not numbers.get(path):
            known = set(ours)
            got = next((other for other in numbers if other not in known), None)
            raise CheckpointError(f"params{path}: expected path {path!r}, got {got!r}")
        order.append(numbers[path].pop(0))
    return order


def _moves(layout: Layout, order: Sequence[int]) -> list[_Moves]:
    """Where elements of the arrays of a file belong, for each segment; of neighbours that stay so as one slice."""
    moves: list[_Moves] = [[] for _ in layout.segments]
    start = [0] * len(layout.segments)
    for number in np.argsort(order):  # in the order of the file
        leaf = layout.leaves[number]
        here, first = moves[leaf.segment], start[leaf.segment]
        start[leaf.segment] = last = first + leaf.stop - leaf.start
        if here and here[-1][1].stop == leaf.start:
            here[-1] = slice(here[-1][0].start, last), slice(here[-1][1].start, leaf.stop)
        else:
            here.append((slice(first, last), slice(leaf.start, leaf.stop)))
    return moves


def _arranged(array: Array, moves: _Moves) -> Array:
    if len(moves) <= 1:
        return array
    arranged = np.empty_like(array)
    for source, target in moves:
        arranged[target] = array[source]
    return arranged


def _read_in_parts(opt: _Optimizer, source: Source, name: str, segment: Array, moves: _Moves) -> None:
    target = segment

    def slices() -> Iterator[slice]:
        nonlocal target
        for there, here in moves:
            for part in opt._in_parts(segment[here]):
                target = segment[here][part]
                yield slice(there.start + part.start, there.start + part.stop)

    for _, numbers in source.parts(name, slices()):
        target[...] = numbers


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
