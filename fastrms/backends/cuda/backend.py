"""The backend on a GPU: launch the kernels of a step without waiting for them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import chain
from typing import Any

import numpy as np

from fastrms._state import Counts, OptimizerState
from fastrms._types import Items
from fastrms.backends.base import Backend
from fastrms.backends.cuda.arrays import Stream, as_stream, copy_in, cuda, let_wait, require_gpu, to_host, wait_for
from fastrms.backends.cuda.buffer import DeviceBuffer, JoinedDeviceBuffer, PinnedGradients, Scratch
from fastrms.backends.cuda.given import params_on_host
from fastrms.backends.cuda.gradients import Finder, Found, Pieces
from fastrms.backends.cuda.held import HeldDeviceArrays, on_device
from fastrms.backends.cuda.launches import Pass, norm_passes, squares, update
from fastrms.backends.cuda.parameter import DeviceParameter
from fastrms.backends.cuda.tables import NO_BOUND, DeviceRun, Tables
from fastrms.backends.memory import Ram
from fastrms.backends.one_by_one import OneByOne
from fastrms.backends.plan import rate_of, split_runs
from fastrms.buffers import Array, FlatBuffer
from fastrms.buffers.joined import read_segments
from fastrms.buffers.replaced import Watch, refuse_replaced
from fastrms.errors import DeviceError, NonfiniteError
from fastrms.kernels import check_cuda_kernel, threads
from fastrms.kernels import cuda as kernels
from fastrms.kernels.norms import LEAST_SUM, combine
from fastrms.options import resolve_lr

__all__ = ["CudaBackend"]


class CudaBackend(Backend):
    """The backend of an optimizer whose buffers are on a GPU. It replaces the buffers in `state` by copies there.

    With nonfinite="skip" the device decides whether a step is taken or skipped, and counts for each parameter the
    steps without a gradient. Then the counts on the host are old, until `settle` asks the device.
    """

    def __init__(self, state: OptimizerState, stream: Stream) -> None:
        require_gpu()
        super().__init__(state)
        self._stream = as_stream(stream)
        state.kernel = "cuda"
        for name, buffer in state.buffers.items():
            state.buffers[name] = on_device(buffer, self._stream)
        self.scratch, self.run_calls = Scratch(), Ram().run
        self._tables: Tables | None = None
        self._measured = self._guarded = False  # whether the last step computed norms, or may have been skipped
        self._forked = False
        self._pending = 0  # steps since the host last asked the device whether it has taken or skipped them
        self._use_parameters()
        threads.call_after_fork(self.after_fork)

    def _use_parameters(self) -> None:
        """Prepare all that depends on the parameters and their groups."""
        params, grads = self._on_device("params"), self._on_device("grads")
        self._grads, self._held = grads, params if isinstance(params, HeldDeviceArrays) else None
        self._watched_params, self._watched_grads = Watch(params), Watch(grads)
        self._finder = Finder(grads.layout, grads.leaves, "gradients")
        self._pinned = PinnedGradients(grads)
        groups, runs = self.state.param_groups, split_runs(grads.layout, self.state.group_of)
        self._runs = [DeviceRun(k, groups[k], grads.layout, numbers) for k, numbers in runs]
        self.one_by_one = OneByOne(DeviceParameter)
        self._device_counts = False  # whether the device, not the host, counts `absent`
        self._absent_changed = False  # whether `absent` on the device is newer than on the host
        # The memory that a step writes; and the memory that updates write, without the gradient buffer.
        self.written = self.written_by_update = Pieces(())
        self._computed_from: object = None  # the version of the options that `use_options` used last
        self._used: list[tuple[bool, bool]] = []  # `state.state_in_use` at that time
        self.options_changed()
        self._params = params  # last: after Ctrl-C in between, the next step does all of it again

    def settle_parameters(self) -> None:
        """Prepare all that depends on the parameters, if groups were added."""
        if self._params is not self.state.buffers["params"]:
            self._use_parameters()

    def adding(self, new: OptimizerState) -> AbstractContextManager[Ram]:
        """Return a context for adding a group, as `Backend.adding`."""
        self.settle()  # the next step copies the counts to new tables on the device
        return nullcontext(Ram())

    def take_in(self, new: OptimizerState, made: Mapping[str, FlatBuffer]) -> None:
        """Append a group, as `Backend.take_in`."""
        new.buffers = {name: on_device(buffer, self._stream) for name, buffer in new.buffers.items()}
        self.state.take_in(new, made, JoinedDeviceBuffer)

    def params_on_host(self, params: Any, name: str) -> Any:
        """Return new parameters with all arrays on the host, as `Backend.params_on_host`."""
        return params_on_host(params, self._stream, name, self.state.buffers.values())

    def _on_device(self, name: str) -> DeviceBuffer:
        buffer = self.state.buffers[name]
        assert isinstance(buffer, DeviceBuffer)
        return buffer

    # Buffers and options.

    @property
    def stream(self) -> Stream:
        """The stream of all work, one of Numba's."""
        return self._stream

    @stream.setter
    def stream(self, value: object) -> None:
        new = as_stream(value)
        with self.turns.lock:
            let_wait(new, self._stream)
            self._stream = new
            for name in self.state.buffers:
                self._on_device(name).use(new)

    def synchronize(self) -> None:
        """Wait until the device has done all work on the stream."""
        self._stream.synchronize()

    def new_buffer(self, name: str) -> FlatBuffer:
        """Return a state buffer of zeros on the device."""
        return self._grads.like()

    def check_kernel(self, value: object) -> str:
        """Return "cuda" if `value` names the only kernel on a GPU, or raise OptionError."""
        return check_cuda_kernel(value)

    def kernel_changed(self) -> None:
        """Do nothing: there is one kernel, and it uses no threads of the host."""

    def options_changed(self) -> None:
        """Forget everything that was computed from options. The next step computes it again."""
        self.version = object()

    def use_options(self) -> None:
        """Compute everything on the host that depends on options only, unless they are unchanged.

        `_prepare_tables` does so on the device.
        """
        version = self.version
        if self._computed_from is version:
            return
        self._scheduled = self.state.scheduled
        used = self.state.state_in_use
        if used != self._used:
            for run in self._runs:
                run.use_buffers(self.state.buffers)
            self._used = used
        self._changed = True
        spans = {name: self._on_device(name).spans for name in self.state.buffers}
        self.written = Pieces(chain.from_iterable(spans.values()))
        self.written_by_update = Pieces(chain.from_iterable(own for name, own in spans.items() if name != "grads"))
        self._computed_from = version  # last: Ctrl-C may come at any line, and a signal handler may set options

    # Counts.

    def settle(self) -> Counts:
        """Return the counts, after waiting for the last steps if the device decides about them."""
        counts = self.settle_steps()
        if self._absent_changed:
            with self.turns.lock:
                self._read_absent()
        return counts

    def settle_steps(self) -> Counts:
        """Return the counts as `settle` does, except that `absent` may be that of an earlier step."""
        counts, tables = self.state.counts, self._tables
        if tables is not None and self._pending:
            with self.turns.lock:
                missed = int(self._params.read(tables.missed)[0])
                counts.steps += self._pending - missed
                counts.skipped_steps += missed
                self._pending = 0
                kernels.launch(kernels.fill, 1, 1, self._stream, tables.missed, 0)
        return counts

    def _read_absent(self) -> None:
        """Copy `absent` from the device, if it has changed there."""
        if self._absent_changed and self._tables is not None:
            self.state.counts.absent[self._tables.order] = self._params.read(self._tables.absent)
            self._absent_changed = False

    def counts_changed(self) -> None:
        """Use the counts that were written to `state`: the next step copies them to the device."""
        self._device_counts = False
        self.options_changed()

    def grad_norm(self) -> float | None:
        """Return the norm of all gradients of the last step, as `Backend.grad_norm`. Wait for the device."""
        tables = self._tables
        if tables is None or not self._measured:
            return None
        sums, norms, sources = map(self._params.read, (tables.sums, tables.norms, tables.sources.array))
        # The device limits `norms` by `clip_norm`, so take them from `sums`, unless a sum is outside the range.
        norms = np.where((sums >= LEAST_SUM) & np.isfinite(sums), np.sqrt(sums), norms)
        return combine(np.where(sources == kernels.ABSENT, 0.0, norms))

    def last_skipped(self) -> bool:
        """Tell whether the last step was skipped. Wait for the device."""
        return self._guarded and self._tables is not None and not self._params.read(self._tables.go)[0]

    def forget_last_step(self) -> None:
        """Forget the norms of the last step, and whether it was skipped."""
        self._measured = self._guarded = False

    # Steps.

    def step(self, gradients: object) -> None:
        """Take one step, as `Backend.step`."""
        self.turns.refuse_in_pass("step")
        self._refuse_forked("step")
        self.settle_parameters()
        # Functions of the user come first, because they may set options: rates, mappings, arrays.
        rates = self.rates()
        grads = self._grads
        from_buffer = gradients is None or gradients is grads.views
        items: Items = () if from_buffer else grads.layout.flatten(gradients, "gradients")
        found = self._finder.find(items, self.written) if items else Found(len(grads.leaves))
        if self._held is not None:
            found.streams |= self._held.located()
        if self._computed_from is not self.version:  # an item has set options
            rates = rates or self.rates()
            self.use_options()
        refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
        counts, tables = self.state.counts, self._prepare_tables()
        if self._changed or rates:
            for run in self._runs:
                run.set_hyper(rate_of(run.group, run.group_number, rates, counts.steps))
            self._changed = False
        if self._corrects:
            tables.correct_up_to(counts.steps + self._pending + 1, self._stream)

        others = wait_for(found.streams, self._stream)
        self._copy(found)
        tables.sources.write(found.sources[tables.order], self._stream)
        self._measured, self._guarded = self._clips, self.state.nonfinite == "skip"
        if self._clips or self.state.nonfinite != "propagate":
            self._measure(tables)
        if self.state.nonfinite == "raise":
            self._raise_if_nonfinite(tables, found, items)
        counts.writing = True  # until the step was counted
        self._update(tables, found)
        for other in others:  # so that it does not write its gradients again before the step has read them
            let_wait(other, self._stream)

        absent = found.sources == kernels.ABSENT
        if self._device_counts:
            self._absent_changed |= bool(absent.any())
        elif absent.any():
            counts.absent[absent] += 1
        if self.state.nonfinite == "skip":
            self._pending += 1
        else:
            counts.steps += 1
        counts.writing = False

    def rates(self) -> list[float] | None:
        """Return the learning rate of each group, from functions too. Return None if no rate is a function."""
        self.use_options()
        if not self._scheduled:
            return None
        steps = self.settle_steps().steps
        return [resolve_lr(group, steps) for group in self.state.param_groups]

    def begin_part(self) -> None:
        """Prepare for the update of one parameter: from now on the host counts."""
        self._refuse_forked("step_parameter")
        if self._device_counts:
            self.settle()
            self.counts_changed()

    def _refuse_forked(self, name: str) -> None:
        """Raise DeviceError in a child of the process that has made the optimizer. `name` is the call."""
        if self._forked:
            raise DeviceError(
                f"{name}: this process was forked from one that used the GPU, which CUDA does not allow; start "
                'processes with the method "spawn", and load a checkpoint there'
            )

    def _prepare_tables(self) -> Tables:
        """Return the tables of the device, with the present options in them."""
        if self._tables is None or self._tables.runs is not self._runs:
            self._tables = Tables(self._runs, self._stream)
        tables = self._tables
        if self._changed:
            self._clips = self.state.clips_by_norm
            self._corrects = any(group["bias_correction"] for group in self.state.param_groups)
            if self.state.nonfinite != "skip":
                self.settle_steps()
            device_counts = self._corrects or self.state.nonfinite == "skip"
            if device_counts and not self._device_counts:
                tables.absent.copy_to_device(self.state.counts.absent[tables.order], stream=self._stream)
            elif self._device_counts and not device_counts:
                self._read_absent()
            self._device_counts = device_counts
            tables.set_options(self._runs, self._stream)
        return tables

    def _copy(self, found: Found) -> None:
        """Copy gradients that cannot be read in place to the gradient buffer."""
        grads, saved = self._grads, []
        for i, (k, interface, ours) in enumerate(found.others):
            if ours:  # another gradient may be copied there first, so save this one
                apart = cuda.device_array(grads.leaves[k].size, np.dtype(interface["typestr"]))
                copy_in(apart, interface, self._stream)
                found.others[i] = k, kernels.interface_of(apart) or interface, ours
                saved.append(apart)
        if found.arrays:
            rest = [k for k, array in enumerate(found.arrays) if array is None]
            whole = bool((found.sources[rest] == kernels.ABSENT).all())
            self._pinned.copy(found.arrays, whole, self._stream)
        for k, interface, _ in found.others:
            copy_in(grads.part(k), interface, self._stream)

    def _measure(self, tables: Tables) -> None:
        """Compute the norms of gradients, and whether they are finite, as options need it."""
        for run in self._runs:
            sources, sums, norms, finite, _ = run.tables
            spans, results = (run.chunks, *run.each, sources), (sums, norms, finite)
            for function, *arguments in squares(
                run, run.arrays[1], spans, results, tables.partials, self._passes(run), self._stream
            ):
                function(*arguments)

    def _passes(self, run: DeviceRun) -> list[Pass]:
        """Return the passes over the gradients of a run that options need."""
        passes = norm_passes(run) if self._clips else []
        if self.state.nonfinite != "propagate":
            # A finite norm proves a finite gradient, unless values were clipped. Otherwise read the values.
            by_norm = self._clips and run.group["clip_value"] in (None, NO_BOUND)
            passes.append((kernels.DOUBTFUL if by_norm else kernels.EVERY, 0.0, NO_BOUND))
        return passes

    def _raise_if_nonfinite(self, tables: Tables, found: Found, items: Items) -> None:
        """Wait for the device, and raise NonfiniteError if a gradient is not finite."""
        grads = self._grads
        wrong = sorted(tables.order[grads.read(tables.finite) == 0].tolist())
        if wrong:
            values = {}
            for k in wrong:
                in_buffer = found.sources[k] == kernels.IN_BUFFER
                value = grads.read(grads.leaves[k]) if in_buffer else to_host(items[k], self._stream)
                values[grads.layout.leaves[k].path] = value
            raise NonfiniteError.of(values)

    def _update(self, tables: Tables, found: Found) -> None:
        """Launch the kernels that update parameters and state."""
        factored, guarded = self._clips or self._corrects, self.state.nonfinite == "skip"
        if factored or guarded:
            limit = NO_BOUND if self.state.global_clip_norm is None else self.state.global_clip_norm
            kernels.launch(
                kernels.decide, 1, kernels.THREADS, self._stream, tables.sources.array, tables.norms, tables.finite,
                guarded, tables.limits.array, limit, tables.signs.array, tables.rows.array, tables.corrections_there,
                self.state.counts.steps + self._pending, tables.absent, tables.missed, tables.factors, tables.go,
            )  # fmt: skip
        for run in self._runs:
            if run.chunks:
                by_parameter = factored or run.held or found.sources[run.numbers].any()
                spans = (run.chunks, *run.each, run.tables[0]) if by_parameter else run.whole
                function, *arguments = update(
                    run, run.arrays[1], spans, run.tables[-1], tables.go, self._stream, factored=factored,
                    guarded=guarded,
                )  # fmt: skip
                function(*arguments)

    # Access to buffers.

    def read(self, segments: Sequence[Any]) -> Array:
        """Return a copy of segments on the host, joined in their order. Wait for the device."""
        return read_segments([self._params.read(segment) for segment in segments])

    def write(self, segments: Sequence[Any], values: Array | float) -> None:
        """Set the elements of segments of a buffer, one after another."""
        start = 0
        for segment in segments:
            stop = start + segment.size
            self._params.write(segment, values[start:stop] if isinstance(values, np.ndarray) else values)
            start = stop

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for all writes of a load."""
        return self._on_device("params").loading()

    def state_on_host(self) -> OptimizerState:
        """Return a copy of the data with buffers on the host."""
        self.settle()
        state = copy(self.state)
        state.buffers = {name: self._on_device(name).to_host() for name in self.state.buffers}
        return state

    def after_fork(self) -> None:
        """Refuse steps in a child process. It cannot use the GPU of its parent."""
        self.turns.after_fork()
        self._forked = True

    def explain(self) -> list[str]:
        """Return a line for each group and dtype: the kernel that updates it."""
        return [f"{run}: cuda, as requested" for run in self._runs]
