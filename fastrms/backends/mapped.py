"""Buffers in mapped files, and norms of gradients in them. Pages are given back after use."""

import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.backends import pages
from fastrms.backends.pages import Pages
from fastrms.buffers import Array, FlatBuffer
from fastrms.errors import StorageError
from fastrms.kernels.norms import CHUNK, SpanNorms

__all__ = ["MappedFile", "PartNorms", "StoredBuffer", "open_own"]


def open_own(path: Path, flags: int) -> int:
    """Open a file of a storage folder, and return its descriptor.

    Raise StorageError for a symbolic or hard link: another folder could have the same data. Raise OSError if the file
    cannot be opened, or is read-only and `flags` ask for writing.
    """
    if path.is_symlink():
        raise StorageError(f"{path}: expected a file of this folder, got a link to another place")
    # O_NONBLOCK: opening a pipe would wait for its other end. It has no effect on files.
    own = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | own, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:  # it became a link after the check above
            raise StorageError(f"{path}: expected a file of this folder, got a link to another place") from None
        raise
    about = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            raise StorageError(
                f"{path}: expected a file of this folder alone, got one with another name too (a hard link), or no "
                "regular file; replace it by a copy"
            )
        # The superuser may write any file, and yet a file that nobody may write is meant to stay.
        if flags & os.O_RDWR and not flags & os.O_EXCL and not about.st_mode & 0o222:
            message = "expected a file that can be written, got one that is read-only"
            raise PermissionError(errno.EACCES, message, str(path))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class MappedFile:
    """A file of `nbytes`, mapped into memory. The mapping lives until the last array that aliases it.

    A `new` file replaces an unfinished file of an earlier process. It is removed after an error.
    """

    def __init__(self, path: Path, nbytes: int, new: bool) -> None:
        self.path = path
        size = max(nbytes, mmap.PAGESIZE)  # an empty file cannot be mapped
        if new:
            path.unlink(missing_ok=True)
        descriptor = open_own(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL) * new)
        try:
            if new:
                _reserve(descriptor, size, path)
            elif (found := os.fstat(descriptor).st_size) != size:
                raise StorageError(f"{path}: expected {size:,} bytes, got {found:,}: the file is damaged")
            self.map = mmap.mmap(descriptor, size)
        except BaseException:
            if new:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        self.memory: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)
        self.start: int = self.memory.ctypes.data

    def advise(self, array: Array, advice: int) -> None:
        """Call `madvise` for the pages of an array that lies in this file."""
        low = array.ctypes.data - self.start
        start = low // mmap.PAGESIZE * mmap.PAGESIZE
        self.map.madvise(advice, start, min(low + array.nbytes, len(self.map)) - start)


def _reserve(file: int, size: int, path: Path) -> None:
    """Set the size of a file and allocate it on the disk.

    Without disk space a later write to the mapping would end the process with SIGBUS.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.ftruncate(file, size)
    except OSError as error:
        message = f"storage: expected room for {size:,} bytes, got: {os.strerror(error.errno or 0)}"
        raise OSError(error.errno, message, str(path)) from None


class StoredBuffer(FlatBuffer, set_once=("pages",)):
    """A `FlatBuffer` whose memory is a file."""

    pages: Pages

    def mappings(self) -> list[Array]:
        """Return all arrays that map the file in this process."""
        return [*super().mappings(), *self.pages.mapped_elsewhere()]

    def copy_in(self, arrays: Any) -> None:
        """Copy arrays as `FlatBuffer.copy_in`, and give pages back after each part."""
        pending = 0
        for array, view in zip(arrays, self.leaves, strict=True):
            if array is not None:
                pending += view.nbytes
                self._copy(view, array)
                if pending > pages.PART_BYTES:
                    self.pages.release(self.block)
                    pending = 0
        self.pages.release(self.block)

    def make_read_only(self) -> None:
        """Make all arrays of the buffer read-only."""
        for array in (self._memory, self.block, *self.segments, *self.leaves):
            array.flags.writeable = False

    def _copy(self, view: Array, array: Any) -> None:
        """Copy an array into a view, in parts of rows."""
        if view.nbytes <= pages.PART_BYTES or not view.ndim:
            view[...] = array
            return
        rows = pages.PART_BYTES * len(view) // view.nbytes
        for i in range(0, len(view), max(1, rows)):
            if rows:
                view[i : i + rows] = array[i : i + rows]
                self.pages.release(view[i : i + rows])
            else:
                self._copy(view[i], array[i])


class PartNorms(SpanNorms):
    """`SpanNorms` that read gradients from a file in parts, with the same bits."""

    def __init__(self, spans: NDArray[np.int64], pages: Pages) -> None:
        super().__init__(spans)
        self._pages = pages

    def of(self, spans: NDArray[np.int64]) -> SpanNorms:
        """Return an object that computes the norms of other spans."""
        return PartNorms(spans, self._pages)

    def sum_squares(self, grads: Array, clip: float, prescale: float, kernel: str) -> NDArray[np.float64]:
        """Return the sums of `SpanNorms.sum_squares`, from parts of the file."""
        if self.spans[:, 2].any():  # the gradients are in arrays of the user
            return super().sum_squares(grads, clip, prescale, kernel)
        # Each chunk of a span is a piece. `span_of` has the number of its span.
        span_of = np.repeat(np.arange(len(self.spans)), np.diff(self.first_chunk))
        pieces = np.zeros((len(span_of), 3), np.int64)
        pieces[:, 0] = self.spans[span_of, 0] + CHUNK * (np.arange(len(span_of)) - self.first_chunk[span_of])
        pieces[:, 1] = np.minimum(pieces[:, 0] + CHUNK, self.spans[span_of, 1])
        partials = np.empty(len(pieces))
        first = 0
        while first < len(pieces):
            end = pieces[first, 0] + pages.PART_BYTES // grads.itemsize
            last = max(first + 1, int(np.searchsorted(pieces[:, 1], end, side="right")))
            partials[first:last] = SpanNorms(pieces[first:last]).sum_squares(grads, clip, prescale, kernel)
            self._pages.release(grads[pieces[first, 0] : pieces[last - 1, 1]])
            first = last
        sums = np.zeros(len(self.spans))
        np.add.at(sums, span_of, partials)  # in order, as `SpanNorms` adds up chunks; `sum` guarantees no order
        return sums
