"""The update of one parameter on a GPU."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastrms.backends.base import Call
from fastrms.backends.cuda.arrays import DeviceArray, Stream, copy_in, copy_out, let_wait, wait_for
from fastrms.backends.cuda.gradients import Finder, Found
from fastrms.backends.cuda.held import HeldDeviceArrays
from fastrms.backends.cuda.launches import Spans, norm_passes, squares, update
from fastrms.backends.cuda.tables import DeviceRun
from fastrms.backends.one_by_one import Parameter, SortedRows
from fastrms.buffers import Layout
from fastrms.errors import DtypeError
from fastrms.kernels import cuda as kernels

if TYPE_CHECKING:
    from fastrms.backends.cuda.backend import CudaBackend

__all__ = ["DeviceParameter"]


class _Gradient(NamedTuple):
    """A gradient in a dense vector of the parameter's dtype on the device."""

    vector: DeviceArray
    spans: Spans  # of the parameter; they have the source of the gradient of each span
    whole: Spans  # the vector as one span
    threads: int  # of a block of the update
    streams: list[Stream]  # of other libraries: they write the gradient's memory again only after the update
    found: Found  # it keeps the gradient alive


class DeviceParameter(Parameter["CudaBackend"]):
    """One parameter on the device, and the run that updates it.

    The kernels get the memory of the gradient as an argument, and the number of steps as a factor of bias correction.
    So an update of the whole parameter writes no tables to the device.
    """

    def __init__(self, backend: "CudaBackend", number: int) -> None:
        super().__init__(backend, number)
        state = backend.state
        group, layout = state.param_groups[self.group_number], state.buffers["grads"].layout
        self._run = DeviceRun(self.group_number, group, layout, np.array([number]))
        self._finder = Finder(self.layout, [state.buffers["grads"].leaves[number]], f"gradients{self.path}")
        self._computed_from: object = None  # the version of the options that the run uses
        self._used: tuple[bool, bool] | None = None  # the state that the run uses, as in `state_in_use`
        self._rate: float | None = None  # the learning rate that the run uses
        self._vector: tuple[int, DeviceArray | None] = 0, None  # the last address of a gradient, and the vector there

    @staticmethod
    def begin(backend: "CudaBackend") -> None:
        """Prepare the backend, or raise DeviceError in a forked process."""
        backend.begin_part()

    def find(self, backend: "CudaBackend", gradient: Any, rows: Any) -> _Gradient | tuple[()]:
        """Check a gradient, and copy it if the kernel cannot read it in place. Return () if it has no elements."""
        self._prepared(backend)  # so that the memory of all state is known
        sorted_rows = None if rows is None else self.rows_of(_on_host(rows, backend.stream))
        if sorted_rows is None:
            found = self._finder.find((gradient,), backend.written_by_update)
            size = self._run.size
        else:
            like = np.broadcast_to(np.zeros((), self.dtype), (len(sorted_rows.order), *self.shape[1:]))
            found = Finder(Layout(like), [like], f"gradients{self.path}").find((gradient,), backend.written_by_update)
            size = like.size
        params = backend.state.buffers["params"]
        if isinstance(params, HeldDeviceArrays):
            found.streams |= params.located(self.number)
        if not size:
            return ()
        run, stream = self._prepared(backend), backend.stream  # an array of the user may have set options
        streams = wait_for(found.streams, stream)
        vector = self._vector_of(backend, found, size)
        if sorted_rows is None:
            return _Gradient(vector, run.whole, run.whole, kernels.THREADS, streams, found)
        return self._of_rows(backend, vector, sorted_rows, streams, found)

    def _vector_of(self, backend: "CudaBackend", found: Found, size: int) -> DeviceArray:
        """Return the vector of a gradient, or a copy of it."""
        source = int(found.sources[0])
        if not (found.arrays or found.others):
            if source == kernels.IN_BUFFER:
                return self._run.arrays[1]
            if self._vector[0] != source or self._vector[1] is None or self._vector[1].size != size:
                self._vector = source, kernels.vector_at(source, size, self.dtype)
            return self._vector[1]
        vector = backend.scratch.array("gradient", self.dtype, size)
        if found.arrays:
            backend.scratch.gradients.copy(found.arrays[0], vector, backend.stream)
        else:
            copy_in(vector, found.others[0][1], backend.stream)
        return vector

    def _of_rows(
        self, backend: "CudaBackend", vector: DeviceArray, rows: SortedRows, streams: list[Stream], found: Found
    ) -> _Gradient:
        """Return the gradients of rows, added up if rows are repeated, with the tables of their spans."""
        scratch, stream = backend.scratch, backend.stream
        count, width = len(rows.numbers), math.prod(self.shape[1:])
        grads = scratch.array("sums", self.dtype, count * width) if rows.repeated else vector
        chunks, whole_chunks = -(-width // kernels.CHUNK), -(-grads.size // kernels.CHUNK)
        starts, address = rows.numbers * width, _address(grads)
        tables = [
            np.stack([starts, starts + width], axis=1).reshape(-1),
            np.arange(0, count * chunks + 1, chunks),
            address + rows.sources * (width * self.dtype.itemsize),
            np.array([0, grads.size]),
            np.array([0, whole_chunks]),
            np.append(rows.first, len(rows.order)),
            rows.order,
        ]
        packed = np.concatenate(tables)
        table = scratch.array("rows", np.int64, packed.size)
        scratch.tables.copy(packed, table, stream)
        stops = np.cumsum([part.size for part in tables])
        bounds, first_chunk, sources, whole, whole_chunk, first, order = (
            table[stop - part.size : stop] for part, stop in zip(tables, stops.tolist(), strict=True)
        )
        if rows.repeated:
            blocks = -(-grads.size // kernels.THREADS)
            kernels.launch(kernels.add_up_rows, blocks, kernels.THREADS, stream, vector, order, first, grads)
        spans = count * chunks, bounds.reshape(count, 2), first_chunk, sources
        as_one = whole_chunks, whole.reshape(1, 2), whole_chunk, self._run.whole[3]
        threads = min(kernels.THREADS, -(-width // kernels.LANES) * kernels.LANES)  # whole warps
        return _Gradient(grads, spans, as_one, threads, streams, found)

    @np.errstate(all="ignore")  # the user's settings may raise, and are for the user's own arithmetic
    def calls(
        self, backend: "CudaBackend", found: _Gradient | tuple[()], rates: list[float] | None, schedules: list[Any]
    ) -> list[Call]:
        """Return the launches of the update, as `Parameter.calls`."""
        if not found:
            return []
        run, counts, scratch, stream = self._prepared(backend), backend.state.counts, backend.scratch, backend.stream
        rate, corrections = self.rate(run, rates, schedules, counts), run.corrections(counts)
        if rate != self._rate:
            run.set_hyper(rate)
            self._rate = rate
        correction = 1.0 if corrections is None else float(corrections[0])
        # The kernel reads `factors` only with clipping, and never `finite`, as nothing decides against the update.
        factors, finite = scratch.array("factors", np.float64, 1, 2), scratch.array("finite", np.int64, 1)
        calls: list[Call] = []
        limit = run.group["clip_norm"]
        if limit is not None:
            count = found.spans[3].size
            sums, norms = (scratch.array(name, np.float64, 1) for name in ("square", "norm"))
            partials = scratch.array("partials", np.float64, found.whole[0])
            factors = scratch.array("factors of spans", np.float64, count, 2)
            calls += squares(run, found.vector, found.whole, (sums, norms, finite), partials, norm_passes(run), stream)
            sign = -1.0 if run.group["maximize"] else 1.0
            blocks = -(-count // kernels.THREADS)
            calls.append(
                (kernels.launch, kernels.limit_norm, blocks, kernels.THREADS, stream, norms, limit, sign, correction,
                 factors)
            )  # fmt: skip
        calls.append(
            update(
                run, found.vector, found.spans, factors, finite, stream, factored=limit is not None,
                correction=correction, threads=found.threads,
            )
        )  # fmt: skip
        return [*calls, *((let_wait, other, stream) for other in found.streams)]

    def _prepared(self, backend: "CudaBackend") -> DeviceRun:
        """Return the run, with the current options."""
        version = backend.version
        if self._computed_from is not version:
            backend.use_options()
            used = backend.state.state_in_use[self.group_number]
            if used != self._used:
                self._run.use_buffers(backend.state.buffers)
                self._used = used
            self._rate = None
            self._computed_from = version  # last: Ctrl-C may come at any line
        return self._run


def _address(array: DeviceArray) -> int:
    """Return the address of an array on the device."""
    interface = kernels.interface_of(array)
    assert interface is not None
    address: int = interface["data"][0]
    return address


def _on_host(rows: Any, stream: Stream) -> Any:
    """Return rows of a gradient; a copy on the host if they are on the device."""
    interface = kernels.interface_of(rows)
    if interface is None:
        return rows
    dtype = np.dtype(interface["typestr"])
    if interface.get("mask") is not None:
        raise DtypeError("rows: expected an array, got a masked array on the device, whose mask would be lost")
    if not dtype.isnative:
        raise DtypeError(f"rows: expected native byte order on the device, got {dtype}")
    if dtype.kind not in "iu":  # refused later
        return np.broadcast_to(np.zeros((), dtype), tuple(interface["shape"]))
    return copy_out(rows, interface, stream)
