"""`Stepping`: from the options and a step's gradients to the kernel calls that are the step."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from operator import call
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms._checks import check_count
from fastrms._guarded import Guarded
from fastrms.backends import tuner
from fastrms.backends.plan import Run
from fastrms.backends.storage import Storage
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.replaced import Watch, refuse_replaced
from fastrms.errors import NonfiniteError, StepInProgressError
from fastrms.kernels import cpu, pointers, threads
from fastrms.kernels.norms import AddUp, combine, scale_to
from fastrms.options import ParamGroup, ParamGroups, resolve_lr

__all__ = ["Stepping"]

# A kernel and its arguments.
_Call = tuple[Any, ...]

# What the one call of `cpu.serial_from` returns that is a whole step.
_UPDATED = [cpu.FOUND]

# State that an option needs, beside the cache: the names of buffer and option.
_STATE = (("momentum_buffer", "momentum"), ("grad_avg", "centered"))


class Counts:
    """How many steps were taken, and whether the state is of a step that was counted.

    Attributes
    ----------
    steps : int
        Steps taken.
    skipped_steps : int
        Steps not taken because a gradient was not finite.
    absent : ndarray of int64
        For each parameter the steps in which it had no gradient.
    writing : bool
        Whether parameters, state and counts are of different steps at the moment.
    """

    __slots__ = ("absent", "skipped_steps", "steps", "writing")

    def __init__(self, parameters: int) -> None:
        self.steps = self.skipped_steps = 0
        self.absent: NDArray[np.int64] = np.zeros(parameters, np.int64)
        self.writing = False


class Stepping(Guarded):
    """The steps of `fastrms.RMSProp`, which has what is declared here and says what it means."""

    _buffers: dict[str, FlatBuffer]
    _param_groups: ParamGroups
    _cache_dtype: str | None
    _global_clip_norm: float | None
    _group_of: NDArray[np.int64]
    _grouped: bool
    _kernel: str
    _lock: threading.RLock
    _nonfinite: str
    _num_threads: int | None
    _counts: Counts
    _storage: Storage | None

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return self._counts.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._counts.steps = value = check_count("steps", value)
        # No parameter has missed more steps than were taken.
        self._counts.absent = np.minimum(self._counts.absent, value)

    @property
    def skipped_steps(self) -> int:
        """The number of steps not taken, with nonfinite="skip"."""
        return self._counts.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._counts.skipped_steps = check_count("skipped_steps", value)

    @property
    def _skipped(self) -> NDArray[np.int64]:
        return self._counts.absent

    @property
    def buffers(self) -> dict[str, FlatBuffer]:
        """The flat buffers behind the views, by name: ``opt.buffers["grads"].flat`` is one dense vector."""
        return self._buffers

    @property
    def param_groups(self) -> ParamGroups:
        """One mapping of options for each group, which may be changed; the list itself cannot."""
        return self._param_groups

    @property
    def _own(self) -> Mapping[str, FlatBuffer]:
        """The buffers that this process updates: all, unless ranks have parts of them (`fastrms.mpi`)."""
        return self._buffers

    def _new_state(self, name: str) -> FlatBuffer:
        params, dtype = self._own["params"], None if self._cache_dtype is None else np.uint16
        if self._storage is None:
            return params.like(dtype=dtype)
        return self._storage.buffer(name, params.layout if dtype is None else params.layout.with_dtype(dtype))

    def _new_run(self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64]) -> Run:
        return Run(group_number, group, layout, numbers, self._storage)

    def _connect(self) -> None:
        """Make what follows from the buffers and groups: the runs, and the groups' way to say that they changed."""
        self._grads = self._buffers["grads"]
        self._params = self._buffers["params"]
        self._watched_grads, self._watched_params = Watch(self._grads), Watch(self._params)
        layout = self._own["grads"].layout
        segment_of = np.array([leaf.segment for leaf in layout.leaves])
        self._runs: list[Run] = []
        # One group and dtype after the other, without a search for each: there may be thousands of groups.
        order = np.lexsort((self._group_of, segment_of))
        ends = np.flatnonzero(np.diff(segment_of[order]) | np.diff(self._group_of[order])) + 1
        for numbers in np.split(order, ends):
            k = int(self._group_of[numbers[0]])
            self._runs.append(self._new_run(k, self._param_groups[k], layout, numbers))
        self._taken: object = None  # the version of the options that all below was made from
        self._state: list[tuple[bool, bool]] = []  # which state each group has: momentum buffer, mean gradient
        for k, group in enumerate(self._param_groups):
            group.bind(self._params.views[k] if self._grouped else self._params.views, self._set_options)
        # Two threads that step the same optimizer, or one that saves it meanwhile, take turns.
        if "_lock" not in vars(self):  # a load connects anew, within them
            self._lock = threading.RLock()
            self._turn = threading.Lock()  # held, by whoever holds `_lock`, as long as a step is in progress
        self._in_memory = self._storage is None
        threads.call_after_fork(self._in_child_of_fork)
        self._add_state(self._param_groups)
        self._kernel_changed()

    def _in_child_of_fork(self) -> None:
        self._lock, self._turn = threading.RLock(), threading.Lock()  # a thread that held them is not here
        self._counts.writing = False
        if self._storage is not None:
            self._storage.in_child_of_fork()
        self._kernel_changed()

    @contextmanager
    def _between_steps(self, name: str, *, changes: bool = True) -> Iterator[None]:
        """Hold the lock, so that no other thread steps, and keep steps of this thread out too.

        `name` is the name of the call, for error messages; `changes` says whether the call writes parameters, state or
        counts.
        """
        with self._lock:
            self._admit(name, changes)
            if self._turn.locked():  # only to be read, within a step or a save
                yield
                return
            with self._turn:
                self._counts.writing = changes
                yield
                self._counts.writing = False

    def _admit(self, name: str, changes: bool) -> None:
        """Raise if a call is in progress on this very thread that does not allow `name` now.

        A signal handler may ask for anything in the midst of a step, and so may a function of the user's that the step
        calls. Before the first write of a step, and after the last, the state can be read, and nothing else.
        """
        if not self._turn.locked():
            self._counts.writing = False  # a step was broken off, as by Ctrl-C
        elif changes or self._counts.writing:
            raise StepInProgressError(
                f"{name}: expected a call between two steps, got one in the midst of a step, save or load on the same "
                "thread, made by a signal handler or by a function that the step calls; set a flag there, and check it "
                "after step()"
            )

    def _set_options(self, changes: Iterable[tuple[ParamGroup, Mapping[str, Any]]]) -> None:
        """Set options of groups, all or, after an error, none."""
        with self._lock:
            checked = [(group, options, group.with_changes(options)) for group, options in changes]
            self._add_state([values for _, _, values in checked])
            self._options_changed()  # also ahead of the change, as Ctrl-C may come in between
            for group, options, values in checked:
                # Not all values: a signal handler may have set another option meanwhile.
                group.assign({name: values[name] for name in options})
            self._options_changed()  # a signal handler may have taken a step meanwhile

    def _add_state(self, options: Sequence[Mapping[str, Any]]) -> None:
        """Make the buffers that groups with these options need and that are not there."""
        for name, option in _STATE:
            if name not in self._buffers and any(values[option] for values in options):
                self._buffers[name] = self._new_state(name)

    def _kernel_changed(self) -> None:
        large = any(run.size >= tuner.TRY_PARALLEL_FROM for run in self._runs)
        watch = self._kernel == "auto" and large and self._threads() > 1 and threads.threads_work()
        self._tuner = tuner.Tuner() if watch else None
        # Where nothing parallel can run, no threads are started for the sake of a limit on them.
        self._uses_threads = watch or self._kernel == "parallel"
        self._zero_copy = self._kernel != "numpy" and pointers.available()
        self._options_changed()

    def _options_changed(self) -> None:
        """Forget what was made from the options. A step makes it anew: thousands of groups may change one by one."""
        # The calls of a step, if they are the same from one to the next, by whether gradients lie elsewhere than in
        # the buffer, and by kernel. A step that is making calls writes them to the dict that it began with.
        self._steady_calls: dict[tuple[bool, str], list[_Call]] = {}
        # Where one call of `cpu.serial_from` is the whole step: its arguments, but for the address of the items.
        self._steady_from: dict[str, tuple[Any, ...]] = {}
        self._version = object()

    def _take_options(self) -> None:
        """Make what follows from the options."""
        version = self._version
        self._compiled: set[tuple[str, bool]] = set()
        # Norms of the gradients of this step, where clipping needs them.
        self._norms = np.full(len(self._skipped), np.nan)
        self._scheduled = any(callable(group["lr"]) for group in self._param_groups)
        state = [(group["momentum"] > 0, group["centered"]) for group in self._param_groups]
        if state != self._state:
            for run in self._runs:
                run.prepare(self._own)
            self._state = state
        self._taken = version  # last: Ctrl-C may come at any line, and a signal handler may set options

    def _step(self, gradients: Any) -> Any:
        # First what may call functions of the user's: rates, then items of a mapping. These may set options.
        rates = self._scheduled_rates() if self._taken is not self._version or self._scheduled else None
        grads = self._grads
        from_buffer = gradients is None or gradients is grads.views
        items = None if from_buffer else grads.layout.flatten(gradients, "gradients")
        if self._taken is not self._version:
            self._take_options()
            if self._scheduled and rates is None:
                rates = self._rates()
        if self._storage is not None:
            self._storage.check_open()
        refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
        kernel = self._kernel if self._tuner is None else self._tuner.kernel
        arrays, present, in_place, updated = None, None, False, False
        if items is not None:
            if self._zero_copy and (self._storage is None or not self._storage.shows(items)):
                # `items` keeps the arrays alive until the kernels have read them.
                address = pointers.items_of(items)
                steady = self._steady_from.get(kernel)
                if steady is not None:
                    # As in `_run`, but that the call may find gradients which are not ordinary, and update nothing.
                    counts = self._counts
                    steps, work = counts.steps, starmap(cpu.serial_from, ((address, *steady),))
                    counts.steps = steps + ([*work] == _UPDATED)
                    updated = counts.steps > steps
                if not updated:
                    in_place, present = self._find(address)
            if not in_place and not updated:
                arrays = as_arrays(items, grads.layout, "gradients", allow_none=True)
        if not updated:
            calls, absent = None, None
            if arrays is None and present is None and self._nonfinite == "propagate":
                calls = self._steady_calls.get((in_place, kernel))
            if calls is None:
                calls, absent = self._plan(kernel, rates, items if in_place else None, arrays, present)
            if calls is None:
                self.skipped_steps += 1
                if self._storage is not None:
                    self._storage.note_skipped(self)
            else:
                self._run(calls, absent)
        if self._tuner is not None:
            self._tuner.step_done()
        return self._params.views

    def _run(self, calls: list[_Call], absent: NDArray[np.bool_] | None) -> None:
        """Make the calls that are the step, and count it; `absent` parameters (None: none) have no gradient.

        This, and its short form in `_step`, are the only places that count. The statement that makes the calls and
        counts has no call in its own bytecode from the first update on. So a signal handler of Python's finds a step
        that has not begun or one that was counted, unless a call runs Python itself, as the NumPy kernel does.
        """
        counts, work = self._counts, starmap(call, calls) if self._in_memory else self._elsewhere(calls)
        steps, absences = counts.steps + 1, counts.absent if absent is None else counts.absent + absent
        counts.writing = True
        _, counts.steps, counts.absent, counts.writing = [*work], steps, absences, False
        if self._storage is not None:
            self._storage.end(self)

    def _elsewhere(self, calls: list[_Call]) -> Iterable[None]:
        """Make the calls of a step, while iterated over, where they are not all that has to be done."""
        assert self._storage is not None
        return self._storage.in_parts(self, calls)

    def _step_at(self, addresses: NDArray[np.int64], present: NDArray[np.bool_] | None) -> None:
        """Take a step with gradients at these addresses, one for each parameter, or for each that is present.

        For adapters, which have looked at their tensors and hold them: dense, of the parameters' dtypes and shapes, in
        memory of their own. Not with the NumPy kernel, which cannot read there, and not with `nonfinite`.
        """
        with self._between_steps("step"):
            rates = self._scheduled_rates()
            if self._taken is not self._version:
                self._take_options()
            kernel = self._kernel if self._tuner is None else self._tuner.kernel
            for run in self._runs:
                run.point_to(addresses)
                if self._kernel_of(run, kernel) != "serial":  # which gathers by itself
                    run.gather()
            calls = self._steady_calls.get((True, kernel)) if present is None else None
            if calls is None:
                calls = self._make_calls(rates, kernel, present, True)
            self._run(calls, None if present is None else ~present)
            if self._tuner is not None:
                self._tuner.step_done()

    def _plan(
        self,
        kernel: str,
        rates: list[float] | None,
        found: tuple[Any, ...] | None,
        arrays: list[Any] | None,
        present: NDArray[np.bool_] | None,
    ) -> tuple[list[_Call] | None, NDArray[np.bool_] | None]:
        """The kernel calls of this step, or None where a gradient is not finite; and which parameters have none.

        Gradients are in the arrays that were `found`, of which those that are not `present` are None, or in `arrays`,
        which are stored, or in the gradient buffer.
        """
        if arrays is not None:
            if self._taken is not self._version:  # an array's own `__array__` may do anything
                self._take_options()
            self._grads.store(arrays)
            if any(array is None for array in arrays):
                present = np.array([array is not None for array in arrays])
        calls = self._calls_for(rates, kernel, present, found)
        return calls, None if present is None else ~present

    def _calls_for(
        self, rates: list[float] | None, kernel: str, present: NDArray[np.bool_] | None, found: tuple[Any, ...] | None
    ) -> list[_Call] | None:
        """As `_plan`, with gradients that are stored or were `found`, for those parameters that are present."""
        in_place = found is not None
        calls = self._steady_calls.get((in_place, kernel)) if present is None else None
        if calls is None:
            calls = self._make_calls(rates, kernel, present, in_place)
        if self._nonfinite != "propagate":
            wrong = self._not_finite(kernel, in_place, present)
            if len(wrong) and self._nonfinite == "raise":
                raise self._error_about(wrong, found)
            if len(wrong):
                return None
        return calls

    def _not_finite(self, kernel: str, in_place: bool, present: NDArray[np.bool_] | None) -> NDArray[np.intp]:
        """The numbers of the parameters whose gradients have an inf or NaN."""
        finite = np.isfinite(self._norms) if present is None else np.isfinite(self._norms) | ~present
        # A norm can be inf though no value is, and where there is none it is NaN: read the gradients.
        if not finite.all():
            for run in self._runs:
                if not in_place:
                    run.point_to_buffer()
                finite[run.numbers] = run.norms.finite(run.part_of(self._own["grads"]), self._kernel_of(run, kernel))
        return np.flatnonzero(~finite if present is None else ~finite & present)

    def _error_about(self, wrong: NDArray[np.intp], found: tuple[Any, ...] | None) -> NonfiniteError:
        leaves, values = self._grads.layout.leaves, found or self._grads.leaves
        return NonfiniteError.of({leaves[k].path: values[k] for k in wrong})

    def _find(self, items: int) -> tuple[bool, NDArray[np.bool_] | None]:
        """Find the gradients in the tuple whose items are at this address.

        Returns whether all of them are ordinary arrays or None, and if some are None, which are present.
        """
        present = None
        for run in self._runs:
            status = run.find(items)
            if status >= 0:
                return False, None
            if status == cpu.FOUND_SOME:
                present = np.ones(len(self._skipped), bool) if present is None else present
                present[run.numbers] = run.found()
        for run in self._runs:  # only now, so that nothing is written if any array is a wrong one
            run.gather()
        return True, present

    def _scheduled_rates(self) -> list[float] | None:
        """The learning rate of each group, or None where none is a function."""
        if self._taken is not self._version:
            self._take_options()
        return self._rates() if self._scheduled else None

    def _rate_of(self, run: Run, rates: list[float] | None) -> float:
        """The learning rate of a run: a number, or of `rates` what the group's function returned in this step."""
        # A function may have put a number in its own place, and that is what `opt.lr` says from then on.
        return rates[run.group_number] if rates and callable(run.group["lr"]) else resolve_lr(run.group, self.steps)

    def _rates(self) -> list[float]:
        return [resolve_lr(group, self.steps) for group in self._param_groups]

    @np.errstate(all="ignore")  # what is set there, and may raise, is for the user's own arithmetic
    def _make_calls(
        self, rates: list[float] | None, kernel: str, present: NDArray[np.bool_] | None, in_place: bool
    ) -> list[_Call]:
        """The kernel calls of the next step, for those parameters that are present (None: all).

        `rates` are what the functions given as rates returned. `kernel` is the one for large runs; "auto" stands for
        serial. With `in_place`, gradients are read where `_find` found them, otherwise from the gradient buffer.
        """
        version = self._version
        if self._taken is not version:
            self._take_options()
        steady_calls, steady_from = self._steady_calls, self._steady_from
        if not in_place:
            for run in self._runs:
                run.point_to_buffer()
        of_run = [self._kernel_of(run, kernel) for run in self._runs]
        scales = self._clip_scales(of_run, present)
        steady = scales is None and present is None
        calls: list[_Call] = []
        for run, name in zip(self._runs, of_run, strict=True):
            options = run.group
            corrections = None
            if options["bias_correction"]:
                own_steps = self.steps + 1 - self._skipped[run.numbers]
                corrections = 1.0 / (1.0 - options["decay_rate"] ** own_steps)
            steady = steady and not callable(options["lr"]) and corrections is None
            arguments = run.arguments(
                self._rate_of(run, rates),
                in_place,
                None if present is None else present[run.numbers],
                None if scales is None else scales[run.numbers],
                corrections,
            )
            if in_place and name == "serial" and self._storage is None:  # which cuts calls of `UPDATES`
                # The function that found them, with which a first step compiles no other. 0: they are found.
                calls.append((cpu.serial_from, 0, *run.with_sources(arguments)))
            else:
                update = kernels.UPDATES[name]
                calls.append((threads.one_at_a_time(update) if name == "parallel" else update, *arguments))
        if self._version is not version:  # a signal handler has set options meanwhile
            return self._make_calls(rates, kernel, present, in_place)
        if (kernel, in_place) not in self._compiled:
            # Without spans they update nothing. So no compiler runs, and may be interrupted, between two updates.
            for update, *rest, spans, factors, extended in calls:
                update(*rest, spans[:0], factors[:0], extended)
            self._compiled.add((kernel, in_place))
        if steady:
            steady_calls[in_place, kernel] = calls
            if len(calls) == 1 and calls[0][0] is cpu.serial_from and self._nonfinite == "propagate":
                steady_from[kernel] = calls[0][2:]
        return calls

    def _kernel_of(self, run: Run, kernel: str) -> str:
        """The kernel for a run where `kernel` is the one for large runs."""
        if not threads.threads_work() and kernel == "parallel":
            return "serial"
        if self._kernel != "auto":
            return kernel
        return kernel if kernel == "parallel" and run.size >= tuner.TRY_PARALLEL_FROM else "serial"

    def _threads(self) -> int:
        return self._num_threads or threads.max_threads()

    def _add_up_of(self, run: Run) -> AddUp | None:
        """What makes sums of squares of parameters from those that `run` has, or None where it has whole ones."""
        return None

    def _clip_scales(self, of_run: list[str], present: NDArray[np.bool_] | None) -> NDArray[np.float64] | None:
        """The factor on each parameter's gradient that clipping by norm asks for, or None where it is off."""
        if self._global_clip_norm is None and all(group["clip_norm"] is None for group in self.param_groups):
            return None
        scales = np.ones(len(self._skipped))
        norms = np.zeros(len(self._skipped))
        self._norms = np.full(len(self._skipped), np.nan)
        for run, kernel in zip(self._runs, of_run, strict=True):
            options = run.group
            grads = run.part_of(self._own["grads"])
            bound = np.inf if options["clip_value"] is None else options["clip_value"]
            own = run.norms(grads, bound, kernel, self._add_up_of(run))
            if options["clip_value"] is None:  # otherwise inf does not show
                self._norms[run.numbers] = own
            if options["clip_norm"] is not None:
                scales[run.numbers] = scale_to(options["clip_norm"], own)
                own = np.minimum(own, options["clip_norm"])
            norms[run.numbers] = own
        if self._global_clip_norm is not None:
            if present is not None:
                norms[~present] = 0.0  # what lies in their place is of an earlier step
            scales *= scale_to(self._global_clip_norm, np.array(combine(norms)))
        return scales
