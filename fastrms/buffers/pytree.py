"""Nestings of lists, tuples and dicts: their structure, and their items in order."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from operator import call, itemgetter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np

from fastrms._types import Array, Options
from fastrms.errors import StructureError

if TYPE_CHECKING:  # part of `typing` from Python 3.13 on; type checkers know it for all versions
    from typing_extensions import TypeVar
else:
    from typing import TypeVar

__all__ = [
    "ArrayTree", "Level", "Node", "P", "Params", "PyTree", "build", "count_items", "describe", "refuse_structure",
    "take_apart",
]  # fmt: skip


class _OnHost(Protocol):
    """Something that NumPy takes for an array."""

    def __array__(self) -> Array: ...


class _Exchanged(Protocol):
    """An array of another library that supports DLPack."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...


class _OnDevice(Protocol):
    """An array on a GPU."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


# Arrays in lists, tuples and dicts, nested at will. Lists are invariant for type checkers, and so are the keys of a
# Mapping.
ArrayTree: TypeAlias = Array | Sequence["ArrayTree"] | Mapping[Any, "ArrayTree"]

# The same with any object that is taken for an array, and None for a missing array.
PyTree: TypeAlias = _OnHost | _Exchanged | _OnDevice | complex | Sequence["PyTree"] | Mapping[Any, "PyTree"] | None

# The parameters of an optimizer as users give them: arrays, or groups with arrays and options.
Params: TypeAlias = PyTree | Sequence[Options]

# The structure of an optimizer's parameters; Any if it is unknown.
if TYPE_CHECKING:
    P = TypeVar("P", bound=ArrayTree, default=Any)
else:
    P = TypeVar("P")


@dataclass(frozen=True)
class Node:
    """A list, tuple, namedtuple or dict of a nesting, with a node for each container in it and None for each item."""

    kind: type
    keys: tuple[Any, ...] | None  # of a dict, else None
    children: tuple["Node | None", ...]

    def make(self, items: list[Any]) -> Any:
        """Return a container of this kind with `items`."""
        if self.keys is not None:
            return dict(zip(self.keys, items, strict=True))
        # A namedtuple takes its items one by one.
        return self.kind(*items) if hasattr(self.kind, "_fields") else self.kind(items)


def take_apart(tree: object, path: str = "") -> tuple[Node | None, list[tuple[str, Any]]]:
    """Return the structure of `tree`, and its items with their paths. Each path begins with `path`."""
    items: list[tuple[str, Any]] = []
    return _node_of(tree, path, items), items


def _node_of(tree: object, path: str, items: list[tuple[str, Any]]) -> Node | None:
    """Return the structure of `tree`, and append its items to `items`."""
    if isinstance(tree, Mapping):
        keys = tuple(tree)
        return Node(dict, keys, tuple(_node_of(tree[key], f"{path}[{key!r}]", items) for key in keys))
    if isinstance(tree, list | tuple):
        kind = list if isinstance(tree, list) else type(tree) if hasattr(tree, "_fields") else tuple
        return Node(kind, None, tuple(_node_of(item, f"{path}[{i}]", items) for i, item in enumerate(tree)))
    items.append((path, tree))
    return None


def build(node: Node | None, items: Iterator[Any]) -> Any:
    """Arrange `items` in the structure of `node`."""
    if node is None:
        return next(items)
    return node.make([build(child, items) for child in node.children])


def count_items(node: Node | None) -> int:
    """Count the items in the structure of `node`."""
    return 1 if node is None else sum(count_items(child) for child in node.children)


class Level:
    """All containers at one depth of a nesting, in order. Functions in C take their items."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = nodes
        self._kinds = [node.kind for node in nodes]
        self._sizes = [len(node.children) for node in nodes]
        self._getters = [_getter(node.keys) for node in nodes]
        children = [child for node in nodes for child in node.children]
        self.below = [child for child in children if child is not None]  # the containers one level deeper
        self._is_leaf = [child is None for child in children]
        self._is_node = [child is not None for child in children]

    def split(self, trees: Sequence[Any], leaves: list[Any]) -> list[Any] | None:
        """Add the leaves in `trees` to `leaves` and return the containers in `trees`; None for another structure."""
        if [*map(type, trees)] != self._kinds and not all(map(_can_be, trees, self._nodes)):
            return None
        if [*map(len, trees)] != self._sizes:
            return None
        try:
            items = [*chain.from_iterable(map(_items, self._getters, trees))]
        except KeyError:
            return None
        if len(items) != len(self._is_leaf):  # a list of the user's own class
            return None
        if not self.below:
            leaves.extend(items)
            return []
        leaves.extend(compress(items, self._is_leaf))
        return [*compress(items, self._is_node)]


_Getter: TypeAlias = Callable[[Any], Iterable[Any]]
_items = cast("Callable[[_Getter, Any], Iterable[Any]]", call)  # calls its first argument


def _getter(keys: tuple[Any, ...] | None) -> _Getter:
    """Return a function that returns the items of a sequence, or of a dict in the order of `keys`."""
    if not keys:
        return iter
    return partial(_only_item, keys[0]) if len(keys) == 1 else itemgetter(*keys)


def _only_item(key: Any, tree: Any) -> tuple[Any]:
    return (tree[key],)


def _can_be(tree: object, node: Node) -> bool:
    """Tell whether a container can stand for `node`: a list or tuple for either, a mapping with the keys for a dict."""
    if node.keys is None:
        return isinstance(tree, list | tuple)
    # A defaultdict would make a missing key when asked for it.
    return isinstance(tree, Mapping) and all(key in tree for key in node.keys)


def refuse_structure(node: Node | None, tree: Any, name: str) -> None:
    """Raise StructureError at the first difference between the structures of `tree` and `node`."""
    if node is None:
        return
    if node.keys is not None:
        if not isinstance(tree, Mapping):
            raise StructureError(f"{name}: expected a dict with the keys {_list(node.keys)}, got {describe(tree)}")
        if missing := [key for key in node.keys if key not in tree]:
            raise StructureError(
                f"{name}: missing {_list(missing)}; expected the keys {_list(node.keys)}, got {_list(tree) or 'none'}"
            )
        if len(tree) > len(node.keys):
            known = set(node.keys)
            extra = [key for key in tree if key not in known]
            raise StructureError(f"{name}: unknown {_list(extra)}; expected the keys {_list(node.keys)}")
    else:
        if not isinstance(tree, list | tuple):
            raise StructureError(
                f"{name}: expected a list or tuple of {len(node.children)} items, got {describe(tree)}"
            )
        if len(tree) != len(node.children):
            raise StructureError(f"{name}: expected {len(node.children)} items, got {len(tree)}")
    for key, child in zip(node.keys or range(len(node.children)), node.children, strict=True):
        refuse_structure(child, tree[key], f"{name}[{key!r}]")


def describe(thing: object) -> str:
    """Describe `thing` in a few words, for an error message."""
    if thing is None:
        return "None"
    if isinstance(thing, Mapping):
        return f"a dict of {len(thing)} items"
    if isinstance(thing, list | tuple):
        return f"a {type(thing).__name__} of {len(thing)} items"
    if isinstance(thing, np.ndarray):
        return f"an array of shape {thing.shape}"
    return f"{type(thing).__name__} object"


def _list(keys: Iterable[object]) -> str:
    keys = list(keys)
    return ", ".join(repr(key) for key in keys[:10]) + (f", ... ({len(keys)} in all)" if len(keys) > 10 else "")
