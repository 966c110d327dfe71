"""The plan of a step on the host: runs of neighbouring parameters, and one kernel call for each run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms._state import STATE_OPTIONS, Counts
from fastrms.backends.base import Call, Memory, Ranks
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.held import HeldArrays
from fastrms.kernels import Update, cpu, pointers, threads
from fastrms.kernels.access import GRADIENT, PARAMETER
from fastrms.kernels.compiled import entry_point, in_background
from fastrms.kernels.hyper import HYPER_FIELDS, hyper_values, needs_extended_rule
from fastrms.kernels.norms import SpanNorms, combine, scale_to
from fastrms.options import ParamGroup, resolve_lr

if TYPE_CHECKING:
    from fastrms._types import Items

__all__ = [
    "FROM_TABLE", "IN_BUFFER", "IN_PLACE", "HostRun", "Located", "Run", "Variant", "clip_scales", "compile_ahead",
    "find_nonfinite", "make_plan", "memory_of", "rate_of", "split_runs", "takes_addresses",
]  # fmt: skip


class Located(NamedTuple):
    """The location of the gradients of a step: in the arrays of the caller (`in_place`), or in the gradient buffer.

    `present` tells for each parameter whether it has a gradient; None if all have one.
    """

    in_place: bool
    present: NDArray[np.bool_] | None


IN_BUFFER, IN_PLACE = Located(False, None), Located(True, None)

# The kernels that read their arguments from a table (`cpu.TABLE`), and can find the gradients in a tuple.
FROM_TABLE: dict[str, Update] = {"serial": cpu.serial_from, "parallel": cpu.parallel_from}


class Variant(NamedTuple):
    """A kernel of the host, and the number of cache lines by which it prefetches; None for no prefetching."""

    kernel: str
    lines_ahead: int | None = None


def split_runs(layout: Layout, group_of: NDArray[np.intp]) -> list[tuple[int, NDArray[np.int64]]]:
    """Return for each run the number of its group and the numbers of its leaves. Each group and dtype is a run."""
    segment_of = np.array([leaf.segment for leaf in layout.leaves])
    # Sorted once, instead of a search for each group, since there may be thousands.
    order = np.lexsort((group_of, segment_of))
    ends = np.flatnonzero(np.diff(segment_of[order]) | np.diff(group_of[order])) + 1
    return [(int(group_of[numbers[0]]), numbers) for numbers in np.split(order, ends)]


class Run:
    """The parameters of one group and one dtype, which are neighbours in memory. `numbers` are their leaves."""

    def __init__(self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64]) -> None:
        leaves = [layout.leaves[i] for i in numbers]
        self.group_number, self.group, self.numbers = group_number, group, numbers
        self.dtype = layout.dtype_of(leaves[0])
        self._segment, self._part = leaves[0].segment, slice(leaves[0].start, leaves[-1].stop)
        self.size = self._part.stop - self._part.start
        # Of each parameter, from the start of the run.
        self.bounds = np.array([(leaf.start, leaf.stop) for leaf in leaves], np.int64) - self._part.start

    def __str__(self) -> str:
        arrays = "1 array" if len(self.numbers) == 1 else f"{len(self.numbers):,} arrays"
        return f"group {self.group_number}, {self.size:,} {self.dtype} in {arrays}"

    def part_of(self, buffer: FlatBuffer) -> Array:
        """Return the elements of this run in `buffer`, 1-D."""
        part: Array = buffer.segments[self._segment][self._part]
        return part

    def parts_of(self, buffers: Mapping[str, FlatBuffer]) -> list[Any]:
        """Return the elements of this run for a kernel, in parameters, gradients and state. Unused state is None."""
        always = [self.part_of(buffers[name]) for name in ("params", "grads", "cache")]
        used = [(name, self.group[option]) for name, option in STATE_OPTIONS.items()]
        return always + [self.part_of(buffers[name]) if value else None for name, value in used]

    def corrections(self, counts: Counts) -> NDArray[np.float64] | None:
        """Return the factor of bias correction of each parameter in the next step; None without bias correction."""
        if not self.group["bias_correction"]:
            return None
        own_steps = counts.steps + 1 - counts.absent[self.numbers]
        corrections: NDArray[np.float64] = 1.0 / (1.0 - self.group["decay_rate"] ** own_steps)
        return corrections


class HostRun(Run):
    """A run on the host. One kernel call updates it."""

    def __init__(
        self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64], memory: Memory
    ) -> None:
        super().__init__(group_number, group, layout, numbers)
        self._spans = np.zeros((len(numbers), 4), np.int64)  # as for `kernels.reference.update`
        self._spans[:, :2] = self.bounds
        self._whole = np.array([(0, self.size, 0, 0)], np.int64)
        self._held: Items | None = None  # the parameters of the optimizer, if they are updated in place
        shapes = [layout.leaves[i].shape for i in numbers]
        self._shapes = np.zeros((len(shapes), 3 + max(map(len, shapes))), np.int64)
        for row, number, shape in zip(self._shapes, numbers, shapes, strict=True):
            row[:2], row[3 : 3 + len(shape)] = (number, len(shape)), shape
        self._memory = memory
        # Whether calls of compiled kernels are calls of `FROM_TABLE`.
        self.from_table = not memory.in_parts and pointers.available()
        # The calls of steady steps hold these arrays, so they are written in place.
        self._hyper = np.empty(len(HYPER_FIELDS), self.dtype)
        self._factors = np.empty((len(shapes), 2), self.dtype)
        self._whole_factors = np.empty((1, 2), self.dtype)
        self._table = np.zeros(1, cpu.TABLE)

    @cached_property
    def norms(self) -> SpanNorms:
        """The object that computes the norm of each parameter's gradient."""
        return self._memory.norms(self._spans)

    def use_options(self, clips_by_norm: bool) -> None:
        """Use the rule that the options of the group need, or clipping by a norm."""
        self._extended = True if clips_by_norm or needs_extended_rule(self.group) else None
        self._finder: partial[int] | None = None

    def use_buffers(self, buffers: Mapping[str, FlatBuffer], written: NDArray[np.int64]) -> None:
        """Update the parts of these buffers from now on, with the state that the options of the run need.

        `written` has the bounds of all buffers in memory (`memory_of`).
        """
        self._written, self._expected = written, pointers.identity(self.dtype)
        table = self._table[0]
        held = buffers["params"]
        if isinstance(held, HeldArrays):
            self._held, table["held_at"] = held.leaves, pointers.items_of(held.leaves)
            self._spans[:, PARAMETER] = [held.leaves[k].ctypes.data for k in self.numbers]
            self._held_dtypes = [held.leaves[k].dtype for k in self.numbers]  # so that their addresses stay theirs
            self._shapes[:, 2] = list(map(id, self._held_dtypes))
            # The kernels need a vector of this size, and do not read it.
            buffers = {**buffers, "params": buffers["grads"]}
        params, grads, *state = self.parts_of(buffers)
        self._arrays = (params, grads, *state, self._hyper)
        self._from_table, self._finder = (self._hyper, *state), None
        self._entry_points: dict[tuple[Update, tuple[Any, Any]], Update] = {}
        table["size"], table["params_at"], table["grads_at"] = self.size, params.ctypes.data, grads.ctypes.data
        table["sources_at"], table["source_count"] = self._spans.ctypes.data, len(self._spans)
        table["shapes_at"], table["shape_columns"] = self._shapes.ctypes.data, self._shapes.shape[1]
        table["expected_at"] = self._expected.ctypes.data
        table["written_at"], table["written_count"] = written.ctypes.data, len(written)
        self._no_update = self._table.copy()
        self._no_update["factors_at"], self._no_update["spans_at"] = self._factors.ctypes.data, self._spans.ctypes.data

    def _entry_point(self, kernel: Update, form: tuple[Any, Any], *arguments: Any) -> Update:
        """Return the compiled function of a kernel for arguments of this run.

        `form` are the arguments `extended` and `lines_ahead`. The types of all others never change.
        """
        entry = self._entry_points.get((kernel, form))
        if entry is None:
            entry = self._entry_points[kernel, form] = entry_point(kernel, *arguments)
        return entry

    def _from(self, kernel: str, table: NDArray[Any], lines_ahead: int | None = None, items: int = 0) -> Call:
        """Return a call of a function in `FROM_TABLE`."""
        arguments = (table, *self._from_table, self._extended, lines_ahead, items)
        return (self._entry_point(FROM_TABLE[kernel], (self._extended, lines_ahead), *arguments), *arguments)

    def compile(self, variant: Variant) -> None:
        """Compile the function of `FROM_TABLE` for a variant, or load it from disk."""
        self._from(variant.kernel, self._no_update, variant.lines_ahead)

    def locate(self, items: int) -> int:
        """Write the addresses of gradients to the spans, and return the status of `cpu.serial_from`.

        `items` is the address of the items of a tuple with all gradients; 0 to check held parameters only.
        """
        if self._finder is None:
            serial_from, *arguments, _ = self._from("serial", self._no_update)
            self._finder = partial(serial_from, *arguments)
        return int(self._finder(items))

    def located(self) -> NDArray[np.bool_]:
        """Return for each parameter whether `locate` found a gradient (and not None)."""
        located: NDArray[np.bool_] = self._spans[:, GRADIENT] != 0
        return located

    def point_to_buffer(self) -> None:
        """Read gradients from the gradient buffer in the next calls."""
        self._spans[:, GRADIENT] = 0

    def point_to(self, addresses: NDArray[np.int64]) -> None:
        """Read gradients at these addresses in the next calls. There is one for each parameter of the optimizer."""
        self._spans[:, GRADIENT] = addresses[self.numbers]

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
        lines_ahead: int | None = None,
    ) -> Call:
        """Return the arguments of a kernel (see `kernels.reference.update`).

        `scales` are the factors of clipping by norm, and `corrections` those of bias correction, one for each
        parameter of the run. The whole run is one span if its parameters and gradients are neighbours, and its factors
        are equal.
        """
        options, present = self.group, None if located.present is None else located.present[self.numbers]
        neighbours = present is None and self._held is None and not located.in_place
        equal = scales is None and (corrections is None or bool(np.all(corrections == corrections[0])))
        one_span = neighbours and equal
        spans, factors = (self._whole, self._whole_factors) if one_span else (self._spans, self._factors)
        sign = -1.0 if options["maximize"] else 1.0
        factors[:, 0] = sign if scales is None else sign * scales
        factors[:, 1] = 1.0 if corrections is None else corrections[: len(factors)]
        if present is not None:
            spans, factors = spans[present], factors[present]
        self._hyper[:] = hyper_values(options, lr, self.dtype)
        return (*self._arrays, spans, factors, self._extended, lines_ahead)

    def calls(self, kernel: str, arguments: Call, located: Located) -> list[Call]:
        """Return the calls of a kernel with the arguments from `arguments`; only one if compiled code updates all."""
        if self.from_table and kernel in FROM_TABLE:  # most programs compile one function only
            *_, spans, factors, _, lines_ahead = arguments
            table = self._table.copy()
            row = table[0]
            row["spans_at"], row["span_count"], row["factors_at"] = spans.ctypes.data, len(spans), factors.ctypes.data
            row["from_buffer"] = self._held is not None and not located.in_place
            self._kept = spans, factors  # the table has only their addresses
            if kernel == "parallel":
                threads.start_threads()  # before Numba does so, as it loads the kernel
            update, *rest = self._from(kernel, table, lines_ahead)
            return [(threads.one_at_a_time(update) if kernel == "parallel" else update, *rest)]
        if self._held is None or takes_addresses(kernel):
            return [self.call(kernel, arguments)]
        chosen = self.numbers if located.present is None else self.numbers[located.present[self.numbers]]
        vectors = [np.asarray(self._held[k]).reshape(-1) for k in chosen]
        grads, spans = arguments[1], arguments[-4]
        return self.calls_by_span(kernel, arguments, vectors, [grads[start:stop] for start, stop, *_ in spans])

    def call(self, kernel: str, arguments: Call) -> Call:
        """Return the call of a kernel that takes all arrays as arguments."""
        if kernel == "parallel":
            threads.start_threads()
        update = self._entry_point(kernels.UPDATES[kernel], arguments[-2:], *arguments)
        return (threads.one_at_a_time(update) if kernel == "parallel" else update, *arguments)

    def calls_by_span(
        self, kernel: str, arguments: Call, params: Iterable[Array], grads: Iterable[Array]
    ) -> list[Call]:
        """Return a call for each span, with its own parameters and gradient, for a kernel that takes no addresses."""
        _, _, *state, hyper, spans, factors, extended, lines_ahead = arguments
        calls = []
        for (start, stop, *_), factor, param, gradient in zip(spans, factors, params, grads, strict=True):
            parts = [None if array is None else array[start:stop] for array in state]
            span = np.array([(0, stop - start, 0, 0)])
            of_span = (param, gradient, *parts, hyper, span, factor[np.newaxis], extended, lines_ahead)
            calls.append(self.call(kernel, of_span))
        return calls


def compile_ahead(wanted: Iterable[tuple[HostRun, Variant]]) -> Callable[[], bool]:
    """Compile variants of runs in the background, and return a function that tells whether that has ended.

    Calls of other functions than those of `FROM_TABLE` are not known before the step.
    """
    wanted = [(run, variant) for run, variant in wanted if run.from_table]
    if any(variant.kernel == "parallel" for _, variant in wanted):
        threads.start_threads()  # here, because it changes settings of the process for a moment

    def work() -> None:
        for run, variant in wanted:
            run.compile(variant)

    return in_background(work)


def takes_addresses(kernel: str) -> bool:
    """Tell whether a kernel finds parameters and gradients by the addresses in spans."""
    return kernel != "numpy" and cpu.COMPILED


def memory_of(buffers: Iterable[FlatBuffer]) -> NDArray[np.int64]:
    """Return the bounds [low, high) in memory of all segments of buffers, sorted, with shape (n, 2)."""
    pieces = [piece for buffer in buffers for piece in buffer.segments if piece.size]
    bounds = sorted((piece.ctypes.data, piece.ctypes.data + piece.nbytes) for piece in pieces)
    return np.array(bounds, np.int64).reshape(-1, 2)


def make_plan(
    runs: Sequence[HostRun],
    variant_of: Sequence[Variant],
    rates: Sequence[float],
    located: Located,
    scales: NDArray[np.float64] | None,
    counts: Counts,
) -> tuple[list[Call], bool]:
    """Return the kernel calls of the next step, and whether the step is steady: later steps make the same calls.

    `rates` has a learning rate for each run. `scales` has a factor of clipping by norm for each parameter.
    """
    steady = scales is None and located.present is None
    calls: list[Call] = []
    for run, (kernel, lines_ahead), lr in zip(runs, variant_of, rates, strict=True):
        corrections = run.corrections(counts)
        steady = steady and not callable(run.group["lr"]) and corrections is None
        own_scales = None if scales is None else scales[run.numbers]
        calls += run.calls(kernel, run.arguments(lr, located, own_scales, corrections, lines_ahead), located)
    return calls, steady


def clip_scales(
    runs: Sequence[HostRun],
    variant_of: Sequence[Variant],
    grads: FlatBuffer,
    ranks: Ranks | None,
    global_clip_norm: float | None,
    present: NDArray[np.bool_] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return for each parameter the factor of clipping by norm, and the norm of its gradient after clipping by value.

    A parameter without a gradient has the norm 0. With `global_clip_norm` inf, norms are computed and clip nothing.
    """
    count = len(grads.leaves)
    scales, norms, measured = np.ones(count), np.zeros(count), np.zeros(count)
    for run, (kernel, _) in zip(runs, variant_of, strict=True):
        own = run.gradient_norms(grads, kernel, ranks)
        measured[run.numbers] = own
        limit = run.group["clip_norm"]
        if limit is not None:
            scales[run.numbers] = scale_to(limit, own)
            own = np.minimum(own, limit)
        norms[run.numbers] = own
    if present is not None:
        norms[~present] = measured[~present] = 0.0  # the buffer still has the gradient of an earlier step
    if global_clip_norm is not None and global_clip_norm < np.inf:
        scales *= scale_to(global_clip_norm, np.array(combine(norms)))
    return scales, measured


def rate_of(group: ParamGroup, number: int, rates: Sequence[float] | None, steps: int) -> float:
    """Return the learning rate of a group. `rates` has the results of functions.

    A function may have replaced itself by a number. Then the number counts.
    """
    return rates[number] if rates and callable(group["lr"]) else resolve_lr(group, steps)


def find_nonfinite(
    runs: Sequence[HostRun],
    variant_of: Sequence[Variant],
    located: Located,
    norms: NDArray[np.float64] | None,
    grads: FlatBuffer,
) -> NDArray[np.bool_]:
    """Return for each parameter whether its gradient has an inf or NaN.

    `norms` are from `clip_scales`, or None if nothing is clipped by norm.
    """
    present = located.present
    finite = np.zeros(len(grads.leaves), bool) if norms is None else np.isfinite(norms)
    for run in runs:
        if run.group["clip_value"] is not None:  # clipping by value hides an inf from the norm
            finite[run.numbers] = False
    if present is not None:
        finite |= ~present
    # A norm can overflow although all values are finite, and may be unknown. So read the gradients.
    if not finite.all():
        for run, (kernel, _) in zip(runs, variant_of, strict=True):
            finite[run.numbers] = run.norms.finite(run.part_of(grads), kernel)
    return ~finite if present is None else ~finite & present
