"""`Stepping`: from the options and a step's gradients to the kernel calls that are the step."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms.buffers import FlatBuffer, Layout
from fastrms.errors import NonfiniteError, StructureError
from fastrms.kernels import choice, cpu, pointers
from fastrms.kernels.norms import AddUp, combine, scale_to
from fastrms.options import ParamGroup, resolve_lr
from fastrms.runs import Run
from fastrms.storage import Storage

__all__ = ["Stepping"]

_Call = tuple[kernels.Kernel, tuple[Any, ...]]


class Stepping:
    """The steps of `fastrms.RMSProp`, which has what is declared here and says what it means."""

    buffers: dict[str, FlatBuffer]
    param_groups: list[ParamGroup]
    steps: int
    skipped_steps: int
    _cache_dtype: str | None
    _global_clip_norm: float | None
    _group_of: NDArray[np.int64]
    _grouped: bool
    _kernel: str
    _lock: threading.RLock
    _nonfinite: str
    _num_threads: int | None
    _skipped: NDArray[np.int64]
    _storage: Storage | None

    @property
    def _own(self) -> Mapping[str, FlatBuffer]:
        """The buffers that this process updates: all, unless ranks have parts of them (`fastrms.mpi`)."""
        return self.buffers

    def _new_state(self, name: str) -> FlatBuffer:
        params, dtype = self._own["params"], None if self._cache_dtype is None else np.uint16
        if self._storage is None:
            return params.like(dtype=dtype)
        return self._storage.buffer(name, params.layout if dtype is None else params.layout.with_dtype(dtype))

    def _new_run(self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64]) -> Run:
        return Run(group_number, group, layout, numbers, self._storage)

    def _connect(self) -> None:
        """Make what follows from the buffers and groups: the runs, and the groups' way to say that they changed."""
        self._grads = self.buffers["grads"]
        self._params = self.buffers["params"]
        layout = self._own["grads"].layout
        segment_of = np.array([leaf.segment for leaf in layout.leaves])
        self._runs: list[Run] = []
        for segment in range(len(layout.segments)):
            for k, group in enumerate(self.param_groups):
                numbers = np.flatnonzero((segment_of == segment) & (self._group_of == k))
                if len(numbers):
                    self._runs.append(self._new_run(k, group, layout, numbers))
        self._state: list[tuple[bool, bool]] = []  # which state each group has: momentum buffer, mean gradient
        for k, group in enumerate(self.param_groups):
            group.bind(self._params.views[k] if self._grouped else self._params.views, self._options_changed)
        # Two threads that step the same optimizer, or one that saves it meanwhile, take turns.
        self.__dict__.setdefault("_lock", threading.RLock())
        choice.call_after_fork(self)
        self._kernel_changed()

    def _in_child_of_fork(self) -> None:
        self._lock = threading.RLock()  # a thread that held it is not here
        if self._storage is not None:
            self._storage.in_child_of_fork()
        self._kernel_changed()

    def _kernel_changed(self) -> None:
        large = any(run.size >= choice.TRY_PARALLEL_FROM for run in self._runs)
        watch = self._kernel == "auto" and large and self._threads() > 1 and choice.threads_work()
        self._chooser = choice.Chooser() if watch else None
        # Where nothing parallel can run, no threads are started for the sake of a limit on them.
        self._uses_threads = watch or self._kernel == "parallel"
        self._options_changed()

    def _options_changed(self) -> None:
        # The calls of a step, if they are the same from one to the next, by whether gradients lie elsewhere than in
        # the buffer, and by kernel.
        self._steady_calls: dict[tuple[bool, str], list[_Call]] = {}
        # Where one call of `cpu.serial_from` is the whole step: its arguments, but for the address of the items.
        self._steady_from: dict[str, tuple[Any, ...]] = {}
        # Of the gradients of this step, where clipping needs them.
        self._norms = np.full(len(self._skipped), np.nan)
        state = [(group["momentum"] > 0, group["centered"]) for group in self.param_groups]
        if state != self._state:
            self._state = state
            self._prepare()
        self._zero_copy = self._kernel != "numpy" and pointers.available()

    def _step(self, gradients: Any) -> Any:
        if self._storage is not None:
            self._storage.check_open()
        kernel = self._kernel if self._chooser is None else self._chooser.kernel
        grads = self._grads
        from_buffer = gradients is None or gradients is grads.views
        self._refuse_replaced(from_buffer)
        items, arrays, in_place, present = None, None, False, None
        calls: list[_Call] | None = None
        if not from_buffer:
            items = grads.layout.flatten(gradients, "gradients")
            if self._zero_copy and (self._storage is None or not self._storage.shows(items)):
                # `items` keeps the arrays alive until the kernels have read them.
                address = pointers.items_of(items)
                steady = self._steady_from.get(kernel)
                status = cpu.FOUND_SOME if steady is None else cpu.serial_from(address, *steady)
                if status == cpu.FOUND_SOME:
                    in_place, present = self._find(address)
                elif in_place := status == cpu.FOUND:
                    calls = []  # that was all
            if not in_place:
                arrays = grads.check(items, "gradients", skip_none=True)
        if calls is None and arrays is None and present is None and self._nonfinite == "propagate":
            calls = self._steady_calls.get((in_place, kernel))
        if calls is None:
            calls = self._plan(kernel, items if in_place else None, arrays, present)
        if calls is None:
            self.skipped_steps += 1
        else:
            self._run(calls)
        if self._chooser is not None:
            self._chooser.step_done()
        return self._params.views

    def _refuse_replaced(self, from_buffer: bool) -> None:
        """Raise if something was put in the place of a view of parameters, or of gradients where these are used."""
        params, grads = self._params, self._grads
        try:
            # Looks first whether items are the same objects, some nanoseconds each. (For a single array, None == None.)
            intact = params.watched == params.kept and (not from_buffer or grads.watched == grads.kept)
        except Exception:  # arrays that differ have no truth value, and other things may not be comparable
            intact = False
        if not intact and (problems := params.problems("params") + grads.problems("grads") * from_buffer):
            raise StructureError(problems[0])

    def _run(self, calls: list[_Call]) -> None:
        if self._storage is None:
            for update, arguments in calls:
                update(*arguments)
        else:
            self._storage.step(self, calls)
        self.steps += 1

    def _step_at(self, addresses: NDArray[np.int64], present: NDArray[np.bool_] | None) -> None:
        """Take a step with gradients at these addresses, one for each parameter, or for each that is present.

        For adapters, which have looked at their tensors and hold them: dense, of the parameters' dtypes and shapes, in
        memory of their own. Not with the NumPy kernel, which cannot read there, and not with `nonfinite`.
        """
        with self._lock:
            kernel = self._kernel if self._chooser is None else self._chooser.kernel
            for run in self._runs:
                run.point_to(addresses)
                if self._kernel_of(run, kernel) != "serial":  # which gathers by itself
                    run.gather()
            calls = self._steady_calls.get((True, kernel)) if present is None else None
            if calls is None:
                calls = self._make_calls(self._rates(), kernel, present, True)
            self._run(calls)
            if present is not None:
                self._skipped[~present] += 1
            if self._chooser is not None:
                self._chooser.step_done()

    def _plan(
        self,
        kernel: str,
        found: tuple[Any, ...] | None,
        arrays: list[Any] | None,
        present: NDArray[np.bool_] | None,
    ) -> list[_Call] | None:
        """The kernel calls of this step, or None where it is skipped because a gradient is not finite.

        Gradients are in the arrays that were `found`, of which those that are not `present` are None, or in `arrays`,
        which are stored, or in the gradient buffer.
        """
        rates = self._rates()
        if arrays is not None:
            self._grads.store(arrays)
            if any(array is None for array in arrays):
                present = np.array([array is not None for array in arrays])
        return self._calls_for(rates, kernel, present, found)

    def _calls_for(
        self, rates: list[float], kernel: str, present: NDArray[np.bool_] | None, found: tuple[Any, ...] | None
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
        if present is not None:
            self._skipped[~present] += 1
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

    def _prepare(self) -> None:
        """Make the state that the options ask for, and let the runs know."""
        for name, option in (("momentum_buffer", "momentum"), ("grad_avg", "centered")):
            if name not in self.buffers and any(group[option] for group in self.param_groups):
                self.buffers[name] = self._new_state(name)
        for run in self._runs:
            run.prepare(self._own)

    def _find(self, items: int) -> tuple[bool, NDArray[np.bool_] | None]:
        """Find the gradients in the tuple whose items are at this address; whether none of them is unusual.

        Then also which are present, where some are None.
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

    def _rates(self) -> list[float]:
        return [resolve_lr(group, self.steps) for group in self.param_groups]

    @np.errstate(all="ignore")  # what is set there, and may raise, is for the user's own arithmetic
    def _make_calls(
        self, rates: list[float], kernel: str, present: NDArray[np.bool_] | None, in_place: bool
    ) -> list[_Call]:
        """The kernel calls of the next step, for those parameters that are present (None: all).

        `kernel` is the one for large runs; "auto" stands for serial. With `in_place`, gradients are read where
        `_find` found them, otherwise from the gradient buffer.
        """
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
                rates[run.group_number],
                in_place,
                None if present is None else present[run.numbers],
                None if scales is None else scales[run.numbers],
                corrections,
            )
            if in_place and name == "serial" and self._storage is None:  # which cuts calls of `UPDATES`
                # The function that found them, with which a first step compiles no other. 0: they are found.
                calls.append((cpu.serial_from, (0, *run.with_sources(arguments))))
            else:
                update = kernels.UPDATES[name]
                calls.append((choice.one_at_a_time(update) if name == "parallel" else update, arguments))
        if steady:
            self._steady_calls[in_place, kernel] = calls
            if len(calls) == 1 and calls[0][0] is cpu.serial_from and self._nonfinite == "propagate":
                self._steady_from[kernel] = calls[0][1][1:]
        return calls

    def _kernel_of(self, run: Run, kernel: str) -> str:
        """The kernel for a run where `kernel` is the one for large runs."""
        if not choice.threads_work() and kernel == "parallel":
            return "serial"
        if self._kernel != "auto":
            return kernel
        return kernel if kernel == "parallel" and run.size >= choice.TRY_PARALLEL_FROM else "serial"

    def _threads(self) -> int:
        return self._num_threads or choice.max_threads()

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
