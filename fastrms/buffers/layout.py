"""`Layout`: where each array of a nesting lies in one block of memory."""

from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from fastrms._types import DType, Items
from fastrms.buffers.conversion import as_array
from fastrms.buffers.pytree import Level, PyTree, build, count_items, describe, refuse_structure, take_apart
from fastrms.errors import StructureError

__all__ = ["ALIGNMENT", "Layout", "Leaf", "Segment"]

# A cache line, and the widest vector register of x86-64.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a layout: elements [start, stop) of segment number `segment`."""

    path: str  # the index into the nesting: "[0]['W']", "" for a single array
    shape: tuple[int, ...]
    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """All arrays of one dtype, contiguous: `size` elements from byte `offset` of the block."""

    dtype: DType
    offset: int
    size: int

    def __reduce__(self) -> Items:
        # An unpickled dtype is not NumPy's own object. A step compares dtypes by identity.
        return _segment, (self.dtype.char, self.offset, self.size)


def _segment(char: str, offset: int, size: int) -> Segment:
    return Segment(np.dtype(char), offset, size)


class Layout:
    """The position of each array of a nesting of lists, tuples and dicts in one block of memory.

    Arrays of one dtype follow one another without gaps, each in C order. Their order is the order of the nesting, and
    in a dict the order of insertion. Each dtype starts at a multiple of 64 bytes. Dtypes are in the order of their
    first array.

    Parameters
    ----------
    arrays : list, tuple, dict or array, or any nesting of these
        Arrays of which the layout keeps structure, shapes and dtypes. Any Mapping counts as a dict, and becomes a dict.
    name : str
        The name of `arrays` in error messages.

    Attributes
    ----------
    leaves : tuple of Leaf
        One Leaf for each array, in the order of the nesting.
    segments : tuple of Segment
        One Segment for each dtype.
    nbytes : int
        The size of the block in bytes.
    hint : str, default ""
        The end of messages about gradients or other arrays with another structure.

    Raises
    ------
    StructureError, DtypeError
        As `FlatBuffer` raises them.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import Layout
    >>> layout = Layout({"W": np.ones((2, 3)), "b": np.zeros(3)})
    >>> [(leaf.path, leaf.start, leaf.stop) for leaf in layout.leaves]
    [("['W']", 0, 6), ("['b']", 6, 9)]
    """

    leaves: tuple[Leaf, ...]
    segments: tuple[Segment, ...]
    nbytes: int
    hint: str  # the end of error messages about another structure

    def __init__(self, arrays: PyTree, name: str = "arrays") -> None:
        try:
            self._root, items = take_apart(arrays)
        except RecursionError:
            raise StructureError(
                f"{name}: expected arrays in lists, tuples or dicts, got a structure that contains itself or is "
                "nested too deeply"
            ) from None
        if not items:
            raise StructureError(f"{name}: expected at least one array, got {describe(arrays)} without any")
        self.hint = ""
        self._place(items, name)
        self._prepare_flatten()

    def _prepare_flatten(self) -> None:
        """Prepare all that `flatten` needs to know of the structure."""
        # One call takes a plain list or dict of arrays, the most frequent structures, apart.
        flat = self._root is not None and not any(self._root.children)
        keys = self._root.keys if flat and self._root is not None else None
        self._is_flat_sequence = flat and keys is None
        self._values = itemgetter(*keys) if keys is not None and len(keys) > 1 else None
        self._levels: list[Level] = []
        nodes = [] if self._root is None else [self._root]
        while nodes:
            self._levels.append(Level(nodes))
            nodes = self._levels[-1].below
        # Levels return leaves by depth.
        numbers = self._by_level(self.structure(range(len(self.leaves))))
        assert numbers is not None
        self._order = None if numbers == sorted(numbers) else itemgetter(*np.argsort(numbers).tolist())

    def _place(self, items: list[tuple[str, object]], name: str) -> None:
        """Set `leaves`, `segments` and `nbytes` for these arrays, given with their paths."""
        dtypes: list[DType] = []
        sizes: list[int] = []
        leaves: list[Leaf] = []
        for path, item in items:
            array = as_array(item, name + path)
            # In native byte order, and NumPy's own object: a step compares dtypes by identity.
            dtype = np.dtype(array.dtype.char)
            if dtype not in dtypes:
                dtypes.append(dtype)
                sizes.append(0)
            segment = dtypes.index(dtype)
            start = sizes[segment]
            sizes[segment] += array.size
            leaves.append(Leaf(path, array.shape, segment, start, sizes[segment]))
        self.leaves = tuple(leaves)
        self._place_segments(dtypes, sizes)

    def _place_segments(self, dtypes: Sequence[DType], sizes: Sequence[int]) -> None:
        """Set `segments` and `nbytes` for segments of these dtypes and sizes."""
        segments: list[Segment] = []
        offset = 0
        for dtype, size in zip(dtypes, sizes, strict=True):
            segments.append(Segment(dtype, offset, size))
            offset += -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.segments = tuple(segments)
        self.nbytes = offset

    def with_dtype(self, dtype: DTypeLike) -> Self:
        """Return a layout with the same structure and shapes, and one dtype for all arrays.

        Parameters
        ----------
        dtype : dtype
            The dtype of all arrays.

        Returns
        -------
        layout : Layout
            A layout with one segment, or with as many segments as this layout.
        """
        zero = np.zeros((), dtype)
        if len({segment.dtype for segment in self.segments}) == 1:  # leaves and segments stay where they are
            other = copy(self)
            other._place_segments([zero.dtype] * len(self.segments), [segment.size for segment in self.segments])
            return other
        return type(self)(self.structure(np.broadcast_to(zero, leaf.shape) for leaf in self.leaves))

    def of_parts(self, parts: Sequence["Layout"]) -> Self:
        """Return this layout, with its arrays placed as in other layouts that follow one another.

        Parameters
        ----------
        parts : sequence of Layout
            Layouts that together have the arrays of this layout, in its order.

        Returns
        -------
        layout : Layout
            A layout with the segments of all parts.
        """
        other = copy(self)
        places: list[Leaf] = []
        segments: list[Segment] = []
        for part in parts:
            places += [replace(leaf, segment=leaf.segment + len(segments)) for leaf in part.leaves]
            segments += part.segments
        other.leaves = tuple(replace(place, path=leaf.path) for place, leaf in zip(places, self.leaves, strict=True))
        other._place_segments([segment.dtype for segment in segments], [segment.size for segment in segments])
        return other

    def cut(self, parts: Sequence[slice]) -> Self:
        """Return the layout of a part of each segment. Each array is 1-D there, with its elements in the part.

        Parameters
        ----------
        parts : sequence of slice
            The elements [start, stop) of each segment.

        Returns
        -------
        layout : Layout
            A layout with the structure and the paths of this layout. An array may be empty.
        """
        other = copy(self)
        leaves: list[Leaf] = []
        for leaf in self.leaves:
            part = parts[leaf.segment]
            start, stop = (min(max(end, part.start), part.stop) - part.start for end in (leaf.start, leaf.stop))
            leaves.append(replace(leaf, shape=(stop - start,), start=start, stop=stop))
        other.leaves = tuple(leaves)
        dtypes = [segment.dtype for segment in self.segments]
        other._place_segments(dtypes, [part.stop - part.start for part in parts])
        return other

    def zeros(self) -> Any:
        """Return arrays of zeros with this structure and these shapes and dtypes, which take no memory.

        Returns
        -------
        arrays : the structure of this layout
            Read-only arrays.
        """
        zero = [np.zeros((), segment.dtype) for segment in self.segments]
        return self.structure(np.broadcast_to(zero[leaf.segment], leaf.shape) for leaf in self.leaves)

    def dtype_of(self, leaf: Leaf) -> DType:
        """Return the dtype of an array of this layout.

        Parameters
        ----------
        leaf : Leaf
            One of `leaves`.

        Returns
        -------
        dtype : numpy.dtype
            In native byte order.
        """
        return self.segments[leaf.segment].dtype

    def child_sizes(self) -> list[int]:
        """Count the arrays below each item of the outermost list, tuple or dict.

        Returns
        -------
        sizes : list of int
            [1] for a single array.
        """
        return [1] if self._root is None else [count_items(child) for child in self._root.children]

    def number_of(self, key: Hashable) -> int:
        """Return the number of the array that a key of the nesting leads to.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            The index of the array in the list or dict. For a nesting, it is a tuple of indices, outermost first. For a
            single array, it is ``()``.

        Returns
        -------
        number : int
            An index of `leaves`.

        Raises
        ------
        StructureError
            There is no array at this key.
        """
        try:
            return self._numbers[key]
        except (KeyError, TypeError):
            whole = (keys[0] if len(keys) == 1 else keys for keys in self._numbers if isinstance(keys, tuple))
            keys = list(dict.fromkeys(whole))  # a tuple that is a key of a dict occurs twice
            known = ", ".join(map(repr, keys[:10])) + (f", ... ({len(keys)} in all)" if len(keys) > 10 else "")
            raise StructureError(f"key: expected one of {known}, got {key!r}") from None

    @cached_property
    def keys(self) -> list[tuple[Hashable, ...]]:
        """The keys of each array in the nesting, the outermost first."""
        return [keys for keys in self._numbers if isinstance(keys, tuple)][: len(self.leaves)]

    @cached_property
    def _numbers(self) -> dict[Hashable, int]:
        """The number of each array by its tuple of keys. A single key also works without the tuple."""
        numbers: dict[tuple[Hashable, ...], int] = {}

        def walk(tree: Any, keys: tuple[Hashable, ...]) -> None:
            if isinstance(tree, int):
                numbers[keys] = tree
                return
            for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
                walk(item, (*keys, key))

        walk(self.structure(range(len(self.leaves))), ())
        return numbers | {keys[0]: k for keys, k in numbers.items() if len(keys) == 1}

    def structure(self, items: Iterable[object]) -> Any:
        """Arrange one item for each array in the structure of this layout.

        Parameters
        ----------
        items : iterable
            Anything, in the order of `leaves`.

        Returns
        -------
        tree : the structure of this layout
            The items, nested as the arrays are.
        """
        return build(self._root, iter(items))

    def flatten(self, tree: Any, name: str) -> Items:
        """Return the items of `tree`, a nesting of this structure, in the order of `leaves`.

        Parameters
        ----------
        tree : the structure of this layout
            Lists and tuples stand for one another. A dict may have its keys in another order. Items may be anything.
        name : str
            What error messages call `tree`.

        Returns
        -------
        items : tuple
            One for each of `leaves`.

        Raises
        ------
        StructureError
            Wrong count, missing or unknown key, or another kind of container.
        """
        plain = self.plain_items(tree)
        if plain is not None:
            return plain
        items = self._by_level(tree)
        if items is None:
            try:
                refuse_structure(self._root, tree, name)
            except StructureError as error:
                raise StructureError(f"{error}{self.hint}") from None
            raise StructureError(
                f"{name}: expected items that do not change while they are read, got {describe(tree)} that changes"
            )
        return tuple(items) if self._order is None else self._order(items)

    def plain_items(self, tree: Any) -> Items | None:
        """Return the items of a plain list, tuple or dict, the most frequent structures. No user code is called.

        Parameters
        ----------
        tree : object
            Anything.

        Returns
        -------
        items : tuple or None
            As `flatten` returns them; None if `tree` is not a list, tuple or dict of this structure, or if the
            structure is nested.
        """
        if self._is_flat_sequence and type(tree) in (list, tuple) and len(tree) == len(self.leaves):
            return tuple(tree)
        if self._values is not None and type(tree) is dict and len(tree) == len(self.leaves):
            with suppress(KeyError):
                values: Items = self._values(tree)
                return values
        return None

    def _by_level(self, tree: object) -> list[Any] | None:
        """Return the items of `tree`, the outermost container's first, or None for another structure."""
        if self._root is None:
            return [tree]
        leaves: list[Any] = []
        trees = [tree]
        for level in self._levels:
            if (below := level.split(trees, leaves)) is None:
                return None
            trees = below
        return leaves
