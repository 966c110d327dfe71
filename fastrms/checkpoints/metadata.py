"""The metadata of an optimizer: all but the arrays of a checkpoint, that is structure, dtypes, options and counts."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import NONFINITE, check_cache_dtype, check_one_of, check_option
from fastrms._state import OptimizerState
from fastrms._types import DType, Metadata
from fastrms.buffers import Array, Layout
from fastrms.checkpoints.formats import Kind
from fastrms.errors import CheckpointError, FastrmsError, StructureError
from fastrms.options import ParamGroup, parameter_groups

__all__ = [
    "MOST_STEPS",
    "VERSION",
    "check_absent",
    "check_keys",
    "check_metadata",
    "check_options",
    "encode",
    "groups_of",
    "kind_of",
    "metadata_of",
    "not_steps",
    "params_of",
    "which_get_lr",
]


# The version of the metadata. This and all older ones can be loaded; tests/checkpoints has a file of each.
VERSION = 1

_FORMAT = "fastrms.RMSProp"
_MOST_DIMENSIONS = 64  # of NumPy

# No run takes more steps: at one a microsecond it would take 285 years. float64 has all these integers.
MOST_STEPS = 2**53


def metadata_of(state: OptimizerState) -> dict[str, Any]:
    """Return the metadata of an optimizer, in types that JSON has."""
    layout, counts = state.layout, state.counts
    try:
        structure = encode(layout.structure(range(len(layout.leaves))))
    except StructureError:
        structure = None  # `load` works without it
    return {
        "format": _FORMAT,
        "version": VERSION,
        "steps": counts.steps,
        "skipped_steps": counts.skipped_steps,
        "global_clip_norm": state.global_clip_norm,
        "nonfinite": state.nonfinite,
        "cache_dtype": state.cache_dtype,
        "param_groups": [
            # A function cannot be stored. The caller of `load` has it.
            {name: None if callable(value) else value for name, value in group.items() if name != "params"}
            for group in state.param_groups
        ],
        "parameters": [
            {"path": leaf.path, "shape": list(leaf.shape), "dtype": str(layout.dtype_of(leaf)), "group": int(group)}
            for leaf, group in zip(layout.leaves, state.group_of, strict=True)
        ],
        "grouped": state.grouped,
        "structure": structure,
    }


def check_metadata(metadata: object) -> None:
    """Raise CheckpointError if metadata is wrong for every optimizer."""
    if not isinstance(metadata, Mapping) or metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"expected what RMSProp.state_dict() returns, or a file of RMSProp.save(), got {kind_of(metadata)}"
        )
    version = metadata.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        newer = "; it needs a newer fastrms" if type(version) is int and version > VERSION else ""
        raise CheckpointError(f"version: expected 1 to {VERSION}, got {version!r}{newer}")
    _check_entries(metadata)
    try:
        check_option("global_clip_norm", metadata["global_clip_norm"])
        check_one_of("nonfinite", metadata["nonfinite"], NONFINITE)
        check_cache_dtype(metadata["cache_dtype"], {np.dtype(np.float32)})
    except FastrmsError as error:
        raise CheckpointError(str(error)) from None


def _check_entries(metadata: Metadata) -> None:
    """Raise CheckpointError if an entry of the metadata is missing or of the wrong kind."""
    for name in ("steps", "skipped_steps"):
        if not _is_count(metadata.get(name)) or metadata[name] > MOST_STEPS:
            raise not_steps(name, metadata.get(name))
    for name in ("parameters", "param_groups"):
        items = metadata.get(name)
        if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
            raise CheckpointError(f"{name}: expected a list of dicts, got {kind_of(items)}")
    if not isinstance(metadata.get("grouped"), bool):
        raise CheckpointError(f"grouped: expected True or False, got {metadata.get('grouped')!r}")
    for name in ("global_clip_norm", "nonfinite", "cache_dtype", "structure"):
        if name not in metadata:
            raise CheckpointError(f"{name}: missing in the state")


def not_steps(name: str, value: object) -> CheckpointError:
    """Return the error about a value that is no number of steps."""
    return CheckpointError(
        f"{name}: expected a number of steps, got {value!r}, which is not a whole number from 0 to 2**53"
    )


def check_absent(absent: NDArray[np.int64], steps: int) -> None:
    """Raise CheckpointError unless each count of steps without a gradient is from 0 to `steps`."""
    wrong = np.flatnonzero((absent < 0) | (absent > steps))
    if len(wrong):
        k = wrong[0]
        raise CheckpointError(
            f"skipped[{k}]: expected 0 to {steps}, because no parameter can miss more steps than were taken; "
            f"got {absent[k]}"
        )


def params_of(metadata: Metadata, kinds: Mapping[str, Kind] | None) -> Any:
    """Return parameters with the structure, shapes and dtypes of `metadata`. They are zeros, and take no memory.

    Raise CheckpointError for parameters that the constructor of an optimizer would refuse, and for arrays of a file
    (`kinds`) that have other sizes than the metadata say. Without a file `kinds` is None.
    """
    grouped, arrays = metadata["grouped"], _empty_arrays(metadata["parameters"], kinds)
    try:
        params = _decode(metadata["structure"], enumerate(arrays))
        fits = isinstance(params, list) if grouped else parameter_groups(params) is None
        if not fits:
            raise ValueError("a list of groups where none is expected, or none where one is")
        paths = [leaf.path for leaf in Layout(params, "params").leaves]
        check_cache_dtype(metadata["cache_dtype"], {array.dtype for array in arrays})
    except (FastrmsError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise CheckpointError("structure: cannot be rebuilt; make an RMSProp and use load()") from None
    if paths != [parameter.get("path") for parameter in metadata["parameters"]]:
        raise CheckpointError("structure and parameters do not fit together; make an RMSProp and use load()")
    if (count := len(params) if grouped else 1) != len(metadata["param_groups"]):
        raise CheckpointError(f"param_groups: expected {count}, got {len(metadata['param_groups'])}")
    return params


def which_get_lr(metadata: Metadata, lr: object, call: str, error: type[FastrmsError]) -> list[bool]:
    """Tell for each group whether it gets the caller's `lr`: groups without a saved rate, or else all groups.

    Raise `error`, which recommends `call`, if a group has no saved rate and `lr` is None.
    """
    missing = [group.get("lr") is None for group in metadata["param_groups"]]
    if lr is None and any(missing):
        raise error(
            "lr: expected a learning rate for the groups whose learning rate was a function, because a file cannot "
            f"store functions; got None. Pass it: {call}(path, lr=...)"
        )
    return missing if any(missing) else [lr is not None] * len(missing)


def groups_of(metadata: Metadata, dtypes: Sequence[Set[DType]], lr: Sequence[object]) -> list[ParamGroup]:
    """Return the groups of `metadata`, or raise CheckpointError if an option is unknown or out of range.

    `dtypes` has the dtypes of each group's parameters; `lr` a new rate for each group, or None for the saved rate.
    """
    groups = []
    for number, options in enumerate(metadata["param_groups"]):
        values = dict(options) | ({} if lr[number] is None else {"lr": lr[number]})
        try:
            groups.append(ParamGroup(values, f"param_groups[{number}]", dtypes[number], metadata["cache_dtype"]))
        except (FastrmsError, TypeError) as error:
            raise CheckpointError(str(error)) from None
    return groups


def check_options(metadata: Metadata) -> None:
    """Raise CheckpointError if a saved option is unknown or out of range. A learning rate may be missing."""
    groups = metadata["param_groups"]
    dtypes: list[set[DType]] = [set() for _ in groups]
    for parameter in metadata["parameters"]:
        if parameter.get("group") in range(len(groups)):
            dtypes[int(parameter["group"])].add(np.dtype(parameter["dtype"]))
    groups_of(metadata, dtypes, [0.0 if group.get("lr") is None else None for group in groups])


def _empty_arrays(parameters: list[Metadata], kinds: Mapping[str, Kind] | None) -> list[Array]:
    """Return an array of zeros without memory for each parameter. Sizes must be equal to those in `kinds`, if given."""
    sizes: dict[str, int] = {}
    for number, parameter in enumerate(parameters):
        shape, dtype = parameter.get("shape"), parameter.get("dtype")
        if dtype not in ("float32", "float64"):
            raise CheckpointError(f"parameters[{number}]: expected dtype float32 or float64, got {dtype!r}")
        if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, shape)):
            raise CheckpointError(f"parameters[{number}]: expected a shape, got {shape!r}")
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    for dtype, size in sizes.items():
        kind = None if kinds is None else kinds.get(f"params/{dtype}")
        if kinds is not None and kind != (np.dtype(dtype), (size,)):
            raise CheckpointError(f"arrays['params/{dtype}']: expected {size} numbers as the shapes say, got {kind}")
    try:
        return [np.broadcast_to(np.zeros((), p["dtype"]), p["shape"]) for p in parameters]
    except ValueError as error:  # (0, 2**62, 2**62) has no elements and yet is too large for NumPy
        raise CheckpointError(f"parameters: {error}") from None


def encode(tree: object) -> Any:
    """Return a nesting of dicts, lists and tuples as nested lists for JSON, from which `_decode` restores it.

    A namedtuple becomes a tuple. Raise StructureError for a key that JSON cannot restore.
    """
    if isinstance(tree, dict):
        for key in tree:  # NaN is not equal to itself
            if not (key is None or type(key) in (str, int, float, bool)) or key != key:
                kind = "" if key != key else f" ({type(key).__name__})"
                raise StructureError(f"expected dicts whose keys are None, str, int, float or bool, got {key!r}{kind}")
        return ["dict", [[key, encode(item)] for key, item in tree.items()]]
    if isinstance(tree, list | tuple):
        return ["list" if isinstance(tree, list) else "tuple", [encode(item) for item in tree]]
    return tree


def check_keys(tree: object) -> None:
    """Raise CheckpointError if the repr of a key does not identify the key in a file.

    A repr with an address, or with a set of several items, differs between processes. Two keys may have the same repr.
    """
    if isinstance(tree, dict):
        texts = set()
        for key, item in tree.items():
            text = repr(key)
            if type(key) is not str and (re.search(" at 0x[0-9a-fA-F]+", text) or _has_set(key)):
                raise CheckpointError(
                    "params: expected keys with the same repr in all processes, because load() finds keys by their "
                    f"repr; got {text}"
                )
            if text in texts:
                raise CheckpointError(
                    f"params: expected keys with different reprs, because load() finds keys by their repr; got two "
                    f"with {text}"
                )
            texts.add(text)
            check_keys(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            check_keys(item)


def _has_set(key: object) -> bool:
    """Tell whether a key contains a set of several items."""
    if isinstance(key, frozenset) and len(key) > 1:
        return True
    return isinstance(key, tuple | frozenset) and any(map(_has_set, key))


def _decode(code: Any, leaves: Iterator[tuple[int, Any]]) -> Any:
    """Return the nesting from which `encode` made `code`, with each number replaced by its leaf."""
    if type(code) is int:
        number, leaf = next(leaves, (None, None))
        if number != code:
            raise ValueError(f"expected leaf {number}, got {code}")
        return leaf
    kind, items = code
    if kind == "dict":
        decoded = {key: _decode(item, leaves) for key, item in items}
        if len(decoded) != len(items):
            raise ValueError("expected each key once")
        return decoded
    return {"list": list, "tuple": tuple}[kind]([_decode(item, leaves) for item in items])


def _is_count(value: object) -> bool:
    """Tell whether a value is an int from 0 to the largest of int64."""
    return type(value) is int and 0 <= value < 2**63


def kind_of(thing: object) -> str:
    """Return the kind of an object, for error messages."""
    return f"{thing.dtype} of shape {thing.shape}" if type(thing) is np.ndarray else f"a {type(thing).__name__}"
