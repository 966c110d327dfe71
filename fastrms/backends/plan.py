"""`Run`: the parameters that one call of a kernel updates, and the arguments of that call."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.backends.storage import Storage
from fastrms.buffers import FlatBuffer, Layout
from fastrms.kernels import cpu, pointers
from fastrms.kernels.hyper import HYPER_FIELDS, hyper_values, needs_extended_rule
from fastrms.kernels.norms import SpanNorms
from fastrms.options import ParamGroup

__all__ = ["Run"]


class Run:
    """The parameters of one group and one dtype, neighbours in memory: what one call of a kernel updates.

    Parameters
    ----------
    group_number : int
    group : ParamGroup
    layout : Layout
    numbers : ndarray of int
        Which leaves of the layout.
    storage : Storage or None, default None
        Where the buffers are, if not in memory.
    """

    def __init__(
        self,
        group_number: int,
        group: ParamGroup,
        layout: Layout,
        numbers: NDArray[np.int64],
        storage: Storage | None = None,
    ) -> None:
        leaves = [layout.leaves[i] for i in numbers]
        self.group_number = group_number
        self.group = group
        self.numbers = numbers
        self._segment = leaves[0].segment
        self._start, self._stop = leaves[0].start, leaves[-1].stop
        self.size = self._stop - self._start
        self.dtype = layout.dtype_of(leaves[0])
        # Spans are counted from the start of the run; the third number is where the gradient is, 0 for the buffer.
        self._spans = np.array([(leaf.start - self._start, leaf.stop - self._start, 0) for leaf in leaves], np.int64)
        self._whole = np.array([(0, self.size, 0)], np.int64)
        self._shapes = np.zeros((len(leaves), 2 + max(len(leaf.shape) for leaf in leaves)), np.int64)
        for row, number, leaf in zip(self._shapes, numbers, leaves, strict=True):
            row[0], row[1] = number, len(leaf.shape)
            row[2 : 2 + len(leaf.shape)] = leaf.shape
        self._storage = storage
        # Small arrays are faster copied together and updated as one, where that is a copy in memory.
        self._gathers = self.size < pointers.GATHER_BELOW * len(leaves) and storage is None
        # Kernels read these; they are written in place, so that a step without changes makes no array.
        self._hyper = np.empty(len(HYPER_FIELDS), self.dtype)
        self._factors = np.empty((len(leaves), 2), self.dtype)
        self._whole_factors = np.empty((1, 2), self.dtype)

    @cached_property
    def norms(self) -> SpanNorms:
        """The norm of each parameter's gradient."""
        return SpanNorms(self._spans) if self._storage is None else self._storage.norms(self._spans)

    def prepare(self, buffers: Mapping[str, FlatBuffer]) -> None:
        """Take note of where the buffers lie and which state the options ask for."""
        written = [(buffer.block.ctypes.data, buffer.block.nbytes) for buffer in buffers.values()]
        bounds = [bound for address, nbytes in written for bound in (address, address + nbytes)]
        expected = np.array([*pointers.identity(self.dtype), *bounds], np.int64)
        self._arrays = (
            self.part_of(buffers["params"]),
            self.part_of(buffers["grads"]),
            self.part_of(buffers["cache"]),
            self.part_of(buffers["momentum_buffer"]) if self.group["momentum"] > 0 else None,
            self.part_of(buffers["grad_avg"]) if self.group["centered"] else None,
            self._hyper,
        )
        self._sources = (expected, self._shapes, self._spans)
        self._no_update = (*self._arrays, self._whole[:0], self._whole_factors[:0], False)

    def find(self, items: int) -> int:
        """Find the gradients in the tuple whose items are at this address; what comes is that of `cpu.serial_from`."""
        return int(cpu.serial_from(items, *self._sources, False, *self._no_update))

    def found(self) -> NDArray[np.bool_]:
        """Which gradients `find` has found, and which are None: to be asked before they are gathered."""
        found: NDArray[np.bool_] = self._spans[:, 2] != 0
        return found

    def gather(self) -> None:
        """Copy the gradients that were found to the gradient buffer, if this run does better so."""
        if self._gathers:
            cpu.serial_from(0, *self._sources, True, *self._no_update)

    def with_sources(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of `cpu.serial_from`, but for the address of the items, from those of `cpu.serial`."""
        return (*self._sources, self._gathers, *arguments)

    def point_to_buffer(self) -> None:
        """Take the gradients from the gradient buffer."""
        self._spans[:, 2] = self._whole[:, 2] = 0

    def point_to(self, addresses: NDArray[np.int64]) -> None:
        """Take the gradients from these addresses, which are those of all leaves of the layout."""
        own = addresses[self.numbers]
        starts = own - self.dtype.itemsize * self._spans[:, 0]
        self.point_to_buffer()
        if self._gathers and bool(np.all(starts == starts[0])):
            self._whole[:, 2] = starts[0]  # neighbours, as parts of one array are: nothing has to be gathered
        else:
            self._spans[:, 2] = own

    def part_of(self, buffer: FlatBuffer) -> NDArray[Any]:
        """The elements of this run in `buffer`, 1-D."""
        part: NDArray[Any] = buffer.segments[self._segment][self._start : self._stop]
        return part

    def arguments(
        self,
        lr: float,
        in_place: bool,
        present: NDArray[np.bool_] | None,
        scales: NDArray[np.float64] | None,
        corrections: NDArray[np.float64] | None,
    ) -> tuple[Any, ...]:
        """What a kernel gets (see `kernels.reference.update`); the last three have one item a parameter, or are None.

        Parameters whose gradients are neighbours and that have the same factors are updated as one span.
        """
        options = self.group
        alike = (self._gathers or not in_place) and present is None and scales is None
        alike = alike and (corrections is None or bool(np.all(corrections == corrections[0])))
        spans, factors = (self._whole, self._whole_factors) if alike else (self._spans, self._factors)
        sign = -1.0 if options["maximize"] else 1.0
        factors[:, 0] = sign if scales is None else sign * scales
        factors[:, 1] = 1.0 if corrections is None else corrections[: len(factors)]
        if present is not None:
            spans, factors = spans[present], factors[present]
        self._hyper[:] = hyper_values(options, lr, self.dtype)
        return (*self._arrays, spans, factors, needs_extended_rule(options) or scales is not None)
