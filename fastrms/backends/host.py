"""The backend on the host: locate gradients, compute the kernel calls from options, make the calls, and count steps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms._state import Counts, OptimizerState
from fastrms._types import Items, Options
from fastrms.backends import plan, tuner
from fastrms.backends.at_once import AtOnce
from fastrms.backends.base import Backend, Call, Memory, Ranks
from fastrms.backends.held_check import HeldCheck
from fastrms.backends.host_parameter import HostParameter
from fastrms.backends.one_by_one import OneByOne
from fastrms.backends.plan import IN_BUFFER, IN_PLACE, HostRun, Located, Variant
from fastrms.backends.storage import Storage
from fastrms.buffers import Array, FlatBuffer
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.joined import read_segments, write_segments
from fastrms.buffers.replaced import Watch, refuse_replaced
from fastrms.errors import NonfiniteError, OptionError
from fastrms.kernels import cpu, pointers, threads
from fastrms.options import resolve_lr

__all__ = ["HostBackend"]


class HostBackend(Backend):
    """The backend of an optimizer whose buffers are on the host.

    `state` has the buffers "params" and "grads". Without `ranks` the optimizer belongs to this process alone.
    """

    def __init__(self, state: OptimizerState, memory: Memory, ranks: Ranks | None = None) -> None:
        super().__init__(state)
        self._memory, self._ranks = memory, ranks
        self.in_parts = memory.in_parts
        self.storage = memory if isinstance(memory, Storage) else None
        self._use_parameters()
        threads.call_after_fork(self.after_fork)

    def _use_parameters(self) -> None:
        """Prepare all that depends on the parameters and their groups."""
        state, memory, ranks = self.state, self._memory, self._ranks
        self._settled: FlatBuffer | None = None
        params, self._grads = state.buffers["params"], state.buffers["grads"]
        self._watched_params, self._watched_grads = Watch(params), Watch(self._grads)
        self._own = state.buffers if ranks is None else ranks.shard_of(state.buffers)
        self.run_calls = memory.run if ranks is None else ranks.run_with(memory.run)
        layout = self._own["grads"].layout
        self._runs = [self.new_run(k, numbers) for k, numbers in plan.split_runs(layout, state.group_of)]
        self._held = HeldCheck(state, self._own, self._runs, memory) if state.in_place else None
        self.one_by_one = OneByOne(HostParameter) if ranks is None else None
        self._computed_from: object = None  # the version of the options that `use_options` used last
        self._used: list[tuple[bool, bool]] = []  # `state.state_in_use` at that time
        self.kernel_changed()
        self._settled = params  # last: after Ctrl-C in between, the next step does all of it again

    def settle_parameters(self) -> None:
        """Prepare all that depends on the parameters, if groups were added or taken out."""
        if self._settled is not self.state.buffers["params"]:
            self._use_parameters()

    def new_run(self, group_number: int, numbers: NDArray[np.int64]) -> HostRun:
        """Return a run of the parameters with these numbers, which are in one group."""
        group, layout = self.state.param_groups[group_number], self._own["grads"].layout
        return HostRun(group_number, group, layout, numbers, self._memory)

    # Options.

    @property
    def stream(self) -> None:
        """None, as there is no GPU."""
        return None

    @stream.setter
    def stream(self, value: Any) -> None:
        if value is not None:
            expected = 'expected an optimizer with kernel="cuda", got a stream for one on the host'
            raise OptionError(f"stream: {expected}: {value!r}")

    def synchronize(self) -> None:
        """Do nothing: a step on the host has ended when it returns."""

    def new_buffer(self, name: str) -> FlatBuffer:
        """Return a state buffer of zeros."""
        return self._memory.new_buffer(name, self.state.state_layout(self._own["grads"].layout))

    def add_state(self, options: Iterable[Options]) -> None:
        """Make the state buffers that groups with these options need and that do not exist."""
        if self._ranks is not None:
            self._ranks.options_change()
        super().add_state(options)

    def check_kernel(self, value: Any) -> str:
        """Return the kernel that `value` names, or raise if it does not run on the host."""
        return kernels.check_host_kernel(value)

    def kernel_changed(self) -> None:
        """Use the kernel and the number of threads in `state`, from the next step on."""
        if self._ranks is not None:
            self._ranks.options_change()
        kernel = self.state.kernel
        largest = max(run.size for run in self._runs)
        variants = tuner.variants(largest, self._threads()) if kernel == "auto" else [kernel]
        wanted = [(run, tuner.of_run(run.size, name, True)) for run in self._runs for name in variants]
        prepare = partial(plan.compile_ahead, wanted)
        self._tuner = tuner.Tuner(variants, prepare=prepare) if len(variants) > 1 else None
        self.thread_limit = self.state.num_threads if "parallel" in variants else None  # a limit starts threads
        self.reads_in_place = kernel != "numpy" and pointers.available()
        self.options_changed()

    def options_changed(self) -> None:
        """Forget everything that was computed from options. The next step computes it again.

        Nothing is computed here, because thousands of groups may change one by one.
        """
        if self._ranks is not None:
            self._ranks.options_change()
        # The calls of steady steps, by (whether gradients are read in place, variant). A step in progress writes its
        # calls to the dict that it began with, so calls from old options never get into the new dict.
        self._steady_calls: dict[tuple[bool, str], list[Call]] = {}
        one_call = len(self._runs) == 1 and self._runs[0].from_table and self._ranks is None
        if one_call and self.state.kernel != "numpy" and self.state.nonfinite == "propagate" and not self.thread_limit:
            self.at_once = AtOnce(self._watched_params, self._watched_grads, self.turns, self.state, self._tuner)
        else:
            self.at_once = None
        self.state.counts.admit(0)
        self.version = object()

    def use_options(self) -> None:
        """Compute everything that depends on options only, unless they are unchanged."""
        version = self.version
        if self._computed_from is version:
            return
        self._scheduled, self._clips = self.state.scheduled, self.state.clips_by_norm
        for run in self._runs:
            run.use_options(self._clips)
        used = self.state.state_in_use
        if used != self._used:
            self._written = plan.memory_of(self._own.values())
            for run in self._runs:
                run.use_buffers(self._own, self._written)
            self._used = used
        self._computed_from = version  # last: Ctrl-C may come at any line, and a signal handler may set options

    def prepare(self, run: HostRun, others: Mapping[str, FlatBuffer] | None = None) -> None:
        """Make a run use the current options and buffers, with `others` in the place of buffers of the same names."""
        run.use_options(self._clips)
        run.use_buffers({**self._own, **(others or {})}, self._written)

    @property
    def variant(self) -> str:
        """The variant of large runs in the next step: a key of `tuner.VARIANTS`, or the option `kernel`."""
        return self.state.kernel if self._tuner is None else self._tuner.variant

    @property
    def decided(self) -> bool:
        """Whether "auto" has chosen among variants, or has nothing to choose."""
        return self._tuner is None or self._tuner.decided

    def _threads(self) -> int:
        """Return the number of threads of the parallel kernel."""
        return self.state.num_threads or threads.max_threads()

    # Steps.

    def step(self, gradients: Any) -> None:
        """Take one step, as `Backend.step`."""
        self.turns.refuse_in_pass("step")
        self.settle_parameters()
        if self._ranks is not None and self._ranks.exchange:
            self._ranks.step(self, gradients)
            return
        # Functions of the user come first, because they may set options: rates, then items of a mapping.
        rates = self.rates() if self._computed_from is not self.version or self._scheduled else None
        grads = self._grads
        from_buffer = gradients is None or gradients is grads.views
        items = None if from_buffer else grads.layout.flatten(gradients, "gradients")
        if self._computed_from is not self.version:  # an item has set options
            rates = rates or self.rates()
            self.use_options()
        if self.storage is not None:
            self.storage.check_open()
        refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
        variant = self.state.kernel if self._tuner is None else self._tuner.variant  # the property, without a call
        if self._held is not None:
            self._held.refuse_changed(self)
        located, items = (IN_BUFFER, None) if items is None else self._locate(items)
        self.take(located, rates, variant, items)
        if self.at_once is not None:
            self.at_once.admit()

    def step_at(self, addresses: NDArray[np.int64], present: NDArray[np.bool_] | None) -> None:
        """Take one step with the gradients at these addresses, one for each parameter.

        Each gradient is dense, has the dtype and shape of its parameter, and shares no memory with the optimizer. The
        caller has checked this. `present` tells for each parameter whether it has a gradient; None if all have one.
        The kernel is not "numpy", and `nonfinite` is "propagate".
        """
        with self.turns.between_steps("step"):
            rates = self.rates()
            variant = self.variant
            for run in self._runs:
                run.point_to(addresses)
            self.take(IN_PLACE if present is None else Located(True, present), rates, variant)

    def take(self, located: Located, rates: list[float] | None, variant: str, items: Items | None = None) -> None:
        """Update parameters and state with located gradients, and count the step.

        `rates` has the learning rate of each group; None if no rate is a function. `items` are the gradients, for
        error messages; None if they are in the gradient buffer.
        """
        if not located.in_place:
            for run in self._runs:
                run.point_to_buffer()
        calls = self._steady_calls.get((located.in_place, variant)) if located.present is None else None
        norms = None
        if calls is None:
            calls, norms = self._make_calls(located, rates, variant)
        counts = self.state.counts
        counts.last_norms = norms
        counts.last_skipped = self.state.nonfinite != "propagate" and self._skips(located, variant, norms, items)
        if counts.last_skipped:
            counts.skipped_steps += 1
            self.step_ended(skipped=True)
        else:
            work, memory, steps = self.run_calls(calls), counts.memory, counts.steps + 1
            absent = counts.absent if located.present is None else counts.absent + ~located.present
            counts.writing = True
            # One statement updates and counts. After the first update its bytecode has no call, so no signal handler
            # sees an update without its count. (Kernels in Python are the exception.)
            _, memory[0], counts.absent, counts.writing = [*work], steps, absent, False
            self.step_ended()

    def adding(self, new: OptimizerState) -> AbstractContextManager[Memory]:
        """Return a context for adding a group, as `Backend.adding`."""
        if self._ranks is None:  # ranks have checked this together
            self.refuse_changed()
        return nullcontext(self._memory) if self.storage is None else self.storage.adding(new)

    def ranks_of(self, new: OptimizerState) -> Ranks | None:
        """Return the ranks that share the buffers of a group to be added, as `Backend.ranks_of`."""
        return None if self._ranks is None else self._ranks.of_group(new)

    def step_ended(self, skipped: bool = False) -> None:
        """Record the end of a step that has been counted."""
        if self.storage is not None:
            (self.storage.step_skipped if skipped else self.storage.step_taken)()
        if self._tuner is not None:
            self._tuner.step_done()

    def _locate(self, items: Items) -> tuple[Located, Items | None]:
        """Locate gradients in place, or copy them to the gradient buffer if one cannot be read in place.

        Return their location, and the arrays that the step reads in place, or None if it reads the gradient buffer.
        """
        if (located := self._in_place(items)) is not None:
            return located, items
        arrays = tuple(as_arrays(items, self._grads.layout, "gradients", allow_none=True))
        self.use_options()  # the `__array__` of a user's class may have set options
        # Objects of other libraries are arrays now, such as views of tensors.
        if not all(map(is_, arrays, items)) and (located := self._in_place(arrays)) is not None:
            return located, arrays
        self._grads.store(arrays)
        if any(array is None for array in arrays):
            return Located(False, np.array([array is not None for array in arrays])), None
        return IN_BUFFER, None

    def _in_place(self, items: Items) -> Located | None:
        """Locate gradients in place, or return None if one cannot be read in place."""
        if not self.reads_in_place or (self.storage is not None and self.storage.pages.shows(items)):
            return None
        first, present = pointers.items_of(items), None
        for run in self._runs:
            status = run.locate(first)
            if status not in (cpu.FOUND, cpu.FOUND_SOME):  # one cannot be read in place
                return None
            if status == cpu.FOUND_SOME:
                if present is None:
                    present = np.ones(len(self.state.counts.absent), bool)
                present[run.numbers] = run.located()
        return IN_PLACE if present is None else Located(True, present)

    def refuse_changed(self) -> None:
        """Raise StructureError if a parameter that is updated in place was changed."""
        if self._held is not None:
            self._held.refuse_changed(self)

    def rates(self) -> list[float] | None:
        """Return the learning rate of each group, from functions too. Return None if no rate is a function."""
        self.use_options()
        return self.all_rates() if self._scheduled else None

    def all_rates(self) -> list[float]:
        """Return the learning rate of each group, from functions too."""
        return [resolve_lr(group, self.state.counts.steps) for group in self.state.param_groups]

    @np.errstate(all="ignore")  # the user's settings may raise, and are for the user's own arithmetic
    def _make_calls(
        self, located: Located, rates: list[float] | None, variant: str
    ) -> tuple[list[Call], NDArray[np.float64] | None]:
        """Return the kernel calls of the next step, and the norms of gradients; None if nothing is clipped by norm."""
        version = self.version
        self.use_options()
        steady_calls, at_once = self._steady_calls, self.at_once
        variant_of = [self.variant_of(run, variant) for run in self._runs]
        counts = self.state.counts
        scales = norms = None
        if self._clips:
            grads, limit = self._own["grads"], self.state.global_clip_norm
            scales, norms = plan.clip_scales(self._runs, variant_of, grads, self._ranks, limit, located.present)
        rate_of_run = [plan.rate_of(run.group, run.group_number, rates, counts.steps) for run in self._runs]
        calls, steady = plan.make_plan(self._runs, variant_of, rate_of_run, located, scales, counts)
        if self.version is not version:  # a signal handler has set options
            return self._make_calls(located, rates, variant)
        if steady:
            steady_calls[located.in_place, variant] = calls
            if at_once is not None:
                at_once.add(located.in_place, variant, calls[0])
        return calls, norms

    def variant_of(self, run: HostRun, variant: str) -> Variant:
        """Return the variant of a run. `variant` is the variant of large runs."""
        return tuner.of_run(run.size, variant, self._tuner is not None)

    def _skips(self, located: Located, variant: str, norms: NDArray[np.float64] | None, items: Items | None) -> bool:
        """Return whether to skip the step because a gradient is not finite, or raise NonfiniteError."""
        variant_of = [self.variant_of(run, variant) for run in self._runs]
        nonfinite = plan.find_nonfinite(self._runs, variant_of, located, norms, self._own["grads"])
        wrong = np.flatnonzero(nonfinite if self._ranks is None else self._ranks.nonfinite_anywhere(nonfinite))
        if not len(wrong) or self.state.nonfinite == "skip":
            return len(wrong) > 0
        if self._ranks is not None and items is None:  # otherwise one rank reads the gradients where they are
            raise self._ranks.nonfinite_error(wrong)
        leaves, values = self._grads.layout.leaves, items or self._grads.leaves
        raise NonfiniteError.of({leaves[k].path: values[k] for k in wrong})

    # Counts, and access to buffers.

    def settle(self) -> Counts:
        """Return the counts."""
        return self.state.counts

    def counts_changed(self) -> None:
        """Do nothing: each step reads the counts in `state`."""

    def read(self, segments: Sequence[Array]) -> Array:
        """Return the segment itself if there is only one, otherwise all of them joined in a new array."""
        return read_segments(segments)

    def write(self, segments: Sequence[Array], values: Array | float) -> None:
        """Set the elements of segments of a buffer, one after another."""
        write_segments(segments, values)

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array that fit into memory."""
        return self._memory.parts(array)

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for all writes of a load."""
        self.refuse_changed()
        return super().loading() if self.storage is None else self.storage.loading()

    def discard(self) -> None:
        """Remove new files after an error in making the optimizer."""
        if self.storage is not None:
            self.storage.discard()

    def refuse_copy(self) -> None:
        """Raise if the buffers are in files, or are divided among ranks."""
        if self.storage is not None:
            self.storage.refuse_copy()
        if self._ranks is not None:
            self._ranks.refuse_copy()

    def state_on_host(self) -> OptimizerState:
        """Return the data of the optimizer."""
        return self.state

    def after_fork(self) -> None:
        """Prepare the optimizer of a child process: new locks, kernels that work there, and a closed folder."""
        self.turns.after_fork()
        if self.storage is not None:
            self.storage.after_fork()
        self.kernel_changed()

    def explain(self) -> list[str]:
        """Return a line for each group and dtype: which kernel updates it, and why."""
        kernel, num_threads = self.state.kernel, self._threads()
        return [f"{run}: {tuner.explain(run.size, kernel, self._tuner, num_threads)}" for run in self._runs]
