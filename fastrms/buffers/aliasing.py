"""Refusal of parameters that alias one another: an update of one would update the other too."""

import math
from typing import Any, NamedTuple

import numpy as np

from fastrms._types import Array
from fastrms.buffers.layout import Layout
from fastrms.errors import StructureError

__all__ = ["refuse_overlap"]

_shares_memory: Any = np.shares_memory  # its type does not allow numbers for `max_work`


class _Span(NamedTuple):
    """An array with its bounds [low, high) in memory, and its path."""

    low: int
    high: int
    path: str
    array: Array


def refuse_overlap(layout: Layout, arrays: object, name: str = "params") -> None:
    """Raise StructureError, with the paths of the first pair, if two ndarrays among the parameters share memory."""
    if overlap := _find_overlap(layout, arrays):
        raise StructureError(
            f"{name}{overlap[0]} and {name}{overlap[1]} share memory; pass tied parameters once and add up their "
            "gradients, or copy one of them"
        )


def _find_overlap(layout: Layout, arrays: object) -> tuple[str, str] | None:
    """Return the paths of two arrays that share an element, or None. ``a[::2]`` and ``a[1::2]`` share none."""
    spans: list[_Span] = []
    for item, leaf in zip(layout.flatten(arrays, "arrays"), layout.leaves, strict=True):
        if isinstance(item, np.ndarray) and item.size:
            spans.append(_Span(*np.lib.array_utils.byte_bounds(item), leaf.path, item))
    spans.sort(key=lambda span: span.low)
    cluster: list[_Span] = []  # arrays whose bounds overlap
    end = 0
    for span in spans:
        if span.low >= end and cluster:
            if found := _overlap_within(cluster):
                return found
            cluster = []
        cluster.append(span)
        end = max(end, span.high)
    return _overlap_within(cluster)


def _overlap_within(cluster: list[_Span]) -> tuple[str, str] | None:
    """Return the paths of two arrays that share memory, or None. The cluster is sorted by lower bounds."""
    if len(cluster) < 2:
        return None
    start = cluster[0].low
    pieces = [_pieces(span.array) for span in cluster]
    cell = math.gcd(
        *(span.low - start for span in cluster),
        *(width for _, _, width in pieces),
        *(stride for _, strides, _ in pieces for stride in strides),
    )
    cells = (max(span.high for span in cluster) - start) // cell
    # To compare a pair of arrays takes about a microsecond. To mark a cell takes about a nanosecond and a byte. So many
    # columns of one array are marked, and two halves of a huge array are compared.
    if cells > 1000 * len(cluster) ** 2:
        return _compare(cluster)
    taken = np.zeros(cells, bool)
    parts = [
        np.ndarray((*shape, width // cell), bool, taken, (span.low - start) // cell, (*(s // cell for s in strides), 1))
        for span, (shape, strides, width) in zip(cluster, pieces, strict=True)
    ]
    for k, part in enumerate(parts):
        if part.any():
            taken[...] = False
            part[...] = True
            other = next(i for i in range(k) if parts[i].any())
            return cluster[other].path, cluster[k].path
        part[...] = True
    return None


def _pieces(item: Array) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return the pieces of contiguous memory of an array: counts and strides by axis, and the bytes of a piece."""
    axes = sorted((abs(stride), size) for stride, size in zip(item.strides, item.shape, strict=True) if size > 1)
    axes = [axis for axis in axes if axis[0]]
    width = item.itemsize
    while axes and axes[0][0] == width:
        width *= axes.pop(0)[1]
    return tuple(size for _, size in axes), tuple(stride for stride, _ in axes), width


def _compare(cluster: list[_Span]) -> tuple[str, str] | None:
    """Return the paths of two arrays of a cluster that share memory, or None, by comparing all pairs."""
    for k, span in enumerate(cluster):
        for other in cluster[:k]:
            try:
                shared = other.high > span.low and _shares_memory(other.array, span.array, max_work=100_000)
            except np.exceptions.TooHardError:
                shared = True
            if shared:
                return other.path, span.path
    return None
