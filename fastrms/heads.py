"""What a checkpoint or a storage says of an optimizer beside its arrays: structure, dtypes, options, counts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.archives import Kind
from fastrms.errors import CheckpointError, FastrmsError
from fastrms.options import NONFINITE, check_cache_dtype, check_one_of, check_option

__all__ = ["VERSION", "check_head", "decode", "encode", "head_of", "kind_of", "params_of"]

Array = NDArray[Any]
_Optimizer = Any  # an RMSProp, which imports this file

# Of what `state_dict` returns. This one and all older ones can be loaded; tests/checkpoints has a file of each.
VERSION = 1

_FORMAT = "fastrms.RMSProp"
_MOST_DIMENSIONS = 64  # of NumPy


def head_of(opt: _Optimizer) -> dict[str, Any]:
    """All but the arrays: what JSON can hold."""
    layout = opt.buffers["params"].layout
    return {
        "format": _FORMAT,
        "version": VERSION,
        "steps": opt.steps,
        "skipped_steps": opt.skipped_steps,
        "global_clip_norm": opt.global_clip_norm,
        "nonfinite": opt.nonfinite,
        "cache_dtype": opt.cache_dtype,
        "param_groups": [
            # A function cannot be stored; whoever loads has it.
            {name: None if callable(value) else value for name, value in group.items() if name != "params"}
            for group in opt.param_groups
        ],
        "parameters": [
            {"path": leaf.path, "shape": list(leaf.shape), "dtype": str(layout.dtype_of(leaf)), "group": int(group)}
            for leaf, group in zip(layout.leaves, opt._group_of, strict=True)
        ],
        "grouped": opt._grouped,
        "structure": encode(layout.structure(range(len(layout.leaves)))),
    }


def check_head(head: Any) -> None:
    """Check what does not depend on the optimizer that it is for."""
    if not isinstance(head, Mapping) or head.get("format") != _FORMAT:
        raise CheckpointError(
            f"expected what RMSProp.state_dict() returns, or a file of RMSProp.save(), got {kind_of(head)}"
        )
    version = head.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        newer = "; it needs a newer fastrms" if type(version) is int and version > VERSION else ""
        raise CheckpointError(f"version: expected 1 to {VERSION}, got {version!r}{newer}")
    for name in ("steps", "skipped_steps"):
        if not _is_count(head.get(name)):
            raise CheckpointError(f"{name}: expected a number of steps, got {head.get(name)!r}")
    for name in ("parameters", "param_groups"):
        items = head.get(name)
        if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
            raise CheckpointError(f"{name}: expected a list of dicts, got {kind_of(items)}")
    if not isinstance(head.get("grouped"), bool):
        raise CheckpointError(f"grouped: expected True or False, got {head.get('grouped')!r}")
    for name in ("global_clip_norm", "nonfinite", "cache_dtype", "structure"):
        if name not in head:
            raise CheckpointError(f"{name}: expected in a state, got none")
    try:
        check_option("global_clip_norm", head["global_clip_norm"])
        check_one_of("nonfinite", head["nonfinite"], NONFINITE)
        check_cache_dtype(head["cache_dtype"], {np.dtype(np.float32)})
    except FastrmsError as error:
        raise CheckpointError(str(error)) from None


def params_of(head: Mapping[str, Any], kinds: Mapping[str, Kind] | None) -> Any:
    """Parameters of the structure, shapes and dtypes that a head has, which take no memory, without values."""
    arrays = _empty_arrays(head["parameters"], kinds)
    try:
        return decode(head["structure"], arrays)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise CheckpointError("structure: cannot be rebuilt; make an RMSProp and use load()") from None


def _empty_arrays(parameters: list[Mapping[str, Any]], kinds: Mapping[str, Kind] | None) -> list[Array]:
    """An array for each parameter that takes no memory, after a check that the file, if any, has as many numbers."""
    sizes: dict[str, int] = {}
    for number, parameter in enumerate(parameters):
        shape, dtype = parameter.get("shape"), parameter.get("dtype")
        if dtype not in ("float32", "float64"):
            raise CheckpointError(f"parameters[{number}]: expected dtype float32 or float64, got {dtype!r}")
        if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, shape)):
            raise CheckpointError(f"parameters[{number}]: expected a shape, got {shape!r}")
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
    for dtype, size in sizes.items():
        kind = (np.dtype(dtype), (size,)) if kinds is None else kinds.get(f"params/{dtype}")
        if kind != (np.dtype(dtype), (size,)):
            raise CheckpointError(f"arrays['params/{dtype}']: expected {size} numbers as the shapes say, got {kind}")
    try:
        return [np.broadcast_to(np.zeros((), p["dtype"]), p["shape"]) for p in parameters]
    except ValueError as error:  # (0, 2**62, 2**62) has no elements and yet is too large for NumPy
        raise CheckpointError(f"parameters: {error}") from None


def encode(tree: Any) -> Any:
    """A nesting of dicts, lists and tuples as one of lists that JSON can hold; None where keys are of other kinds."""
    if isinstance(tree, dict):
        if not all(key is None or isinstance(key, str | int | float) for key in tree):
            return None
        return ["dict", [[key, encode(item)] for key, item in tree.items()]]
    if isinstance(tree, list | tuple):
        return ["list" if isinstance(tree, list) else "tuple", [encode(item) for item in tree]]
    return tree


def decode(code: Any, leaves: Sequence[Any]) -> Any:
    """The nesting that `encode` was given, with `leaves` for their numbers."""
    if isinstance(code, int):
        return leaves[code]
    kind, items = code
    if kind == "dict":
        return {key: decode(item, leaves) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](decode(item, leaves) for item in items)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def kind_of(thing: Any) -> str:
    """What something is, for a message."""
    return f"{thing.dtype} of shape {thing.shape}" if type(thing) is np.ndarray else f"a {type(thing).__name__}"
