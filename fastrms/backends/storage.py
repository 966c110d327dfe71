"""Buffers in memory-mapped files, for parameters and state that are larger than memory.

A folder has one file for each buffer, ``head.json`` with structure, dtypes and options as checkpoints have them,
``counts.bin`` with the counts of steps, and ``lock``, which whoever has the folder open holds. `Storage` is such a
folder; `Stored` has the methods of `fastrms.RMSProp` that are about it.

The system keeps what is mapped in its page cache and writes it to the disk when it thinks fit; nothing of that is
memory of the process, but for the pages that it has touched. So a step goes through the arrays in parts of some MB,
and gives the pages of each part back when it is done: a call of a kernel becomes many calls, on slices. No bit depends
on where arrays are cut, which is part of the kernels' contract.
"""

import atexit
import contextlib
import errno
import json
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import check_one_of
from fastrms.backends import mapped
from fastrms.backends.mapped import MappedFile, PartNorms, StoredBuffer, open_own
from fastrms.buffers import Layout
from fastrms.checkpoints.formats import replaced
from fastrms.checkpoints.metadata import (
    MOST_STEPS,
    check_head,
    check_skipped,
    encode,
    get_lr,
    groups_of,
    head_of,
    params_of,
)
from fastrms.errors import (
    CheckpointError,
    FastrmsError,
    OptionError,
    OptionTypeError,
    StorageError,
    StructureError,
    call_all,
)
from fastrms.kernels.norms import SpanNorms

if sys.platform != "win32":
    import fcntl

__all__ = ["Storage", "Stored", "check_storage"]

Array = NDArray[Any]
_Optimizer = Any  # an RMSProp, which is a `Stored` and imports this file

# Of what is in the folder. Head and arrays are those of checkpoints, which have a version of their own.
VERSION = 1

_HEAD, _COUNTS, _LOCK = "head.json", "counts.bin", "lock"
_BUFFERS = ("params", "grads", "cache", "momentum_buffer", "grad_avg")  # the first three are always there

# Advice that Linux takes from 5.14 on, for which `mmap` has no names: get all pages at once, to be read or written,
# instead of each when it is touched. 60 ms a step instead of 110 where all is in the page cache (5e7 float32).
_POPULATE_READ, _POPULATE_WRITE = 22, 23

# What `counts.bin` begins with; the steps that each parameter sat out follow.
_UNDER_WAY, _STEPS, _SKIPPED_STEPS, _SKIPPED = range(4)
_NOTHING, _STEP, _LOAD = range(3)
_WHAT = {_NOTHING: "nothing was under way", _STEP: "a step was under way", _LOAD: "a load was under way"}

_open: "weakref.WeakSet[Stored]" = weakref.WeakSet()


def check_storage(storage: Any) -> None:
    """Raise OptionTypeError if this is nothing that RMSProp takes as `storage`."""
    if storage is not None and not isinstance(storage, str | os.PathLike | Storage):
        raise OptionTypeError(f"storage: expected the path of a folder or None, got {type(storage).__name__} object")
    if storage == "":  # which is the current folder for pathlib
        raise OptionError("storage: expected the path of a folder or None, got ''")


class Storage:
    """A folder with the buffers of an optimizer; `create` and `open` make the object.

    Attributes
    ----------
    path : Path
        Where it is, whatever becomes of the current folder and of links that lead there.
    reopened : bool
        Whether the buffers were there before.
    head : dict
        What ``head.json`` said when it was opened.
    """

    path: Path
    reopened: bool
    head: Mapping[str, Any]
    _made_folder: bool = False

    @classmethod
    def of(cls, storage: Any, layout: Layout) -> "Storage":
        """What was opened by `open`, or a new one for arrays of this layout at a path."""
        return storage if isinstance(storage, Storage) else cls.create(Path(storage), layout)

    @classmethod
    def create(cls, path: Path, layout: Layout) -> "Storage":
        """Make the folder, and take it into possession."""
        path = _real(path)
        try:
            encode(layout.structure(range(len(layout.leaves))))
        except StructureError as error:
            raise StructureError(f"storage: {error} in params, which a file cannot give back") from None
        new = cls.__new__(cls)
        new._made_folder = _make_folder(path)
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
        """Open what is there; the buffers are mapped when somebody asks for them."""
        old = cls.__new__(cls)
        path = _real(path)
        if not os.path.lexists(path / _HEAD):
            files = path.is_dir() and any(path.iterdir())
            rest = "; it was not finished: remove it, and make a new one with RMSProp(params, storage=...)"
            raise StorageError(f"{path}: expected a folder with {_HEAD}, got none{rest if files else ''}")
        old._start(path, True)
        old._take_lock(os.O_CREAT)
        try:
            old.head = _read_head(path / _HEAD)
            old._map_counts(len(old.head["parameters"]))
            under_way, steps = old.counts[_UNDER_WAY], old.counts[_STEPS]
            if old.head["storage"]["clean"]:
                old._check_counts(old.counts[_SKIPPED:])
            elif after_crash == "raise":
                raise StorageError(
                    f"{path}: expected a folder that was closed, got one of a process that ended without: "
                    f"{_WHAT.get(int(under_way), 'it is damaged')}, {steps} steps were finished, "
                    f"{old.head['steps']} when it was flushed last. Parameters and state may be of different steps; "
                    'after_crash="use" takes them as they are'
                )
            else:
                # Of what was written by then, some counts can be newer than others.
                old._check_counts(np.minimum(old.counts[_SKIPPED:], steps))
        except BaseException:
            old._unlock()
            raise
        return old

    @contextlib.contextmanager
    def making(self, opt: _Optimizer, layout: Layout) -> Iterator[bool]:
        """Around the making of an optimizer: its buffers are there, in the end its counts; nothing, after an error.

        What comes says whether they were there before.
        """
        try:
            if len(self.counts) != _SKIPPED + len(layout.leaves):
                raise StorageError(f"{self.path / _HEAD}: structure and parameters do not fit together")
            for name in ("params", "grads"):
                opt.buffers[name] = self.buffer(name, layout)
            if self.reopened:
                for name in self.names[2:]:
                    opt.buffers[name] = opt._new_state(name)
            yield self.reopened
            if self.reopened:
                opt.steps, opt.skipped_steps = int(self.counts[_STEPS]), int(self.counts[_SKIPPED_STEPS])
                opt._skipped[...] = np.minimum(self.counts[_SKIPPED:], opt.steps)
            else:
                self._write_head(opt, clean=False)
        except BaseException:
            self.discard()
            raise
        _open.add(opt)

    def _start(self, path: Path, reopened: bool) -> None:
        self.path, self.reopened, self.head = path, reopened, {}
        self._files: dict[str, MappedFile] = {}
        self._lock: int | None = None
        self._closed: str | None = None  # why nothing can be done with it any more
        self._interrupted = False  # whether something that began here has not ended
        self._head_says_open = False  # whether the head on the disk knows all buffers, and that they are in use

    def _take_lock(self, flags: int) -> None:
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
                raise  # otherwise a file system without locks: nobody can tell

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which unlocks; children of fork have closed theirs
            self._lock = None

    def _map_counts(self, parameters: int) -> None:
        nbytes = 8 * (_SKIPPED + parameters)
        self._counts_file = MappedFile(self.path / _COUNTS, nbytes, not self.reopened)
        self.counts: NDArray[np.int64] = self._counts_file.memory[:nbytes].view(np.int64)

    def _check_counts(self, skipped: NDArray[np.int64]) -> None:
        """Raise StorageError where the file has counts that no run can have."""
        where = self.path / _COUNTS
        for name, count in (("steps", self.counts[_STEPS]), ("skipped_steps", self.counts[_SKIPPED_STEPS])):
            if not 0 <= count <= MOST_STEPS:
                raise StorageError(
                    f"{where}: {name}: expected a number of steps, got {count}, which is not from 0 to 2**53: the file "
                    "is damaged"
                )
        try:
            check_skipped(skipped, int(self.counts[_STEPS]))
        except CheckpointError as error:
            raise StorageError(f"{where}: {error}: the file is damaged") from None

    @property
    def names(self) -> list[str]:
        """The buffers that there are, on the disk or mapped."""
        found = {*self.head.get("storage", {}).get("buffers", []), *self._files}
        return [name for name in _BUFFERS if name in found]

    def buffer(self, name: str, layout: Layout) -> StoredBuffer:
        """A buffer of this layout in a file: one that is there, or a new one of zeros."""
        self.check_open()
        new = name not in self.names
        if new:
            self._check_place()
        file = MappedFile(self.path / f"{name}.bin", layout.nbytes, new)
        self._files[name] = file
        self._head_says_open = self._head_says_open and not new
        buffer = StoredBuffer.from_layout(layout, lambda *size_and_dtype: file.memory)
        buffer.storage = self
        return buffer

    @property
    def is_open(self) -> bool:
        """Whether steps can be taken."""
        return self._closed is None

    def check_open(self) -> None:
        """Raise StorageError if it was closed, or is the parent's."""
        if self._closed is not None:
            raise StorageError(f"{self.path}: {self._closed}")

    def _check_place(self) -> None:
        """Raise StorageError if another folder, or none, is where this one was: what is mapped is elsewhere now."""
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

    # What is there, and what is being done with it.

    def begin(self, opt: _Optimizer, what: int = _STEP) -> None:
        """Note, ahead of the first write, that something is under way."""
        self.check_open()
        if not self._head_says_open:
            self._write_head(opt, clean=False)
        self.counts[_UNDER_WAY] = what
        self._interrupted = True

    def end(self, opt: _Optimizer) -> None:
        """Note that it is done, and how many steps there are now."""
        self.counts[_SKIPPED:] = opt._skipped
        self.counts[_SKIPPED_STEPS] = opt.skipped_steps
        self.counts[_STEPS] = opt.steps
        self.counts[_UNDER_WAY] = _NOTHING
        self._interrupted = False

    def note_skipped(self, opt: _Optimizer) -> None:
        """Note a step that was not taken, which neither begins nor ends anything."""
        if not self._head_says_open:
            self._write_head(opt, clean=False)
        self.counts[_SKIPPED_STEPS] = opt.skipped_steps

    @contextlib.contextmanager
    def loading(self, opt: _Optimizer) -> Iterator[None]:
        """Around all writes of a load."""
        self.begin(opt, _LOAD)
        yield
        self.end(opt)
        self._write_head(opt, clean=False)  # options are others now

    def flush(self, opt: _Optimizer) -> None:
        """Write all to the disk, and then that it is there. Gradients are no state, and are left to the system."""
        self.check_open()
        call_all([partial(self._write_out, file) for name, file in self._files.items() if name != "grads"])
        if not self._interrupted:
            self.end(opt)
        self._counts_file.map.flush()
        self._write_head(opt, clean=not self._interrupted)

    def _write_out(self, file: MappedFile) -> None:
        file.map.flush()
        self.release(file.memory)

    def close(self, opt: _Optimizer) -> None:
        """Flush, and let others have it; views live on, and can be read."""
        try:
            self.flush(opt)
        finally:
            self._let_go("expected an optimizer that is open, got one that was closed; RMSProp.reopen(path) goes on")
            for buffer in opt.buffers.values():
                for array in (buffer._memory, buffer.block, *buffer.segments, *buffer.leaves):
                    array.flags.writeable = False

    def _let_go(self, reason: str) -> None:
        self._unlock()
        self._closed = reason

    def in_child_of_fork(self) -> None:
        """The memory is the parent's as well, and so is the lock."""
        if self._closed is None:
            self._closed = (
                "expected the process that opened it, got a child of fork(), whose steps would be steps of its "
                "parent's parameters; close it before the fork, or open another folder"
            )
            self._unlock()

    def discard(self) -> None:
        """Remove what was made, after an error; what cannot be removed is left, and does not hide that error."""
        with contextlib.suppress(StorageError):
            self._check_place()
            self._remove()
        self._let_go("it was not made")

    def _remove(self) -> None:
        if not self.reopened:
            for name in [*(f"{name}.bin" for name in _BUFFERS), _COUNTS, _HEAD, _LOCK]:
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
            if self._made_folder:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def _write_head(self, opt: _Optimizer, clean: bool) -> None:
        self._check_place()
        own = {"version": VERSION, "clean": clean, "buffers": self.names}
        with replaced(self.path / _HEAD) as temporary:
            temporary.write_text(json.dumps(head_of(opt) | {"storage": own}), encoding="utf-8")
        self._head_says_open = not clean

    def mapped_elsewhere(self) -> list[Array]:
        """The memory at which somebody in this process has mapped the buffers' files once more."""
        return mapped.mapped_elsewhere(self._files.values())

    def shows(self, arrays: tuple[Any, ...]) -> bool:
        """Whether one of the arrays lies in another mapping of these files, and changes when the buffers do."""
        viewing = [array for array in arrays if isinstance(array, np.ndarray) and not array.flags.owndata]
        places = self.mapped_elsewhere() if viewing else []
        return any(np.may_share_memory(array, place) for array in viewing for place in places)

    # Calls in parts.

    def release(self, array: Array) -> None:
        """Give back the pages of a dense array, if it lies in one of the files; what it has is in the page cache."""
        # Elsewhere it is not there, or is not known to leave changed pages of a file alone.
        if sys.platform == "linux":
            self._advise(array, mmap.MADV_DONTNEED)

    def _populate(self, array: Array, advice: int) -> None:
        """Get the pages of a dense array, if it lies in one of the files, where the system can do so at once."""
        if sys.platform == "linux":
            try:
                self._advise(array, advice)
            except OSError as error:
                # EFAULT: the disk cannot be read or written, for which touching them would end the process.
                if error.errno == errno.EFAULT:
                    raise OSError(errno.EIO, "cannot be read or written", str(self.path)) from None

    def _advise(self, array: Array, advice: int) -> None:
        for file in self._files.values():
            if array.nbytes and file.has(array):
                file.advise(array, advice)

    def parts(self, array: Array) -> Iterator[slice]:
        """Slices that make up a 1-D array; the pages of each are given back when the next is asked for."""
        size = max(1, mapped.PART_BYTES // array.itemsize)
        for start in range(0, len(array), size):
            part = slice(start, min(start + size, len(array)))
            yield part
            self.release(array[part])

    def norms(self, spans: NDArray[np.int64]) -> SpanNorms:
        """What tells the norm of each parameter's gradient."""
        return PartNorms(spans, self)

    def in_parts(self, opt: _Optimizer, calls: list[tuple[Any, ...]]) -> Iterator[None]:
        """Make the calls of kernels that are a step, in parts, one for each item; `end` follows when it was counted."""
        self.begin(opt)
        for call in calls:
            self._call_in_parts(*call)
            yield

    def _call_in_parts(
        self,
        update: Callable[..., None],
        params: Array,
        grads: Array,
        cache: Array,
        momentum_buffer: Array | None,
        grad_avg: Array | None,
        hyper: Array,
        spans: NDArray[np.int64],
        factors: Array,
        extended: bool,
    ) -> None:
        """One call of a kernel as many on slices of its arrays. Arguments as for `kernels.reference.update`."""
        starts, stops = (np.ascontiguousarray(spans[:, column]) for column in (0, 1))
        size = mapped.PART_BYTES // params.itemsize
        for low in range(0, len(params), size):
            high = min(low + size, len(params))
            own = slice(np.searchsorted(stops, low, side="right"), np.searchsorted(starts, high, side="left"))
            here = spans[own].copy()
            if not len(here):
                continue
            # Of the first and last span what lies in this part; and of the arrays, what these have.
            first, last = max(low, here[0, 0]), min(here[-1, 1], high)
            if here[0, 2]:  # the address of its gradient, of which the beginning may have been read
                here[0, 2] += (first - here[0, 0]) * grads.itemsize
            here[0, 0], here[-1, 1] = first, last
            here[:, :2] -= first
            arrays = [None if a is None else a[first:last] for a in (params, grads, cache, momentum_buffer, grad_avg)]
            there = [array for array in arrays if array is not None]
            for array in there:
                if array is not arrays[1]:
                    self._populate(array, _POPULATE_WRITE)
                elif not here[:, 2].any():
                    self._populate(array, _POPULATE_READ)
            update(*arrays, hyper, here, factors[own], extended)
            for array in there:
                self.release(array)


def _real(path: Path) -> Path:
    """Where a path leads now; os.chdir(), or a link that is set to another folder, changes that for the path only."""
    return Path(os.path.realpath(path))


def _make_folder(path: Path) -> bool:
    """Make a folder, or find that there is an empty one; whether it was made."""
    try:
        path.mkdir()
        return True
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, "storage: expected a folder to make another one in, got none", str(path.parent)
        ) from None
    except FileExistsError:
        if not path.is_dir():
            raise StorageError(f"storage: expected the path of a folder, got that of a file: {path}") from None
        found = sorted(item.name for item in path.iterdir())
        if _HEAD in found:
            raise StorageError(
                f"storage: expected a new folder, got one with an optimizer in it: {path}; RMSProp.reopen(path) goes "
                "on with that one"
            ) from None
        if found:
            raise StorageError(
                f"storage: expected a new or empty folder, got one with {found[0]!r} in it: {path}; give another path"
            ) from None
        return False


def _read_head(path: Path) -> Any:
    """The head, after a check of what does not depend on the buffers."""
    try:
        with open(open_own(path, os.O_RDONLY), encoding="utf-8") as stream:
            head = json.loads(stream.read())
        check_head(head)
        own = head.get("storage")
        if not isinstance(own, dict) or type(own.get("clean")) is not bool or not isinstance(own.get("buffers"), list):
            raise StorageError("storage: expected a dict with 'clean' and 'buffers'")
        if own.get("version") != VERSION:
            raise StorageError(f"storage: expected version {VERSION}, got {own.get('version')!r}")
        if not set(_BUFFERS[:3]) <= set(own["buffers"]) <= set(_BUFFERS):
            raise StorageError(f"storage: expected the buffers of an optimizer, got {own['buffers']}")
    except (FastrmsError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None
    return head


class Stored:
    """The methods of `fastrms.RMSProp` about its storage."""

    _between_steps: Any
    _storage: Storage | None = None

    @property
    def storage(self) -> Path | None:
        """The folder that has the buffers, or None where they are in memory."""
        return None if self._storage is None else self._storage.path

    @classmethod
    def reopen(
        cls,
        path: str | os.PathLike[str],
        *,
        lr: float | Callable[[int], float] | None = None,
        kernel: str = "auto",
        num_threads: int | None = None,
        after_crash: str = "raise",
    ) -> Any:
        """Go on with an optimizer that was made with ``storage=path`` and closed: same bits, options and steps.

        Parameters
        ----------
        path : str or path-like
            The folder.
        lr : float or callable, optional
            The rate of the groups whose own rate was a function, which no file can hold; required if there are such
            groups. If there are none, `lr` replaces the saved rates of all groups.
        kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
            As for `RMSProp`; it is not saved, as it changes no bit.
        num_threads : int or None, default None
            As for `RMSProp`; not saved either.
        after_crash : {"raise", "use"}, default "raise"
            What to do if the process that had it open ended without closing it, so that parameters and state may be of
            different steps: raise StorageError, which says what is known, or use what is there.

        Returns
        -------
        optimizer : RMSProp
            Its buffers are the files; nothing is read until it is used.

        Raises
        ------
        StorageError
            There is no optimizer in the folder, it is damaged, open elsewhere, or was not closed; or `lr` is needed.
        OptionError, OptionTypeError
            A bad option.
        """
        check_one_of("after_crash", after_crash, ("raise", "use"))
        storage = Storage.open(Path(path), after_crash)
        try:
            head, where = storage.head, storage.path / _HEAD
            try:
                params = params_of(head, None)
                dtypes = [
                    {np.dtype(parameter["dtype"]) for parameter in head["parameters"] if parameter.get("group") == k}
                    for k in range(len(head["param_groups"]))
                ]
                # Rates that are missing are the caller's to give, and checked as such.
                groups_of(head, dtypes, [0.0 if group.get("lr") is None else None for group in head["param_groups"]])
            except CheckpointError as error:
                raise StorageError(f"{where}: cannot be read: {error}") from None
            try:
                new_lr = get_lr(head["param_groups"], lr, "reopen")
            except CheckpointError as error:
                raise StorageError(str(error)) from None
            options = [
                group | ({"lr": lr} if new else {}) for group, new in zip(head["param_groups"], new_lr, strict=True)
            ]
            of_all = {name: head[name] for name in ("global_clip_norm", "nonfinite", "cache_dtype")}
            if head["grouped"]:
                params = [{"params": part} | group for part, group in zip(params, options, strict=True)]
            else:
                of_all |= options[0]
            make: Any = cls
            opt: _Optimizer = make(params, kernel=kernel, num_threads=num_threads, storage=storage, **of_all)
            if head_of(opt)["parameters"] != head["parameters"]:
                raise StorageError(f"{where}: structure and parameters do not fit together")
        except BaseException:
            storage.discard()
            raise
        return opt

    def flush(self) -> None:
        """Write parameters, state, counts and options to the disk, if they are in storage; return when they are there.

        What a crash leaves is what was there then, or newer. In memory there is nothing to do.

        Raises
        ------
        StorageError
            It was closed.
        OSError
            It cannot be written.
        """
        if self._storage is not None:
            with self._between_steps("flush", changes=False):
                self._storage.flush(self)

    def close(self) -> None:
        """Flush, and let others open the folder; this optimizer takes no step any more. In memory nothing to do.

        Views of parameters and state live on, and can be read, not written. ``with RMSProp(params, storage=path) as
        opt`` closes at the end, and so do the end of the optimizer's life and that of a program that ends by itself.
        A second call does nothing.

        Raises
        ------
        OSError
            It cannot be written; it is closed nevertheless, and counts as not closed when it is opened again.
        """
        if self._storage is not None and self._storage.is_open:
            with self._between_steps("close"):
                if self._storage.is_open:  # still, when it is this thread's turn
                    self._storage.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _in_parts(self, array: Array) -> Iterator[slice]:
        """Slices of an array of this optimizer: of one in storage some MB at a time, whose memory is given back."""
        return iter([slice(None)]) if self._storage is None else self._storage.parts(array)

    def _loading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._storage is None else self._storage.loading(self)


@atexit.register
def _close_all() -> None:
    call_all([optimizer.close for optimizer in _open])
