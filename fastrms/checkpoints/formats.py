"""Files that hold 1-D arrays and a text: NumPy's .npz and safetensors, written whole or not at all.

A file may come from elsewhere, or be damaged. So nothing in it is run (no pickle), what it says of sizes is compared
with its own size before memory is taken for it, and each array has a checksum, in the text. What is written goes to a
temporary file beside the old one, which it replaces when it has reached the disk: whenever a process ends, there is the
old file or the new one. As editors do, a link is followed to its target, and mode and owner of the old file are kept.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrms.errors import CheckpointError

__all__ = ["Kind", "Source", "checksum", "compare_checksum", "opened", "reading", "replaced", "write"]

Array = NDArray[Any]
Kind = tuple[np.dtype[Any], tuple[int, ...]]

# The entry that has the text.
_HEAD = "head"


class Source(Protocol):
    """Where a state comes from."""

    @property
    def head(self) -> Mapping[str, Any]:
        """All but the arrays."""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Dtype and shape of each array."""

    def read(self, name: str) -> Array:
        """Return an array, after a comparison of its checksum."""

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]:
        """Iterate over slices of an array, without a look at its checksum."""


def write(path: Path, arrays: Mapping[str, Array], head: str, in_parts: Callable[[Array], Iterable[slice]]) -> None:
    """Make a file of 1-D arrays and the text `head`, in the format that its name says; `in_parts` cuts arrays."""
    as_safetensors = is_safetensors(path)
    with replaced(path) as temporary:
        if as_safetensors:
            try:
                _safetensors("numpy").save_file(dict(arrays), temporary, metadata={_HEAD: head})
            except Exception as error:  # an error of its own, for a full disk too
                if isinstance(error, OSError | ImportError | MemoryError):
                    raise
                raise OSError(f"{path}: cannot be written: {error}") from None
            return
        entries: dict[str, Array] = {**arrays, _HEAD: np.frombuffer(head.encode(), np.uint8)}
        with zipfile.ZipFile(temporary, "w") as archive:  # as np.savez does, and in parts
            for name, array in entries.items():
                # Entered twice: Ctrl-C on the way out of the inner one must not leave the entry open, for then the
                # archive raises an error of its own in place of KeyboardInterrupt.
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry, entry:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    np.lib.format.write_array_header_1_0(entry, header)
                    for part in in_parts(array):
                        entry.write(array[part].data)


class _Npz:
    """A file of `np.savez`: a zip archive of arrays, not compressed."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._archive = zipfile.ZipFile(stream)
        self._entries: dict[str, tuple[zipfile.ZipInfo, Kind]] = {}
        for info in self._archive.infolist():
            name = info.filename.removesuffix(".npy")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise CheckpointError(f"{name}: expected an entry that is not compressed")
            if name in self._entries:
                raise CheckpointError(f"{name}: expected once, got twice")
            if info.header_offset + info.file_size > size:
                raise CheckpointError(f"{name}: expected an entry inside the file, got one of {info.file_size} bytes")
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
        compare_checksum(self.head, name, [array])
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
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except MemoryError as error:  # what Python's parser raises for an expression that is nested too deeply
        raise CheckpointError(f"expected a header of NumPy's, got one that cannot be read: {error}") from None
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
        compare_checksum(self.head, name, [array])
        return array

    def parts(self, name: str, slices: Iterable[slice]) -> Iterator[tuple[slice, Array]]:
        tensor = self._file.get_slice(name)
        for part in slices:
            yield part, tensor[part]


@contextlib.contextmanager
def opened(path: Path, most_bytes: int | None) -> Iterator[Source]:
    """Open the file at `path`; a CheckpointError that is raised meanwhile names it, others come out as they are."""
    path_now = path.absolute()  # safetensors opens it a second time
    as_safetensors = is_safetensors(path)
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise CheckpointError(f"{path}: expected at most {most_bytes} bytes for this optimizer, got {size}")
        try:
            with reading():
                source: Source = _Safetensors(path_now) if as_safetensors else _Npz(stream, size)
            yield source
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Make a CheckpointError of whatever is raised for damaged content; only around what reads, and calls nothing else.

    What is wrong with the machine and not with the file keeps its type: no memory, a disk that cannot be read.
    """
    try:
        yield
    except (CheckpointError, ImportError, MemoryError):
        raise
    # Whatever the readers of those formats raise, for what nobody has written on purpose.
    except (Exception, RecursionError) as error:
        # A damaged archive can name places before its beginning (EINVAL).
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        text = (str(error).strip() or "damaged").splitlines()[0]
        raise CheckpointError(f"cannot be read as a checkpoint: {type(error).__name__}: {text}") from None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Make a file beside `path`, which replaces it when all of it is on the disk, or is removed after an error.

    Where `path` is a link, its target is replaced. Mode, owner and further attributes of an older file are kept.

    Raises
    ------
    OSError
        There is no such folder; or what is there is not an ordinary file, or must not be written.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        folder = target.parent if path.is_symlink() else path.parent
        raise FileNotFoundError(errno.ENOENT, "expected a folder to write to, got none", str(folder))
    old = _old(target, path)
    temporary = target.with_name(_temporary_name(target.name))
    try:
        # Nobody else can read what is to replace a private file, from the first byte on.
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if old is None else 0o600))
        except PermissionError as error:
            raise PermissionError(
                error.errno, "expected a folder in which a file can be made, got one that is read-only", str(path)
            ) from None
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if old is None:
            temporary.chmod(mode)  # safetensors makes files for their owner only
        else:
            _make_alike(temporary, target, old)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # so that the new name is on the disk; not every system lets folders be opened
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _old(target: Path, path: Path) -> os.stat_result | None:
    """Return the status of the file to be replaced, or None if there is none; raise if it must not be replaced."""
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
    # The superuser may write to all files, and means a file without any such bit to stay, too.
    effective = os.access in os.supports_effective_ids
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK, effective_ids=effective):
        raise PermissionError(errno.EACCES, "expected a file that can be written, got one that is read-only", str(path))
    return old


def _temporary_name(name: str) -> str:
    """Return a unique file name that is no longer than `name`, or than 64 bytes."""
    end = f".{secrets.token_hex(8)}.tmp"
    beginning, room = f".{name}", max(64, len(os.fsencode(name))) - len(end)
    while len(os.fsencode(beginning)) > room:
        beginning = beginning[:-1]
    return beginning + end


def _make_alike(temporary: Path, target: Path, old: os.stat_result) -> None:
    """Give a file owner, mode and further attributes of the one that it is to replace, as far as is allowed."""
    mode = stat.S_IMODE(old.st_mode)
    new = temporary.stat()
    if hasattr(os, "chown") and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(temporary, old.st_uid, old.st_gid)
        except OSError:
            try:
                os.chown(temporary, -1, old.st_gid)  # one's own groups can be given without being the superuser
            except OSError:
                # Another group than before can do no more than everybody.
                mode = mode & ~0o070 | (mode & 0o007) << 3
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
    temporary.chmod(mode)
    if hasattr(os, "listxattr"):
        with contextlib.suppress(OSError):  # not every file system has them
            for name in os.listxattr(target):
                with contextlib.suppress(OSError):
                    os.setxattr(temporary, name, os.getxattr(target, name))


def is_safetensors(path: Path) -> bool:
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


def checksum(parts: Iterable[Array]) -> str:
    """Of an array that consists of these parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    return digest.hexdigest()


def compare_checksum(head: Any, name: str, parts: Iterable[Array]) -> None:
    """Raise CheckpointError unless an array that consists of these parts has the checksum that the head says."""
    checksums = head.get("checksums")
    expected = checksums.get(name) if isinstance(checksums, Mapping) else None
    if (found := checksum(parts)) != expected:
        raise CheckpointError(f"{name}: expected the checksum {expected!r}, got {found!r}: it is damaged")
