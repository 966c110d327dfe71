"""Pages of mapped files: they are read, used and given back in parts, so that little of a file is in memory."""

import ctypes
import errno
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastrms.buffers import Array

if TYPE_CHECKING:
    from fastrms.backends.mapped import MappedFile

__all__ = ["PART_BYTES", "Pages"]

# How much of each array a step works on at a time. With 2 GB of data in 512 MB of memory, 1 MB took 1.2 s a step, every
# time; 4 and 16 MB took up to 2.9 s now and then. Tried and left out: to ask for the next part ahead (MADV_WILLNEED,
# 2.5 s), to start writing a part when it is done (sync_file_range, POSIX_FADV_DONTNEED, 2.5 s), and to wait until it is
# written (msync, 1.9 s). The system does both better by itself, unless nothing is given back: 3.5 s.
PART_BYTES = 1 << 20

# Advice that Linux takes from 5.14 on, for which `mmap` has no names: get all pages at once, to be read or written,
# instead of each when it is touched. 60 ms a step instead of 110 where all is in the page cache (5e7 float32).
_POPULATE_READ, _POPULATE_WRITE = 22, 23


class Pages:
    """The pages of the files of one folder.

    Parameters
    ----------
    path : Path
        The folder, for error messages.
    files : mapping of str to MappedFile
        Grows as buffers are made.
    """

    def __init__(self, path: Path, files: Mapping[str, "MappedFile"]) -> None:
        self._path, self._files = path, files

    def mapped_elsewhere(self) -> list[Array]:
        """Return the memory at which this process has mapped the files once more."""
        return _mapped_elsewhere(self._files.values())

    def shows(self, arrays: tuple[Any, ...]) -> bool:
        """Whether one of the arrays lies in another mapping of these files, and changes when the buffers do."""
        viewing = [array for array in arrays if isinstance(array, np.ndarray) and not array.flags.owndata]
        places = self.mapped_elsewhere() if viewing else []
        return any(np.may_share_memory(array, place) for array in viewing for place in places)

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
                    raise OSError(errno.EIO, "cannot be read or written", str(self._path)) from None

    def _advise(self, array: Array, advice: int) -> None:
        for file in self._files.values():
            if array.nbytes and file.has(array):
                file.advise(array, advice)

    def parts(self, array: Array) -> Iterator[slice]:
        """Slices that make up a 1-D array; the pages of each are given back when the next is asked for."""
        size = max(1, PART_BYTES // array.itemsize)
        for start in range(0, len(array), size):
            part = slice(start, min(start + size, len(array)))
            yield part
            self.release(array[part])

    def call_in_parts(
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
        size = PART_BYTES // params.itemsize
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


def _mapped_elsewhere(files: Iterable["MappedFile"]) -> list[Array]:
    """Return the memory at which this process has mapped files once more, as arrays; only Linux tells."""
    if sys.platform != "linux":
        return []
    found = []  # address, end, and what identifies the file
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        bounds, _, _, device, inode = line.split(maxsplit=5)[:5]
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        found.append((low, high, (device, inode)))
    own = {file.memory.ctypes.data for file in files}
    # Not by `os.stat`: some file systems have other numbers there.
    names = {name for low, high, name in found if any(low <= address < high for address in own)}
    return [
        np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        for low, high, name in found
        if name in names and not any(low <= address < high for address in own)
    ]
