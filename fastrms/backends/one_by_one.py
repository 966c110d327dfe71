"""Steps that are taken one parameter at a time, so that a program need not hold all gradients at once."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrms._state import OptimizerState
from fastrms.backends import plan
from fastrms.backends.base import Call
from fastrms.backends.plan import IN_BUFFER, HostRun
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.replaced import changed_view
from fastrms.errors import DtypeError, OptionError, StructureError
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
        # The learning rates of the step in progress, and which parameters have no gradient in it.
        self._rates: list[float] | None = None
        self._missing: NDArray[np.bool_] = np.zeros(0, bool)

    def update(self, backend: "HostBackend", number: int, gradient: Any, rows: Any = None) -> None:
        """Update one parameter, or some of its rows. Count the step if this was the last parameter.

        The caller holds the lock of `Backend.turns`.
        """
        state = backend.state
        counts = state.counts
        _refuse_options(state)
        if number not in self._parameters:
            self._parameters[number] = _Parameter(backend, number)
        updated, parameter = counts.updated, self._parameters[number]
        if updated is None:
            # Functions of the user come first, because they may set options.
            self._rates, self._missing = backend.rates(), np.zeros(len(counts.absent), bool)
            updated = np.zeros(len(counts.absent), bool)
            backend.refuse_replaced()
        elif updated[number]:
            raise StructureError(
                f"gradients{parameter.path}: expected one gradient for each parameter in a step, got a second one; add "
                f"them up, or end the step with finish_step(): {int(updated.sum())} of {len(updated)} parameters were "
                "updated"
            )
        located = None if gradient is None else parameter.locate(state, gradient, rows)
        backend.use_options()  # the `__array__` of a user's class may have set options
        if backend.storage is not None:
            backend.storage.check_open()
        calls = [] if located is None else parameter.calls(backend, located, self._rates)
        self._missing[number] = located is None
        work = backend.run_calls(calls)
        last = np.count_nonzero(updated) == len(updated) - 1
        counts.writing = True
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
            steps, absent = counts.steps + 1, counts.absent + (self._missing | ~updated)
            counts.steps, counts.absent, counts.updated = steps, absent, None
            backend.step_ended()


class _Parameter:
    """One parameter, the run that updates it, and the arrays that its kernel calls read."""

    def __init__(self, backend: "HostBackend", number: int) -> None:
        state = backend.state
        layout = state.buffers["grads"].layout
        leaf = layout.leaves[number]
        self.path, self.shape, self._number = leaf.path, leaf.shape, number
        self._layout = Layout(np.broadcast_to(np.zeros((), layout.dtype_of(leaf)), leaf.shape))
        self._dtype = self._layout.segments[0].dtype
        self._run = backend.new_run(int(state.group_of[number]), np.array([number]))
        self._computed_from: object = None

    def locate(self, state: OptimizerState, gradient: Any, rows: Any) -> _Gradient:
        """Check a gradient and return it, in place if it can be read there, otherwise in a new array."""
        name = f"gradients{self.path}"
        if rows is None:
            vector = self._dense(state, *as_arrays([gradient], self._layout, name)).reshape(-1)
            whole = np.array([(0, vector.size)])
            return _Gradient(vector, whole, np.array([vector.ctypes.data]))
        if not self.shape:
            raise StructureError(f"rows: expected a parameter with rows, params{self.path} has no axis")
        numbers = _row_numbers(rows, self.shape[0])
        shape = (len(numbers), *self.shape[1:])
        layout = Layout(np.broadcast_to(np.zeros((), self._dtype), shape))
        dense = self._dense(state, *as_arrays([gradient], layout, name)).reshape(len(numbers), math.prod(shape[1:]))
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
        written = [buffer for name, buffer in state.buffers.items() if name != "grads"]
        dense = array.dtype is self._dtype and array.flags.c_contiguous and array.flags.aligned
        if dense and not any(buffer.aliases([array])[0] for buffer in written):
            return array
        with np.errstate(all="ignore"):  # numbers that are too large become inf, as in a gradient buffer
            return np.array(array, self._dtype, order="C")

    def calls(self, backend: "HostBackend", gradient: _Gradient, rates: list[float] | None) -> list[Call]:
        """Return the kernel calls of the update."""
        if not gradient.vector.size:
            return []
        run, counts = self._prepared(backend), backend.state.counts
        kernel, lines_ahead = backend.variant_of(run, backend.variant)
        by_address = plan.takes_addresses(kernel)
        spans = np.zeros((len(gradient.spans), 4), np.int64)
        spans[:, :2] = gradient.spans
        if by_address:
            spans[:, GRADIENT] = gradient.addresses
        rate = plan.rate_of(run.group, run.group_number, rates, counts.steps)
        scales = self._scales(run, gradient, kernel)
        arguments = run.arguments(rate, IN_BUFFER, scales, run.corrections(counts), lines_ahead)
        params, grads, *state_and_hyper, _, factors, extended, lines_ahead = arguments
        if backend.state.in_place:
            params = self._held(backend.state.buffers["params"])
        factors = np.repeat(factors, len(spans), axis=0)
        self._kept = gradient.vector, spans, factors  # the call may hold only their addresses
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
        if self._computed_from is not backend.version:
            self._computed_from = backend.version
            backend.prepare(self._run)
        return self._run

    def _scales(self, run: HostRun, gradient: _Gradient, kernel: str) -> NDArray[np.float64] | None:
        """Return the factor of clipping by norm, or None without clipping."""
        limit, bound = run.group["clip_norm"], run.group["clip_value"]
        if limit is None:
            return None
        vector, span = gradient.vector, np.array([(0, gradient.vector.size, 0, 0)], np.int64)
        if plan.takes_addresses(kernel):
            # The function is compiled for writable arrays, but the gradient may be read-only. So pass its address.
            span[0, GRADIENT], vector = vector.ctypes.data, np.empty(0, self._dtype)
        return scale_to(limit, SpanNorms(span)(vector, np.inf if bound is None else bound, kernel))

    def _held(self, params: FlatBuffer) -> Array:
        """Return the parameter as a vector in place, or raise StructureError if it can no longer be updated."""
        vector: Array = params.segments[self._number]
        leaf, original = params.leaves[self._number], params.original_views()[self._number]
        if problem := changed_view(f"params{self.path}", leaf, original):
            raise StructureError(problem)
        return vector


def _row_numbers(rows: Any, size: int) -> NDArray[np.int64]:
    """Return row numbers from 0 to size - 1, or raise an error. Negative ones among `rows` count from the end."""
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        mask = "; np.flatnonzero(mask) gives the rows of a mask" if numbers.dtype.kind == "b" else ""
        raise DtypeError(f"rows: expected a 1-D array of integers, got {numbers.dtype} of shape {numbers.shape}{mask}")
    numbers = numbers.astype(np.int64)
    wrong = numbers[(numbers < -size) | (numbers >= size)]
    if len(wrong):
        raise StructureError(f"rows: expected row numbers from 0 to {size - 1}, got {wrong[0]}")
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
