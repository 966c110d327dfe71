"""Parameters that alias one another, so that an update of one would be an update of the other."""

import math
from typing import Any

import numpy as np

from fastrms._types import Array
from fastrms.buffers.layout import Layout
from fastrms.errors import StructureError

__all__ = ["refuse_overlap"]

_shares_memory: Any = np.shares_memory  # any number is right for `max_work`, which its type does not know

_Span = tuple[int, int, str, Array]  # the bounds of an array in memory, its path, and the array


def refuse_overlap(layout: Layout, arrays: object) -> None:
    """Raise StructureError if two parameters share memory.

    Parameters
    ----------
    layout : Layout
        The structure of the parameters.
    arrays : list, tuple, dict or array, or any nesting of these
        The parameters. Items that are no ndarray share nothing.

    Raises
    ------
    StructureError
        The message names the paths of the first such pair.
    """
    if overlap := _find_overlap(layout, arrays):
        raise StructureError(
            f"params{overlap[0]} and params{overlap[1]} share memory; give tied parameters once and add up their "
            "gradients, or copy one of them"
        )


def _find_overlap(layout: Layout, arrays: object) -> tuple[str, str] | None:
    """Return the paths of two arrays that share an element, or None.

    Two views whose bounds overlap without a shared element, such as ``a[::2]`` and ``a[1::2]``, do not count.
    """
    spans: list[_Span] = []
    for item, leaf in zip(layout.flatten(arrays, "arrays"), layout.leaves, strict=True):
        if isinstance(item, np.ndarray) and item.size:
            spans.append((*np.lib.array_utils.byte_bounds(item), leaf.path, item))
    spans.sort(key=lambda span: span[0])
    cluster: list[_Span] = []  # arrays whose bounds overlap
    end = 0
    for span in spans:
        if span[0] >= end and cluster:
            if found := _overlap_within(cluster):
                return found
            cluster = []
        cluster.append(span)
        end = max(end, span[1])
    return _overlap_within(cluster)


def _overlap_within(cluster: list[_Span]) -> tuple[str, str] | None:
    """Return the paths of two arrays that share memory, or None; the cluster is sorted by lower bounds."""
    if len(cluster) < 2:
        return None
    start = cluster[0][0]
    pieces = [_pieces(item) for _, _, _, item in cluster]
    cell = math.gcd(
        *(low - start for low, _, _, _ in cluster),
        *(width for _, _, width in pieces),
        *(stride for _, strides, _ in pieces for stride in strides),
    )
    cells = (max(high for _, high, _, _ in cluster) - start) // cell
    # Comparing takes about a microsecond for each pair of arrays. Marking takes about a nanosecond and a byte for each
    # cell. So many columns of one array are marked, and two halves of a huge array are compared.
    if cells > 1000 * len(cluster) ** 2:
        return _compare(cluster)
    taken = np.zeros(cells, bool)
    parts = [
        np.ndarray((*shape, width // cell), bool, taken, (span[0] - start) // cell, (*(s // cell for s in strides), 1))
        for span, (shape, strides, width) in zip(cluster, pieces, strict=True)
    ]
    for k, part in enumerate(parts):
        if part.any():
            taken[...] = False
            part[...] = True
            other = next(i for i in range(k) if parts[i].any())
            return cluster[other][2], cluster[k][2]
        part[...] = True
    return None


def _pieces(item: Array) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return an array as pieces of contiguous memory: counts and strides by axis, and the bytes of a piece."""
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
                shared = other[1] > span[0] and _shares_memory(other[3], span[3], max_work=100_000)
            except np.exceptions.TooHardError:
                shared = True
            if shared:
                return other[2], span[2]
    return None
