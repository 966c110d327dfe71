"""The plan of a step on the host: runs of neighbouring parameters, and one kernel call for each run."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms._state import Counts
from fastrms.backends.base import Call, Memory, Ranks
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.kernels import Update, cpu, pointers, threads
from fastrms.kernels.compiled import entry_point
from fastrms.kernels.hyper import HYPER_FIELDS, hyper_values, needs_extended_rule
from fastrms.kernels.norms import SpanNorms, combine, scale_to
from fastrms.options import ParamGroup, resolve_lr

__all__ = [
    "IN_BUFFER",
    "IN_PLACE",
    "Located",
    "Run",
    "Variant",
    "clip_scales",
    "find_nonfinite",
    "make_plan",
    "rate_of",
    "split_runs",
]


class Located(NamedTuple):
    """Where the gradients of a step lie.

    Attributes
    ----------
    in_place : bool
        Whether kernels read them in the caller's arrays, at the addresses that the runs hold. Otherwise they are in
        the gradient buffer.
    present : ndarray of bool, shape (parameters,), or None
        Which parameters have a gradient; None where all have one.
    """

    in_place: bool
    present: NDArray[np.bool_] | None


class Variant(NamedTuple):
    """A kernel, and how it fetches memory.

    Attributes
    ----------
    kernel : {"numpy", "serial", "parallel"}
    lines_ahead : int
        How many cache lines ahead it prefetches; 0 for none.
    """

    kernel: str
    lines_ahead: int = 0


def split_runs(layout: Layout, group_of: NDArray[np.intp]) -> list[tuple[int, NDArray[np.int64]]]:
    """Return for each run, one for each group and dtype, the number of its group and those of its leaves."""
    segment_of = np.array([leaf.segment for leaf in layout.leaves])
    # Sorted once, instead of a search for each group, since there may be thousands.
    order = np.lexsort((group_of, segment_of))
    ends = np.flatnonzero(np.diff(segment_of[order]) | np.diff(group_of[order])) + 1
    return [(int(group_of[numbers[0]]), numbers) for numbers in np.split(order, ends)]


IN_BUFFER, IN_PLACE = Located(False, None), Located(True, None)


class Run:
    """The parameters of one group and one dtype, which are neighbours in memory. One kernel call updates them.

    Parameters
    ----------
    group_number : int
    group : ParamGroup
    layout : Layout
        Of the parameters that this process updates.
    numbers : ndarray of int
        The leaves of the layout that belong to the run.
    memory : Memory

    Attributes
    ----------
    size : int
        The number of elements.
    dtype : numpy.dtype
    from_table : bool
        Whether calls of the serial kernel are calls of `cpu.serial_from`.
    """

    def __init__(
        self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64], memory: Memory
    ) -> None:
        leaves = [layout.leaves[i] for i in numbers]
        self.group_number = group_number
        self.group = group
        self.numbers = numbers
        self._segment = leaves[0].segment
        self._start, self._stop = leaves[0].start, leaves[-1].stop
        self.size = self._stop - self._start
        self.dtype = layout.dtype_of(leaves[0])
        # Bounds count from the start of the run. The third number is the address of the gradient, 0 for the buffer.
        self._spans = np.array([(leaf.start - self._start, leaf.stop - self._start, 0) for leaf in leaves], np.int64)
        self._whole = np.array([(0, self.size, 0)], np.int64)
        self._offsets = self._spans[:, 0] * self.dtype.itemsize
        self._shapes = np.zeros((len(leaves), 2 + max(len(leaf.shape) for leaf in leaves)), np.int64)
        for row, number, leaf in zip(self._shapes, numbers, leaves, strict=True):
            row[0], row[1] = number, len(leaf.shape)
            row[2 : 2 + len(leaf.shape)] = leaf.shape
        self._memory = memory
        # Copying small gradients and updating them as one span is faster than many spans, if the copy is in memory.
        self.from_table = not memory.in_parts and pointers.available()
        self._copies = self.size < pointers.GATHER_BELOW * len(leaves) and not memory.in_parts
        # The calls of steady steps hold these arrays, so they are written in place.
        self._hyper = np.empty(len(HYPER_FIELDS), self.dtype)
        self._factors = np.empty((len(leaves), 2), self.dtype)
        self._whole_factors = np.empty((1, 2), self.dtype)
        self._table = np.zeros(1, cpu.TABLE)

    @cached_property
    def norms(self) -> SpanNorms:
        """The object that computes the norm of each parameter's gradient."""
        return self._memory.norms(self._spans)

    def use_buffers(self, buffers: Mapping[str, FlatBuffer]) -> None:
        """Use the parts of these buffers that belong to the run, with the state that its options need."""
        written = [(buffer.block.ctypes.data, buffer.block.nbytes) for buffer in buffers.values()]
        bounds = [bound for address, nbytes in written for bound in (address, address + nbytes)]
        self._expected = np.array([*pointers.identity(self.dtype), *bounds], np.int64)
        params, grads = self.part_of(buffers["params"]), self.part_of(buffers["grads"])
        state = (
            self.part_of(buffers["cache"]),
            self.part_of(buffers["momentum_buffer"]) if self.group["momentum"] > 0 else None,
            self.part_of(buffers["grad_avg"]) if self.group["centered"] else None,
        )
        self._arrays = (params, grads, *state, self._hyper)
        self._from_table = (self._hyper, *state)
        self._entry_points: dict[Update, Update] = {}
        table = self._table[0]
        table["size"], table["params_at"], table["grads_at"] = self.size, params.ctypes.data, grads.ctypes.data
        table["sources_at"], table["source_count"] = self._spans.ctypes.data, len(self._spans)
        table["shapes_at"], table["shape_columns"] = self._shapes.ctypes.data, self._shapes.shape[1]
        table["expected_at"], table["expected_size"] = self._expected.ctypes.data, len(self._expected)
        self._no_update = self._table.copy()
        self._no_update["factors_at"], self._no_update["spans_at"] = self._factors.ctypes.data, self._spans.ctypes.data
        self._only_copy = self._no_update.copy()
        self._only_copy["copies"] = 1

    def _entry_point(self, kernel: Update, *arguments: Any) -> Update:
        """Return the form of a compiled kernel for the arguments of this run, whose types never change."""
        entry = self._entry_points.get(kernel)
        if entry is None:
            entry = self._entry_points[kernel] = entry_point(kernel, *arguments)
        return entry

    def _serial_from(self, table: NDArray[Any], items: int = 0) -> Call:
        """Return a call of `cpu.serial_from`."""
        arguments = (table, *self._from_table, items)
        return (self._entry_point(cpu.serial_from, *arguments), *arguments)

    def locate(self, items: int) -> int:
        """Write the addresses of gradients to the spans, and return the status of `cpu.serial_from`.

        `items` is the address of the first item in the tuple of all gradients.
        """
        serial_from, *arguments = self._serial_from(self._no_update, items)
        return int(serial_from(*arguments))

    def located(self) -> NDArray[np.bool_]:
        """Return which gradients `locate` found; the others are None. Call it before `copy_small`."""
        located: NDArray[np.bool_] = self._spans[:, 2] != 0
        return located

    def copy_small(self) -> None:
        """Copy located gradients to the gradient buffer, if they are small."""
        if self._copies:
            serial_from, *arguments = self._serial_from(self._only_copy)
            serial_from(*arguments)

    def point_to_buffer(self) -> None:
        """Read gradients from the gradient buffer in the next calls."""
        self._spans[:, 2] = self._whole[:, 2] = 0

    def point_to(self, addresses: NDArray[np.int64]) -> None:
        """Read gradients at these addresses in the next calls: one for each parameter of the optimizer."""
        own = addresses[self.numbers]
        self.point_to_buffer()
        start = own[0] - self._offsets[0]
        # The last one first, which mostly differs too where they are not parts of one array.
        together = self._copies and own[-1] - self._offsets[-1] == start
        if together and bool(np.all(own - self._offsets == start)):
            self._whole[:, 2] = start  # nothing has to be copied
        else:
            self._spans[:, 2] = own

    def part_of(self, buffer: FlatBuffer) -> Array:
        """Return the elements of this run in `buffer`, 1-D."""
        part: Array = buffer.segments[self._segment][self._start : self._stop]
        return part

    def gradient_norms(self, grads: FlatBuffer, kernel: str, ranks: Ranks | None) -> NDArray[np.float64]:
        """Return the norm of each parameter's gradient after clipping by value, over the shards of all ranks."""
        clip_value = self.group["clip_value"]
        bound = np.inf if clip_value is None else clip_value
        return self.norms(self.part_of(grads), bound, kernel, None if ranks is None else ranks.add_up(self.numbers))

    def arguments(
        self,
        lr: float,
        located: Located,
        scales: NDArray[np.float64] | None,
        corrections: NDArray[np.float64] | None,
        lines_ahead: int = 0,
    ) -> Call:
        """Return the arguments of a kernel (see `kernels.reference.update`).

        Parameters whose gradients are neighbours and whose factors are equal become one span.

        Parameters
        ----------
        lr : float
        located : Located
        scales, corrections : ndarray of float64, shape (parameters of the run,), or None
            The factors of clipping by norm and of bias correction.
        lines_ahead : int, default 0
            How many cache lines ahead the kernel prefetches.
        """
        options, present = self.group, None if located.present is None else located.present[self.numbers]
        one_span = (self._copies or not located.in_place) and present is None and scales is None
        one_span = one_span and (corrections is None or bool(np.all(corrections == corrections[0])))
        spans, factors = (self._whole, self._whole_factors) if one_span else (self._spans, self._factors)
        sign = -1.0 if options["maximize"] else 1.0
        factors[:, 0] = sign if scales is None else sign * scales
        factors[:, 1] = 1.0 if corrections is None else corrections[: len(factors)]
        if present is not None:
            spans, factors = spans[present], factors[present]
        self._hyper[:] = hyper_values(options, lr, self.dtype)
        return (*self._arrays, spans, factors, needs_extended_rule(options) or scales is not None, lines_ahead)

    def call(self, kernel: str, arguments: Call, in_place: bool) -> Call:
        """Return the call of a kernel with the arguments from `arguments`.

        The serial kernel is called through `cpu.serial_from` where `from_table`, so that most programs compile one
        function only.
        """
        if self.from_table and kernel == "serial":
            *_, spans, factors, extended, lines_ahead = arguments
            table = self._table.copy()
            row = table[0]
            row["spans_at"], row["span_count"], row["factors_at"] = spans.ctypes.data, len(spans), factors.ctypes.data
            row["extended"], row["lines_ahead"], row["copies"] = extended, lines_ahead, in_place and self._copies
            self._kept = spans, factors  # the table has only their addresses
            return self._serial_from(table)
        if kernel == "parallel":
            threads.start_threads()  # before Numba does so, as it loads the kernel
        update = self._entry_point(kernels.UPDATES[kernel], *arguments)
        return (threads.one_at_a_time(update) if kernel == "parallel" else update, *arguments)


def make_plan(
    runs: Sequence[Run],
    variant_of: Sequence[Variant],
    rates: Sequence[float],
    located: Located,
    scales: NDArray[np.float64] | None,
    counts: Counts,
) -> tuple[list[Call], bool]:
    """Return the kernel calls of the next step, and whether the step is steady: later steps make the same calls.

    Parameters
    ----------
    runs : sequence of Run
    variant_of : sequence of Variant
        The kernel of each run.
    rates : sequence of float
        The learning rate of each run.
    located : Located
    scales : ndarray of float64, shape (parameters,), or None
        The factors of clipping by norm.
    counts : Counts
        Before the step.
    """
    steady = scales is None and located.present is None
    calls: list[Call] = []
    for run, (kernel, lines_ahead), lr in zip(runs, variant_of, rates, strict=True):
        options = run.group
        corrections = None
        if options["bias_correction"]:
            own_steps = counts.steps + 1 - counts.absent[run.numbers]
            corrections = 1.0 / (1.0 - options["decay_rate"] ** own_steps)
        steady = steady and not callable(options["lr"]) and corrections is None
        own_scales = None if scales is None else scales[run.numbers]
        arguments = run.arguments(lr, located, own_scales, corrections, lines_ahead)
        calls.append(run.call(kernel, arguments, located.in_place))
    return calls, steady


def clip_scales(
    runs: Sequence[Run],
    norms_of: Sequence[NDArray[np.float64]],
    global_clip_norm: float | None,
    present: NDArray[np.bool_] | None,
    parameters: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the factors of clipping by norm, and the norms of unclipped gradients, for each parameter.

    A norm is NaN where gradients are clipped by value, because that hides an inf.

    Parameters
    ----------
    runs : sequence of Run
    norms_of : sequence of ndarray of float64
        For each run the norms of its gradients.
    global_clip_norm : float or None
    present : ndarray of bool, shape (parameters,), or None
        Which parameters have a gradient; None for all.
    parameters : int
        The number of all parameters.
    """
    scales, norms, unclipped = np.ones(parameters), np.zeros(parameters), np.full(parameters, np.nan)
    for run, own in zip(runs, norms_of, strict=True):
        if run.group["clip_value"] is None:
            unclipped[run.numbers] = own
        limit = run.group["clip_norm"]
        if limit is not None:
            scales[run.numbers] = scale_to(limit, own)
            own = np.minimum(own, limit)
        norms[run.numbers] = own
    if global_clip_norm is not None:
        if present is not None:
            norms[~present] = 0.0  # the buffer still has the gradient of an earlier step
        scales *= scale_to(global_clip_norm, np.array(combine(norms)))
    return scales, unclipped


def rate_of(group: ParamGroup, number: int, rates: Sequence[float] | None, steps: int) -> float:
    """Return the learning rate of a group: from `rates` where it is a function.

    `rates` has the results of the functions. A function that has replaced itself by a number counts as that number.
    """
    return rates[number] if rates and callable(group["lr"]) else resolve_lr(group, steps)


def find_nonfinite(
    runs: Sequence[Run],
    variant_of: Sequence[Variant],
    located: Located,
    norms: NDArray[np.float64] | None,
    grads: FlatBuffer,
) -> NDArray[np.bool_]:
    """Return which parameters have a gradient with an inf or NaN.

    Parameters
    ----------
    runs : sequence of Run
    variant_of : sequence of Variant
        The kernel of each run.
    located : Located
    norms : ndarray of float64, shape (parameters,), or None
        From `clip_scales`; None where nothing is clipped by norm.
    grads : FlatBuffer
        The gradient buffer.
    """
    present = located.present
    finite = np.zeros(len(grads.leaves), bool) if norms is None else np.isfinite(norms)
    if present is not None:
        finite |= ~present
    # A norm can overflow although all values are finite, and is NaN where it is unknown. So read the gradients.
    if not finite.all():
        for run, (kernel, _) in zip(runs, variant_of, strict=True):
            if not located.in_place:
                run.point_to_buffer()
            finite[run.numbers] = run.norms.finite(run.part_of(grads), kernel)
    return ~finite if present is None else ~finite & present
