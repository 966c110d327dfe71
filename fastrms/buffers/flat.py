"""`FlatBuffer`: arrays in one block of memory, with views of it in their structure."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastrms._guarded import Guarded
from fastrms._types import Array
from fastrms.buffers.conversion import as_array, can_store, castable_to
from fastrms.buffers.layout import ALIGNMENT, Layout
from fastrms.buffers.pytree import P, PyTree, describe
from fastrms.errors import DtypeError, StructureError

__all__ = ["Array", "FlatBuffer", "as_arrays", "lies_in", "views_of"]


# Bytes of a page, the unit of 4K aliasing on every processor; bytes from which on a block begins on a page.
PAGE, PAGE_ALIGNED_FROM = 4096, 65_536


def as_arrays(items: Sequence[object], layout: Layout, name: str, allow_none: bool = False) -> list[Any]:
    """Return one array for each item, for `FlatBuffer.store`, or raise as `FlatBuffer.gather`; nothing is written.

    Ordinary arrays are the items themselves. With `allow_none` an item may be None.
    """
    arrays = []
    dtypes = [segment.dtype for segment in layout.segments]
    for item, leaf in zip(items, layout.leaves, strict=True):
        dtype = dtypes[leaf.segment]
        # Nearly all items are ordinary arrays. Each step pays for this test once for each array.
        ordinary = type(item) is np.ndarray and item.shape == leaf.shape and item.dtype is dtype
        if not ordinary and not (item is None and allow_none):
            item = as_array(item, name + leaf.path, dtype)
            if item.shape != leaf.shape:
                raise StructureError(f"{name}{leaf.path}: expected shape {leaf.shape}, got {item.shape}")
            if not can_store(item.dtype, dtype):
                raise DtypeError(f"{name}{leaf.path}: expected {castable_to(dtype)}, got {item.dtype}")
        arrays.append(item)
    return arrays


def lies_in(item: object, memory: Array) -> bool:
    """Tell whether an object is an array within the bounds of `memory`, or an array without elements."""
    if not isinstance(item, np.ndarray) or not item.size:
        return isinstance(item, np.ndarray)
    low, high = np.lib.array_utils.byte_bounds(item)
    ours, end = np.lib.array_utils.byte_bounds(memory)
    return bool(ours <= low and high <= end)


def views_of(segments: Sequence[Array], layout: Layout) -> list[Array]:
    """Return the arrays of a layout as views of one vector for each of its segments."""
    return [segments[leaf.segment][leaf.start : leaf.stop].reshape(leaf.shape) for leaf in layout.leaves]


class FlatBuffer(Guarded, Generic[P], set_once=("block", "layout", "leaves", "segments", "views")):
    """Arrays in one contiguous block of memory, and views of the block in the structure of the arrays.

    Views and block share their memory, which is never reallocated. One loop, one ``np.savez`` or one MPI call over
    `flat` handles all arrays.

    Parameters
    ----------
    arrays : list, tuple, dict or array, or any nesting of these
        Arrays of any shape (0-d and empty too), any strides and byte order, and any dtype of NumPy's bool, integer,
        float and complex kinds. They are copied; the views are in C order and native byte order. Python numbers and
        objects with ``__array__`` are converted as NumPy does.
    name : str, default "arrays"
        The name of `arrays` in error messages.

    Attributes
    ----------
    views : the structure of `arrays`, with an ndarray for each array
        Views of the block. They stay the same arrays as long as the buffer exists.
    flat : ndarray, or tuple of ndarray
        The dense 1-D array behind all views. It is aligned to 64 bytes, or to a page of 4 KiB if it has 64 KiB or more.
        With several dtypes, a tuple with one dense array for each dtype, in the order of their first appearance. All of
        them are in the same block.
    segments : tuple of ndarray
        The same as `flat`, but always a tuple.
    leaves : tuple of ndarray
        The views in order, without their structure.
    block : ndarray of uint8
        The whole memory, including gaps between segments.
    layout : Layout
    size, nbytes : int
        The number of elements of all arrays, and the number of bytes of the block.

    Raises
    ------
    StructureError
        `arrays` contains no array, or contains itself.
    DtypeError
        An item is not an array of numbers: text, None, objects, ragged lists, masked arrays, generators, sets.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import FlatBuffer
    >>> buffer = FlatBuffer({"W": np.ones((2, 2)), "b": np.zeros(2)})
    >>> buffer.flat
    array([1., 1., 1., 1., 0., 0.])
    >>> buffer.flat *= 3
    >>> buffer.views["W"]
    array([[3., 3.],
           [3., 3.]])
    """

    @overload
    def __init__(self, arrays: P, name: str = "arrays") -> None: ...
    @overload
    def __init__(self: "FlatBuffer[Any]", arrays: PyTree, name: str = "arrays") -> None: ...
    def __init__(self, arrays: PyTree, name: str = "arrays") -> None:
        self._allocate(Layout(arrays, name))
        self.gather(arrays, name)

    @classmethod
    def from_layout(cls, layout: Layout, allocate: Callable[..., Array] = np.zeros) -> Self:
        """Return a new buffer of zeros.

        Parameters
        ----------
        layout : Layout
            Structure, shapes and dtypes.
        allocate : function of a size and a dtype, default numpy.zeros
            Called once with a number of bytes and ``numpy.uint8``. It returns the memory as a 1-D array, whose contents
            the buffer keeps.

        Returns
        -------
        buffer : FlatBuffer
            A buffer of this class.

        Raises
        ------
        MemoryError
            The arrays do not fit into memory.
        """
        buffer = cls.__new__(cls)
        buffer._allocate(layout, allocate)
        return buffer

    def _allocate(self, layout: Layout, allocate: Callable[..., Array] = np.zeros) -> None:
        self.layout = layout
        # Large blocks start on a page, and small ones on a cache line. A large new NumPy array, as most gradients are,
        # starts 16 bytes into a page. If the block started 64 bytes in, each load of a gradient would have the low 12
        # address bits of a store just before, and wait for it (benchmarks/placement.py).
        alignment = PAGE if layout.nbytes >= PAGE_ALIGNED_FROM else ALIGNMENT
        try:
            memory = allocate(layout.nbytes + alignment, np.uint8)
        except (MemoryError, ValueError):  # ValueError for a number of bytes beyond NumPy's integers
            raise MemoryError(
                f"expected arrays that fit into memory, got {layout.nbytes:,} bytes, which every buffer needs"
            ) from None
        start = -memory.ctypes.data % alignment
        self._memory = memory
        self.block: NDArray[np.uint8] = memory[start : start + layout.nbytes]
        self.segments: tuple[Array, ...] = tuple(
            self.block[s.offset : s.offset + s.size * s.dtype.itemsize].view(s.dtype) for s in layout.segments
        )
        self.leaves: tuple[Array, ...] = tuple(views_of(self.segments, layout))
        self.views: P = layout.structure(self.leaves)

    @property
    def flat(self) -> Array | Any:
        """The dense 1-D array behind all views, or a tuple with an array for each dtype if there are several.

        An assignment copies values into the block: ``buffer.flat *= 2`` and ``buffer.flat = vector`` change all views.
        """
        return self.segments[0] if len(self.segments) == 1 else self.segments

    @flat.setter
    def flat(self, value: ArrayLike) -> None:
        if value is self.flat:
            return
        if len(self.segments) != 1:
            raise StructureError(f"flat: there are {len(self.segments)} dtypes; write to each of buffer.segments")
        if np.shape(value) not in ((), self.segments[0].shape):
            raise StructureError(f"flat: expected shape {self.segments[0].shape}, got {np.shape(value)}")
        self.segments[0][...] = value

    @property
    def size(self) -> int:
        """The number of elements of all arrays."""
        return sum(segment.size for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the block, including padding between segments."""
        return self.layout.nbytes

    @overload
    def like(self, fill: float = 0, dtype: None = None) -> "FlatBuffer[P]": ...
    @overload
    def like(self, fill: float = 0, dtype: DTypeLike | None = None) -> "FlatBuffer[Any]": ...
    def like(self, fill: float = 0, dtype: DTypeLike | None = None) -> "FlatBuffer[Any]":
        """Return a new buffer with the same structure and shapes in new memory.

        Parameters
        ----------
        fill : float, default 0
            The value of every element.
        dtype : dtype or None, default None
            The dtype of all its arrays; None for the dtypes of this buffer.

        Returns
        -------
        buffer : FlatBuffer
            It shares no memory with this buffer.
        """
        other = FlatBuffer.from_layout(self.layout if dtype is None else self.layout.with_dtype(dtype))
        # New memory is 0, and the system provides it at the first use. A gradient buffer stays unused if gradients are
        # read where they lie.
        if fill != 0 or np.signbit(fill):
            for segment in other.segments:
                segment[...] = fill
        return other

    def unflatten(self, vector: Array | Sequence[Array]) -> Any:
        """Return views of another vector in the structure of `views`, without a copy.

        Parameters
        ----------
        vector : ndarray, shape (size,)
            A vector of any dtype and stride. For a buffer with several dtypes, a sequence of one vector for each
            segment.

        Returns
        -------
        tree : the structure of `views`
            Views of `vector`. Writing to them changes `vector`.

        Raises
        ------
        StructureError
            The number of vectors or a shape is wrong.
        DtypeError
            A vector is not an ndarray, and so has no views.
        """
        segments = self.layout.segments
        vectors: list[Any] = [vector] if len(segments) == 1 else list(vector)
        if len(vectors) != len(segments):
            raise StructureError(f"vector: expected {len(segments)} vectors, one for each dtype, got {len(vectors)}")
        for one, segment in zip(vectors, segments, strict=True):
            if not isinstance(one, np.ndarray):
                raise DtypeError(f"vector: expected a 1-D ndarray of {segment.size} elements, got {describe(one)}")
            if one.shape != (segment.size,):
                raise StructureError(f"vector: expected shape {(segment.size,)}, got {one.shape}")
        return self.layout.structure(views_of(vectors, self.layout))

    def gather(self, arrays: PyTree, name: str = "arrays") -> None:
        """Copy arrays with the structure and shapes of `views` into the block.

        All arrays are checked before the first write.

        Parameters
        ----------
        arrays : the structure of `views`
            Values are cast as NumPy's ``casting="same_kind"`` allows. A float32 buffer accepts float64, integers and
            the floats of ml_dtypes (bfloat16, float8), but no complex numbers. A number that is too large becomes inf,
            without a warning.
        name : str, default "arrays"
            The name of `arrays` in error messages.

        Raises
        ------
        StructureError
            The structure or a shape is wrong.
        DtypeError
            An item is not an array of numbers, or cannot be cast.
        """
        self.store(as_arrays(self.layout.flatten(arrays, name), self.layout, name))

    def store(self, arrays: Sequence[Any]) -> None:
        """Copy arrays that fit, one for each of `leaves`, into the block.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            Arrays with the shapes of `leaves`. They may alias this buffer in any way. None leaves its part of the block
            unchanged.
        """
        if any(aliases := self.aliases(arrays)):
            # Copy: a write to the block could change an array before it is read. A view at its own place needs no copy.
            arrays = [None if array is view else array.copy() if alias else array
                      for array, view, alias in zip(arrays, self.leaves, aliases, strict=True)]  # fmt: skip
        with np.errstate(all="ignore"):  # an error of a cast would come after half of the writes
            self.copy_in(arrays)

    def copy_in(self, arrays: Sequence[object]) -> None:
        """Copy arrays that do not alias this buffer into the block. `store` calls it; derived classes override it.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            As for `store`.
        """
        # One assignment for each array: np.concatenate(out=flat) is faster for many 1-D arrays (84 us against 115 for
        # 1,000 of 100 elements) and slower for 2-D arrays (260 us).
        for array, view in zip(arrays, self.leaves, strict=True):
            if array is not None:
                view[...] = array

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Tell for each array whether it may share memory with this buffer, from the bounds of its memory.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            Any number of arrays of any shape.

        Returns
        -------
        aliases : list of bool
            One for each array; False for None.
        """
        aliases = []
        places: list[Array] | None = None
        apart: dict[int, bool] = {}  # by the base of arrays, which many have in common
        for array in arrays:
            if array is None or ((base := array.base) is None and array.flags.owndata):
                aliases.append(False)
                continue
            if id(base) not in apart:
                apart[id(base)] = isinstance(base, np.ndarray) and base.flags.owndata and base is not self._memory
            if apart[id(base)]:
                aliases.append(False)
                continue
            if places is None:
                places = self.mappings()
            aliases.append(any(np.may_share_memory(array, place) for place in places))
        return aliases

    def original_views(self) -> Sequence[Array]:
        """Return new views with the original shapes of `leaves`.

        Returns
        -------
        originals : sequence of ndarray
            One view for each of `leaves`.
        """
        return views_of(self.segments, self.layout)

    def mappings(self) -> list[Array]:
        """Return all memory through which the buffer can be read.

        Returns
        -------
        mappings : list of ndarray of uint8
            One mapping, unless the memory is a file that is mapped more than once.
        """
        return [self._memory]

    def contains(self, item: object) -> bool:
        """Tell whether an object is an array in the memory of the block.

        Parameters
        ----------
        item : object
            Any object.

        Returns
        -------
        inside : bool
            True also for an array without elements.
        """
        return lies_in(item, self.block)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would pickle views as arrays of their own.
        return _restore, (self.layout, self.block)

    def __repr__(self) -> str:
        parts = ", ".join(f"{segment.size} {segment.dtype}" for segment in self.segments)
        return f"FlatBuffer({len(self.leaves)} arrays, {parts})"


def _restore(layout: Layout, block: NDArray[np.uint8]) -> FlatBuffer:
    buffer = FlatBuffer.from_layout(layout)
    buffer.block[...] = block
    return buffer
