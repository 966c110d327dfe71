"""Parameters that share memory, of which an update of one would be an update of another."""

from typing import Any

import numpy as np

from fastrms.buffers import Layout
from fastrms.errors import StructureError

__all__ = ["refuse_overlap"]


def refuse_overlap(layout: Layout, arrays: Any) -> None:
    """Raise StructureError if two of the parameters that `layout` is of share memory."""
    if overlap := _find_overlap(layout, arrays):
        raise StructureError(
            f"params{overlap[0]} and params{overlap[1]} share memory; give tied parameters once and add up their "
            "gradients, or copy one of them"
        )


def _find_overlap(layout: Layout, arrays: Any) -> tuple[str, str] | None:
    """The paths of two of them, or None.

    Two views that lie within one another's bounds without sharing an element, such as ``a[::2]`` and ``a[1::2]``, do
    not overlap.
    """
    spans = []
    for item, leaf in zip(layout.flatten(arrays, "arrays"), layout.leaves, strict=True):
        if isinstance(item, np.ndarray) and item.size:
            low, high = np.lib.array_utils.byte_bounds(item)
            spans.append((low, high, leaf.path, item))
    spans.sort(key=lambda span: span[0])
    reach: list[tuple[int, int, str, Any]] = []  # those that may still overlap what comes
    for span in spans:
        reach = [other for other in reach if other[1] > span[0]]
        for other in reach:
            try:
                shared = np.shares_memory(other[3], span[3], max_work=100_000)  # type: ignore[arg-type]
            except np.exceptions.TooHardError:
                shared = True
            if shared:
                return other[2], span[2]
        reach.append(span)
    return None
