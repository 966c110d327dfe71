"""Save and restore an optimizer: its parameters, state, options and counts as plain arrays, numbers and text.

A state to load may come from elsewhere, or be damaged. So nothing in it is run (no pickle). Every count, shape and
dtype is compared with the expected one before memory is taken for it, and each array has a checksum. The optimizer is
changed only when all of it was read and found right. A new file is written beside the old one, which it replaces when
it has reached the disk: whenever a process ends, there is the old file or the new one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import check_option
from fastrms._state import Counts, OptimizerState
from fastrms.buffers import FlatBuffer, Layout
from fastrms.checkpoints.formats import Kind, Source, checksum, compare_checksum, opened, reading, write
from fastrms.checkpoints.metadata import check_head, check_keys, check_skipped, groups_of, head_of, kind_of
from fastrms.errors import CheckpointError
from fastrms.options import ParamGroup

__all__ = ["Target", "load_file", "load_state", "restore", "save_file", "state_dict"]

Array = NDArray[Any]

_SKIPPED = "skipped"  # the array of steps in which each parameter had no gradient
# The bytes of a file beside the expected numbers: in all, and for each array of parameters.
_BESIDES, _BESIDES_EACH = 1 << 16, 1 << 11
_PART = 1 << 18  # numbers that are read at a time where not all can be in memory


class Target(Protocol):
    """An optimizer to save or to restore: every backend is one."""

    @property
    def state(self) -> OptimizerState:
        """The data of the optimizer."""

    @property
    def in_parts(self) -> bool:
        """Whether buffers may be larger than memory, and are read and written part by part."""

    def new_buffer(self, name: str) -> FlatBuffer:
        """Return a state buffer of zeros."""

    def read(self, segment: Any) -> Array:
        """Return a segment of a buffer as an array on the host."""

    def write(self, segment: Any, values: Array | float) -> None:
        """Set the elements of a segment of a buffer."""

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array, small enough to be in memory."""

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for all writes of a load."""

    def settle(self) -> Counts:
        """Return the counts, after the last step has been counted."""

    def counts_changed(self) -> None:
        """Use the counts that were written to `state`."""

    def options_changed(self) -> None:
        """Use the options that were written to `state`."""


def state_dict(target: Target) -> dict[str, Any]:
    """Return a copy of everything that decides the next steps of an optimizer."""
    counts = target.settle()
    head = head_of(target.state)  # first: a signal handler may set an option that brings a buffer, which is not in it
    arrays = {_SKIPPED: counts.absent.copy()}
    for name, segment in _segments(target):
        there = target.read(segment)
        arrays[name] = np.empty_like(there)
        for part in target.parts(there):
            arrays[name][part] = there[part]
    return head | {"arrays": arrays}


def save_file(target: Target, path: Path) -> None:
    """Write the state of an optimizer to a file, which appears complete or not at all."""
    check_keys(target.state.buffers["params"].views)
    counts = target.settle()
    head = head_of(target.state)  # first, as in `state_dict`
    arrays = {name: target.read(segment) for name, segment in _segments(target)} | {_SKIPPED: counts.absent}
    checksums = {name: checksum(array[part] for part in target.parts(array)) for name, array in arrays.items()}
    write(path, arrays, json.dumps(head | {"checksums": checksums}), target.parts)


def load_file(target: Target, path: Path) -> None:
    """Read a file of `save_file` into an optimizer."""
    layout = target.state.layout
    expected = 4 * layout.nbytes + (_BESIDES_EACH + 8) * len(layout.leaves) + _BESIDES
    with opened(path, expected) as source:
        restore(target, source)


def load_state(target: Target, state: Any) -> None:
    """Read a state of `state_dict` into an optimizer."""
    restore(target, _Memory(state, target.state.buffers.values()))


def _segments(target: Target) -> Iterator[tuple[str, Any]]:
    """Iterate over the dense arrays of parameters and state, with names such as "cache/float32"."""
    for name, buffer in list(target.state.buffers.items()):
        if name != "grads":
            for segment in buffer.segments:
                yield f"{name}/{segment.dtype}", segment


def restore(target: Target, source: Source, keep_lr: Sequence[bool] | None = None) -> None:
    """Check all of `source`, then copy it into an optimizer.

    Parameters
    ----------
    target : Target
    source : Source
    keep_lr : sequence of bool or None, default None
        Which groups keep their own learning rate; None for none.

    Raises
    ------
    CheckpointError
        Something in `source` does not fit. Nothing is changed then.
    """
    state = target.state
    with reading():
        loaded = _checked(target, source, keep_lr or [False] * len(state.param_groups))
    # Whole or not at all: everything for which memory or room may lack comes first.
    state.buffers.update({name: target.new_buffer(name) for name in loaded.names if name not in state.buffers})
    counts, head = target.settle(), source.head
    # From here on nothing can fail, except reading again for storage, which is marked as torn then.
    with target.loading():
        for name, segment in _segments(target):
            if not target.in_parts:
                target.write(segment, loaded.arrays.get(name, 0))
            elif name in loaded.moves:
                with reading():
                    _read_in_parts(target, source, name, segment, loaded.moves[name])
            else:
                for part in target.parts(segment):
                    segment[part] = 0
        counts.absent = loaded.arrays[_SKIPPED]
        counts.steps, counts.skipped_steps = head["steps"], head["skipped_steps"]
        target.counts_changed()
        target.options_changed()  # also ahead of the change, as Ctrl-C may come in between
        state.global_clip_norm = check_option("global_clip_norm", head["global_clip_norm"])
        state.nonfinite = head["nonfinite"]
        for group, options in zip(state.param_groups, loaded.groups, strict=True):
            group.assign(options)
        target.options_changed()


# Elements of an array in a file, and where they belong in the segment of that name.
_Moves = list[tuple[slice, slice]]


class _Loaded(NamedTuple):
    """What was checked, and can be taken over."""

    names: list[str]  # of buffers
    groups: list[ParamGroup]
    arrays: dict[str, Array]  # in the order of the optimizer; where that has storage, only `_SKIPPED`
    moves: dict[str, _Moves]


def _checked(target: Target, source: Source, keep_lr: Sequence[bool]) -> _Loaded:
    """Look whether all of `source` fits the optimizer, of which nothing is changed."""
    head = source.head
    check_head(head)
    state = target.state
    own = head_of(state)
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
    rates = [group["lr"] if old else None for old, group in zip(keep, state.param_groups, strict=True)]
    groups = groups_of(head, [group.dtypes for group in state.param_groups], rates)

    names = ["params", "cache"]
    names += ["momentum_buffer"] if any(group["momentum"] for group in groups) else []
    names += ["grad_avg"] if any(group["centered"] for group in groups) else []
    # State that no option asks for any more is kept: an option may come back.
    names += [name for name in ("momentum_buffer", "grad_avg") if name not in names and _has(source.kinds, name)]
    expected: dict[str, Kind] = {_SKIPPED: (np.dtype(np.int64), state.counts.absent.shape)}
    moves: dict[str, _Moves] = {}
    moves_of_segments = _moves(state.layout, order)
    for name in names:
        segments = state.buffers["params" if name == "params" else "cache"].segments
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
        if target.in_parts:  # read twice: first to see whether it is right
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


def _read_in_parts(target: Target, source: Source, name: str, segment: Array, moves: _Moves) -> None:
    destination = segment

    def slices() -> Iterator[slice]:
        nonlocal destination
        for there, here in moves:
            for part in target.parts(segment[here]):
                destination = segment[here][part]
                yield slice(there.start + part.start, there.start + part.stop)

    for _, numbers in source.parts(name, slices()):
        destination[...] = numbers


class _Memory:
    """What `state_dict` returned; arrays that alias `buffers`, which are written in turn, are copied."""

    def __init__(self, state: Any, buffers: Iterable[FlatBuffer]) -> None:
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
