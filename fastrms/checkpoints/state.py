"""Save and restore an optimizer: its parameters, state, options and counts as plain arrays and metadata.

A state to load may be damaged, or come from an untrusted place. So every count, shape and dtype is compared with the
expected one before memory is allocated, and the optimizer is changed only after all of the state was checked.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastrms._checks import check_option
from fastrms._state import STATE_OPTIONS, Counts, OptimizerState, optional_state
from fastrms._types import Metadata
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.checkpoints.formats import Kind, Source, checksum, compare_checksum, opened, reading, write
from fastrms.checkpoints.metadata import check_absent, check_keys, check_metadata, groups_of, kind_of, metadata_of
from fastrms.errors import CheckpointError
from fastrms.options import ParamGroup

__all__ = ["Target", "load_file", "load_state", "restore", "save_file", "state_dict"]


_ABSENT = "skipped"  # the array with the number of steps in which each parameter had no gradient
# An upper bound on the bytes of a file that are not elements: in all, and for each parameter.
_EXTRA, _EXTRA_EACH = 1 << 16, 1 << 11
_PART = 1 << 18  # elements that are read at a time if an array may be larger than memory


class Target(Protocol):
    """The access to an optimizer that saving and restoring need. Every backend has it."""

    @property
    def state(self) -> OptimizerState:
        """The data of the optimizer."""
        ...

    @property
    def in_parts(self) -> bool:
        """Whether buffers may be larger than memory, and are read and written part by part."""
        ...

    def new_buffer(self, name: str) -> FlatBuffer:
        """Return a state buffer of zeros."""
        ...

    def read(self, segments: Sequence[Array]) -> Array:
        """Return segments of a buffer, joined in their order, as one array on the host."""
        ...

    def write(self, segments: Sequence[Array], values: Array | float) -> None:
        """Set the elements of segments of a buffer to a number, or to an array such as `read` returns."""
        ...

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array, small enough to be in memory."""
        ...

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for all writes of a load."""
        ...

    def settle(self) -> Counts:
        """Return the counts, after the last step has been counted."""
        ...

    def counts_changed(self) -> None:
        """Use the counts that were written to `state`, from the next step on."""
        ...

    def options_changed(self) -> None:
        """Use the options that were written to `state`, from the next step on."""
        ...


def state_dict(target: Target) -> dict[str, Any]:
    """Return a copy of all that determines the next steps of an optimizer."""
    counts = target.settle()
    # First, because a signal handler may set an option later, and thereby make a buffer that is not in this metadata.
    metadata = metadata_of(target.state)
    arrays = {_ABSENT: counts.absent.copy()}
    for name, pieces in _pieces(target):
        copied = np.empty(sum(piece.size for piece in pieces), pieces[0].dtype)
        start = 0
        for piece in pieces:
            own = copied[start : start + piece.size]
            for part in target.parts(piece):
                own[part] = piece[part]
            start += piece.size
        arrays[name] = copied
    return metadata | {"arrays": arrays}


def save_file(target: Target, path: Path) -> None:
    """Write the state of an optimizer to a file, completely or not at all."""
    check_keys(target.state.buffers["params"].views)
    counts = target.settle()
    metadata = metadata_of(target.state)  # first, as in `state_dict`
    arrays = dict(_pieces(target)) | {_ABSENT: [counts.absent]}
    checksums = {
        name: checksum(piece[part] for piece in pieces for part in target.parts(piece))
        for name, pieces in arrays.items()
    }
    write(path, arrays, json.dumps(metadata | {"checksums": checksums}), target.parts)


def load_file(target: Target, path: Path) -> None:
    """Read a file of `save_file` into an optimizer."""
    layout = target.state.layout
    expected = 4 * layout.nbytes + (_EXTRA_EACH + 8) * len(layout.leaves) + _EXTRA
    with opened(path, expected) as source:
        restore(target, source)


def load_state(target: Target, state: Any) -> None:
    """Read a state of `state_dict` into an optimizer."""
    restore(target, _StateDict(state, target.state.buffers.values()))


def _vectors(target: Target) -> Iterator[tuple[str, list[Array]]]:
    """Iterate over the names of the vectors of a state, such as "cache/float32", and the segments of each vector."""
    for name, buffer in list(target.state.buffers.items()):
        if name != "grads":
            of_dtype: dict[str, list[Array]] = {}
            for segment in buffer.segments:
                of_dtype.setdefault(f"{name}/{segment.dtype}", []).append(segment)
            yield from of_dtype.items()


def _pieces(target: Target) -> Iterator[tuple[str, Sequence[Array]]]:
    """Iterate over the names of the vectors of a state, and the pieces on the host of which each vector consists."""
    for name, segments in _vectors(target):
        yield name, segments if target.in_parts else [target.read(segments)]


def restore(target: Target, source: Source, keep_lr: Sequence[bool] | None = None) -> None:
    """Check all of `source`, then copy it into an optimizer. After a CheckpointError nothing is changed.

    `keep_lr` tells for each group whether it keeps its own learning rate; None if no group does.
    """
    state = target.state
    with reading():
        loaded = _checked(target, source, keep_lr or [False] * len(state.param_groups))
    # First the allocations, which can fail for lack of memory or disk space.
    state.add_buffers(loaded.names, target.new_buffer)
    counts, metadata = target.settle(), source.metadata
    # From here on only the second reading, for storage, can fail. The folder is then marked as broken off.
    with target.loading():
        for name, segments in _vectors(target):
            if not target.in_parts:
                target.write(segments, loaded.arrays.get(name, 0))
                continue
            if name in loaded.moves:
                with reading():
                    _read_in_parts(target, source, name, segments, loaded.moves[name])
                continue
            for segment in segments:
                for part in target.parts(segment):
                    segment[part] = 0
        counts.absent, counts.updated = loaded.arrays[_ABSENT], None
        counts.steps, counts.skipped_steps = metadata["steps"], metadata["skipped_steps"]
        target.counts_changed()
        target.options_changed()  # before the change too, as Ctrl-C may come right after it
        state.global_clip_norm = check_option("global_clip_norm", metadata["global_clip_norm"])
        state.nonfinite = metadata["nonfinite"]
        for group, options in zip(state.param_groups, loaded.groups, strict=True):
            group.assign(options)
        target.options_changed()


# Pairs of slices: elements of an array in a file, and their place in the segment of the same name.
_Moves = list[tuple[slice, slice]]


class _Loaded(NamedTuple):
    """A state that was checked, in the order of the optimizer's parameters."""

    names: list[str]  # of the buffers
    groups: list[ParamGroup]
    arrays: dict[str, Array]  # by name; only `_ABSENT` if the target works in parts
    moves: dict[str, _Moves]  # of the elements of each array of the file


def _checked(target: Target, source: Source, keep_lr: Sequence[bool]) -> _Loaded:
    """Return the state in `source`, or raise CheckpointError if it does not fit the optimizer."""
    metadata, state = source.metadata, target.state
    check_metadata(metadata)
    order = _matched(metadata_of(state), metadata)
    rates = [
        group["lr"] if keep or saved.get("lr") is None else None
        for group, saved, keep in zip(state.param_groups, metadata["param_groups"], keep_lr, strict=True)
    ]
    groups = groups_of(metadata, [group.dtypes for group in state.param_groups], rates)

    needed = optional_state(groups)
    # State that no option needs any more is kept, because the option may be set again.
    kept = [name for name in STATE_OPTIONS if name not in needed and _has(source.kinds, name)]
    names = ["params", "cache", *needed, *kept]
    expected: dict[str, Kind] = {_ABSENT: (np.dtype(np.int64), state.counts.absent.shape)}
    moves: dict[str, _Moves] = {}
    moves_of_segments = _moves(state.layout, order)
    for name in names:
        segments = (state.layout if name == "params" else state.state_layout(state.layout)).segments
        for segment, of_segment in zip(segments, moves_of_segments, strict=True):
            expected[f"{name}/{segment.dtype}"] = segment.dtype, (segment.size,)
            moves[f"{name}/{segment.dtype}"] = of_segment
    _check_kinds(source.kinds, expected)
    absent = source.read(_ABSENT)
    check_absent(absent, metadata["steps"])
    arrays = {_ABSENT: absent[order]}
    for name, of_array in moves.items():
        if target.in_parts:  # read once to check, and a second time to copy
            _verify(source, name, expected[name])
        else:
            arrays[name] = _arranged(source.read(name), of_array)
    return _Loaded(names, groups, arrays, moves)


def _matched(own: Metadata, found: Metadata) -> list[int]:
    """Return the `_order` of parameters from the metadata of an optimizer (`own`) and of a file (`found`).

    Raise CheckpointError if their parameters differ.
    """
    for name in ("parameters", "param_groups"):
        if len(found[name]) != len(own[name]):
            raise CheckpointError(f"{name}: expected {len(own[name])}, got {len(found[name])}")
    order = _order(own["parameters"], found["parameters"])
    for mine, number in zip(own["parameters"], order, strict=True):
        theirs = found["parameters"][number]
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise CheckpointError(f"params{mine['path']}: expected {key} {value!r}, got {theirs.get(key)!r}")
    if found["cache_dtype"] != own["cache_dtype"]:
        raise CheckpointError(f"cache_dtype: expected {own['cache_dtype']!r}, got {found['cache_dtype']!r}")
    return order


def _check_kinds(kinds: Mapping[str, Kind], expected: Mapping[str, Kind]) -> None:
    """Raise CheckpointError unless the arrays of a file have the expected names, dtypes and shapes."""
    for name, (dtype, shape) in expected.items():
        if name not in kinds:
            raise CheckpointError(f"arrays[{name!r}]: expected {dtype} of shape {shape}, got none")
        if kinds[name] != (dtype, shape):
            found = kinds[name]
            raise CheckpointError(f"arrays[{name!r}]: expected {dtype} of shape {shape}, got {found[0]} of {found[1]}")
    if unknown := kinds.keys() - expected.keys():
        raise CheckpointError(f"arrays: expected {', '.join(expected)}, got also {sorted(unknown)[0]!r}")


def _order(own: Sequence[Metadata], found: Sequence[Metadata]) -> list[int]:
    """Return for each parameter of the optimizer its number in the file. The keys of dicts may be in another order."""
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
    """Return for each segment the places of the file's elements. Parameters that stay neighbours share a slice."""
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
    """Return an array of the file with its elements in the order of the optimizer."""
    if len(moves) <= 1:
        return array
    arranged = np.empty_like(array)
    for source, target in moves:
        arranged[target] = array[source]
    return arranged


def _read_in_parts(target: Target, source: Source, name: str, segments: Sequence[Array], moves: _Moves) -> None:
    """Copy an array of the file into segments that follow one another, part by part."""
    destination = segments[0]
    starts = np.cumsum([0, *(segment.size for segment in segments)]).tolist()

    def slices() -> Iterator[slice]:  # one at a time: `target.parts` gives back the pages of each part before the next
        nonlocal destination
        for there, here in moves:
            for start, segment in zip(starts[:-1], segments, strict=True):
                low, high = max(here.start, start), min(here.stop, start + segment.size)
                piece, first = segment[low - start : max(low, high) - start], there.start + low - here.start
                for part in target.parts(piece):
                    destination = piece[part]
                    yield slice(first + part.start, first + part.stop)

    for numbers in source.parts(name, slices()):
        destination[...] = numbers


class _StateDict:
    """A source that reads a result of `state_dict`. Arrays that alias `buffers` are copied: `restore` writes there."""

    def __init__(self, state: Any, buffers: Iterable[FlatBuffer]) -> None:
        check_metadata(state)
        self.metadata = state
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

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[Array]:
        return (self._arrays[name][part] for part in slices)


def _verify(source: Source, name: str, kind: Kind) -> None:
    """Compare the checksum of an array as `source.read` does, but part by part."""
    if not isinstance(source, _StateDict):  # which has no checksums
        _, (size,) = kind
        slices = (slice(start, min(start + _PART, size)) for start in range(0, size, _PART))
        compare_checksum(source.metadata, name, source.parts(name, slices))


def _has(kinds: Mapping[str, Kind], name: str) -> bool:
    """Tell whether there are arrays of the buffer `name`."""
    return any(isinstance(key, str) and key.startswith(f"{name}/") for key in kinds)
