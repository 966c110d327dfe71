"""A folder with the buffers of an optimizer in memory-mapped files. They may be larger than memory.

The folder has one file for each buffer, ``head.json`` with the metadata of checkpoints, ``counts.bin`` with the counts
of steps, and ``lock``. A process holds the lock while it has the folder open.

The system keeps mapped pages in its page cache, and writes them to the disk at any time. Only pages that a process has
accessed count as its memory. So a step updates the arrays in parts, and gives the pages of each part back. One kernel
call becomes many, on slices. No bit depends on where arrays are cut.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms._state import OptimizerState
from fastrms._types import Options
from fastrms.backends.base import Call
from fastrms.backends.folder import BUFFERS, METADATA_FILE, VERSION, make_folder, read_metadata, real_path
from fastrms.backends.mapped import MappedFile, PartNorms, StoredBuffer, open_own
from fastrms.backends.pages import Pages
from fastrms.buffers import Array, Layout
from fastrms.checkpoints.formats import replaced
from fastrms.checkpoints.metadata import MOST_STEPS, check_absent, encode, metadata_of
from fastrms.errors import CheckpointError, OptionError, OptionTypeError, StorageError, StructureError, call_all
from fastrms.kernels.norms import SpanNorms

if sys.platform != "win32":
    import fcntl

__all__ = ["Storage", "check_storage"]


_COUNTS, _LOCK = "counts.bin", "lock"

# The places of the numbers in `counts.bin`. Those of `Counts.absent` begin at the last one.
_UNDER_WAY, _STEPS, _SKIPPED_STEPS, _ABSENT = range(4)
_NOTHING, _STEP, _LOAD = range(3)
_WHAT = {_NOTHING: "nothing was under way", _STEP: "a step was under way", _LOAD: "a load was under way"}


class Storage:
    """A folder with the buffers of an optimizer, and a `Memory`. `create` and `open` return one."""

    path: Path  # absolute and without links
    reopened: bool  # whether the folder had buffers before
    metadata: Options  # the content of `head.json` when the folder was opened; empty for a new folder
    counts: NDArray[np.int64]  # the content of `counts.bin`
    _state: OptimizerState  # set at the end of `making`
    _made_folder: bool = False

    @classmethod
    def of(cls, storage: Any, layout: Layout) -> "Storage":
        """Return `storage` if it is a Storage, or a new folder at this path for arrays of this layout."""
        return storage if isinstance(storage, Storage) else cls.create(Path(storage), layout)

    @classmethod
    def create(cls, path: Path, layout: Layout) -> "Storage":
        """Make the folder and lock it."""
        path = real_path(path)
        try:
            encode(layout.structure(range(len(layout.leaves))))
        except StructureError as error:
            raise StructureError(f"storage: {error} in params, which a file cannot give back") from None
        new = cls.__new__(cls)
        new._made_folder = make_folder(path)
        new._start(path, False)
        new._take_lock(os.O_CREAT | os.O_EXCL)
        try:
            new._map_counts(len(layout.leaves))
        except BaseException:
            new.discard()
            raise
        return new

    @classmethod
    def open(cls, path: Path, after_crash: str) -> "Storage":
        """Open and lock a folder of an earlier optimizer. `new_buffer` maps its buffers later."""
        old = cls.__new__(cls)
        path = real_path(path)
        if not os.path.lexists(path / METADATA_FILE):
            files = path.is_dir() and any(path.iterdir())
            rest = "; it was not finished: remove it, and make a new one with RMSProp(params, storage=...)"
            raise StorageError(f"{path}: expected a folder with {METADATA_FILE}, got none{rest if files else ''}")
        old._start(path, True)
        old._take_lock(os.O_CREAT)
        try:
            old.metadata = read_metadata(path / METADATA_FILE)
            old._map_counts(len(old.metadata["parameters"]))
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
            if len(self.counts) != _ABSENT + len(state.layout.leaves):
                raise StorageError(f"{self.path / METADATA_FILE}: structure and parameters do not fit together")
            yield
            self._state = state
            if self.reopened:
                counts = state.counts
                counts.steps, counts.skipped_steps = int(self.counts[_STEPS]), int(self.counts[_SKIPPED_STEPS])
                counts.absent[...] = np.minimum(self.counts[_ABSENT:], counts.steps)
            else:
                self._write_metadata(clean=False)
        except BaseException:
            self.discard()
            raise

    def _start(self, path: Path, reopened: bool) -> None:
        """Set the attributes of a folder that is not locked yet."""
        self.path, self.reopened, self.metadata = path, reopened, {}
        self._files: dict[str, MappedFile] = {}
        self.pages = Pages(path, self._files)
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
                f"{self.path}: expected a folder that nobody has open, got one that another process, or another "
                "optimizer of this one, has; it has to be closed there first"
            ) from None
        except OSError as error:
            if self._lock is None or error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise  # the two errors mean that the file system has no locks

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # unlocks, as child processes have closed their copies
            self._lock = None

    def _map_counts(self, parameters: int) -> None:
        """Make or map the file of counts."""
        nbytes = 8 * (_ABSENT + parameters)
        self._counts_file = MappedFile(self.path / _COUNTS, nbytes, not self.reopened)
        self.counts = self._counts_file.memory[:nbytes].view(np.int64)

    def _check_content(self, after_crash: str) -> None:
        """Raise StorageError for impossible counts, or after a crash if `after_crash` is "raise"."""
        under_way, steps, absent = self.counts[_UNDER_WAY], self.counts[_STEPS], self.counts[_ABSENT:]
        if self.metadata["storage"]["clean"]:
            self._check_counts(absent)
        elif after_crash == "raise":
            raise StorageError(
                f"{self.path}: expected a folder that was closed, got one of a process that ended without: "
                f"{_WHAT.get(int(under_way), 'it is damaged')}, {steps} steps were finished, "
                f"{self.metadata['steps']} when it was flushed last. Parameters and state may be of different "
                'steps; after_crash="use" takes them as they are'
            )
        else:
            self._check_counts(np.minimum(absent, steps))  # some counts may have reached the disk without others

    def _check_counts(self, absent: NDArray[np.int64]) -> None:
        """Raise StorageError for impossible counts."""
        where = self.path / _COUNTS
        for name, count in (("steps", self.counts[_STEPS]), ("skipped_steps", self.counts[_SKIPPED_STEPS])):
            if not 0 <= count <= MOST_STEPS:
                raise StorageError(
                    f"{where}: {name}: expected a number of steps, got {count}, which is not from 0 to 2**53: the file "
                    "is damaged"
                )
        try:
            check_absent(absent, int(self.counts[_STEPS]))
        except CheckpointError as error:
            raise StorageError(f"{where}: {error}: the file is damaged") from None

    @property
    def names(self) -> list[str]:
        """The names of all buffers, on the disk or mapped."""
        found = {*self.metadata.get("storage", {}).get("buffers", []), *self._files}
        return [name for name in BUFFERS if name in found]

    def new_buffer(self, name: str, layout: Layout) -> StoredBuffer:
        """Return the stored buffer `name`, or a new one of zeros, in a mapped file."""
        self.check_open()
        new = name not in self.names
        if new:
            self._check_place()
        file = MappedFile(self.path / f"{name}.bin", layout.nbytes, new)
        self._files[name] = file
        self._marked_open = self._marked_open and not new
        buffer = StoredBuffer.from_layout(layout, lambda *size_and_dtype: file.memory)
        buffer.pages = self.pages
        return buffer

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
        self.counts[_UNDER_WAY] = what
        self._interrupted = True

    def step_taken(self) -> None:
        """Record the counts, and the end of a step or load."""
        counts = self._state.counts
        self.counts[_ABSENT:] = counts.absent
        self.counts[_SKIPPED_STEPS] = counts.skipped_steps
        self.counts[_STEPS] = counts.steps
        self.counts[_UNDER_WAY] = _NOTHING
        self._interrupted = False

    def step_skipped(self) -> None:
        """Record the count of skipped steps."""
        if not self._marked_open:
            self._write_metadata(clean=False)
        self.counts[_SKIPPED_STEPS] = self._state.counts.skipped_steps

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Return a context for all writes of a load."""
        self._begin(_LOAD)
        yield
        self.step_taken()
        self._write_metadata(clean=False)  # with the options that were loaded

    def flush(self) -> None:
        """Write everything but gradients to the disk, and then record that the folder is complete."""
        self.check_open()
        call_all([partial(self._write_out, file) for name, file in self._files.items() if name != "grads"])
        if not self._interrupted:
            self.step_taken()
        self._counts_file.map.flush()
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
            self._end("expected an optimizer that is open, got one that was closed; RMSProp.reopen(path) goes on")
            for buffer in self._state.buffers.values():
                assert isinstance(buffer, StoredBuffer)
                buffer.make_read_only()

    def _end(self, reason: str) -> None:
        """Close and unlock the folder. `reason` is the error of later calls."""
        self._closed = reason
        self._unlock()

    def after_fork(self) -> None:
        """Close the folder in a child process. It shares memory and lock with its parent."""
        if self._closed is None:
            self._end(
                "expected the process that opened it, got a child of fork(), whose steps would be steps of its "
                "parent's parameters; close it before the fork, or open another folder"
            )

    def discard(self) -> None:
        """Remove new files after an error. Ignore errors of the removal, so that the first error is seen."""
        with contextlib.suppress(StorageError):
            self._check_place()
            self._remove()
        self._end("it was not made")

    def _remove(self) -> None:
        """Remove the files of a new folder, and the folder if it was made."""
        if not self.reopened:
            for name in [*(f"{name}.bin" for name in BUFFERS), _COUNTS, METADATA_FILE, _LOCK]:
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            if self._made_folder:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def _write_metadata(self, clean: bool) -> None:
        """Write ``head.json``. `clean` tells whether the files on the disk are complete and belong together."""
        self._check_place()
        own = {"version": VERSION, "clean": clean, "buffers": self.names}
        with replaced(self.path / METADATA_FILE) as temporary:
            temporary.write_text(json.dumps(metadata_of(self._state) | {"storage": own}), encoding="utf-8")
        self._marked_open = not clean

    # The memory of a host backend.

    in_parts = True

    def run(self, calls: Sequence[Call]) -> Iterator[None]:
        """Return an iterator that makes one kernel call for each item, in parts. Call `step_taken` after the last."""
        self._begin(_STEP)
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


def check_storage(storage: object) -> None:
    """Raise OptionTypeError or OptionError unless RMSProp takes this value as `storage`."""
    if storage is not None and not isinstance(storage, str | os.PathLike | Storage):
        raise OptionTypeError(f"storage: expected the path of a folder or None, got {type(storage).__name__} object")
    if storage == "":  # pathlib would take it for the current folder
        raise OptionError("storage: expected the path of a folder or None, got ''")
