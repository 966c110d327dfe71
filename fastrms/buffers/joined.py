"""`JoinedBuffer`: a buffer that has grown by the parameters of a new group."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from fastrms.buffers.flat import Array, FlatBuffer
from fastrms.buffers.layout import Layout

__all__ = ["JoinedBuffer", "parts_of", "read_segments", "write_segments"]


class JoinedBuffer(FlatBuffer, set_once=("parts",)):
    """Several buffers as one buffer. Each part keeps its own block, and the views of the parts stay valid.

    Parameters
    ----------
    layout : Layout
        The result of `Layout.of_parts` for the layouts of the parts.
    parts : sequence of FlatBuffer
        The parts, in the order of the leaves.
    views : the structure of the layout, or None
        Existing containers with the arrays; None for new containers.
    """

    parts: tuple[FlatBuffer, ...]  # without nesting

    def __init__(self, layout: Layout, parts: Sequence[FlatBuffer], views: Any = None) -> None:
        # Without nesting: there may be hundreds of groups.
        own = [part.parts if isinstance(part, JoinedBuffer) else (part,) for part in parts]
        parts = self.parts = tuple(chain.from_iterable(own))
        self.layout = layout
        self.segments = tuple(chain.from_iterable(part.segments for part in parts))
        self.leaves = tuple(chain.from_iterable(part.leaves for part in parts))
        self.views = layout.structure(self.leaves) if views is None else views

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Tell for each array whether it may share memory with one of the buffers, by the bounds of memory.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            Any number of arrays, of any shape.

        Returns
        -------
        aliases : list of bool
            One value for each array; False for None.
        """
        return list(map(any, zip(*(part.aliases(arrays) for part in self.parts), strict=True)))

    def copy_in(self, arrays: Sequence[object]) -> None:
        """Copy arrays into the parts, each as the part does it.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            As for `FlatBuffer.store`.
        """
        start = 0
        for part in self.parts:
            part.copy_in(arrays[start : start + len(part.leaves)])
            start += len(part.leaves)

    def contains(self, item: object) -> bool:
        """Tell whether an object is an array that lies in one of the buffers.

        Parameters
        ----------
        item : object
            Any object.

        Returns
        -------
        inside : bool
            True also for an array without elements.
        """
        return any(part.contains(item) for part in self.parts)

    def mappings(self) -> list[Array]:
        """Return all memory at which the buffers can be read.

        Returns
        -------
        mappings : list of ndarray of uint8
            At least one array for each part.
        """
        return [mapping for part in self.parts for mapping in part.mappings()]

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedBuffer, (self.layout, self.parts)


def parts_of(layout: Layout, first: int) -> list[Layout]:
    """Return layouts of the parts of a list of groups: the first `first` groups together, and each other group."""
    groups = layout.zeros()
    return [Layout(groups[:first]), *map(Layout, groups[first:])]


def read_segments(segments: Sequence[Array]) -> Array:
    """Return segments of a buffer as one vector: the only segment itself, or several in a new array."""
    return segments[0] if len(segments) == 1 else np.concatenate(segments)


def write_segments(segments: Sequence[Array], values: Array | float) -> None:
    """Write a vector, or a number, to segments of a buffer, one after another."""
    start = 0
    for segment in segments:
        stop = start + segment.size
        segment[...] = values[start:stop] if isinstance(values, np.ndarray) else values
        start = stop
