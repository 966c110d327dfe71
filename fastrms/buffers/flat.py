"""Many arrays in one block of memory: `Layout` says where each one lies, `FlatBuffer` is the block with its views."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from operator import call, is_, itemgetter
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastrms.attributes import Guarded
from fastrms.errors import DtypeError, StructureError

__all__ = ["FlatBuffer", "Layout", "Leaf", "Segment"]

Array = NDArray[Any]

# What `numpy.dtype.isbuiltin` is for a dtype that another package has added, such as the bfloat16 of ml_dtypes.
_REGISTERED = 2

# A cache line, and the widest vector register of x86-64.
ALIGNMENT = 64


@dataclass(frozen=True)
class Leaf:
    """One array of a layout: elements [start, stop) of segment number `segment`."""

    path: str  # as one would index it: "[0]['W']", "" for a single array
    shape: tuple[int, ...]
    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class Segment:
    """All arrays of one dtype, without gaps: `size` elements from byte `offset` of the block."""

    dtype: np.dtype[Any]
    offset: int
    size: int


@dataclass(frozen=True)
class _Node:
    """A list, tuple, namedtuple or dict of the nesting, with a node for each child; a leaf is None."""

    kind: type
    keys: tuple[Any, ...] | None  # of a dict, else None
    children: tuple["_Node | None", ...]

    def build(self, items: list[Any]) -> Any:
        if self.keys is not None:
            return dict(zip(self.keys, items, strict=True))
        # A namedtuple takes its items one by one.
        return self.kind(*items) if hasattr(self.kind, "_fields") else self.kind(items)


class _Level:
    """Take the items of all containers at one depth of a nesting, in C."""

    def __init__(self, nodes: list[_Node]) -> None:
        self.nodes = nodes
        self._kinds = [node.kind for node in nodes]
        self._sizes = [len(node.children) for node in nodes]
        self._items_of = [_items_of(node.keys) for node in nodes]
        children = [child for node in nodes for child in node.children]
        self.below = [child for child in children if child is not None]
        self._is_leaf = [child is None for child in children]
        self._is_node = [child is not None for child in children]

    def take(self, trees: Sequence[Any], leaves: list[Any]) -> list[Any] | None:
        """Add the leaves in `trees` to `leaves` and return the containers in them, or None if `trees` do not fit."""
        if [*map(type, trees)] != self._kinds and not all(map(_can_be, trees, self.nodes)):
            return None
        if [*map(len, trees)] != self._sizes:
            return None
        try:
            items = [*chain.from_iterable(map(call, self._items_of, trees))]
        except KeyError:
            return None
        if len(items) != len(self._is_leaf):  # somebody's own list
            return None
        if not self.below:
            leaves.extend(items)
            return []
        leaves.extend(compress(items, self._is_leaf))
        return [*compress(items, self._is_node)]


def _items_of(keys: tuple[Any, ...] | None) -> Callable[[Any], Iterable[Any]]:
    """What gives the items of a list or tuple, or those of a dict in the order of these keys."""
    if not keys:
        return iter
    return itemgetter(*keys) if len(keys) > 1 else partial(_only_item, keys[0])


def _only_item(key: Any, tree: Any) -> tuple[Any]:
    return (tree[key],)


def _can_be(tree: Any, node: _Node) -> bool:
    """Whether a container is of a kind that may stand for that of `node`; a dict has its keys."""
    if node.keys is None:
        return isinstance(tree, list | tuple)
    # A key that is not there may be made when it is asked for.
    return isinstance(tree, Mapping) and all(key in tree for key in node.keys)


class Layout:
    """Where each array of a nesting of lists, tuples and dicts lies in one block of memory.

    Arrays of one dtype follow one another without gaps, each in C order, in the order of the nesting (dicts: of
    insertion); each dtype starts on a multiple of 64 bytes, dtypes in the order of their first array.

    Parameters
    ----------
    arrays : list, tuple, dict or array, or any nesting of these
        Only structure, shapes and dtypes are kept. A dict may be any Mapping and comes back as a dict.
    name : str
        What error messages call `arrays`.

    Attributes
    ----------
    leaves : tuple of Leaf
        One for each array, in the order of the nesting.
    segments : tuple of Segment
        One for each dtype.
    nbytes : int
        Size of the block.

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

    def __init__(self, arrays: Any, name: str = "arrays") -> None:
        found: list[tuple[str, Array]] = []
        try:
            self._root = _analyse(arrays, name, "", found)
        except RecursionError:
            raise StructureError(
                f"{name}: expected arrays in lists, tuples or dicts, got a nesting that contains itself, or is too deep"
            ) from None
        if not found:
            raise StructureError(f"{name}: expected at least one array, got {_describe(arrays)} without any")
        dtypes: list[np.dtype[Any]] = []
        sizes: list[int] = []
        leaves: list[Leaf] = []
        for path, array in found:
            # In native byte order, and NumPy's own object for it, so that `is` recognises a usual gradient.
            dtype = np.dtype(array.dtype.char)
            if dtype not in dtypes:
                dtypes.append(dtype)
                sizes.append(0)
            segment = dtypes.index(dtype)
            start = sizes[segment]
            sizes[segment] += array.size
            leaves.append(Leaf(path, array.shape, segment, start, sizes[segment]))
        self.leaves = tuple(leaves)
        segments: list[Segment] = []
        offset = 0
        for dtype, size in zip(dtypes, sizes, strict=True):
            segments.append(Segment(dtype, offset, size))
            offset += -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.segments = tuple(segments)
        self.nbytes = offset
        # A plain list or dict of arrays, as most are, is taken apart by one call.
        flat = self._root is not None and not any(self._root.children)
        keys = self._root.keys if flat and self._root is not None else None
        self._is_flat_sequence = flat and keys is None
        self._values = itemgetter(*keys) if keys is not None and len(keys) > 1 else None
        self._levels: list[_Level] = []
        nodes = [] if self._root is None else [self._root]
        while nodes:
            self._levels.append(_Level(nodes))
            nodes = self._levels[-1].below
        # Levels give leaves in the order of their depth.
        numbers = self._by_level(self.structure(range(len(leaves))))
        assert numbers is not None
        self._order = None if numbers == sorted(numbers) else itemgetter(*np.argsort(numbers).tolist())

    def with_dtype(self, dtype: DTypeLike) -> "Layout":
        """The layout of arrays of the same structure and shapes, all of one dtype.

        Parameters
        ----------
        dtype : dtype
            Of all of them.

        Returns
        -------
        layout : Layout
            With one segment.
        """
        return Layout(self.structure(np.broadcast_to(np.zeros((), dtype), leaf.shape) for leaf in self.leaves))

    def dtype_of(self, leaf: Leaf) -> np.dtype[Any]:
        """The dtype of an array of this layout.

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
        return [1] if self._root is None else [_count(child) for child in self._root.children]

    def structure(self, items: Iterable[Any]) -> Any:
        """Arrange one item for each array in the structure of this layout.

        Parameters
        ----------
        items : iterable
            Anything, in the order of `leaves`.

        Returns
        -------
        tree : the structure of this layout
            With an item where it has an array.
        """
        return _build(self._root, iter(items))

    def flatten(self, tree: Any, name: str) -> tuple[Any, ...]:
        """The items of `tree`, which must have this structure, in the order of `leaves`; the items are not looked at.

        Parameters
        ----------
        tree : the structure of this layout
            Lists and tuples stand for one another. A dict may have its keys in another order.
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
        if self._is_flat_sequence and type(tree) in (list, tuple) and len(tree) == len(self.leaves):
            return tuple(tree)
        if self._values is not None and type(tree) is dict and len(tree) == len(self.leaves):
            with suppress(KeyError):  # below it is said which
                return self._values(tree)  # type: ignore[no-any-return]
        items = self._by_level(tree)
        if items is None:
            _refuse(self._root, tree, name)
            raise StructureError(
                f"{name}: expected items that do not change while they are read, got {_describe(tree)} that changes"
            )
        return tuple(items) if self._order is None else self._order(items)

    def _by_level(self, tree: Any) -> list[Any] | None:
        """The items of `tree`, those of the outermost container first, or None if it has another structure."""
        if self._root is None:
            return [tree]
        leaves: list[Any] = []
        trees = [tree]
        for level in self._levels:
            if (below := level.take(trees, leaves)) is None:
                return None
            trees = below
        return leaves


class FlatBuffer(Guarded):
    """Arrays packed into one contiguous block of memory, and views of it in the structure of those arrays.

    Writing to a view writes to the block, and the other way round; nothing is ever reallocated. One loop, one
    ``np.savez`` or one MPI call over `flat` then does for all arrays.

    Parameters
    ----------
    arrays : list, tuple, dict or array, or any nesting of these
        Copied. Any dtype of NumPy's bool, integer, float and complex kinds, any shape (0-d and empty too), any
        strides and byte order; views come out in C order and native byte order. Objects with ``__array__`` and
        Python numbers are taken as NumPy takes them.
    name : str, default "arrays"
        What error messages call `arrays`.

    Attributes
    ----------
    views : the structure of `arrays`, with an ndarray for each
        Stable for the buffer's life.
    flat : ndarray, or tuple of ndarray
        The dense 1-D array behind all views, 64-byte aligned. Arrays of several dtypes cannot be one array: then a
        tuple with one dense array for each dtype, in the order of first appearance, all in the one block.
    segments : tuple of ndarray
        As `flat`, and a tuple also for a single dtype.
    leaves : tuple of ndarray
        The views in order, without the structure.
    block : ndarray of uint8
        The whole memory, gaps between segments included.
    layout : Layout
    size, nbytes : int
        Elements of all arrays; bytes of the block.

    Raises
    ------
    StructureError
        There is no array in `arrays`, or it is a nesting that contains itself.
    DtypeError
        Something is not an array of numbers: text, None, objects, ragged lists, masked arrays, generators, sets.

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

    _set_once = frozenset({"block", "kept", "layout", "leaves", "ones", "segments", "views", "watched"})

    def __init__(self, arrays: Any, name: str = "arrays") -> None:
        self._allocate(Layout(arrays, name))
        self.gather(arrays, name)

    def _allocate(self, layout: Layout, new_memory: Any = np.zeros) -> None:
        self.layout = layout
        # NumPy aligns to 16 bytes at least; take enough to start on a cache line.
        try:
            memory = new_memory(layout.nbytes + ALIGNMENT, np.uint8)
        except (MemoryError, ValueError):  # ValueError where NumPy cannot even count them
            raise MemoryError(
                f"expected arrays that fit into memory, got {layout.nbytes:,} bytes of them, which each buffer takes"
            ) from None
        start = -memory.ctypes.data % ALIGNMENT
        self._memory = memory
        self.block: NDArray[np.uint8] = memory[start : start + layout.nbytes]
        self.segments: tuple[Array, ...] = tuple(
            self.block[s.offset : s.offset + s.size * s.dtype.itemsize].view(s.dtype) for s in layout.segments
        )
        self.leaves: tuple[Array, ...] = tuple(self._views_of(self.segments))
        self.views: Any = layout.structure(self.leaves)
        self._watch()

    def _watch(self) -> None:
        """Keep what `views` can be compared with, to see whether something else was put into it."""
        # Lists that are equal have the same items, but for arrays of one element. For a single array, None == None.
        single = self.views is self.leaves[0]
        self.watched = None if single else self.views
        self.kept = None if single else self.layout.structure(self.leaves)
        ones = [k for k, leaf in enumerate(self.layout.leaves) if leaf.stop - leaf.start == 1]
        # The first one twice, so that the answer is a tuple also for a single number.
        self.ones = itemgetter(*ones, ones[0]) if ones and not single else None

    def _views_of(self, segments: Sequence[Array]) -> list[Array]:
        return [segments[leaf.segment][leaf.start : leaf.stop].reshape(leaf.shape) for leaf in self.layout.leaves]

    def has_its_ones(self) -> bool:
        """Whether the items of `views` that have one element are the arrays that were there at first.

        Returns
        -------
        intact : bool
            All other items are compared by ``watched == kept``. That cannot tell two arrays of one element apart if
            their values are equal.
        """
        items = self.layout.flatten(self.views, "views")
        return self.ones is None or all(map(is_, self.ones(items), self.ones(self.leaves)))

    def problems(self, name: str) -> list[str]:
        """What has been put in the place of views, and which views no longer show their part of the block.

        Parameters
        ----------
        name : str
            What the answer calls `views`.

        Returns
        -------
        problems : list of str
            A sentence for each; empty if all is as it was at first.
        """
        try:
            items = self.layout.flatten(self.views, name)
        except StructureError as error:
            return [str(error)]
        found = []
        for item, view, fresh, leaf in zip(
            items, self.leaves, self._views_of(self.segments), self.layout.leaves, strict=True
        ):
            path = name + leaf.path
            if item is not view:
                found.append(
                    f"{path}: expected the view that was there, got {_describe(item)} in its place; write into the "
                    f"view: {path}[...] = value"
                )
            elif view.__array_interface__ != fresh.__array_interface__:
                found.append(
                    f"{path}: expected a view of shape {leaf.shape} of its part of the block, got one that was changed "
                    f"to shape {view.shape}, strides {view.strides}, {view.dtype}"
                )
        return found

    def foreign(self, tree: Any, name: str) -> list[str]:
        """Find arrays that do not lie in the block.

        Parameters
        ----------
        tree : array, or list, tuple or dict of these, or any nesting
            Of any structure.
        name : str
            What the answer calls `tree`.

        Returns
        -------
        paths : list of str
            The paths of arrays that lie elsewhere, and of items that are no arrays.
        """
        return [path for path, item in _items(tree, name) if not self._has(item)]

    def _has(self, item: Any) -> bool:
        if not isinstance(item, np.ndarray) or not item.size:
            return isinstance(item, np.ndarray)
        low, high = np.lib.array_utils.byte_bounds(item)
        ours, end = np.lib.array_utils.byte_bounds(self.block)
        return bool(ours <= low and high <= end)

    @property
    def flat(self) -> Any:
        """The dense 1-D array behind all views, or a tuple of one for each dtype where there are several.

        Assigning to it copies in, so that ``buffer.flat *= 2`` and ``buffer.flat = vector`` do what they say.
        """
        return self.segments[0] if len(self.segments) == 1 else self.segments

    @flat.setter
    def flat(self, value: Any) -> None:
        if value is self.flat:
            return
        if len(self.segments) > 1:
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
        """The number of bytes of the block, padding between segments included."""
        return self.layout.nbytes

    def like(self, fill: float = 0, dtype: DTypeLike | None = None) -> "FlatBuffer":
        """Return a new buffer of the same structure and shapes in new memory.

        Parameters
        ----------
        fill : float, default 0
            What every element is set to.
        dtype : dtype or None, default None
            Of all its arrays; None for the dtypes of this one.

        Returns
        -------
        buffer : FlatBuffer
            Nothing is shared with this one.
        """
        other = _empty(self.layout if dtype is None else self.layout.with_dtype(dtype))
        # New memory is 0, and the system hands it out when it is first used: gradients that are read where they lie
        # never need theirs.
        if fill != 0 or np.signbit(fill):
            for segment in other.segments:
                segment[...] = fill
        return other

    def unflatten(self, vector: Any) -> Any:
        """Views of `vector` in this structure: what `views` is for `flat`. Nothing is copied.

        Parameters
        ----------
        vector : ndarray, shape (size,)
            Of any dtype and stride. For a buffer of several dtypes a sequence of one such vector for each segment.

        Returns
        -------
        tree : the structure of `views`
            Views of `vector`; writing to them writes to it.

        Raises
        ------
        StructureError
            Wrong number of vectors, or a vector of another shape.
        DtypeError
            A vector is no ndarray, so that views of it cannot be had.
        """
        vectors = [vector] if len(self.segments) == 1 else list(vector)
        if len(vectors) != len(self.segments):
            raise StructureError(f"vector: expected {len(self.segments)} vectors, one a dtype, got {len(vectors)}")
        for one, segment in zip(vectors, self.segments, strict=True):
            if not isinstance(one, np.ndarray):
                raise DtypeError(f"vector: expected a 1-D ndarray of {segment.size} elements, got {_describe(one)}")
            if one.shape != segment.shape:
                raise StructureError(f"vector: expected shape {segment.shape}, got {one.shape}")
        return self.layout.structure(self._views_of(vectors))

    def gather(self, arrays: Any, name: str = "arrays") -> None:
        """Copy `arrays`, which must have this structure and these shapes, into the block.

        Everything is checked before the first write.

        Parameters
        ----------
        arrays : the structure of `views`
            Values are cast as NumPy's ``casting="same_kind"`` allows: float64, integers and the floats of ml_dtypes
            (bfloat16, float8) go into a float32 buffer, complex numbers do not. A number that is too large becomes
            inf, without a warning.
        name : str, default "arrays"
            What error messages call `arrays`.

        Raises
        ------
        StructureError
            Wrong structure or shape.
        DtypeError
            Not an array of numbers, or of a kind that cannot be cast.
        """
        self.store(self.check(self.layout.flatten(arrays, name), name))

    def check(self, items: Sequence[Any], name: str, skip_none: bool = False) -> list[Any]:
        """Look whether something fits this buffer, and make arrays of it; nothing is written.

        Parameters
        ----------
        items : sequence
            One for each of `leaves`.
        name : str
            What error messages call `items`.
        skip_none : bool, default False
            Whether None may stand for an array, for which `store` then leaves the block as it is.

        Returns
        -------
        arrays : list of ndarray or None
            The items themselves where they are ordinary arrays.

        Raises
        ------
        StructureError, DtypeError
            As `gather` raises them.
        """
        checked = []
        for item, view, leaf in zip(items, self.leaves, self.layout.leaves, strict=True):
            # What nearly all items are, in as few steps as can be: this is the cost of each array of each step.
            usual = type(item) is np.ndarray and item.shape == leaf.shape and item.dtype is view.dtype
            if not usual and not (item is None and skip_none):
                item = _as_array(item, name + leaf.path, view.dtype)
                if item.shape != leaf.shape:
                    raise StructureError(f"{name}{leaf.path}: expected shape {leaf.shape}, got {item.shape}")
                if not _can_store(item.dtype, view.dtype):
                    raise DtypeError(f"{name}{leaf.path}: expected {_castable_to(view.dtype)}, got {item.dtype}")
            checked.append(item)
        return checked

    def store(self, arrays: Sequence[Any]) -> None:
        """Copy what `check` returned into the block.

        Parameters
        ----------
        arrays : list of ndarray or None
            Arrays that alias this buffer too, in any way. Where there is None, the block stays as it is.
        """
        if any(aliases := self.aliases(arrays)):
            # They may be written before they are read, except those that are at their own place.
            arrays = [None if array is view else array.copy() if alias else array
                      for array, view, alias in zip(arrays, self.leaves, aliases, strict=True)]  # fmt: skip
        with np.errstate(all="ignore"):  # half of them would be written when a cast raises
            self._copy_in(arrays)

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Tell which arrays may share memory with this buffer, by the bounds of memory.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            Of any number and shape.

        Returns
        -------
        aliases : list of bool
            One for each of them; False for None.
        """
        aliases = []
        places: list[Array] | None = None
        elsewhere: dict[int, bool] = {}  # by the base of arrays, which many have in common
        for array in arrays:
            if array is None or ((base := array.base) is None and array.flags.owndata):
                aliases.append(False)
                continue
            apart = elsewhere.get(id(base))
            if apart is None:
                apart = isinstance(base, np.ndarray) and base.flags.owndata and base is not self._memory
                elsewhere[id(base)] = apart
            if not apart and places is None:
                places = self._places()
            aliases.append(not apart and any(np.may_share_memory(array, place) for place in places or ()))
        return aliases

    def _places(self) -> list[Array]:
        """The memory in which the buffer can be read, as arrays."""
        return [self._memory]

    def _copy_in(self, arrays: Sequence[Any]) -> None:
        # One assignment for each: np.concatenate(out=flat) is faster for many 1-D arrays (84 us against 115 for 1,000
        # of 100 elements) and slower for 2-D ones (260 us).
        for array, view in zip(arrays, self.leaves, strict=True):
            if array is not None:
                view[...] = array

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would pickle views as arrays of their own.
        return _restore, (self.layout, self.block)

    def __repr__(self) -> str:
        parts = ", ".join(f"{segment.size} {segment.dtype}" for segment in self.segments)
        return f"FlatBuffer({len(self.leaves)} arrays, {parts})"


def _empty(layout: Layout) -> FlatBuffer:
    buffer = FlatBuffer.__new__(FlatBuffer)
    buffer._allocate(layout)
    return buffer


def _restore(layout: Layout, block: NDArray[np.uint8]) -> FlatBuffer:
    buffer = _empty(layout)
    buffer.block[...] = block
    return buffer


def _analyse(tree: Any, name: str, path: str, found: list[tuple[str, Array]]) -> _Node | None:
    """The structure of `tree`; its arrays, with their paths, are appended to `found`."""
    if isinstance(tree, Mapping):
        keys = tuple(tree)
        return _Node(dict, keys, tuple(_analyse(tree[key], name, f"{path}[{key!r}]", found) for key in keys))
    if isinstance(tree, list | tuple):
        kind = list if isinstance(tree, list) else type(tree) if hasattr(tree, "_fields") else tuple
        return _Node(kind, None, tuple(_analyse(item, name, f"{path}[{i}]", found) for i, item in enumerate(tree)))
    found.append((path, _as_array(tree, name + path)))
    return None


def _items(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What is in a nesting of lists, tuples and dicts, with paths; it is not looked at."""
    if isinstance(tree, Mapping | list | tuple):
        for key, item in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _items(item, f"{path}[{key!r}]")
    else:
        yield path, tree


def _count(node: _Node | None) -> int:
    return 1 if node is None else sum(_count(child) for child in node.children)


def _build(node: _Node | None, items: Any) -> Any:
    if node is None:
        return next(items)
    return node.build([_build(child, items) for child in node.children])


def _refuse(node: _Node | None, tree: Any, name: str) -> None:
    """Raise StructureError where `tree`, which is called `name`, first has another structure than `node`."""
    if node is None:
        return
    if node.keys is not None:
        if not isinstance(tree, Mapping):
            raise StructureError(f"{name}: expected a dict with the keys {_list(node.keys)}, got {_describe(tree)}")
        if missing := [key for key in node.keys if key not in tree]:
            raise StructureError(f"{name}: missing {_list(missing)}; expected the keys {_list(node.keys)}")
        if len(tree) > len(node.keys):
            known = set(node.keys)
            extra = [key for key in tree if key not in known]
            raise StructureError(f"{name}: unknown {_list(extra)}; expected the keys {_list(node.keys)}")
    else:
        if not isinstance(tree, list | tuple):
            raise StructureError(
                f"{name}: expected a list or tuple of {len(node.children)} items, got {_describe(tree)}"
            )
        if len(tree) != len(node.children):
            raise StructureError(f"{name}: expected {len(node.children)} items, got {len(tree)}")
    for key, child in zip(node.keys or range(len(node.children)), node.children, strict=True):
        _refuse(child, tree[key], f"{name}[{key!r}]")


def _as_array(item: Any, name: str, target: np.dtype[Any] | None = None) -> Array:
    """`item` as an ndarray of numbers, or DtypeError; numbers of a dtype that is not NumPy's own as `target`."""
    if isinstance(item, np.ma.MaskedArray):
        raise DtypeError(f"{name}: expected an array, got a masked array; use .filled(value), the mask would be lost")
    if isinstance(item, np.matrix):
        raise DtypeError(f"{name}: expected an array, got a np.matrix; use np.asarray(...), for which * is elementwise")
    try:
        if not (hasattr(item, "__array__") or isinstance(item, int | float | complex | list | tuple)):
            raise DtypeError(f"{name}: expected an array, got {_describe(item)}")
        array = np.asarray(item)
    except DtypeError:
        raise
    except Exception as error:  # whatever a method of `item` raises
        raise DtypeError(f"{name}: expected an array, got {_describe(item)}: {error}") from None
    if array.dtype.isbuiltin == _REGISTERED:
        if target is None:
            raise DtypeError(
                f"{name}: expected an array of a dtype of NumPy's own, got {array.dtype}; convert it with "
                ".astype(np.float32)"
            )
        if _can_store(array.dtype, target):
            with np.errstate(all="ignore"):
                return array.astype(target)
    elif array.dtype.kind not in "biufc":
        raise DtypeError(f"{name}: expected an array of numbers, got dtype {array.dtype}")
    return array


def _can_store(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    # A mask among gradients is a slip, so bool goes only into bool.
    return (source.kind != "b" or target.kind == "b") and np.can_cast(source, target, casting="same_kind")


def _castable_to(dtype: np.dtype[Any]) -> str:
    kinds = {"b": "bool", "i": "an integer dtype", "u": "an unsigned integer dtype", "c": "a numeric dtype"}
    return f"a dtype that can be cast to {dtype} ({kinds.get(dtype.kind, 'a float or integer dtype')})"


def _describe(thing: Any) -> str:
    if thing is None:
        return "None"
    if isinstance(thing, Mapping):
        return f"a dict of {len(thing)} items"
    if isinstance(thing, list | tuple):
        return f"a {type(thing).__name__} of {len(thing)} items"
    if isinstance(thing, np.ndarray):
        return f"an array of shape {thing.shape}"
    return f"{type(thing).__name__} object"


def _list(keys: Iterable[Any]) -> str:
    keys = list(keys)
    return ", ".join(repr(key) for key in keys[:10]) + (f", ... ({len(keys)} in all)" if len(keys) > 10 else "")
