"""Pages of mapped files: read, used and given back in parts, so that a process has few of them in memory."""

import bisect
import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastrms.buffers import Array

if TYPE_CHECKING:
    from fastrms.backends.mapped import MappedFile

__all__ = ["PART_BYTES", "Pages"]

# The bytes of each array that a step updates at a time. With 2 GB of data in 512 MB of memory a step took 1.2 s with
# parts of 1 MB, and up to 2.9 s with 4 or 16 MB. All else was slower: reading the next part ahead (MADV_WILLNEED,
# 2.5 s), starting to write a finished part (sync_file_range, POSIX_FADV_DONTNEED, 2.5 s), waiting until it is written
# (msync, 1.9 s), and giving no pages back (3.5 s).
PART_BYTES = 1 << 20

# Advice of Linux 5.14 without a name in `mmap`: map all pages at once, instead of each at its first access. A step
# takes 60 ms instead of 110 if all pages are in the page cache (5e7 float32).
_POPULATE_READ, _POPULATE_WRITE = 22, 23

_start = attrgetter("start")


class Pages:
    """The pages of the files of one folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[MappedFile] = []  # in the order of their addresses

    def add(self, file: "MappedFile") -> None:
        """Include the pages of a file."""
        bisect.insort(self._files, file, key=_start)

    def remove(self, file: "MappedFile") -> None:
        """Exclude the pages of a file. Ctrl-C may have come before they were included."""
        self._files = [other for other in self._files if other is not file]

    def mapped_elsewhere(self) -> list[Array]:
        """Return other mappings of the same files in this process, as arrays. Only Linux can find them."""
        if sys.platform != "linux":
            return []
        found = []  # address, end, and (device, inode) of the file
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            bounds, _, _, device, inode = line.split(maxsplit=5)[:5]
            low, high = (int(bound, 16) for bound in bounds.split("-"))
            found.append((low, high, (device, inode)))
        own = [file.start for file in self._files]
        # The identity comes from the maps too, because `os.stat` gives other numbers on some file systems.
        names = {name for low, high, name in found if bisect.bisect_left(own, low) < bisect.bisect_left(own, high)}
        return [
            np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
            for low, high, name in found
            if name in names and bisect.bisect_left(own, low) == bisect.bisect_left(own, high)
        ]

    def shows(self, arrays: tuple[object, ...]) -> bool:
        """Return whether an array aliases a buffer through another mapping of its file."""
        viewing = [array for array in arrays if isinstance(array, np.ndarray) and not array.flags.owndata]
        places = self.mapped_elsewhere() if viewing else []
        return any(np.may_share_memory(array, place) for array in viewing for place in places)

    def release(self, array: Array) -> None:
        """Give back the pages of a dense array that lies in one of the files. The page cache keeps the content."""
        # Other systems lack this advice, or may discard changed pages.
        if sys.platform == "linux":
            self._advise(array, mmap.MADV_DONTNEED)

    def _populate(self, array: Array, advice: int) -> None:
        """Map all pages of a dense array at once, if the system can do so."""
        if sys.platform == "linux":
            try:
                self._advise(array, advice)
            except OSError as error:
                # EFAULT: the disk cannot be read or written. Accessing the pages would end the process with SIGBUS.
                if error.errno == errno.EFAULT:
                    raise OSError(errno.EIO, "cannot be read or written", str(self._path)) from None

    def _advise(self, array: Array, advice: int) -> None:
        """Call `madvise` for the pages of a dense array. Do nothing for an array outside the files."""
        address = array.ctypes.data
        place = bisect.bisect_right(self._files, address, key=_start) - 1
        if array.nbytes and place >= 0 and address < (file := self._files[place]).start + file.memory.nbytes:
            file.advise(array, advice)

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of a 1-D array, and give back the pages of each before the next."""
        size = max(1, PART_BYTES // array.itemsize)
        for start in range(0, len(array), size):
            part = slice(start, min(start + size, len(array)))
            yield part
            self.release(array[part])

    def call_in_parts(self, *call: Any) -> None:
        """Make a kernel call part by part, as calls on slices of its arrays."""
        update, *buffers, hyper, spans, factors, extended, lines_ahead = call
        for elements, rows, cut in _cut(spans, len(buffers[0]), buffers[0].itemsize):
            arrays = [None if buffer is None else buffer[elements] for buffer in buffers]
            params, grads, *state = (array for array in arrays if array is not None)
            for array in (params, *state):
                self._populate(array, _POPULATE_WRITE)
            if not cut[:, 2].any():  # gradients are in the gradient buffer
                self._populate(grads, _POPULATE_READ)
            update(*arrays, hyper, cut, factors[rows], extended, lines_ahead)
            for array in (params, grads, *state):
                self.release(array)


def _cut(spans: NDArray[np.int64], size: int, itemsize: int) -> Iterator[tuple[slice, slice, NDArray[np.int64]]]:
    """Cut the spans of an update of `size` elements into parts.

    Yield for each part the elements of its arrays, the rows of `spans` in it, and these rows as spans of the part.
    """
    starts, stops = (np.ascontiguousarray(spans[:, column]) for column in (0, 1))
    step = PART_BYTES // itemsize
    for low in range(0, size, step):
        high = min(low + step, size)
        rows = slice(np.searchsorted(stops, low, side="right"), np.searchsorted(starts, high, side="left"))
        cut = spans[rows].copy()
        if len(cut):
            first, last = max(low, cut[0, 0]), min(high, cut[-1, 1])
            if cut[0, 2]:  # the address of a gradient. An earlier part may have its beginning
                cut[0, 2] += (first - cut[0, 0]) * itemsize
            cut[0, 0], cut[-1, 1] = first, last
            cut[:, :2] -= first
            yield slice(first, last), rows, cut
