"""Checkpoints: all of an optimizer as plain arrays, numbers and text, in memory and in files.

What is loaded may come from elsewhere, or be damaged. So nothing in it is run (no pickle), every count, shape and dtype
is compared with what is expected before memory is taken for it, each array has a checksum, and the optimizer is
changed only when all of it was read and found right. What is saved is written to a temporary file beside the old one,
which it replaces when it has reached the disk: whenever a process ends, there is the old file or the new one.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrms.errors import CheckpointError, FastrmsError
from fastrms.options import NONFINITE, ParamGroup, check_cache_dtype, check_one_of, check_option

__all__ = ["VERSION", "Checkpointed"]

Array = NDArray[Any]
_Optimizer = Any  # an RMSProp, which is a `Checkpointed` and imports this file
Kind = tuple[np.dtype[Any], tuple[int, ...]]

# Of what `state_dict` returns. This one and all older ones can be loaded; tests/checkpoints has a file of each.
VERSION = 1

_FORMAT = "fastrms.RMSProp"
# The array of steps that each parameter sat out, and the entry of a file that has all but the arrays, as JSON.
_SKIPPED, _HEAD = "skipped", "head"
# What a file may take around the numbers that are expected in it: in all, and for each array of parameters.
_BESIDES, _BESIDES_EACH = 1 << 16, 1 << 11
_MOST_DIMENSIONS = 64  # of NumPy
_PART = 1 << 18  # numbers that are read at a time where not all can be in memory


class _Source(Protocol):
    """Where a state comes from: all but the arrays, what kind each array is, and the arrays themselves.

    `read` gives one that was compared with its checksum, `parts` some slices of one that was not.
    """

    @property
    def head(self) -> Mapping[str, Any]: ...

    @property
    def kinds(self) -> Mapping[str, Kind]: ...

    def read(self, name: str) -> Array: ...

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]: ...


class Checkpointed:
    """The methods of `fastrms.RMSProp` that store and restore it."""

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
            _take(self, _Memory(state))

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
    return _head(opt) | {"arrays": arrays}


def _save(opt: _Optimizer, path: Path) -> None:
    arrays = {name: opt._read(segment) for name, segment in _segments(opt)} | {_SKIPPED: opt._skipped}
    checksums = {name: _checksum(array[part] for part in opt._in_parts(array)) for name, array in arrays.items()}
    head = json.dumps(_head(opt) | {"checksums": checksums})
    is_safetensors = _is_safetensors(path)
    with _replaced(path) as temporary:
        if is_safetensors:
            _safetensors("numpy").save_file(arrays, temporary, metadata={_HEAD: head})
        else:
            entries: dict[str, Array] = arrays | {_HEAD: np.frombuffer(head.encode(), np.uint8)}
            # As np.savez does, and in parts.
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, array in entries.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        header = np.lib.format.header_data_from_array_1_0(array)
                        np.lib.format.write_array_header_1_0(entry, header)
                        for part in opt._in_parts(array):
                            entry.write(array[part].data)


def _load(opt: _Optimizer, path: Path) -> None:
    layout = opt.buffers["params"].layout
    expected = 4 * layout.nbytes + (_BESIDES_EACH + 8) * len(layout.leaves) + _BESIDES
    with _opened(path, expected) as source:
        _take(opt, source)


def _new_from_file(cls: Any, path: Path, lr: Any, **options: Any) -> _Optimizer:
    with _opened(path, None) as source:
        head = source.head
        _check_head(head)
        params = _params_of(head, source.kinds)
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


def _params_of(head: Mapping[str, Any], kinds: Mapping[str, Kind] | None) -> Any:
    """Parameters of the structure, shapes and dtypes that a head has, which take no memory, without values."""
    arrays = _empty_arrays(head["parameters"], kinds)
    try:
        return _decode(head["structure"], arrays)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        raise CheckpointError("structure: cannot be rebuilt; make an RMSProp and use load()") from None


def _head(opt: _Optimizer) -> dict[str, Any]:
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
        "structure": _encode(layout.structure(range(len(layout.leaves)))),
    }


def _segments(opt: _Optimizer) -> Iterator[tuple[str, Array]]:
    """The dense arrays of parameters and state, by name: "cache/float32"."""
    for name, buffer in opt.buffers.items():
        if name != "grads":
            for segment in buffer.segments:
                yield f"{name}/{segment.dtype}", segment


def _take(opt: _Optimizer, source: _Source) -> None:
    """Check everything that `source` has, then copy it into `opt`."""
    head = source.head
    _check_head(head)
    own = _head(opt)
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


def _check_head(head: Any) -> None:
    """Check what does not depend on the optimizer that it is for."""
    if not isinstance(head, Mapping) or head.get("format") != _FORMAT:
        raise CheckpointError(
            f"expected what RMSProp.state_dict() returns, or a file of RMSProp.save(), got {_kind(head)}"
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
            raise CheckpointError(f"{name}: expected a list of dicts, got {_kind(items)}")
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


def _encode(tree: Any) -> Any:
    """A nesting of dicts, lists and tuples as one of lists that JSON can hold; None where keys are of other kinds."""
    if isinstance(tree, dict):
        if not all(key is None or isinstance(key, str | int | float) for key in tree):
            return None
        return ["dict", [[key, _encode(item)] for key, item in tree.items()]]
    if isinstance(tree, list | tuple):
        return ["list" if isinstance(tree, list) else "tuple", [_encode(item) for item in tree]]
    return tree


def _decode(code: Any, leaves: Sequence[Any]) -> Any:
    """The nesting that `_encode` was given, with `leaves` for their numbers."""
    if isinstance(code, int):
        return leaves[code]
    kind, items = code
    if kind == "dict":
        return {key: _decode(item, leaves) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](_decode(item, leaves) for item in items)


class _Memory:
    """What `state_dict` returned."""

    def __init__(self, state: Any) -> None:
        _check_head(state)
        self.head = state
        self._arrays = state.get("arrays")
        if not isinstance(self._arrays, Mapping):
            raise CheckpointError(f"arrays: expected a dict, got {_kind(self._arrays)}")
        for name, array in self._arrays.items():
            if type(array) is not np.ndarray:
                raise CheckpointError(f"arrays[{name!r}]: expected an array, got {_kind(array)}")
        self.kinds = {name: (array.dtype, array.shape) for name, array in self._arrays.items()}

    def read(self, name: str) -> Array:
        array: Array = self._arrays[name]
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]:
        for part in slices:
            yield part, self._arrays[name][part]


class _Npz:
    """A file of `np.savez`: a zip archive of arrays, not compressed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._archive = zipfile.ZipFile(stream)
        self._entries: dict[str, tuple[zipfile.ZipInfo, Kind]] = {}
        for info in self._archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"{name}: expected an entry that is not compressed")
            if name in self._entries:
                raise CheckpointError(f"{name}: expected once, got twice")
            self._entries[name] = info, self._kind(info)
        dtype, shape = self._entries.get(_HEAD, (None, (None, ())))[1]
        if dtype != np.uint8 or len(shape) != 1:
            raise CheckpointError(f"expected a file of RMSProp.save(), got one without the entry {_HEAD!r}")
        self.head = _parse(self._bytes(_HEAD))
        self.kinds = {name: (kind[0].newbyteorder("="), kind[1]) for name, (_, kind) in self._entries.items()}
        self.kinds.pop(_HEAD)

    def _kind(self, info: zipfile.ZipInfo) -> Kind:
        with self._archive.open(info) as stream:
            return _npy_kind(stream)

    def _bytes(self, name: str) -> bytes:
        info, (dtype, shape) = self._entries[name]
        size = math.prod(shape) * dtype.itemsize
        if size > info.file_size:
            raise CheckpointError(f"{name}: expected {size} bytes, got an entry of {info.file_size}")
        with self._archive.open(info) as stream:
            _npy_kind(stream)
            found = stream.read(size)
            # The archive's own checksum is looked at when an entry has been read to its end.
            if len(found) != size or stream.read(1):
                raise CheckpointError(f"{name}: expected {size} bytes, got another number")
        return found

    def read(self, name: str) -> Array:
        array = np.frombuffer(self._bytes(name), self._entries[name][1][0])
        _compare_checksum(self.head, name, [array])
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]:
        info, (dtype, (size,)) = self._entries[name]
        with self._archive.open(info) as stream:
            _npy_kind(stream)
            for part in slices:
                yield part, np.frombuffer(stream.read((part.stop - part.start) * dtype.itemsize), dtype)
            if stream.read(1):  # which looks at the archive's own checksum, too
                raise CheckpointError(f"{name}: expected {size} numbers, got more")


def _npy_kind(stream: Any) -> Kind:
    """Read the head of an array in NumPy's format, version 1.0, which is what `np.savez` writes for plain numbers."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise CheckpointError(f"expected an array in version 1.0 of NumPy's format, got {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "fiu" or len(shape) != 1:
        raise CheckpointError(f"expected a one-dimensional array of numbers, got {dtype} of shape {shape}")
    return dtype, tuple(map(int, shape))


class _Safetensors:
    """A file in the format of safetensors."""

    def __init__(self, path: Path) -> None:
        self._file = _safetensors().safe_open(path, framework="np")
        metadata = self._file.metadata() or {}
        if _HEAD not in metadata:
            raise CheckpointError(f"expected a file of RMSProp.save(), got one without metadata called {_HEAD!r}")
        self.head = _parse(metadata[_HEAD].encode())
        names = {"F32": np.float32, "F64": np.float64, "U16": np.uint16, "I64": np.int64}
        self.kinds = {}
        for name in self._file.keys():  # noqa: SIM118 - it is no dict
            part = self._file.get_slice(name)
            if part.get_dtype() not in names:
                raise CheckpointError(f"{name}: expected {', '.join(names)}, got {part.get_dtype()}")
            self.kinds[name] = np.dtype(names[part.get_dtype()]), tuple(part.get_shape())

    def read(self, name: str) -> Array:
        array: Array = self._file.get_tensor(name)
        _compare_checksum(self.head, name, [array])
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]:
        tensor = self._file.get_slice(name)
        for part in slices:
            yield part, tensor[part]


@contextlib.contextmanager
def _opened(path: Path, most_bytes: int | None) -> Iterator[_Source]:
    """The file at `path`; whatever is wrong inside it is a CheckpointError that names it."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise CheckpointError(f"{path}: expected at most {most_bytes} bytes for this optimizer, got {size}")
        try:
            yield _Safetensors(path) if _is_safetensors(path) else _Npz(stream)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except ImportError:
            raise
        # Whatever the readers of those formats raise, for what nobody has written on purpose.
        except (Exception, RecursionError) as error:
            text = (str(error).strip() or "damaged").splitlines()[0]
            raise CheckpointError(f"{path}: cannot be read as a checkpoint: {type(error).__name__}: {text}") from None


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which replaces it when all of it is on the disk, or is removed after an error."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "expected a folder to write to, got none", str(path.parent))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files for their owner only
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # so that the new name is on the disk; not every system lets folders be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _is_safetensors(path: Path) -> bool:
    if path.suffix not in (".npz", ".safetensors"):
        raise CheckpointError(f"{path}: expected a name that ends in .npz or .safetensors")
    return path.suffix == ".safetensors"


def _safetensors(module: str = "") -> Any:
    try:
        return importlib.import_module(f"safetensors.{module}".rstrip("."))
    except ImportError:
        raise ImportError(
            'safetensors is not installed; install with: python -m pip install "fastrms[safetensors]", or use .npz'
        ) from None


def _parse(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"))


def _checksum(parts: Iterable[Array]) -> str:
    """Of an array that consists of these parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def _compare_checksum(head: Any, name: str, parts: Iterable[Array]) -> None:
    checksums = head.get("checksums")
    expected = checksums.get(name) if isinstance(checksums, Mapping) else None
    if (found := _checksum(parts)) != expected:
        raise CheckpointError(f"{name}: expected the checksum {expected!r}, got {found!r}: it is damaged")


def _verify(source: _Source, name: str, size: int) -> None:
    """Compare an array with its checksum, as `source.read` does, without having all of it in memory."""
    if not isinstance(source, _Memory):
        slices = (slice(start, min(start + _PART, size)) for start in range(0, size, _PART))
        _compare_checksum(source.head, name, (values for _, values in source.parts(name, slices)))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _has(kinds: Mapping[str, Kind], name: str) -> bool:
    return any(isinstance(key, str) and key.startswith(f"{name}/") for key in kinds)


def _kind(thing: Any) -> str:
    return f"{thing.dtype} of shape {thing.shape}" if type(thing) is np.ndarray else f"a {type(thing).__name__}"
