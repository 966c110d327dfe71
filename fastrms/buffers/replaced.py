"""Views that were replaced or changed: the comparison in each step, and the report of `RMSProp.check`."""

from collections.abc import Sequence
from operator import is_, itemgetter
from typing import Any

import numpy as np

from fastrms._types import Array
from fastrms.buffers.flat import FlatBuffer
from fastrms.buffers.held import HeldArrays, moved
from fastrms.buffers.layout import Layout
from fastrms.buffers.narrow import narrow_of
from fastrms.buffers.pytree import describe, take_apart
from fastrms.errors import StructureError

__all__ = ["Watch", "are_intact", "changed_view", "changed_views", "foreign_arrays", "refuse_replaced"]


class Watch:
    """The original views of a buffer, to notice that another object took the place of a view.

    ``watch.views == watch.kept`` finds most replacements. It compares objects by identity first, at some nanoseconds
    each and without a Python call. It misses a replacement by an equal array of one element, which `has_its_scalars`
    finds.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        self.buffer = buffer
        # The views that users hold, and the same views in other containers. A single array has no container.
        single = buffer.views is buffer.leaves[0]
        self.views: Any = None if single else buffer.views
        self.kept: Any = None if single else buffer.layout.structure(buffer.leaves)
        ones = [k for k, leaf in enumerate(buffer.layout.leaves) if leaf.stop - leaf.start == 1]
        self.has_scalars = bool(ones) and not single
        # The first one twice: with one argument `itemgetter` would not return a tuple.
        self._scalars = itemgetter(*ones, ones[0]) if ones else None

    def has_its_scalars(self) -> bool:
        """Tell whether the items of `views` with one element are the original views."""
        items = self.buffer.layout.flatten(self.buffer.views, "views")
        return self._scalars is None or all(map(is_, self._scalars(items), self._scalars(self.buffer.leaves)))


def are_intact(params: Watch, grads: Watch | None = None) -> bool:
    """Tell whether all views of the parameters, and of the gradient buffer unless it is None, are the original ones."""
    try:
        intact = params.views == params.kept and (grads is None or grads.views == grads.kept)
        if params.has_scalars and intact:
            intact = params.has_its_scalars() and (grads is None or grads.has_its_scalars())
    except Exception:  # arrays that differ have no truth value, and other objects may not be comparable
        return False
    return bool(intact)


def refuse_replaced(params: Watch, grads: Watch | None = None) -> None:
    """Raise StructureError, with the name of the first replaced view, unless `are_intact`."""
    if are_intact(params, grads):
        return
    for name, watch in (("params", params), ("grads", grads)):
        if watch is not None and (problems := changed_views(watch.buffer, name)):
            raise StructureError(problems[0])


def changed_views(buffer: FlatBuffer, name: str) -> list[str]:
    """Return a sentence for each view that was replaced, or that no longer shows its part of the block.

    The buffer is on the host or on a device. The sentences call its views `name`.
    """
    leaves = buffer.leaves
    if isinstance(buffer, HeldArrays):
        present = list(map(buffer.present, leaves))
        return _changes(buffer.layout, name, buffer.views, leaves, present, buffer.original_views(), held=True)
    on_host = isinstance(leaves[0], np.ndarray)
    expected = buffer.original_views() if on_host else leaves
    found = _changes(buffer.layout, name, buffer.views, leaves, leaves, expected)
    if (narrow := narrow_of(buffer)) is not None:
        expected = [view.view(narrow.dtype) for view in expected]
        found += _changes(buffer.layout, name, narrow.views, narrow.leaves, narrow.leaves, expected)
    return found


def _changes(
    layout: Layout,
    name: str,
    tree: Any,
    views: Sequence[Any],
    present: Sequence[Any],
    expected: Sequence[Any],
    held: bool = False,
) -> list[str]:
    """Return a sentence for each item of `tree` that is not the one in `views`, or was changed.

    `present` has ndarrays like the views now, and `expected` ndarrays like the views at first.
    """
    try:
        items = layout.flatten(tree, name)
    except StructureError as error:
        return [str(error)]
    on_host = isinstance(expected[0], np.ndarray)
    found = []
    for item, view, now, fresh, leaf in zip(items, views, present, expected, layout.leaves, strict=True):
        path = name + leaf.path
        if item is not view:
            what = describe(item) if isinstance(view, np.ndarray) else f"a {type(item).__name__}"
            found.append(
                f"{path}: expected the original view, got {what} in its place; write into the view instead: "
                f"{path}[...] = value"
            )
        elif on_host and (problem := changed_view(path, now, fresh, held)):  # flat arrays on a device cannot change
            found.append(problem)
    return found


def changed_view(path: str, view: Array | None, original: Array, held: bool) -> str | None:
    """Return a sentence if a view, or an array that is updated in place, is not as it was at first; otherwise None.

    `view` is None for an array that is no longer on the GPU.
    """
    if view is None:
        return f"{path}: expected the original array on the GPU, got an object that is no array there any more"
    if not view.flags.writeable and (held or original.flags.writeable):
        return (
            f"{path}: expected an array that a step can write to, got one that is read-only now; make it writable "
            "again, or finish the operation that made it read-only"
        )
    if view.__array_interface__ != original.__array_interface__:
        if held:
            return moved(path, view, original)
        return (
            f"{path}: expected a view of shape {original.shape} of its part of the buffer, got one that was changed to "
            f"shape {view.shape}, strides {view.strides}, {view.dtype}"
        )
    return None


def foreign_arrays(params: FlatBuffer, grads: FlatBuffer, tree: object, name: str) -> list[str]:
    """Return a sentence for each item of `tree` that is no array in the memory of parameters or gradients.

    The sentences call the tree `name`.
    """
    expected = "an array that is updated in place" if isinstance(params, HeldArrays) else "a view of the parameters"
    on_host = isinstance(params.leaves[0], np.ndarray)
    found = []
    for path, item in take_apart(tree, name)[1]:
        if params.contains(item) or grads.contains(item):
            continue
        if on_host and not isinstance(item, np.ndarray):
            got = f"{describe(item)}; pass the array that it holds"
        else:
            got = "an array in other memory; take the view from params again"
        found.append(f"{path}: expected {expected}, got {got}")
    return found
