"""The location of the gradients of a step: on the device, on the host, or none."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms._types import DType, Items
from fastrms.backends.cuda.arrays import Interface, cuda, dense_strides, stream_of
from fastrms.buffers import Layout
from fastrms.buffers.conversion import can_store, castable_to
from fastrms.buffers.flat import as_arrays
from fastrms.errors import DtypeError, StructureError
from fastrms.kernels import cuda as kernels
from fastrms.kernels import dlpack, pointers

__all__ = ["Finder", "Found", "Pieces"]

# Up to so many pieces of memory, compiled code compares a tensor with each of them.
_FEW = 16


class Pieces:
    """Disjoint pieces of memory [low, high)."""

    def __init__(self, bounds: Iterable[tuple[int, int]]) -> None:
        self.bounds: NDArray[np.int64] = np.array(sorted(bounds), np.int64).reshape(-1, 2)
        self._lows, self._highs = self.bounds[:, 0].tolist(), self.bounds[:, 1].tolist()

    def overlap(self, start: int, end: int) -> bool:
        """Tell whether [start, end) overlaps a piece."""
        first = bisect_right(self._highs, start)  # the first piece that ends after `start`
        return first < len(self._lows) and self._lows[first] < end

    def overlaps(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for each of several ranges of memory whether it overlaps a piece."""
        first = np.searchsorted(self.bounds[:, 1], starts, side="right")
        lows = np.append(self.bounds[:, 0], np.iinfo(np.int64).max)
        overlaps: NDArray[np.bool_] = lows[first] < ends
        return overlaps


class Found:
    """The location of the gradients of a step."""

    def __init__(self, count: int) -> None:
        # For each parameter the address of its gradient, or `IN_BUFFER`, or `ABSENT`.
        self.sources = np.zeros(count, np.int64)
        # The gradients on the host, and None for all others. The list is empty if none is on the host.
        self.arrays: list[Any] = []
        # The gradients on the device that must be copied to the gradient buffer: the number of the parameter, the
        # interface, and whether the gradient lies in memory that the step writes.
        self.others: list[tuple[int, Interface, bool]] = []
        self.streams: set[int] = set()  # the numbers of the streams that compute gradients
        self.kept: list[Any] = []  # objects that must live until the step is launched


class Finder:
    """The search for gradients, with all checks. It writes nothing to buffers.

    `layout` has the shapes and dtypes of the gradients, and `views` those gradients that lie in the gradient buffer.
    Errors call the gradients `name`.
    """

    def __init__(self, layout: Layout, views: Sequence[Any], name: str) -> None:
        self._layout, self._views, self._name = layout, views, name
        self._leaves = layout.leaves
        self._dtypes = [layout.dtype_of(leaf) for leaf in layout.leaves]
        # (typestr of a gradient, dtype of its parameter): dtype of the gradient, if it can be cast.
        self._known: dict[tuple[str, DType], DType] = {}
        # For `dlpack.locate`.
        self._expected = dlpack.expected_of(views)
        self._words = np.zeros(dlpack.WORDS, np.int64)
        self._places = np.zeros((2, len(self._leaves)), np.int64)
        self._device = dlpack.CUDA | getattr(getattr(cuda.current_context(), "device", None), "id", 0) << 32
        # Negative views of PyTorch are parts of complex tensors. Only those of one element are dense.
        self._singles = [k for k, leaf in enumerate(self._leaves) if leaf.stop - leaf.start == 1]

    @cached_property
    def _nbytes(self) -> NDArray[np.int64]:
        """The number of bytes of each gradient in the dtype of its parameter."""
        sizes = zip(self._leaves, self._dtypes, strict=True)
        return np.array([(leaf.stop - leaf.start) * dtype.itemsize for leaf, dtype in sizes])

    def find(self, items: Items, written: Pieces) -> Found:
        """Return the location of gradients, or raise StructureError or DtypeError.

        There is an item for each parameter: a gradient or None. `written` has the memory that the step writes.
        Gradients there are copied first.
        """
        found = Found(len(items))
        on_host: list[int] = []
        for k in self.locate_tensors(items, written, found):
            item = items[k]
            if item is None:
                found.sources[k] = kernels.ABSENT
            elif item is not self._views[k]:
                interface = kernels.interface_of(item)
                if interface is None:
                    on_host.append(k)
                    continue
                if getattr(item, "is_neg", bool)():  # a view of PyTorch whose memory has the opposite sign
                    item = item.resolve_neg()
                    found.kept.append(item)
                    interface = kernels.interface_of(item) or interface
                self._locate_one(k, item, interface, written, found)
        found.streams.discard(0)
        if on_host:
            wanted = set(on_host)
            chosen = [item if k in wanted else None for k, item in enumerate(items)]
            found.arrays = as_arrays(chosen, self._layout, self._name, allow_none=True)
        return found

    def locate_tensors(self, items: Items, written: Pieces, found: Found) -> Iterable[int]:
        """Locate tensors of PyTorch by compiled code, and return the numbers of the items that it cannot locate.

        An item that overlaps memory in `written` is one of them.
        """
        kind = type(items[0])
        function = dlpack.exchange_function(kind)
        if not function:
            return range(len(items))
        addresses, states = self._places
        few = len(written.bounds) <= _FEW
        dlpack.locate(
            function, pointers.items_of(items), np.array([id(kind)]), id(None), self._expected,
            written.bounds if few else written.bounds[:0], self._words, addresses, states, self._device,
        )  # fmt: skip
        ordinary = states == dlpack.ORDINARY
        if not few:
            ordinary &= ~written.overlaps(addresses, addresses + self._nbytes)
        for k in self._singles:
            ordinary[k] = ordinary[k] and not getattr(items[k], "is_neg", bool)()
        found.sources[ordinary] = addresses[ordinary]
        if ordinary.any():
            found.streams.add(dlpack.current_stream(kind, self._device) or kernels.LEGACY_STREAM)
        return np.flatnonzero(~ordinary).tolist()

    def _locate_one(self, k: int, item: object, interface: Interface, written: Pieces, found: Found) -> None:
        """Check one gradient on the device, and locate it."""
        # It runs for each of 1,000 arrays, so texts are made only for errors.
        leaf, dtype, shape = self._leaves[k], self._dtypes[k], interface["shape"]
        if interface.get("mask") is not None:
            raise DtypeError(
                f"{self._name}{leaf.path}: expected an array, got a masked array on the device, whose mask would be "
                "lost"
            )
        if shape != leaf.shape and tuple(shape) != leaf.shape:
            raise StructureError(f"{self._name}{leaf.path}: expected shape {leaf.shape}, got {tuple(shape)}")
        theirs = self._known.get((interface["typestr"], dtype))
        if theirs is None:
            theirs = np.dtype(interface["typestr"])
            if not can_store(theirs, dtype) or not theirs.isnative:
                raise DtypeError(f"{self._name}{leaf.path}: expected {castable_to(dtype)}, got {theirs}")
            self._known[interface["typestr"], dtype] = theirs
        if leaf.stop == leaf.start:
            return
        address, strides = interface["data"][0], interface.get("strides")
        found.streams.add(stream_of(item, interface))
        if strides is not None and tuple(strides) == dense_strides(leaf.shape, theirs):
            strides = None
        start, end = address, address + (leaf.stop - leaf.start) * theirs.itemsize
        if strides is not None:
            reach = [(size - 1) * stride for size, stride in zip(leaf.shape, strides, strict=True)]
            start = address + sum(step for step in reach if step < 0)
            end = address + sum(step for step in reach if step > 0) + theirs.itemsize
        ours = written.overlap(start, end)
        if theirs is dtype and not ours and strides is None:
            found.sources[k] = address
        else:
            found.others.append((k, interface, ours))
