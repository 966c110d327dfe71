"""File formats of checkpoints, .npz and .safetensors: 1-D arrays and metadata, written completely or not at all.

A file may be damaged, or come from an untrusted place. So nothing in it is run (no pickle). Sizes are compared with the
size of the file before memory is allocated. Each array has a checksum in the metadata.

A new file is written under a temporary name, and replaces the old one when it has reached the disk. So at any time
there is a complete file, old or new. A link is followed to its target, and mode and owner of the old file are kept.
"""

import contextlib
import errno
import hashlib
import importlib
import json
import math
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from fastrms._types import DType, Metadata
from fastrms.buffers import Array
from fastrms.buffers.joined import read_segments
from fastrms.errors import CheckpointError

__all__ = ["Kind", "Source", "checksum", "compare_checksum", "opened", "reading", "replaced", "write"]

Kind = tuple[DType, tuple[int, ...]]

# The entry with the metadata, as JSON.
_METADATA = "head"


class Source(Protocol):
    """A saved state: metadata and arrays, in a file or in memory."""

    @property
    def metadata(self) -> Metadata:
        """The metadata."""
        ...

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The dtype and shape of each array."""
        ...

    def read(self, name: str) -> Array:
        """Return an array whose checksum is right, or raise CheckpointError."""
        ...

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[Array]:
        """Iterate over parts of an array, in order, without comparing its checksum."""
        ...


def write(
    path: Path, arrays: Mapping[str, Sequence[Array]], metadata: str, in_parts: Callable[[Array], Iterable[slice]]
) -> None:
    """Write 1-D arrays and metadata (JSON) to a file, in the format of its suffix, and arrays in parts.

    Each array is given in pieces that follow one another.
    """
    as_safetensors = is_safetensors(path)
    with replaced(path) as temporary:
        if not as_safetensors:
            _write_npz(temporary, {**arrays, _METADATA: [np.frombuffer(metadata.encode(), np.uint8)]}, in_parts)
            return
        try:
            whole = {name: read_segments(pieces) for name, pieces in arrays.items()}
            _safetensors("numpy").save_file(whole, temporary, metadata={_METADATA: metadata})
        except Exception as error:  # its own error type, even for a full disk
            if isinstance(error, OSError | ImportError | MemoryError):
                raise
            raise OSError(f"{path}: cannot be written: {error}") from None


def _write_npz(
    path: Path, entries: Mapping[str, Sequence[Array]], in_parts: Callable[[Array], Iterable[slice]]
) -> None:
    """Write a file as `np.savez`, but in parts."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, pieces in entries.items():
            header = np.lib.format.header_data_from_array_1_0(pieces[0])
            header["shape"] = (sum(piece.size for piece in pieces),)
            # Entered twice: after Ctrl-C in the inner exit the outer exit closes the entry. The archive would raise an
            # error of its own for an open entry, instead of KeyboardInterrupt.
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry, entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for piece in pieces:
                    for part in in_parts(piece):
                        entry.write(piece[part].data)


class _Npz:
    """A file as `np.savez` writes it: a zip archive of uncompressed arrays."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._archive = zipfile.ZipFile(stream)
        self._entries: dict[str, tuple[zipfile.ZipInfo, Kind]] = {}
        for info in self._archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"{name}: expected an entry that is not compressed")
            if name in self._entries:
                raise CheckpointError(f"{name}: expected one entry of this name, got two")
            if info.header_offset + info.file_size > size:
                raise CheckpointError(f"{name}: expected an entry inside the file, got one of {info.file_size} bytes")
            with self._archive.open(info) as entry:
                self._entries[name] = info, _npy_kind(entry)
        dtype, shape = self._entries.get(_METADATA, (None, (None, ())))[1]
        if dtype != np.uint8 or len(shape) != 1:
            raise CheckpointError(f"expected a file of RMSProp.save(), got one without the entry {_METADATA!r}")
        self.metadata = _parse(self._bytes(_METADATA))
        self.kinds = {name: (kind[0].newbyteorder("="), kind[1]) for name, (_, kind) in self._entries.items()}
        self.kinds.pop(_METADATA)

    def _bytes(self, name: str) -> bytes:
        """Return the elements of an array, after the archive has compared its own checksum."""
        info, (dtype, shape) = self._entries[name]
        size = math.prod(shape) * dtype.itemsize
        if size > info.file_size:
            raise CheckpointError(f"{name}: expected {size} bytes, got an entry of {info.file_size}")
        with self._archive.open(info) as stream:
            _npy_kind(stream)
            found = stream.read(size)
            # The archive compares its own checksum when an entry is read to its end.
            if len(found) != size or stream.read(1):
                raise CheckpointError(f"{name}: expected {size} bytes, got another number")
        return found

    def read(self, name: str) -> Array:
        array = np.frombuffer(self._bytes(name), self._entries[name][1][0])
        compare_checksum(self.metadata, name, [array])
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[Array]:
        info, (dtype, (size,)) = self._entries[name]
        with self._archive.open(info) as stream:
            _npy_kind(stream)
            for part in slices:
                yield np.frombuffer(stream.read((part.stop - part.start) * dtype.itemsize), dtype)
            if stream.read(1):  # at the end the archive compares its own checksum, too
                raise CheckpointError(f"{name}: expected {size} numbers, got more")


def _npy_kind(stream: Any) -> Kind:
    """Read the header of an array in NumPy's format, and return dtype and shape."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):  # np.savez writes no other version for plain numbers
        raise CheckpointError(f"expected an array in version 1.0 of NumPy's format, got {version}")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except MemoryError as error:  # Python's parser raises it for an expression that is nested too deeply
        raise CheckpointError(f"expected a header in NumPy's format, got one that cannot be read: {error}") from None
    if dtype.kind not in "fiu" or len(shape) != 1:
        raise CheckpointError(f"expected a one-dimensional array of numbers, got {dtype} of shape {shape}")
    return dtype, tuple(map(int, shape))


class _Safetensors:
    """A file in the format of safetensors."""

    def __init__(self, path: Path) -> None:
        self._file = _safetensors().safe_open(path, framework="np")
        entries = self._file.metadata() or {}
        if _METADATA not in entries:
            raise CheckpointError(f"expected a file of RMSProp.save(), got one without metadata called {_METADATA!r}")
        self.metadata = _parse(entries[_METADATA].encode())
        names = {"F32": np.float32, "F64": np.float64, "U16": np.uint16, "I64": np.int64}
        self.kinds = {}
        for name in self._file.keys():  # noqa: SIM118 - not a dict
            part = self._file.get_slice(name)
            if part.get_dtype() not in names:
                raise CheckpointError(f"{name}: expected {', '.join(names)}, got {part.get_dtype()}")
            self.kinds[name] = np.dtype(names[part.get_dtype()]), tuple(part.get_shape())

    def read(self, name: str) -> Array:
        array: Array = self._file.get_tensor(name)
        compare_checksum(self.metadata, name, [array])
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[Array]:
        tensor = self._file.get_slice(name)
        for part in slices:
            yield tensor[part]


@contextlib.contextmanager
def opened(path: Path, most_bytes: int | None) -> Iterator[Source]:
    """Return a context with the source that reads a file. A CheckpointError within the context is prefixed with `path`.

    Raise CheckpointError if the file is damaged, has another suffix, or is larger than `most_bytes` (None: any size).
    """
    absolute = path.absolute()  # safetensors opens the file a second time
    as_safetensors = is_safetensors(path)
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise CheckpointError(f"{path}: expected at most {most_bytes} bytes for this optimizer, got {size}")
        try:
            with reading():
                source: Source = _Safetensors(absolute) if as_safetensors else _Npz(stream, size)
            yield source
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Return a context, for reading only, that turns errors of a damaged file into a CheckpointError.

    Errors of the machine, such as no memory or an unreadable disk, keep their type.
    """
    try:
        yield
    except (CheckpointError, ImportError, MemoryError):
        raise
    # Readers of the formats raise errors of any type for damaged content.
    except (Exception, RecursionError) as error:
        # A damaged archive can name places before its beginning (EINVAL).
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        text = (str(error).strip() or "damaged").splitlines()[0]
        raise CheckpointError(f"cannot be read as a checkpoint: {type(error).__name__}: {text}") from None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Return a context with a temporary file, which replaces the file at `path` when it is on the disk.

    After an error the temporary file is removed. The target of a link is replaced, not the link. Mode, owner and
    extended attributes of an older file are kept.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        folder = target.parent if path.is_symlink() else path.parent
        raise FileNotFoundError(errno.ENOENT, "expected a folder to write to, got none", str(folder))
    old = _old(target, path)
    temporary = target.with_name(_temporary_name(target.name))
    try:
        # The replacement of a private file is private from its first byte on.
        mode = _create(temporary, 0o666 if old is None else 0o600, path)
        yield temporary
        if old is None:
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
        else:
            _make_alike(temporary, target, old)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name reaches the disk too, if the system can open folders
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _create(temporary: Path, mode: int, path: Path) -> int:
    """Make an empty file, and return its mode as the system has set it; errors name `path`."""
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    except PermissionError as error:
        raise PermissionError(
            error.errno, "expected a folder in which a file can be created, got one that is read-only", str(path)
        ) from None
    return stat.S_IMODE(temporary.stat().st_mode)


def _old(target: Path, path: Path) -> os.stat_result | None:
    """Return the status of the file to replace, or None without a file; raise OSError if it must not be replaced."""
    try:
        old = target.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(old.st_mode):  # after all links were followed
        raise OSError(errno.ELOOP, "expected a file, got a link that leads to itself", str(path))
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", str(path))
    if not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "expected an ordinary file, got a device or something else", str(path))
    # The superuser may write any file, and yet a file that nobody may write is meant to stay.
    effective = os.access in os.supports_effective_ids
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, "expected a file that can be written, got one that is read-only", str(path))
    return old


def _temporary_name(name: str) -> str:
    """Return a unique file name, no longer than `name` or 64 bytes."""
    end = f".{secrets.token_hex(8)}.tmp"
    beginning, room = f".{name}", max(64, len(os.fsencode(name))) - len(end)
    while len(os.fsencode(beginning)) > room:
        beginning = beginning[:-1]
    return beginning + end


def _make_alike(temporary: Path, target: Path, old: os.stat_result) -> None:
    """Copy owner, mode and extended attributes of `target` to the file that replaces it, as far as allowed."""
    mode = stat.S_IMODE(old.st_mode)
    new = temporary.stat()
    if hasattr(os, "chown") and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(temporary, old.st_uid, old.st_gid)
        except OSError:
            try:
                os.chown(temporary, -1, old.st_gid)  # users may give a file to a group of their own
            except OSError:
                # The group is another one, so it gets the permissions of everybody.
                mode = mode & ~0o070 | (mode & 0o007) << 3
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
    temporary.chmod(mode)
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):  # not every file system has them
            for name in os.listxattr(target):
                with contextlib.suppress(OSError):
                    os.setxattr(temporary, name, os.getxattr(target, name))


def is_safetensors(path: Path) -> bool:
    """Tell whether a path has the suffix .safetensors; raise CheckpointError if the suffix is not .npz either."""
    if path.suffix not in (".npz", ".safetensors"):
        raise CheckpointError(f"{path}: expected a name that ends in .npz or .safetensors")
    return path.suffix == ".safetensors"


def _safetensors(module: str = "") -> Any:
    """Import a module of the optional package safetensors."""
    try:
        return importlib.import_module(f"safetensors.{module}".rstrip("."))
    except ImportError:
        raise ImportError(
            'safetensors is not installed; install with: python -m pip install "fastrms[safetensors]", or use .npz'
        ) from None


def _parse(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"))


def checksum(parts: Iterable[Array]) -> str:
    """Return the checksum of an array that consists of these parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def compare_checksum(metadata: Any, name: str, parts: Iterable[Array]) -> None:
    """Raise CheckpointError unless the array of these parts has the checksum in `metadata`."""
    checksums = metadata.get("checksums")
    expected = checksums.get(name) if isinstance(checksums, Mapping) else None
    if (found := checksum(parts)) != expected:
        raise CheckpointError(f"{name}: expected the checksum {expected!r}, got {found!r}: the array is damaged")
