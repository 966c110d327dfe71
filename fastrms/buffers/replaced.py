"""Views that were replaced or changed: what a step compares, and what `RMSProp.check` reports."""

from operator import is_, itemgetter
from typing import Any

import numpy as np

from fastrms.buffers.flat import FlatBuffer, views_of
from fastrms.buffers.pytree import describe, take_apart
from fastrms.errors import StructureError

__all__ = ["Watch", "are_intact", "changed_views", "paths_outside", "refuse_replaced"]


class Watch:
    """The views of a buffer as they were at first, to notice when another object is put in the place of a view.

    ``watch.views == watch.kept`` finds most replacements: it compares objects by identity first, at some nanoseconds
    each and without a Python call. It cannot tell arrays of one element apart whose values are equal, for which there
    is `has_its_scalars`.

    Parameters
    ----------
    buffer : FlatBuffer
        The buffer whose `views` are watched.

    Attributes
    ----------
    buffer : FlatBuffer
        The same buffer.
    views : list, tuple or dict, or None
        The views that users hold; None for a single array, which has no container to be replaced in.
    kept : list, tuple or dict, or None
        The same views in containers of its own.
    has_scalars : bool
        Whether `has_its_scalars` has anything to compare.
    """

    def __init__(self, buffer: FlatBuffer) -> None:
        self.buffer = buffer
        single = buffer.views is buffer.leaves[0]
        self.views: Any = None if single else buffer.views
        self.kept: Any = None if single else buffer.layout.structure(buffer.leaves)
        ones = [k for k, leaf in enumerate(buffer.layout.leaves) if leaf.stop - leaf.start == 1]
        self.has_scalars = bool(ones) and not single
        # The first one twice, so that the answer is a tuple also for one array.
        self._scalars = itemgetter(*ones, ones[0]) if ones else None

    def has_its_scalars(self) -> bool:
        """Tell whether the items of `views` with one element are the views that were there at first."""
        items = self.buffer.layout.flatten(self.buffer.views, "views")
        return self._scalars is None or all(map(is_, self._scalars(items), self._scalars(self.buffer.leaves)))


def are_intact(params: Watch, grads: Watch | None = None) -> bool:
    """Tell whether no object was put in the place of a view of the parameters, or of the gradients that a step reads.

    Parameters
    ----------
    params : Watch
        The parameters.
    grads : Watch or None, default None
        The gradient buffer; None for a step that does not read it.
    """
    try:
        intact = params.views == params.kept and (grads is None or grads.views == grads.kept)
        if params.has_scalars and intact:
            intact = params.has_its_scalars() and (grads is None or grads.has_its_scalars())
    except Exception:  # arrays that differ have no truth value, and other objects may not be comparable
        return False
    return bool(intact)


def refuse_replaced(params: Watch, grads: Watch | None = None) -> None:
    """Raise StructureError, which names the first such view, where views are not intact (see `are_intact`)."""
    if are_intact(params, grads):
        return
    for name, watch in (("params", params), ("grads", grads)):
        if watch is not None and (problems := changed_views(watch.buffer, name)):
            raise StructureError(problems[0])


def changed_views(buffer: FlatBuffer, name: str) -> list[str]:
    """Describe all views that were replaced, or no longer show their part of the block.

    Parameters
    ----------
    buffer : FlatBuffer
        The buffer, on the host or on a device.
    name : str
        What the sentences call `buffer.views`.

    Returns
    -------
    problems : list of str
        A sentence for each such view; empty if all are as they were at first.
    """
    try:
        items = buffer.layout.flatten(buffer.views, name)
    except StructureError as error:
        return [str(error)]
    on_host = isinstance(buffer.block, np.ndarray)
    expected = views_of(buffer.segments, buffer.layout) if on_host else buffer.leaves
    found = []
    for item, view, fresh, leaf in zip(items, buffer.leaves, expected, buffer.layout.leaves, strict=True):
        path = name + leaf.path
        if item is not view:
            what = describe(item) if on_host else f"a {type(item).__name__}"
            found.append(
                f"{path}: expected the view that was there, got {what} in its place; write into the view: "
                f"{path}[...] = value"
            )
        # The arrays of a device cannot change their shape.
        elif on_host and view.__array_interface__ != fresh.__array_interface__:
            found.append(
                f"{path}: expected a view of shape {leaf.shape} of its part of the block, got one that was changed "
                f"to shape {view.shape}, strides {view.strides}, {view.dtype}"
            )
    return found


def paths_outside(buffer: FlatBuffer, tree: object, name: str) -> list[str]:
    """Return the paths of all items of `tree` that do not lie in the block.

    Parameters
    ----------
    buffer : FlatBuffer
        The buffer, on the host or on a device.
    tree : array, or list, tuple or dict of these, or any nesting
        Of any structure; an item that is no array does not lie in the block.
    name : str
        The beginning of all paths.

    Returns
    -------
    paths : list of str
        Empty if all items are views of the buffer.
    """
    return [path for path, item in take_apart(tree, name)[1] if not buffer.contains(item)]
