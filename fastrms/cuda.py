"""RMSProp on a GPU: `CudaRMSProp`, which ``RMSProp(params, kernel="cuda")`` makes.

Options, layout and bits are those of `fastrms.RMSProp`; parameters, gradients and state lie on the device. docs/cuda.md
says how arrays of CuPy, PyTorch and Numba go in and out, and what a step waits for.
"""

import inspect
import math
import threading
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import LearningRate, check_count
from fastrms.backends.device import (
    DeviceBuffer,
    Finder,
    Found,
    Pinned,
    Staged,
    as_stream,
    copy_in,
    let_wait,
    shadows,
    to_host,
)
from fastrms.backends.plan import Run
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.buffers.replaced import refuse_replaced
from fastrms.errors import DeviceError, NonfiniteError, OptionError
from fastrms.kernels import cuda as kernels
from fastrms.kernels.hyper import hyper_values, needs_extended_rule
from fastrms.optimizer import RMSProp
from fastrms.options import ParamGroup

__all__ = ["CudaRMSProp", "why_not"]

_NO_BOUND = math.inf

cuda: Any = kernels.cuda  # with the types of none of its targets


def why_not() -> str | None:
    """Say why ``RMSProp(params, kernel="cuda")`` cannot work here.

    Returns
    -------
    reason : str or None
        What is missing: a package, the driver, or a device. None if nothing is.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrms
    >>> from fastrms.cuda import why_not
    >>> kernel = "cuda" if why_not() is None else "auto"
    >>> opt = fastrms.RMSProp([np.ones(3)], kernel=kernel)
    """
    return kernels.missing()


class _DeviceRun(Run):
    """A `Run` with its tables on the device."""

    def __init__(self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64]) -> None:
        super().__init__(group_number, group, layout, numbers)
        sizes = self._spans[:, 1] - self._spans[:, 0]
        first_chunk = np.concatenate([[0], np.cumsum(-(-sizes // kernels.CHUNK))])
        self.chunks = int(first_chunk[-1])
        self.whole_chunks = -(-self.size // kernels.CHUNK)
        # Bounds and first chunks of each parameter, and of all as one span, whose gradient is in the buffer.
        self.each = tuple(map(cuda.to_device, (np.ascontiguousarray(self._spans[:, :2]), first_chunk)))
        whole = np.array([[0, self.size]]), np.array([0, self.whole_chunks]), np.array([kernels.IN_BUFFER])
        self.whole = tuple(map(cuda.to_device, whole))
        self.slots = slice(0, 0)  # its parameters among those of all runs, one run after the other
        self.tables: tuple[Any, ...] = ()  # its items of `sources`, `sums`, `norms`, `finite` and `factors`
        self.hyper: tuple[Any, ...] = ()

    _arrays: Any

    def prepare(self, buffers: Any) -> None:
        """Take note of where the buffers lie and which state the options ask for."""
        params = self.part_of(buffers["params"])
        self._arrays = (
            params,
            self.part_of(buffers["grads"]),
            self.part_of(buffers["cache"]),
            # Instead of what is not there anything will do.
            self.part_of(buffers["momentum_buffer"]) if self.group["momentum"] > 0 else params,
            self.part_of(buffers["grad_avg"]) if self.group["centered"] else params,
        )

    def part_of(self, buffer: FlatBuffer) -> Any:
        """The elements of this run in `buffer`, 1-D."""
        segment = buffer.segments[self._segment]
        return segment[self._start : self._stop] if self.size else segment

    def set_hyper(self, lr: float) -> None:
        """Make the numbers that the kernel gets for the options."""
        with np.errstate(all="ignore"):
            self.hyper = tuple(np.array(hyper_values(self.group, lr, self.dtype), self.dtype))


class _Tables:
    """What a step reads and writes on the device beside the buffers: one item for each parameter, run after run."""

    def __init__(self, runs: list[_DeviceRun], stream: Any) -> None:
        self.order = np.concatenate([run.numbers for run in runs])
        count = 0
        for run in runs:
            run.slots = slice(count, count + len(run.numbers))
            count = run.slots.stop
        self.sources = Staged(np.zeros(count, np.int64), stream)
        self.sums, self.norms, self.partials = (
            cuda.to_device(np.zeros(size))
            for size in (count, count, max(1, *(run.chunks for run in runs)))
        )  # fmt: skip
        self.finite, self.sat_out = (cuda.to_device(np.zeros(count, np.int64)) for _ in range(2))
        self.missed, self.go = (cuda.to_device(np.zeros(1, np.int64)) for _ in range(2))
        self.factors = cuda.to_device(np.zeros((count, 2)))
        self.limits, self.signs = (Staged(np.zeros(count), stream) for _ in range(2))
        self.rows = Staged(np.full(count, -1), stream)
        for run in runs:  # slices take Numba longer than a launch
            run.tables = tuple(
                array[run.slots]
                for array in (self.sources.array, self.sums, self.norms, self.finite, self.factors)
            )  # fmt: skip
        # For correcting bias: a row for each decay rate, a column for each number of steps.
        self.decay_rates: list[float] = []
        self.corrections = np.ones((1, 1))
        self.corrections_there = cuda.to_device(self.corrections)

    def set_options(self, runs: list[_DeviceRun], stream: Any) -> None:
        """Write what the options say of each parameter."""
        limits, signs, rows = np.zeros(len(self.order)), np.zeros(len(self.order)), np.full(len(self.order), -1)
        rates = sorted({run.group["decay_rate"] for run in runs if run.group["bias_correction"]})
        for run in runs:
            options = run.group
            limits[run.slots] = _NO_BOUND if options["clip_norm"] is None else options["clip_norm"]
            signs[run.slots] = -1.0 if options["maximize"] else 1.0
            if options["bias_correction"]:
                rows[run.slots] = rates.index(options["decay_rate"])
        self.limits.write(limits, stream)
        self.signs.write(signs, stream)
        self.rows.write(rows, stream)
        if rates != self.decay_rates:
            self.decay_rates = rates
            self.corrections = np.zeros((max(1, len(rates)), 0))

    def correct_up_to(self, steps: int, stream: Any) -> None:
        """Have the corrections up to so many steps; they come to 1, and then there need be no more."""
        known = self.corrections.shape[1]
        if known >= steps or (known and bool((self.corrections[:, -1] == 1).all())):
            return
        number = np.arange(1, max(1024, 2 * steps) + 1)
        self.corrections = np.array([1.0 / (1.0 - rate**number) for rate in self.decay_rates])
        self.corrections_there = cuda.to_device(self.corrections, stream=stream)


class CudaRMSProp(RMSProp):
    """RMSProp with all buffers on a GPU: the options, the layout and the bits of `fastrms.RMSProp`.

    ``RMSProp(params, kernel="cuda")`` makes one. A step launches kernels and returns; what it computes is there when
    its stream has got so far. It waits for nothing, unless nonfinite="raise", or the function given as lr together with
    nonfinite="skip", asks for an answer from the device.

    Parameters
    ----------
    params : as for `RMSProp`
        On the host or on the device (whatever has ``__cuda_array_interface__``); copied.
    lr, decay_rate, epsilon : float
        As for `RMSProp`.
    stream : stream or int or None, default None
        On which all is done: a stream of Numba, CuPy or PyTorch, or its number. None is the default stream, on which
        CuPy and PyTorch work too as long as nothing else is asked of them. `stream` can be set later.
    kernel : {"cuda", "auto"}, default "cuda"
        There is just one.
    **options
        The other options of `RMSProp`; not cache_dtype and storage. `num_threads` changes nothing.

    Attributes
    ----------
    params, grads, cache, momentum_buffer, grad_avg : as for `RMSProp`
        Device arrays of Numba, which are views of flat buffers on the device. CuPy and PyTorch can wrap them without a
        copy: ``cupy.asarray(view)``, ``torch.as_tensor(view, device="cuda")``. `numpy.asarray` makes a copy.

    Raises
    ------
    DeviceError
        There is no GPU that can be used; the message says what is missing.
    StructureError, DtypeError, OptionError, OptionTypeError
        As for `RMSProp`.

    See Also
    --------
    fastrms.RMSProp : the options.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms.cuda import CudaRMSProp, why_not
    >>> if why_not() is None:
    ...     opt = CudaRMSProp({"W": np.ones((3, 2)), "b": np.zeros(2)}, lr=0.1)
    ...     _ = opt.step({"W": np.full((3, 2), 0.5), "b": None})
    """

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Make an optimizer."""
        return super().__new__(cls, **{name: value for name, value in options.items() if name != "kernel"})

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        decay_rate: float = 0.9,
        epsilon: float = 1e-8,
        *,
        stream: Any = None,
        kernel: str = "cuda",
        **options: Any,
    ) -> None:
        _check_kernel(kernel)
        if options.get("cache_dtype") is not None:
            raise OptionError(
                f'cache_dtype: expected None with kernel="cuda", which keeps state in the dtype of the parameters, got '
                f"{options['cache_dtype']!r}"
            )
        if options.get("storage") is not None:
            raise OptionError('storage: expected None with kernel="cuda", which keeps the buffers on a GPU, got a path')
        _require()
        self._stream = as_stream(stream)
        try:
            on_host, places = to_host(params, self._stream), shadows(params)
        except RecursionError:  # of which there is a better message
            on_host = places = params
        super().__init__(on_host, lr, decay_rate, epsilon, **options)
        if self._grouped:
            places = [group["params"] for group in places]
        if on_host is not places:
            refuse_overlap(self._params.layout, places)

    def _connect(self) -> None:
        self._kernel = "cuda"
        self._forked = False
        for name, buffer in self.buffers.items():
            if not isinstance(buffer, DeviceBuffer):
                self.buffers[name] = DeviceBuffer.of(buffer, self._stream)
        self._finder = Finder(self._on_device("grads"))
        self._pinned: list[tuple[Pinned, Any]] = []
        self._tables: _Tables | None = None
        self._counts_there = False  # whether the device counts steps, or we
        self._pending = 0  # steps since the device was asked how many of them it took
        self._written: NDArray[np.int64] = np.zeros((0, 2), np.int64)
        super()._connect()

    def _on_device(self, name: str) -> DeviceBuffer:
        buffer = self.buffers[name]
        assert isinstance(buffer, DeviceBuffer)
        return buffer

    def _new_run(self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64]) -> Run:
        return _DeviceRun(group_number, group, layout, numbers)

    def _in_child_of_fork(self) -> None:
        self._lock = threading.RLock()  # a thread that held it is not here
        self._forked = True

    def _kernel_changed(self) -> None:
        self._tuner, self._uses_threads = None, False
        self._options_changed()

    def _take_options(self) -> None:
        super()._take_options()
        self._changed = True
        self._written = np.array([self._on_device(name).span for name in self.buffers], np.int64)

    # Counts: the host knows them, but for what the device has decided since it was asked last.

    _pending = 0  # steps that the host does not know of yet whether they were taken
    _absent_changed = False

    def _settle(self) -> None:
        """Ask the device how many of the last steps it took."""
        if self._pending and self._tables is not None:
            with self._lock:
                missed = int(self._read(self._tables.missed)[0])
                self._counts.steps += self._pending - missed
                self._counts.skipped_steps += missed
                self._pending = 0
                kernels.launch(kernels.fill, 1, 1, self._stream, self._tables.missed, 0)

    @property
    def steps(self) -> int:
        """Steps taken. With nonfinite="skip" the device is asked, which waits for it."""
        self._settle()
        return self._counts.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._settle()
        self._counts.absent = np.minimum(self._skipped, check_count("steps", value))
        self._counts.steps = int(value)
        self._counts_there = False  # the device gets them anew
        self._options_changed()

    @property
    def skipped_steps(self) -> int:
        """Steps not taken, with nonfinite="skip". The device is asked, which waits for it."""
        self._settle()
        return self._counts.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._settle()
        self._counts.skipped_steps = check_count("skipped_steps", value)

    @property
    def _skipped(self) -> NDArray[np.int64]:
        if self._absent_changed and self._tables is not None:
            self._counts.absent[self._tables.order] = self._read(self._tables.sat_out)
            self._absent_changed = False
        return self._counts.absent

    # What users set and call.

    @property
    def kernel(self) -> str:
        """What runs the update: "cuda", and nothing else."""
        return self._kernel

    @kernel.setter
    def kernel(self, value: str) -> None:
        _check_kernel(value)

    @property
    def stream(self) -> Any:
        """The stream on which all is done, of Numba; to be set to what the constructor takes."""
        return self._stream

    @stream.setter
    def stream(self, value: Any) -> None:
        new = as_stream(value)
        with self._lock:
            event = cuda.event()
            event.record(self._stream)
            event.wait(new)
            self._stream = new
            for name in self.buffers:
                self._on_device(name).use(new)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it on this optimizer's stream."""
        self._stream.synchronize()

    def _read(self, segment: Any) -> NDArray[Any]:
        return self._on_device("params").read(segment)

    def _write(self, segment: Any, values: Any) -> None:
        self._on_device("params").write(segment, values)

    def _to_copy(self) -> dict[str, Any]:
        with self._lock:
            self._settle()
            self._counts.absent = self._skipped
            state = {name: value for name, value in super()._to_copy().items() if name not in _DERIVED}
            return state | {"_buffers": {name: self._on_device(name).to_host() for name in self.buffers}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _require()
        self._stream = as_stream(None)
        super().__setstate__(state)

    # The step.

    def _step(self, gradients: Any) -> Any:
        if self._forked:
            raise DeviceError(
                "step: this process was forked from one that used the GPU, which CUDA does not allow; start processes "
                'with the method "spawn", and load a checkpoint there'
            )
        # First what may call functions of the user's, which may set options: rates, mappings, arrays.
        rates = self._scheduled_rates()
        grads = self._grads
        from_buffer = gradients is None or gradients is grads.views
        items: tuple[Any, ...] = () if from_buffer else grads.layout.flatten(gradients, "gradients")
        found = self._finder.find(items, self._written) if items else Found(len(grads.leaves))
        if self._taken is not self._version:
            self._take_options()
        refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
        tables = self._prepare_tables()
        if self._changed or rates:
            for run in self._device_runs:
                run.set_hyper(self._rate_of(run, rates))
            self._changed = False
        if self._corrects:
            tables.correct_up_to(self._counts.steps + self._pending + 1, self._stream)

        for handle in found.streams:
            let_wait(self._stream, handle, True)
        self._bring(found)
        tables.sources.write(found.sources[tables.order], self._stream)
        if self._clips or self._nonfinite != "propagate":
            self._measure()
        if self._nonfinite == "raise":
            self._raise_if_not_finite(found, items)
        self._counts.writing = True  # until the step was counted
        self._update(found)
        for handle in found.streams:  # whose memory may be written again, but not before it has been read
            let_wait(self._stream, handle, False)

        absent = found.sources == kernels.ABSENT
        if self._counts_there:
            self._absent_changed |= bool(absent.any())
        elif absent.any():
            self._counts.absent[absent] += 1
        if self._nonfinite == "skip":
            self._pending += 1
        else:
            self._counts.steps += 1
        self._counts.writing = False
        return self._params.views

    @property
    def _device_runs(self) -> list[_DeviceRun]:
        return self._runs  # type: ignore[return-value]

    def _prepare_tables(self) -> _Tables:
        """The tables, with what the options say now."""
        if self._tables is None:
            self._tables = _Tables(self._device_runs, self._stream)
        tables = self._tables
        if self._changed:
            groups = self.param_groups
            self._clips = self._global_clip_norm is not None or any(g["clip_norm"] is not None for g in groups)
            self._corrects = any(group["bias_correction"] for group in groups)
            if self._nonfinite != "skip":
                self._settle()
            counts = self._corrects or self._nonfinite == "skip"
            if counts and not self._counts_there:
                tables.sat_out.copy_to_device(self._counts.absent[tables.order], stream=self._stream)
            elif self._counts_there and not counts:
                self._counts.absent = self._skipped
            self._counts_there = counts
            tables.set_options(self._device_runs, self._stream)
        return tables

    def _bring(self, found: Found) -> None:
        """Copy gradients that cannot be read where they lie to the gradient buffer."""
        grads = self._on_device("grads")
        sources: list[tuple[Any, Any, Any]] = []
        for k, interface, ours in found.others:
            leaf = grads.layout.leaves[k]
            if ours:  # perhaps where another one is about to be copied to
                apart = cuda.device_array(leaf.stop - leaf.start, np.dtype(interface["typestr"]))
                copy_in(apart, interface, self._stream)
                sources.append((k, kernels.interface_of(apart), apart))
            else:
                sources.append((k, interface, None))
        if found.arrays:
            self._upload(found, grads)
        for k, source, _ in sources:
            copy_in(grads.part(k), source, self._stream)

    def _upload(self, found: Found, grads: DeviceBuffer) -> None:
        if len(self._pinned) < 2:  # one is filled while the other is on its way
            self._pinned.append((Pinned(grads.layout), cuda.event()))
        else:
            self._pinned.reverse()
            self._pinned[-1][1].synchronize()
        pinned, event = self._pinned[-1]
        pinned.store(found.arrays)
        rest = [k for k, array in enumerate(found.arrays) if array is None]
        if (found.sources[rest] == kernels.ABSENT).all():
            if pinned.nbytes:
                grads.block.copy_to_device(pinned.block, stream=self._stream)
        else:
            for k, (array, memory) in enumerate(zip(found.arrays, pinned.leaves, strict=True)):
                if array is not None and memory.size:
                    grads.part(k).copy_to_device(memory.reshape(-1), stream=self._stream)
        event.record(self._stream)

    def _measure(self) -> None:
        """Find out the norms of gradients, and whether they are finite, as far as the options ask."""
        tables = self._tables
        assert tables is not None
        for run in self._device_runs:
            bound = _NO_BOUND if run.group["clip_value"] is None else run.group["clip_value"]
            passes = []
            if self._clips:
                passes.append((kernels.EVERY, 1.0, bound))
                if run.dtype == np.float64:
                    passes.append((kernels.TOO_SMALL, kernels.PRESCALE, bound))
                    passes.append((kernels.TOO_LARGE, 1 / kernels.PRESCALE, bound))
            if self._nonfinite != "propagate":
                # A norm that is finite tells it, if nothing was clipped; otherwise the values do.
                told = self._clips and bound == _NO_BOUND
                passes.append((kernels.DOUBTFUL if told else kernels.EVERY, 0.0, _NO_BOUND))
            sources, sums, norms, finite, _ = run.tables
            bounds, first_chunk = run.each
            for which, prescale, limit in passes:
                if run.chunks:
                    kernels.launch(
                        kernels.square_chunks, run.chunks, kernels.LANES, self._stream, run._arrays[1], bounds,
                        first_chunk, sources, run.dtype.type(limit), prescale, which, sums, norms, tables.partials,
                    )  # fmt: skip
                kernels.launch(
                    kernels.add_partials, len(run.numbers), kernels.THREADS, self._stream, first_chunk, sources, which,
                    prescale, tables.partials, sums, norms, finite,
                )  # fmt: skip

    def _raise_if_not_finite(self, found: Found, items: tuple[Any, ...]) -> None:
        tables, grads = self._tables, self._on_device("grads")
        assert tables is not None
        wrong = sorted(tables.order[self._read(tables.finite) == 0].tolist())
        if wrong:
            values = {}
            for k in wrong:
                in_buffer = found.sources[k] == kernels.IN_BUFFER
                value = grads.read(grads.leaves[k]) if in_buffer else to_host(items[k], self._stream)
                values[grads.layout.leaves[k].path] = value
            raise NonfiniteError.of(values)

    def _update(self, found: Found) -> None:
        tables = self._tables
        assert tables is not None
        factored, guarded = self._clips or self._corrects, self._nonfinite == "skip"
        if factored or guarded:
            limit = _NO_BOUND if self._global_clip_norm is None else self._global_clip_norm
            kernels.launch(
                kernels.decide, 1, kernels.THREADS, self._stream, tables.sources.array, tables.norms, tables.finite,
                guarded, tables.limits.array, limit, tables.signs.array, tables.rows.array, tables.corrections_there,
                self._counts.steps + self._pending, tables.sat_out, tables.missed, tables.factors, tables.go,
            )  # fmt: skip
        for run in self._device_runs:
            if not run.chunks:
                continue
            kernel = kernels.update_kernel(
                run.dtype, run.group["momentum"] > 0, run.group["centered"],
                factored or needs_extended_rule(run.group), factored, guarded,
            )  # fmt: skip
            if factored or found.sources[run.numbers].any():
                blocks, spans = run.chunks, (*run.each, run.tables[0])
            else:
                blocks, spans = run.whole_chunks, run.whole
            sign = run.dtype.type(-1 if run.group["maximize"] else 1)
            kernels.launch(
                kernel, blocks, kernels.THREADS, self._stream, *run._arrays, run.hyper, sign, run.dtype.type(1), *spans,
                run.tables[-1], tables.go,
            )  # fmt: skip


# For help(), as in `RMSProp`.
CudaRMSProp.__new__.__signature__ = inspect.signature(CudaRMSProp.__init__)  # type: ignore[attr-defined]

# What `_connect` makes, and pickles leave out: a copy works on the default stream.
_DERIVED = (
    "_stream", "_finder", "_pinned", "_tables", "_counts_there", "_pending", "_written", "_changed", "_forked",
    "_clips", "_corrects", "_absent_changed",
)  # fmt: skip


def _check_kernel(value: Any) -> None:
    if value not in ("cuda", "auto"):
        raise OptionError(
            f'kernel: expected "cuda", as all buffers are on the GPU, got {value!r}; make a new optimizer for the '
            "host, RMSProp(params), and let it load_state_dict() of this one"
        )


def _require() -> None:
    reason = why_not()
    if reason is not None:
        raise DeviceError(f'kernel: expected a GPU for "cuda", got none: {reason}')
