"""Take the steps of an optimizer on the host: from gradients and options to kernel calls, and to the counts."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms._state import STATE_OPTIONS, Counts, OptimizerState
from fastrms.backends import plan, tuner
from fastrms.backends.base import Call, Memory, Ranks
from fastrms.backends.plan import IN_BUFFER, IN_PLACE, Located, Run
from fastrms.backends.storage import Storage
from fastrms.backends.turns import Turns
from fastrms.buffers import Array, FlatBuffer
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.replaced import Watch, refuse_replaced
from fastrms.errors import NonfiniteError, OptionError
from fastrms.kernels import cpu, pointers, threads
from fastrms.options import resolve_lr

__all__ = ["HostBackend"]

# The result of the one call of `cpu.serial_from` that is a whole step.
_UPDATED = [cpu.FOUND]


class HostBackend:
    """The steps of an optimizer whose buffers are on the host.

    Parameters
    ----------
    state : OptimizerState
        With buffers for parameters and gradients.
    memory : Memory
        Where new buffers are made.
    ranks : Ranks or None, default None
        The processes that share the optimizer; None for this one alone.

    Attributes
    ----------
    in_parts : bool
        Whether buffers may be larger than memory, and are read and written part by part.
    storage : Storage or None
        The folder that has the buffers.
    thread_limit : int or None
        The number of threads to which a step is limited.
    """

    def __init__(self, state: OptimizerState, memory: Memory, ranks: Ranks | None = None) -> None:
        self.state = state
        self.turns = Turns(state.counts)
        self._memory, self._ranks = memory, ranks
        self.in_parts = memory.in_parts
        self.storage = memory if isinstance(memory, Storage) else None
        self._params, self._grads = state.buffers["params"], state.buffers["grads"]
        self._watched_params, self._watched_grads = Watch(self._params), Watch(self._grads)
        self._own = state.buffers if ranks is None else ranks.shard_of(state.buffers)
        self._run_calls = memory.run if ranks is None else ranks.run_with(memory.run)
        layout = self._own["grads"].layout
        self._runs = [
            Run(k, state.param_groups[k], layout, numbers, memory)
            for k, numbers in plan.split_runs(layout, state.group_of)
        ]
        self._computed_from: object = None  # the version of the options from which everything below was computed
        self._used: list[tuple[bool, bool]] = []  # for each group whether it has a momentum buffer and a mean gradient
        self.kernel_changed()
        threads.call_after_fork(self.after_fork)

    @property
    def stream(self) -> None:
        """None: there is no GPU."""
        return None

    @stream.setter
    def stream(self, value: Any) -> None:
        raise OptionError(
            f'stream: expected an optimizer with kernel="cuda", got a stream for one on the host: {value!r}'
        )

    def synchronize(self) -> None:
        """Do nothing: a step on the host ends when it is done."""

    def new_buffer(self, name: str) -> FlatBuffer:
        """Return a state buffer of zeros."""
        return self._memory.new_buffer(name, self.state.state_layout(self._own["params"].layout))

    check_kernel = staticmethod(kernels.check_host_kernel)

    def add_state(self, options: Iterable[Mapping[str, Any]]) -> None:
        """Make the state buffers that groups with these options need and that do not exist."""
        if self._ranks is not None:
            self._ranks.options_change()
        options = list(options)
        for name, option in STATE_OPTIONS.items():
            if name not in self.state.buffers and any(values[option] for values in options):
                self.state.buffers[name] = self.new_buffer(name)

    def kernel_changed(self) -> None:
        """Follow `state.kernel` and `state.num_threads`."""
        if self._ranks is not None:
            self._ranks.options_change()
        kernel, threads_work = self.state.kernel, threads.threads_work()
        large = any(run.size >= tuner.TRY_PARALLEL_FROM for run in self._runs)
        watch = kernel == "auto" and large and self._threads() > 1 and threads_work
        self._tuner = tuner.Tuner() if watch else None
        # Where nothing parallel can run, no threads are started for the sake of a limit on them.
        self.thread_limit = self.state.num_threads if watch or kernel == "parallel" else None
        self._zero_copy = kernel != "numpy" and pointers.available()
        self.options_changed()

    def options_changed(self) -> None:
        """Forget everything that was computed from options. The next step computes it again.

        Thousands of groups may change one by one, so nothing is computed here.
        """
        if self._ranks is not None:
            self._ranks.options_change()
        # The calls of a step where every step has the same, by whether gradients are read in place, and by kernel. A
        # step that is making calls writes them to the dict with which it began.
        self._steady_calls: dict[tuple[bool, str], list[Call]] = {}
        # Where one call of `cpu.serial_from` is the whole step: its arguments after the address of the items.
        self._whole_step: dict[str, Call] = {}
        self._version = object()

    def use_options(self) -> None:
        """Compute everything that follows from options, unless that was done."""
        version = self._version
        if self._computed_from is version:
            return
        self._compiled: set[tuple[bool, str]] = set()
        groups = self.state.param_groups
        self._scheduled = any(callable(group["lr"]) for group in groups)
        self._clips = self.state.global_clip_norm is not None or any(group["clip_norm"] is not None for group in groups)
        used = [(group["momentum"] > 0, group["centered"]) for group in groups]
        if used != self._used:
            for run in self._runs:
                run.use_buffers(self._own)
            self._used = used
        self._computed_from = version  # last: Ctrl-C may come at any line, and a signal handler may set options

    @property
    def large_kernel(self) -> str:
        """The kernel of large runs in the next step; "auto" stands for serial."""
        return self.state.kernel if self._tuner is None else self._tuner.kernel

    def _threads(self) -> int:
        return self.state.num_threads or threads.max_threads()

    # Steps.

    def step(self, gradients: Any) -> None:
        """Take one step with gradients in the structure of the parameters, or None for the gradient buffer.

        The caller holds the lock of `turns`.
        """
        if self._ranks is not None and self._ranks.exchange:
            self._ranks.step(self, gradients)
            return
        # First everything that may call the user's functions, which may set options: rates, then items of a mapping.
        rates = self.rates() if self._computed_from is not self._version or self._scheduled else None
        grads = self._grads
        from_buffer = gradients is None or gradients is grads.views
        items = None if from_buffer else grads.layout.flatten(gradients, "gradients")
        if self._computed_from is not self._version:
            self.use_options()
            if self._scheduled and rates is None:
                rates = self.all_rates()
        if self.storage is not None:
            self.storage.check_open()
        refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
        kernel = self.state.kernel if self._tuner is None else self._tuner.kernel  # `large_kernel`, without a call
        located = IN_BUFFER
        if items is not None:
            in_place = None
            if self._zero_copy and (self.storage is None or not self.storage.pages.shows(items)):
                # `items` keeps the arrays alive until the kernels have read them.
                address = pointers.items_of(items)
                arguments = self._whole_step.get(kernel)
                if arguments is not None:
                    # As in `take`, except that the call may meet unusual gradients, and then updates nothing.
                    counts = self.state.counts
                    steps, work = counts.steps, starmap(cpu.serial_from, ((address, *arguments),))
                    counts.steps = steps + ([*work] == _UPDATED)
                    if counts.steps > steps:
                        if self._tuner is not None:
                            self._tuner.step_done()
                        return
                in_place = self._locate(address)
            located = self._copy(items) if in_place is None else in_place
        self.take(located, rates, kernel, items if located.in_place else None)

    def step_at(self, addresses: NDArray[np.int64], present: NDArray[np.bool_] | None) -> None:
        """Take one step with gradients at these addresses, for adapters that have looked at their tensors.

        Not with the NumPy kernel, which cannot read there, and not with another `nonfinite` than "propagate".

        Parameters
        ----------
        addresses : ndarray of int64, shape (parameters,)
            Each gradient is dense, has the dtype and shape of its parameter, and shares no memory with the optimizer.
        present : ndarray of bool, shape (parameters,), or None
            Which parameters have a gradient; None where all have one.
        """
        with self.turns.between_steps("step"):
            rates = self.rates()
            kernel = self.large_kernel
            for run in self._runs:
                run.point_to(addresses)
                if self._kernel_of(run, kernel) != "serial":  # which copies by itself
                    run.copy_small()
            self.take(IN_PLACE if present is None else Located(True, present), rates, kernel)

    def take(
        self, located: Located, rates: list[float] | None, kernel: str, items: tuple[Any, ...] | None = None
    ) -> None:
        """Update parameters and state with gradients that were located, and count the step.

        This, and the one call in `step`, are the only places that count. The statement that makes the calls and counts
        has no call in its own bytecode from the first update on. So a signal handler of Python's finds a step that has
        not begun or one that was counted, unless a call runs Python itself, as the NumPy kernel does.

        Parameters
        ----------
        located : Located
        rates : list of float or None
            The learning rate of each group; None where no rate is a function.
        kernel : {"numpy", "serial", "parallel", "auto"}
            For large runs; "auto" stands for serial.
        items : tuple or None, default None
            The gradients that lie in place, for error messages.
        """
        calls = self._steady_calls.get((located.in_place, kernel)) if located.present is None else None
        norms = None
        if calls is None:
            calls, norms = self._make_calls(located, rates, kernel)
        counts = self.state.counts
        if self.state.nonfinite != "propagate" and self._skips(located, kernel, norms, items):
            counts.skipped_steps += 1
            if self.storage is not None:
                self.storage.step_skipped()
        else:
            work, steps = self._run_calls(calls), counts.steps + 1
            absent = counts.absent if located.present is None else counts.absent + ~located.present
            counts.writing = True
            _, counts.steps, counts.absent, counts.writing = [*work], steps, absent, False
            if self.storage is not None:
                self.storage.step_taken()
        if self._tuner is not None:
            self._tuner.step_done()

    def _locate(self, items: int) -> Located | None:
        """Locate the gradients in the tuple whose items are at this address, or return None where one is unusual."""
        present = None
        for run in self._runs:
            status = run.locate(items)
            if status >= 0:
                return None
            if status == cpu.FOUND_SOME:
                if present is None:
                    present = np.ones(len(self.state.counts.absent), bool)
                present[run.numbers] = run.located()
        for run in self._runs:  # only now, so that nothing is written if any array is a wrong one
            run.copy_small()
        return IN_PLACE if present is None else Located(True, present)

    def _copy(self, items: tuple[Any, ...]) -> Located:
        """Check gradients of any kind, and copy them to the gradient buffer."""
        arrays = as_arrays(items, self._grads.layout, "gradients", allow_none=True)
        self.use_options()  # an array's own `__array__` may do anything
        self._grads.store(arrays)
        if any(array is None for array in arrays):
            return Located(False, np.array([array is not None for array in arrays]))
        return IN_BUFFER

    def rates(self) -> list[float] | None:
        """Return the learning rate of each group, or None where no rate is a function. Calls the functions."""
        self.use_options()
        return self.all_rates() if self._scheduled else None

    def all_rates(self) -> list[float]:
        """Return the learning rate of each group. Calls the functions."""
        return [resolve_lr(group, self.state.counts.steps) for group in self.state.param_groups]

    @np.errstate(all="ignore")  # the settings, which may raise, are for the user's own arithmetic
    def _make_calls(
        self, located: Located, rates: list[float] | None, kernel: str
    ) -> tuple[list[Call], NDArray[np.float64] | None]:
        """Return the kernel calls of the next step, and the norms of gradients where clipping computed them."""
        version = self._version
        self.use_options()
        steady_calls, whole_step = self._steady_calls, self._whole_step
        if not located.in_place:
            for run in self._runs:
                run.point_to_buffer()
        kernel_of = [self._kernel_of(run, kernel) for run in self._runs]
        counts = self.state.counts
        scales = norms = None
        if self._clips:
            grads, ranks, limit = self._own["grads"], self._ranks, self.state.global_clip_norm
            of_runs = [run.gradient_norms(grads, name, ranks) for run, name in zip(self._runs, kernel_of, strict=True)]
            scales, norms = plan.clip_scales(self._runs, of_runs, limit, located.present, len(counts.absent))
        rate_of_run = [plan.rate_of(run.group, run.group_number, rates, counts.steps) for run in self._runs]
        from_items = located.in_place and self.storage is None  # a folder cuts calls of `UPDATES`
        calls, steady = plan.make_plan(self._runs, kernel_of, rate_of_run, located, scales, counts, from_items)
        if self._version is not version:  # a signal handler has set options meanwhile
            return self._make_calls(located, rates, kernel)
        if (located.in_place, kernel) not in self._compiled:
            # Without spans they update nothing. So no compiler runs, and may be interrupted, between two updates.
            for update, *rest, spans, factors, extended in calls:
                update(*rest, spans[:0], factors[:0], extended)
            self._compiled.add((located.in_place, kernel))
        if steady:
            steady_calls[located.in_place, kernel] = calls
            if len(calls) == 1 and calls[0][0] is cpu.serial_from and self.state.nonfinite == "propagate":
                whole_step[kernel] = calls[0][2:]
        return calls, norms

    def _kernel_of(self, run: Run, kernel: str) -> str:
        """Return the kernel for a run where `kernel` is the one for large runs."""
        if not threads.threads_work() and kernel == "parallel":
            return "serial"
        if self.state.kernel != "auto":
            return kernel
        return kernel if kernel == "parallel" and run.size >= tuner.TRY_PARALLEL_FROM else "serial"

    def _skips(
        self, located: Located, kernel: str, norms: NDArray[np.float64] | None, items: tuple[Any, ...] | None
    ) -> bool:
        """Return whether the step is to be skipped, or raise, where a gradient is not finite."""
        kernel_of = [self._kernel_of(run, kernel) for run in self._runs]
        nonfinite = plan.find_nonfinite(self._runs, kernel_of, located, norms, self._own["grads"])
        wrong = np.flatnonzero(nonfinite if self._ranks is None else self._ranks.nonfinite_anywhere(nonfinite))
        if not len(wrong) or self.state.nonfinite == "skip":
            return len(wrong) > 0
        if self._ranks is not None:
            raise self._ranks.nonfinite_error(wrong)
        leaves, values = self._grads.layout.leaves, items or self._grads.leaves
        raise NonfiniteError.of({leaves[k].path: values[k] for k in wrong})

    # Counts, and access to buffers.

    def settle(self) -> Counts:
        """Return the counts."""
        return self.state.counts

    def counts_changed(self) -> None:
        """Use the counts that were written to `state`: each step reads them."""

    def read(self, segment: Array) -> Array:
        """Return a segment of a buffer, itself."""
        return segment

    def write(self, segment: Array, values: Array | float) -> None:
        """Set the elements of a segment of a buffer."""
        segment[...] = values

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array, small enough to be in memory."""
        return self._memory.parts(array)

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for all writes of a load."""
        return nullcontext() if self.storage is None else self.storage.loading()

    def discard(self) -> None:
        """Remove files that the optimizer made, after an error in making it."""
        if self.storage is not None:
            self.storage.discard()

    def refuse_copy(self) -> None:
        """Raise where the buffers are files, for which a copy in memory may be too large, or shared with ranks."""
        if self.storage is not None:
            self.storage.refuse_copy()
        if self._ranks is not None:
            self._ranks.refuse_copy()

    def state_on_host(self) -> OptimizerState:
        """Return the data of the optimizer."""
        return self.state

    def after_fork(self) -> None:
        """Make what a child process needs: locks of its own, kernels that work there, and no use of the folder."""
        self.turns.after_fork()
        if self.storage is not None:
            self.storage.after_fork()
        self.kernel_changed()

    def explain(self) -> list[str]:
        """Say which kernel updates which parameters, and why, a line each."""
        return [
            f"group {run.group_number}, {run.size:,} {run.dtype} in {len(run.numbers):,} arrays: "
            f"{tuner.explain(run.size, self.state.kernel, self._tuner, self._threads())}"
            for run in self._runs
        ]
