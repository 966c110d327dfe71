"""The update of one parameter on the host."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrms._state import OptimizerState
from fastrms.backends import plan
from fastrms.backends.base import Call
from fastrms.backends.one_by_one import Parameter
from fastrms.backends.plan import IN_BUFFER, IN_PLACE, HostRun
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.replaced import changed_view
from fastrms.errors import StructureError
from fastrms.kernels import cpu, pointers
from fastrms.kernels.access import GRADIENT
from fastrms.kernels.norms import SpanNorms, scale_to
from fastrms.kernels.rows import add_up_rows

if TYPE_CHECKING:
    from fastrms.backends.host import HostBackend

__all__ = ["HostParameter"]


class _Gradient(NamedTuple):
    """A gradient in a dense vector of the parameter's dtype. The gradient of each span lies at one of `addresses`."""

    vector: Array
    spans: NDArray[np.int64]  # elements [start, stop) of the parameter, shape (n, 2)
    addresses: NDArray[np.int64]  # of the gradient of each span


class HostParameter(Parameter["HostBackend"]):
    """One parameter on the host, and the run that updates it."""

    def __init__(self, backend: "HostBackend", number: int) -> None:
        super().__init__(backend, number)
        self._run = backend.new_run(self.group_number, np.array([number]))
        self._computed_from: object = None  # the version of the options that the run uses
        # By variant: calls that read a gradient where `find` has found it, and are the same in each step.
        self._steady: dict[str, list[Call]] = {}

    @staticmethod
    def begin(backend: "HostBackend") -> None:
        """Raise StorageError if the folder was closed."""
        if backend.storage is not None:
            backend.storage.check_open()

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
        raise StructureError(f"params{self.path}: expected the original array, got one that was changed")

    def _finds(self, backend: "HostBackend", run: HostRun, items: tuple[Any]) -> bool:
        """Write the address of the gradient to the span of the run, and tell whether it can be read in place."""
        if backend.storage is not None and backend.storage.pages.shows(items):
            return False
        # The compiled function counts items from the first parameter of the optimizer.
        return run.locate(pointers.items_of(items) - 8 * self.number) == cpu.FOUND

    def _whole(self, state: OptimizerState, gradient: Any) -> _Gradient:
        """Return a whole gradient, checked, and copied if need be."""
        vector = self._dense(state, self._checked(gradient)).reshape(-1)
        return _Gradient(vector, np.array([(0, vector.size)]), np.array([vector.ctypes.data]))

    def _checked(self, gradient: Any) -> Array:
        """Return a whole gradient as an array, or raise as `RMSProp.step` does."""
        array: Array = as_arrays([gradient], self.layout, f"gradients{self.path}")[0]
        return array

    def _rows(self, state: OptimizerState, gradient: Any, rows: Any) -> _Gradient:
        """Return gradients of rows, checked, and added up if rows are equal."""
        sorted_rows = self.rows_of(rows)
        shape = (len(sorted_rows.order), *self.shape[1:])
        layout = Layout(np.broadcast_to(np.zeros((), self.dtype), shape))
        (array,) = as_arrays([gradient], layout, f"gradients{self.path}")
        dense = self._dense(state, array).reshape(len(array), math.prod(shape[1:]))
        if sorted_rows.repeated:
            dense = add_up_rows(dense, sorted_rows.order, sorted_rows.first, state.kernel)
        width = dense.shape[1]
        starts = sorted_rows.numbers * width
        places = dense.ctypes.data + sorted_rows.sources * (width * dense.itemsize)
        return _Gradient(dense.reshape(-1), np.stack([starts, starts + width], axis=1), places)

    def _dense(self, state: OptimizerState, array: Array) -> Array:
        """Return a dense array of the parameter's dtype that shares no memory with what the step writes."""
        dense = array.dtype is self.dtype and array.flags.c_contiguous and array.flags.aligned
        written = [buffer for name, buffer in list(state.buffers.items()) if name not in ("params", "grads")]
        own = state.buffers["params"].leaves[self.number]
        if dense and not np.may_share_memory(array, own) and not any(b.aliases([array])[0] for b in written):
            return array
        return self._copy(array)

    def _copy(self, array: Array) -> Array:
        """Return a dense copy in the dtype of the parameter."""
        # np.array(array, dtype) may keep another dtype object that is equal, as an unpickled array has it.
        copied: Array = np.empty(array.shape, self.dtype)
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
        rate, corrections = self.rate(run, rates, schedules, counts), run.corrections(counts)
        calls = run.calls(kernel, run.arguments(rate, IN_PLACE, scales, corrections, lines_ahead), IN_PLACE)
        if scales is None and corrections is None and not callable(run.group["lr"]):
            self._steady[variant] = calls
        return calls

    @np.errstate(all="ignore")
    def _calls_elsewhere(
        self, backend: "HostBackend", run: HostRun, gradient: _Gradient, rates: list[float] | None, schedules: list[Any]
    ) -> list[Call]:
        """Return the kernel calls for the spans of a gradient that is given by addresses, or by its vector."""
        if not gradient.vector.size:
            return []
        kernel, lines_ahead = backend.variant_of(run, backend.variant)
        counts, by_address = backend.state.counts, plan.takes_addresses(kernel)
        rate, corrections = self.rate(run, rates, schedules, counts), run.corrections(counts)
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
            span[0, GRADIENT], vector = vector.ctypes.data, np.empty(0, self.dtype)
        return scale_to(limit, SpanNorms(span)(vector, np.inf if bound is None else bound, kernel))

    def _held(self, params: FlatBuffer) -> Array:
        """Return the parameter as a vector in place, or raise StructureError if it can no longer be updated."""
        leaf, original = params.leaves[self.number], params.original_views()[self.number]
        if problem := changed_view(f"params{self.path}", leaf, original, held=True):
            raise StructureError(problem)
        return np.asarray(leaf).reshape(-1)
