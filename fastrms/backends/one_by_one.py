"""Steps that are taken one parameter at a time, so that a program need not hold all gradients at once."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrms._state import Counts, OptimizerState
from fastrms.backends import plan
from fastrms.backends.base import Call
from fastrms.backends.plan import IN_BUFFER, IN_PLACE, HostRun
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.conversion import as_array
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.replaced import Watch, changed_view, refuse_replaced
from fastrms.errors import DtypeError, OptionError, StructureError
from fastrms.kernels import cpu, pointers
from fastrms.kernels.access import GRADIENT
from fastrms.kernels.norms import SpanNorms, scale_to
from fastrms.kernels.rows import add_up_rows

if TYPE_CHECKING:
    from fastrms.backends.host import HostBackend

__all__ = ["OneByOne"]


class _Gradient(NamedTuple):
    """A gradient in a dense vector of the parameter's dtype. The gradient of each span lies at one of `addresses`."""

    vector: Array
    spans: NDArray[np.int64]  # elements [start, stop) of the parameter, shape (n, 2)
    addresses: NDArray[np.int64]  # of the gradient of each span


class OneByOne:
    """Updates one parameter of a host backend at a time. A step is counted when every parameter was updated."""

    def __init__(self) -> None:
        self._parameters: dict[int, _Parameter] = {}
        # Of the step in progress: which parameters have no gradient, and by group the option lr and its present rate.
        self._missing: NDArray[np.bool_] = np.zeros(0, bool)
        self._schedules: list[Any] = []
        self._rates: list[float] | None = None

    def update(self, backend: "HostBackend", number: int, gradient: Any, rows: Any = None) -> None:
        """Update one parameter, or some of its rows. Count the step if this was the last parameter.

        The caller holds the lock of `Backend.turns`.
        """
        state = backend.state
        counts = state.counts
        _refuse_options(state)
        backend.settle_parameters()
        if backend.storage is not None:
            backend.storage.check_open()
        parameter = self._parameters.get(number)
        if parameter is None:
            parameter = self._parameters[number] = _Parameter(backend, number)
        updated = counts.updated
        if updated is None:
            self._rates = backend.rates()  # first, because functions of the user may set options
            self._schedules = [group["lr"] for group in state.param_groups]
            self._missing, updated = np.zeros(len(counts.absent), bool), np.zeros(len(counts.absent), bool)
        elif updated[number]:
            raise StructureError(
                f"gradients{parameter.path}: expected one gradient for each parameter in a step, got a second one; add "
                f"them up, or end the step with finish_step(): {int(updated.sum())} of {len(updated)} parameters were "
                "updated"
            )
        parameter.refuse_replaced(backend)
        calls: list[Call] = []
        found = None if gradient is None else parameter.find(backend, gradient, rows)
        version = None
        while found is not None and version is not backend.version:  # a signal handler may set options meanwhile
            version = backend.version
            calls = parameter.calls(backend, found, self._rates, self._schedules)
        self._missing[number] = found is None
        work = backend.run_calls(calls)
        last = np.count_nonzero(updated) == len(updated) - 1
        counts.last_norms, counts.last_skipped, counts.writing = None, False, True
        # As in `HostBackend.take`, one statement updates and counts.
        if last:
            steps, absent, memory = counts.steps + 1, counts.absent + self._missing, counts.memory
            _, memory[0], counts.absent, counts.updated, counts.writing = [*work], steps, absent, None, False
            backend.step_ended()
        else:
            _, updated[number], counts.updated, counts.writing = [*work], True, updated, False

    def finish(self, backend: "HostBackend") -> None:
        """End the step, with no gradient for the parameters that were not updated. Do nothing between two steps."""
        counts = backend.state.counts
        updated = counts.updated
        if updated is not None:
            if backend.storage is not None:
                backend.storage.check_open()
            memory, steps, absent = counts.memory, counts.steps + 1, counts.absent + (self._missing | ~updated)
            memory[0], counts.absent, counts.updated = steps, absent, None
            backend.step_ended()


class _Parameter:
    """One parameter, and the run that updates it."""

    def __init__(self, backend: "HostBackend", number: int) -> None:
        state = backend.state
        layout = state.buffers["grads"].layout
        leaf = layout.leaves[number]
        self.path, self.shape, self._number = leaf.path, leaf.shape, number
        self._layout = Layout(np.broadcast_to(np.zeros((), layout.dtype_of(leaf)), leaf.shape))
        self._dtype = self._layout.segments[0].dtype
        self._run = backend.new_run(int(state.group_of[number]), np.array([number]))
        self._keys = state.layout.keys[number]
        self._computed_from: object = None  # the version of the options that the run uses
        # By variant: calls that read a gradient where `find` has found it, and are the same in each step.
        self._steady: dict[str, list[Call]] = {}

    def refuse_replaced(self, backend: "HostBackend") -> None:
        """Raise StructureError if another object took the place of the parameter in `params`."""
        params = backend.state.buffers["params"]
        item = params.views
        try:
            for key in self._keys:
                item = item[key]
        except (LookupError, TypeError):
            item = None
        if item is not params.leaves[self._number]:
            refuse_replaced(Watch(params))

    def find(self, backend: "HostBackend", gradient: Any, rows: Any) -> "_Gradient | tuple[Any]":
        """Check a gradient. Return it, or a copy, in the form that `calls` takes; it lies where the run reads it.

        A tuple has a whole gradient for compiled code.
        """
        if rows is not None:
            return self._rows(backend.state, gradient, rows)
        if not backend.reads_in_place:
            return self._whole(backend.state, gradient)
        run = self._prepared(backend)
        if self._finds(backend, run, items := (gradient,)):
            return items
        array = self._checked(gradient)
        run = self._prepared(backend)  # the `__array__` of a user's class may have set options
        if self._finds(backend, run, items := (array,)) or self._finds(backend, run, items := (self._copy(array),)):
            return items
        self._held(backend.state.buffers["params"])
        raise StructureError(f"params{self.path}: expected the array as it was at first, got one that was changed")

    def _finds(self, backend: "HostBackend", run: HostRun, items: tuple[Any]) -> bool:
        """Write the address of the gradient to the span of the run, and tell whether it can be read in place."""
        if backend.storage is not None and backend.storage.pages.shows(items):
            return False
        # The compiled function counts items from the first parameter of the optimizer.
        return run.locate(pointers.items_of(items) - 8 * self._number) == cpu.FOUND

    def _whole(self, state: OptimizerState, gradient: Any) -> _Gradient:
        """Return a whole gradient, checked, and copied if need be."""
        vector = self._dense(state, self._checked(gradient)).reshape(-1)
        return _Gradient(vector, np.array([(0, vector.size)]), np.array([vector.ctypes.data]))

    def _checked(self, gradient: Any) -> Array:
        """Return a whole gradient as an array, or raise as `RMSProp.step` does."""
        array: Array = as_arrays([gradient], self._layout, f"gradients{self.path}")[0]
        return array

    def _rows(self, state: OptimizerState, gradient: Any, rows: Any) -> _Gradient:
        """Return gradients of rows, checked, and added up if rows are equal."""
        if not self.shape:
            raise StructureError(f"rows: expected a parameter with rows, params{self.path} has no axis")
        numbers = _row_numbers(rows, self.shape[0])
        shape = (len(numbers), *self.shape[1:])
        layout = Layout(np.broadcast_to(np.zeros((), self._dtype), shape))
        (array,) = as_arrays([gradient], layout, f"gradients{self.path}")
        dense = self._dense(state, array).reshape(len(numbers), math.prod(shape[1:]))
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))
        if len(first) < len(ordered):
            dense = add_up_rows(dense, order, first, state.kernel)
            order, ordered = np.arange(len(first)), ordered[first]
        width = dense.shape[1]
        starts = ordered * width
        places = dense.ctypes.data + order * (width * dense.itemsize)
        return _Gradient(dense.reshape(-1), np.stack([starts, starts + width], axis=1), places)

    def _dense(self, state: OptimizerState, array: Array) -> Array:
        """Return a dense array of the parameter's dtype that shares no memory with what the step writes."""
        dense = array.dtype is self._dtype and array.flags.c_contiguous and array.flags.aligned
        written = [buffer for name, buffer in list(state.buffers.items()) if name not in ("params", "grads")]
        own = state.buffers["params"].leaves[self._number]
        if dense and not np.may_share_memory(array, own) and not any(b.aliases([array])[0] for b in written):
            return array
        return self._copy(array)

    def _copy(self, array: Array) -> Array:
        """Return a dense copy in the dtype of the parameter."""
        # np.array(array, dtype) may keep another dtype object that is equal, as an unpickled array has it.
        copied: Array = np.empty(array.shape, self._dtype)
        with np.errstate(all="ignore"):  # numbers that are too large become inf, as in a gradient buffer
            copied[...] = array
        return copied

    def calls(
        self, backend: "HostBackend", found: "_Gradient | tuple[Any]", rates: list[float] | None, schedules: list[Any]
    ) -> list[Call]:
        """Return the kernel calls of the update. They may have only the address of the gradient in `found`.

        `rates` has the rates of the groups whose option lr is still the one in `schedules`.
        """
        run = self._prepared(backend)
        if isinstance(found, _Gradient):
            return self._calls_elsewhere(backend, run, found, rates, schedules)
        if not backend.reads_in_place:  # a signal handler has set another kernel
            return self._calls_elsewhere(backend, run, self._whole(backend.state, found[0]), rates, schedules)
        variant = backend.variant
        calls = self._steady.get(variant)
        return self._calls_in_place(backend, run, variant, rates, schedules) if calls is None else calls

    @np.errstate(all="ignore")  # the user's settings may raise, and are for the user's own arithmetic
    def _calls_in_place(
        self, backend: "HostBackend", run: HostRun, variant: str, rates: list[float] | None, schedules: list[Any]
    ) -> list[Call]:
        """Return the kernel calls for a gradient where `find` has found it."""
        kernel, lines_ahead = backend.variant_of(run, variant)
        limit, scales, counts = run.group["clip_norm"], None, backend.state.counts
        if limit is not None:
            scales = scale_to(limit, run.gradient_norms(backend.state.buffers["grads"], kernel, None))
        rate, corrections = self._rate(run, rates, schedules, counts), run.corrections(counts)
        calls = run.calls(kernel, run.arguments(rate, IN_PLACE, scales, corrections, lines_ahead), IN_PLACE)
        if scales is None and corrections is None and not callable(run.group["lr"]):
            self._steady[variant] = calls
        return calls

    def _rate(self, run: HostRun, rates: list[float] | None, schedules: list[Any], counts: Counts) -> float:
        """Return the learning rate of the run."""
        number = run.group_number
        return plan.rate_of(run.group, number, rates if run.group["lr"] is schedules[number] else None, counts.steps)

    @np.errstate(all="ignore")
    def _calls_elsewhere(
        self, backend: "HostBackend", run: HostRun, gradient: _Gradient, rates: list[float] | None, schedules: list[Any]
    ) -> list[Call]:
        """Return the kernel calls for the spans of a gradient that is given by addresses, or by its vector."""
        if not gradient.vector.size:
            return []
        kernel, lines_ahead = backend.variant_of(run, backend.variant)
        counts, by_address = backend.state.counts, plan.takes_addresses(kernel)
        rate, corrections = self._rate(run, rates, schedules, counts), run.corrections(counts)
        spans = np.zeros((len(gradient.spans), 4), np.int64)
        spans[:, :2] = gradient.spans
        if by_address:
            spans[:, GRADIENT] = gradient.addresses
        arguments = run.arguments(rate, IN_BUFFER, self._scales(gradient, kernel), corrections, lines_ahead)
        params, grads, *state_and_hyper, _, factors, extended, lines_ahead = arguments
        if backend.state.in_place:
            params = self._held(backend.state.buffers["params"])
        factors = np.repeat(factors, len(spans), axis=0)
        arguments = (params, grads, *state_and_hyper, spans, factors, extended, lines_ahead)
        if by_address:
            return [run.call(kernel, arguments)]
        itemsize = gradient.vector.itemsize
        starts = (gradient.addresses - gradient.vector.ctypes.data) // itemsize
        widths = gradient.spans[:, 1] - gradient.spans[:, 0]
        own = [gradient.vector[start : start + width] for start, width in zip(starts, widths, strict=True)]
        return run.calls_by_span(kernel, arguments, [params[start:stop] for start, stop in gradient.spans], own)

    def _prepared(self, backend: "HostBackend") -> HostRun:
        """Return the run, with the current options."""
        version = backend.version
        if self._computed_from is not version:
            backend.use_options()
            backend.prepare(self._run)
            self._steady.clear()
            self._computed_from = version  # last: Ctrl-C may come at any line
        return self._run

    def _scales(self, gradient: _Gradient, kernel: str) -> NDArray[np.float64] | None:
        """Return the factor of clipping by norm, or None without clipping."""
        limit, bound = self._run.group["clip_norm"], self._run.group["clip_value"]
        if limit is None:
            return None
        vector, span = gradient.vector, np.array([(0, gradient.vector.size, 0, 0)], np.int64)
        if plan.takes_addresses(kernel):
            # The function is compiled for writable arrays, but the gradient may be read-only. So pass its address.
            span[0, GRADIENT], vector = vector.ctypes.data, np.empty(0, self._dtype)
        return scale_to(limit, SpanNorms(span)(vector, np.inf if bound is None else bound, kernel))

    def _held(self, params: FlatBuffer) -> Array:
        """Return the parameter as a vector in place, or raise StructureError if it can no longer be updated."""
        leaf, original = params.leaves[self._number], params.original_views()[self._number]
        if problem := changed_view(f"params{self.path}", leaf, original, held=True):
            raise StructureError(problem)
        return np.asarray(leaf).reshape(-1)


def _row_numbers(rows: Any, size: int) -> NDArray[np.int64]:
    """Return row numbers from 0 to size - 1, or raise an error. Negative ones among `rows` count from the end."""
    numbers = as_array(rows, "rows")
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        mask = "; np.flatnonzero(mask) gives the rows of a mask" if numbers.dtype.kind == "b" else ""
        raise DtypeError(f"rows: expected a 1-D array of integers, got {numbers.dtype} of shape {numbers.shape}{mask}")
    lowest = 0 if numbers.dtype.kind == "u" else -size
    wrong = numbers[(numbers < lowest) | (numbers >= size)]
    if len(wrong):
        raise StructureError(f"rows: expected row numbers from -{size} to {size - 1}, got {wrong[0]}")
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + size, numbers)


def _refuse_options(state: OptimizerState) -> None:
    """Raise OptionError if an option needs the gradients of all parameters together."""
    if state.global_clip_norm is not None:
        raise OptionError(
            f"global_clip_norm: expected None for steps of one parameter at a time, got {state.global_clip_norm!r}, "
            "which needs all gradients together; clip_norm limits the norm of each gradient"
        )
    if state.nonfinite != "propagate":
        raise OptionError(
            f'nonfinite: expected "propagate" for steps of one parameter at a time, got {state.nonfinite!r}, which '
            "needs all gradients together"
        )
