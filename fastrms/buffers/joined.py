"""`JoinedBuffer`: a buffer that has grown by the parameters of a new group."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from fastrms.buffers.flat import Array, FlatBuffer
from fastrms.buffers.layout import Layout

__all__ = ["JoinedBuffer"]


class JoinedBuffer(FlatBuffer):
    """Buffers with a block each, side by side, as one. The views of the parts stay valid.

    Parameters
    ----------
    layout : Layout
        From `Layout.of_parts`, of the layouts of the parts.
    parts : sequence of FlatBuffer
        In the order of the leaves.
    views : the structure of the layout, or None
        Containers with the arrays; None for new containers.
    """

    def __init__(self, layout: Layout, parts: Sequence[FlatBuffer], views: Any = None) -> None:
        self.layout, self._parts = layout, tuple(parts)
        self.segments = tuple(chain.from_iterable(part.segments for part in parts))
        self.leaves = tuple(chain.from_iterable(part.leaves for part in parts))
        self.views = layout.structure(self.leaves) if views is None else views

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Tell for each array whether it may share memory with one of the buffers, by the bounds of memory.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            Of any number and shape.

        Returns
        -------
        aliases : list of bool
            One for each array; False for None.
        """
        return list(map(any, zip(*(part.aliases(arrays) for part in self._parts), strict=True)))

    def contains(self, item: object) -> bool:
        """Tell whether an object is an array that lies in one of the buffers.

        Parameters
        ----------
        item : object
            Anything.

        Returns
        -------
        inside : bool
            True also for an array without elements.
        """
        return any(part.contains(item) for part in self._parts)

    def mappings(self) -> list[Array]:
        """Return all memory at which the buffers can be read.

        Returns
        -------
        mappings : list of ndarray of uint8
            At least one for each part.
        """
        return [mapping for part in self._parts for mapping in part.mappings()]

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedBuffer, (self.layout, self._parts)
