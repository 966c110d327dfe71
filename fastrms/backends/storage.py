"""A folder with the buffers of an optimizer in memory-mapped files. They may be larger than memory.

The folder has one file for each buffer, ``head.json`` with the metadata of checkpoints, ``counts.bin`` with the counts
of steps, and ``lock``. A process holds the lock while it has the folder open. A group that was added has files of its
own for all of these buffers and for its counts, with the number of the group in their names: ``params-1.bin``. A file
counts as part of the folder when the metadata list it. So a group is added by writing the metadata, after its files.

The system keeps mapped pages in its page cache, and writes them to the disk at any time. Only pages that a process has
accessed count as its memory. So a step updates the arrays in parts, and gives the pages of each part back. One kernel
call becomes many, on slices. No bit depends on where arrays are cut.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms._state import OptimizerState
from fastrms._types import Options
from fastrms.backends import folder
from fastrms.backends.base import Call
from fastrms.backends.folder import BUFFERS, METADATA_FILE
from fastrms.backends.mapped import MappedFile, PartNorms, StoredBuffer, open_own
from fastrms.backends.pages import Pages
from fastrms.backends.stored_counts import COUNTS_FILE, LOAD, STEP, StoredCounts
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.joined import JoinedBuffer, parts_of
from fastrms.checkpoints.formats import replaced
from fastrms.checkpoints.metadata import metadata_of
from fastrms.errors import OptionError, OptionTypeError, StorageError, call_all
from fastrms.kernels.norms import SpanNorms

if sys.platform != "win32":
    import fcntl

__all__ = ["Storage", "check_storage"]


_LOCK = "lock"


class Storage:
    """A folder with the buffers of an optimizer, and a `Memory`. `create` and `open` return one."""

    path: Path  # absolute and without links
    reopened: bool  # whether the folder had buffers before
    metadata: Options  # the content of `head.json` when the folder was opened; empty for a new folder
    _counts: StoredCounts
    _state: OptimizerState  # set in `making`
    _first: int  # the number of groups that the folder was made with
    _made_folder: bool = False

    @classmethod
    def of(cls, storage: Any, layout: Layout) -> "Storage":
        """Return `storage` if it is a Storage, or a new folder at this path for arrays of this layout."""
        return storage if isinstance(storage, Storage) else cls.create(Path(storage), layout)

    @classmethod
    def create(cls, path: Path, layout: Layout) -> "Storage":
        """Make the folder and lock it."""
        path = folder.real_path(path)
        folder.check_keys(layout)
        new = cls.__new__(cls)
        new._made_folder = folder.make_folder(path)
        new._start(path, False)
        new._take_lock(os.O_CREAT | os.O_EXCL)
        try:
            new._counts = StoredCounts(path, len(layout.leaves), {}, True)
        except BaseException:
            new.discard()
            raise
        return new

    @classmethod
    def open(cls, path: Path, after_crash: str) -> "Storage":
        """Open and lock a folder of an earlier optimizer. `new_buffer` maps its buffers later."""
        old = cls.__new__(cls)
        path = folder.real_path(path)
        if not os.path.lexists(path / METADATA_FILE):
            files = path.is_dir() and any(path.iterdir())
            rest = "; it was not finished: remove it, and make a new one with RMSProp(params, storage=...)"
            raise StorageError(f"{path}: expected a folder with {METADATA_FILE}, got none{rest if files else ''}")
        old._start(path, True)
        old._take_lock(os.O_CREAT)
        try:
            old.metadata = folder.read_metadata(path / METADATA_FILE)
            added = folder.added_groups(old.metadata)
            old._counts = StoredCounts(path, len(old.metadata["parameters"]) - sum(added.values()), added, False)
            old._check_content(after_crash)
        except BaseException:
            old._unlock()
            raise
        return old

    @contextlib.contextmanager
    def making(self, state: OptimizerState) -> Iterator[None]:
        """Return a context for making the buffers of an optimizer, or for mapping those of an opened folder.

        At its end `state` takes the counts of an opened folder, and a new folder gets its metadata. An error removes
        new files.
        """
        try:
            if len(self._counts.absent) != len(state.layout.leaves):
                raise StorageError(f"{self.path / METADATA_FILE}: structure and parameters do not fit together")
            self._state = state
            self._first = len(state.param_groups) - self.metadata.get("storage", {}).get("added", 0)
            yield
            if self.reopened:
                self._counts.read(state.counts)
            else:
                self._write_metadata(clean=False)
        except BaseException:
            self.discard()
            raise

    def _start(self, path: Path, reopened: bool) -> None:
        """Set the attributes of a folder that is not locked yet."""
        self.path, self.reopened, self.metadata = path, reopened, {}
        self._files: dict[str, MappedFile] = {}  # of buffers, by their names without suffix
        self.pages = Pages(path)
        self._lock: int | None = None
        self._closed: str | None = None  # the reason why the folder can no longer be used
        self._interrupted = False  # whether a step or load has begun and not ended
        self._marked_open = False  # whether the metadata on the disk lists all buffers and says that they are in use

    def _take_lock(self, flags: int) -> None:
        """Lock the folder, or raise StorageError if another optimizer holds the lock."""
        try:
            self._lock = open_own(self.path / _LOCK, os.O_RDWR | flags)
            if sys.platform != "win32":
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (FileExistsError, BlockingIOError):
            self._unlock()
            raise StorageError(
                f"{self.path}: expected a folder that is not open, got one that another process, or another "
                "optimizer of this process, has open; close it there first"
            ) from None
        except OSError as error:
            if self._lock is None or error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise  # the two errors mean that the file system has no locks

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # unlocks, as child processes have closed their copies
            self._lock = None

    @property
    def counts(self) -> NDArray[np.int64]:
        """The content of `counts.bin`."""
        return self._counts.array

    def _check_content(self, after_crash: str) -> None:
        """Raise StorageError for impossible counts, or after a crash if `after_crash` is "raise"."""
        clean = self.metadata["storage"]["clean"]
        if not clean and after_crash == "raise":
            raise StorageError(
                f"{self.path}: expected a folder that was closed, got one whose process ended without closing it: "
                f"{self._counts.crash()}, {self.metadata['steps']} when it was flushed last. Parameters and state may "
                'be of different steps; after_crash="use" uses them as they are'
            )
        self._counts.check(after_crash=not clean)

    @property
    def names(self) -> list[str]:
        """The names of all buffers, on the disk or mapped."""
        found = {*self.metadata.get("storage", {}).get("buffers", []), *self._files}
        return [name for name in BUFFERS if name in found]

    def new_buffer(self, name: str, layout: Layout) -> FlatBuffer:
        """Return the stored buffer `name`, or a new one of zeros, in a mapped file, and one for each added group."""
        self.check_open()
        new = name not in self.names
        if new:
            self._check_place()
        added = range(self._first, len(self._state.param_groups))
        if not added:
            return self.map_buffer(name, layout, new)
        layouts, before = parts_of(layout, self._first), set(self._files)
        try:
            names = [name, *(f"{name}-{number}" for number in added)]
            parts = [self.map_buffer(one, part, new) for one, part in zip(names, layouts, strict=True)]
        except BaseException:
            if new:
                self._remove(self._take_out_all_but(before))
            raise
        return JoinedBuffer(layout.of_parts(layouts), parts)

    def map_buffer(self, name: str, layout: Layout, new: bool) -> StoredBuffer:
        """Return a buffer in the file `name`, which is stored, or new and of zeros."""
        file = self._files[name] = MappedFile(self.path / f"{name}.bin", layout.nbytes, new)
        self.pages.add(file)
        self._marked_open = self._marked_open and not new
        buffer = StoredBuffer.from_layout(layout, lambda *size_and_dtype: file.memory)
        buffer.pages = self.pages
        return buffer

    def _take_out_all_but(self, names: Set[str]) -> list[Path]:
        """Return the paths of the files of all buffers except these, and no longer use the files."""
        files = [self._files.pop(name) for name in self._files.keys() - names]
        for file in files:
            self.pages.remove(file)
        return [file.path for file in files]

    @contextlib.contextmanager
    def adding(self, new: OptimizerState) -> Iterator["_Added"]:
        """Return a context for adding a group, as `Backend.adding`. Its files are on the disk before the metadata are.

        After Ctrl-C the group may be in the state already. Then the next step, or `flush`, writes the metadata.
        """
        self.check_open()
        self._check_place()
        folder.check_keys(new.layout)
        state, before, undo = self._state, set(self._files), self._state.undo()
        number = len(state.param_groups)
        try:
            self._counts.add(number, len(new.layout.leaves))
            yield _Added(self, number)
            call_all([partial(self._write_out, self._files[name]) for name in self._files.keys() - before])
            self._write_metadata(clean=False)
        except BaseException as error:
            if isinstance(error, Exception):
                undo()
            if len(state.param_groups) == number:
                self._remove([*self._take_out_all_but(before), *self._counts.take_out(number)])
            raise

    @property
    def is_open(self) -> bool:
        """Whether steps can be taken."""
        return self._closed is None

    def check_open(self) -> None:
        """Raise StorageError if the folder was closed, or belongs to the parent process."""
        if self._closed is not None:
            raise StorageError(f"{self.path}: {self._closed}")

    def _check_place(self) -> None:
        """Raise StorageError if the folder was moved or replaced: writes would go to another place."""
        if self._lock is None:
            return
        try:
            there = os.path.samestat(os.fstat(self._lock), os.stat(self.path / _LOCK))
        except OSError:
            there = False
        if not there:
            raise StorageError(
                f"{self.path}: expected the folder that was opened, got none or another one in its place; nothing was "
                "written there"
            )

    # The work in progress, on the disk.

    def _begin(self, what: int) -> None:
        """Record that a step or a load is in progress. It has not written yet."""
        self.check_open()
        if not self._marked_open:
            self._write_metadata(clean=False)
        self._counts.begin(what)
        self._interrupted = True

    def step_taken(self) -> None:
        """Record the counts, and the end of a step or load."""
        self._counts.record(self._state.counts)
        self._interrupted = False

    def step_skipped(self) -> None:
        """Record the count of skipped steps."""
        if not self._marked_open:
            self._write_metadata(clean=False)
        self._counts.skipped(self._state.counts)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Return a context for all writes of a load."""
        self._begin(LOAD)
        yield
        self.step_taken()
        self._write_metadata(clean=False)  # with the options that were loaded

    def flush(self) -> None:
        """Write everything but gradients to the disk, and then record that the folder is complete."""
        self.check_open()
        state = [file for name, file in self._files.items() if name.partition("-")[0] != "grads"]
        call_all([partial(self._write_out, file) for file in state])
        if not self._interrupted:
            self.step_taken()
        self._counts.flush()
        self._write_metadata(clean=not self._interrupted)

    def _write_out(self, file: MappedFile) -> None:
        """Write a file to the disk, and give its pages back."""
        file.map.flush()
        self.pages.release(file.memory)

    def close(self) -> None:
        """Flush, unlock the folder, and make all views read-only."""
        try:
            self.flush()
        finally:
            self._end("expected an optimizer that is open, got a closed one; RMSProp.reopen(path) opens it again")
            for buffer in self._state.buffers.values():
                for part in buffer.parts if isinstance(buffer, JoinedBuffer) else (buffer,):
                    assert isinstance(part, StoredBuffer)
                    part.make_read_only()

    def _end(self, reason: str) -> None:
        """Close and unlock the folder. `reason` is the error of later calls."""
        self._closed = reason
        self._unlock()

    def after_fork(self) -> None:
        """Close the folder in a child process. It shares memory and lock with its parent."""
        if self._closed is None:
            self._end(
                "expected the process that opened it, got a child of fork(), whose steps would change the "
                "parameters of its parent; close it before the fork, or open another folder"
            )

    def discard(self) -> None:
        """Remove the files of a new folder after an error, and the folder if it was made."""
        if not self.reopened:
            names = [*(f"{name}.bin" for name in BUFFERS), COUNTS_FILE, METADATA_FILE, _LOCK]
            self._remove([self.path / name for name in names], self._made_folder)
        self._end("it was not made")

    def _remove(self, files: Iterable[Path], with_folder: bool = False) -> None:
        """Remove files after an error. Ignore errors of the removal, so that the first error is seen."""
        with contextlib.suppress(StorageError):
            self._check_place()
            for path in files:
                with contextlib.suppress(OSError):
                    path.unlink()
            if with_folder:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def _write_metadata(self, clean: bool) -> None:
        """Write ``head.json``. `clean` tells whether the files on the disk are complete and belong together."""
        self._check_place()
        own = folder.own_metadata(clean, self.names, len(self._state.param_groups) - self._first)
        with replaced(self.path / METADATA_FILE) as temporary:
            temporary.write_text(json.dumps(metadata_of(self._state) | {"storage": own}), encoding="utf-8")
        self._marked_open = not clean

    # The memory of a host backend.

    in_parts = True

    def run(self, calls: Sequence[Call]) -> Iterator[None]:
        """Return an iterator that makes one kernel call for each item, in parts. Call `step_taken` after the last."""
        self._begin(STEP)
        for call in calls:
            self.pages.call_in_parts(*call)
            yield

    def refuse_copy(self) -> None:
        """Raise StorageError: a copy would be in memory, and the buffers may be larger than memory."""
        raise StorageError(
            f"{self.path}: an optimizer with storage cannot be copied or pickled; use save() and "
            "RMSProp.from_checkpoint(), or close() and RMSProp.reopen()"
        )

    def norms(self, spans: NDArray[np.int64]) -> SpanNorms:
        """Return an object that computes the norm of each span of the gradient buffer."""
        return PartNorms(spans, self.pages)

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of a 1-D array, and give back the pages of each before the next."""
        return self.pages.parts(array)


class _Added:
    """The memory of a group that is being added: files of its own in the folder."""

    in_parts = True

    def __init__(self, storage: Storage, number: int) -> None:
        self._storage, self._number = storage, number
        self.run, self.norms, self.parts = storage.run, storage.norms, storage.parts

    def new_buffer(self, name: str, layout: Layout) -> StoredBuffer:
        """Return a new buffer of zeros."""
        return self._storage.map_buffer(f"{name}-{self._number}", layout, True)


def check_storage(storage: object) -> None:
    """Raise OptionTypeError or OptionError unless RMSProp takes this value as `storage`."""
    if storage is not None and not isinstance(storage, str | os.PathLike | Storage):
        raise OptionTypeError(f"storage: expected the path of a folder or None, got {type(storage).__name__} object")
    if storage == "":  # pathlib would take it for the current folder
        raise OptionError("storage: expected the path of a folder or None, got ''")
