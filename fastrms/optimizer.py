"""`RMSProp`: holds the buffers and the options, checks a step, and hands runs of elements to a kernel."""

import copy
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms import kernels
from fastrms.attributes import checked, option_of_all_groups, views
from fastrms.buffers import FlatBuffer
from fastrms.checkpoints import Checkpointed
from fastrms.errors import DtypeError, NonfiniteError, StructureError
from fastrms.kernels import choice, cpu, pointers
from fastrms.kernels.norms import combine, scale_to
from fastrms.kernels.reference import to_bfloat16
from fastrms.options import (
    NONFINITE,
    LearningRate,
    ParamGroup,
    check_cache_dtype,
    check_one_of,
    check_option,
    check_threads,
    parameter_groups,
    resolve_lr,
)
from fastrms.overlap import refuse_overlap
from fastrms.runs import Run

__all__ = ["RMSProp"]

_Call = tuple[kernels.Kernel, tuple[Any, ...]]


class RMSProp(Checkpointed):
    """RMSProp over one flat buffer, bit for bit the NumPy reference, in one compiled pass.

    With default options each step computes, element by element of a parameter p with gradient g and cache v, ::

        v = decay_rate * v + (1 - decay_rate) * g**2
        p = p - lr * g / (sqrt(v) + epsilon)

    (G. Hinton, Neural Networks for Machine Learning, lecture 6e, 2012). ``docs/options.md`` has the equations of
    every option and the order in which they apply.

    Parameters
    ----------
    params : list, tuple, dict or ndarray, or any nesting of these, of float32 or float64 arrays
        Initial values; copied, never written. Any shape (0-d and empty too), strides and byte order. Or parameter
        groups as in PyTorch: a list of dicts, each with its parameters under ``"params"`` and options that differ
        from those given here.
    lr : float or callable, default 0.001
        Learning rate, >= 0. A callable gets the number of steps taken so far (0 at the first) and returns the rate.
    decay_rate : float, default 0.9
        Decay rate d of the mean square, in [0, 1). It remembers about 1/(1 - d) steps.
    epsilon : float, default 1e-8
        Added to the denominator, > 0 also after rounding to the dtype of the parameters.
    momentum : float, default 0.0
        Decay rate of a momentum buffer, in [0, 1); 0 for none.
    nesterov : bool, default False
        Look one step ahead along the momentum buffer. Needs momentum > 0.
    centered : bool, default False
        Divide by the root of the variance v - m^2, with m the mean gradient, instead of the mean square. The variance
        is clamped at 0, below which rounding can bring it.
    weight_decay : float, default 0.0
        Coefficient of weight decay, >= 0. Added to the gradient (L2) unless `decoupled_weight_decay`.
    decoupled_weight_decay : bool, default False
        Take ``lr * weight_decay * p`` off the parameter itself, ahead of the step.
    maximize : bool, default False
        Climb instead of descend.
    eps_in_sqrt : bool, default False
        Divide by sqrt(v + epsilon) instead of sqrt(v) + epsilon.
    initial_scale : float, default 0.0
        What the cache starts from, >= 0.
    bias_correction : bool, default False
        Divide v (and m) by 1 - d^t at the t-th step of a parameter, which makes up for the start from 0.
    lr_in_momentum : bool, default False
        Multiply by lr ahead of the momentum buffer, as Keras, TensorFlow and optax do. False is PyTorch's form. They
        differ only when lr changes.
    clip_value : float or None, default None
        Limit each gradient element to [-clip_value, clip_value].
    clip_norm : float or None, default None
        Scale the gradient of each parameter down to this Euclidean norm where it is longer.
    global_clip_norm : float or None, default None
        Scale all gradients together down to this norm; for all groups, after the other two.
    flush_subnormals : bool, default True
        Count weighted squares and state below the smallest normal number as 0: subnormal numbers make a vector of
        arithmetic many times slower and arise in ordinary training. Elements in which none arises keep their bits;
        the parameters of the others stay within one rounding for epsilon >= 1e-10 (float32) or 1e-130 (float64).
    kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
        What runs the update. All give the same bits. "auto" begins with serial; in a training of some seconds with
        many parameters it tries parallel, and keeps what makes whole training steps faster (`explain` says which).
    num_threads : int or None, default None
        Threads of the parallel kernel, up to those that Numba started with; None for all of them.
    cache_dtype : {"bfloat16"} or None, default None
        "bfloat16" keeps cache, momentum buffer and mean gradient of float32 parameters in 16 bits: 16 instead of 20
        bytes move through memory for each parameter. Steps compute in float32; what is stored is rounded to nearest.
        `cache` then has uint16 arrays, which `from_bfloat16` turns into numbers. decay_rate and momentum must be
        less than 255/256, as nothing decays any more from there on. ``docs/options.md`` has the arithmetic.
    nonfinite : {"propagate", "raise", "skip"}, default "propagate"
        What a step does where a gradient has an inf or NaN: use it, which stays in its element; raise NonfiniteError;
        or do nothing, and count that in `skipped_steps`. The latter two leave parameters, state and `steps` as they
        were, and cost one reading of the gradients, or none where the norms that clipping needs tell it.

    Attributes
    ----------
    params, grads, cache : the structure of `params`
        Views of flat buffers, the same arrays for the optimizer's life. With parameter groups a list with the
        structure of each group. Write gradients straight into `grads` and call `step()`, and nothing is copied.
    momentum_buffer, grad_avg : the structure of `params`, or None
        State of `momentum` and `centered`, where a group uses them.
    param_groups : list of ParamGroup
        One mapping of options for each group (one group if none were given): ``opt.param_groups[0]["lr"] = 0.1``.
    buffers : dict of str to FlatBuffer
        The flat buffers behind the views: ``opt.buffers["grads"].flat`` is one dense vector.
    steps, skipped_steps : int
        Steps taken, and steps not taken, with nonfinite="skip".

    Raises
    ------
    StructureError
        No parameters; the same array, or overlapping memory, given twice; a group without ``"params"``.
    DtypeError
        Parameters that are not float32 or float64 arrays.
    OptionError, OptionTypeError
        An option out of range or of the wrong kind, unknown in a group, or of no use in the dtype of a parameter.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp
    >>> opt = RMSProp([np.array([1.0, 2.0]), np.array(3.0)], lr=0.1)
    >>> opt.step([np.array([0.5, -0.5]), np.array(0.0)])
    [array([0.68377225, 2.31622775]), array(3.)]
    >>> opt.grads[0][...] = 0.0
    >>> _ = opt.step()
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        decay_rate: float = 0.9,
        epsilon: float = 1e-8,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        centered: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        eps_in_sqrt: bool = False,
        initial_scale: float = 0.0,
        bias_correction: bool = False,
        lr_in_momentum: bool = False,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        global_clip_norm: float | None = None,
        flush_subnormals: bool = True,
        kernel: str = "auto",
        num_threads: int | None = None,
        cache_dtype: str | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        defaults = {
            "lr": lr,
            "decay_rate": decay_rate,
            "epsilon": epsilon,
            "momentum": momentum,
            "nesterov": nesterov,
            "centered": centered,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "eps_in_sqrt": eps_in_sqrt,
            "initial_scale": initial_scale,
            "bias_correction": bias_correction,
            "lr_in_momentum": lr_in_momentum,
            "clip_value": clip_value,
            "clip_norm": clip_norm,
            "flush_subnormals": flush_subnormals,
        }
        self._global_clip_norm: float | None = check_option("global_clip_norm", global_clip_norm)
        self._nonfinite = check_one_of("nonfinite", nonfinite, NONFINITE)
        self._kernel = check_one_of("kernel", kernel, choice.KERNELS)
        self._num_threads = check_threads(num_threads, choice.max_threads())

        groups = parameter_groups(params)
        self._grouped = groups is not None
        arrays = params if groups is None else [group["params"] for group in groups]
        values = FlatBuffer(arrays, "params")
        layout = values.layout
        for leaf in layout.leaves:
            if (dtype := layout.dtype_of(leaf)) not in (np.float32, np.float64):
                raise DtypeError(
                    f"params{leaf.path}: expected float32 or float64, got {dtype}; convert it with .astype(np.float32)"
                )
        refuse_overlap(values, arrays)

        self._cache_dtype = check_cache_dtype(cache_dtype, {segment.dtype for segment in layout.segments})

        # With groups, the outermost list of the structure is the list of groups.
        sizes = layout.child_sizes() if self._grouped else [len(layout.leaves)]
        self._group_of = np.repeat(np.arange(len(sizes)), sizes)
        self.param_groups: list[ParamGroup] = []
        for number, group in enumerate(groups or [{}]):
            own = {name: value for name, value in group.items() if name != "params"}
            dtypes = {layout.dtype_of(layout.leaves[i]) for i in np.flatnonzero(self._group_of == number)}
            self.param_groups.append(ParamGroup(defaults | own, f"param_groups[{number}]", dtypes, self._cache_dtype))

        self.buffers: dict[str, FlatBuffer] = {"params": values, "grads": values.like()}
        self.buffers["cache"] = self._new_state()
        for cache, k in zip(self.buffers["cache"].leaves, self._group_of, strict=True):
            start = self.param_groups[k]["initial_scale"]
            cache[...] = start if self._cache_dtype is None else to_bfloat16(start)
        self.steps = self.skipped_steps = 0
        self._skipped = np.zeros(len(layout.leaves), np.int64)  # steps that each parameter sat out
        self._connect()

    def _new_state(self) -> FlatBuffer:
        return self.buffers["params"].like(dtype=None if self._cache_dtype is None else np.uint16)

    def _connect(self) -> None:
        """Make what follows from the buffers and groups: the runs, and the groups' way to say that they changed."""
        self._grads = self.buffers["grads"]
        self._params = self.buffers["params"]
        layout = self._grads.layout
        segment_of = np.array([leaf.segment for leaf in layout.leaves])
        self._runs: list[Run] = []
        for segment in range(len(layout.segments)):
            for k, group in enumerate(self.param_groups):
                numbers = np.flatnonzero((segment_of == segment) & (self._group_of == k))
                if len(numbers):
                    self._runs.append(Run(k, group, layout, numbers))
        self._state: list[tuple[bool, bool]] = []  # which state each group has: momentum buffer, mean gradient
        for k, group in enumerate(self.param_groups):
            group.bind(self._params.views[k] if self._grouped else self._params.views, self._options_changed)
        # Two threads that step the same optimizer, or one that saves it meanwhile, take turns.
        self.__dict__.setdefault("_lock", threading.RLock())
        choice.call_after_fork(self)
        self._kernel_changed()

    def _in_child_of_fork(self) -> None:
        self._lock = threading.RLock()  # a thread that held it is not here
        self._kernel_changed()

    def _kernel_changed(self) -> None:
        large = any(run.size >= choice.TRY_PARALLEL_FROM for run in self._runs)
        watch = self._kernel == "auto" and large and self._threads() > 1 and choice.threads_work()
        self._chooser = choice.Chooser() if watch else None
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

    params: Any = views("params", "The parameters, in the structure that was given.")
    grads: Any = views(
        "grads",
        "Where a gradient for each parameter can be written, for `step()` without arguments. `step(gradients)` uses "
        "this memory for small arrays, and to cast or rearrange: what it holds afterwards is not defined.",
    )
    cache: Any = views("cache", "The running mean of squared gradients, v in the equations.")
    momentum_buffer: Any = views("momentum_buffer", "The momentum buffer, or None where no group uses momentum.")
    grad_avg: Any = views("grad_avg", "The running mean of gradients, or None where no group is centered.")
    lr: Any = option_of_all_groups("lr", "Learning rate, or the function that gives it.")
    decay_rate: Any = option_of_all_groups("decay_rate", "Decay rate of the mean square.")
    epsilon: Any = option_of_all_groups("epsilon", "Constant added to the denominator.")

    global_clip_norm: Any = checked(
        "global_clip_norm",
        lambda value: check_option("global_clip_norm", value),
        "_options_changed",
        "Bound on the Euclidean norm of all gradients together, or None.",
    )
    nonfinite: Any = checked(
        "nonfinite",
        lambda value: check_one_of("nonfinite", value, NONFINITE),
        "_options_changed",
        'What a step does about gradients that are inf or NaN: "propagate", "raise" or "skip".',
    )
    kernel: Any = checked(
        "kernel",
        lambda value: check_one_of("kernel", value, choice.KERNELS),
        "_kernel_changed",
        'What runs the update: "auto", "numpy", "serial" or "parallel".',
    )
    num_threads: Any = checked(
        "num_threads",
        lambda value: check_threads(value, choice.max_threads()),
        "_kernel_changed",
        "Threads of the parallel kernel, or None for all that Numba started with.",
    )

    @property
    def cache_dtype(self) -> str | None:
        """The dtype of the state: "bfloat16", or None for that of the parameters."""
        return self._cache_dtype

    def step(self, gradients: Any = None) -> Any:
        """Take one step and return the updated parameters, which are the same views as before.

        Parameters
        ----------
        gradients : the structure of the parameters, or None
            An array for each parameter, of the same shape and any float or integer dtype (cast to the parameter's);
            never written. Lists and tuples stand for one another; the keys of a dict may come in any order. Where an
            item is None, its parameter is skipped: neither value nor state changes. Without an argument the step
            uses what was written to `grads`.

        Returns
        -------
        params : the structure of the parameters
            `self.params`.

        Raises
        ------
        StructureError
            Wrong count, missing or unknown key, wrong shape; or something was put into `params` or `grads` in the place
            of a view, as in ``opt.params[0] = array``, which no step would see.
        DtypeError
            Something that is no array, or of complex, bool or object dtype.
        OptionError, OptionTypeError
            The function given as lr returned no usable rate.
        NonfiniteError
            A gradient has an inf or NaN, and `nonfinite` is "raise".

        Notes
        -----
        All errors come before the first write to parameters and state.
        """
        with self._lock:
            if self._num_threads is None:
                return self._step(gradients)
            with choice.limit_threads(self._num_threads):
                return self._step(gradients)

    def _step(self, gradients: Any) -> Any:
        kernel = self._kernel if self._chooser is None else self._chooser.kernel
        params, grads = self._params, self._grads
        from_buffer = gradients is None or gradients is grads.views
        try:
            # Whether nothing was put in the place of a view: looks first whether items are the same objects, some
            # nanoseconds each. (For a single array, None == None.)
            intact = params.watched == params.kept and (not from_buffer or grads.watched == grads.kept)
        except Exception:  # arrays that differ have no truth value, and other things may not be comparable
            intact = False
        if not intact and (problems := params.problems("params") + grads.problems("grads") * from_buffer):
            raise StructureError(problems[0])

        items, arrays, in_place = None, None, False
        calls: list[_Call] | None = None
        if not from_buffer:
            items = grads.layout.flatten(gradients, "gradients")
            if self._zero_copy:
                # `items` keeps the arrays alive until the kernels have read them.
                address = pointers.items_of(items)
                steady = self._steady_from.get(kernel)
                if steady is None:
                    in_place = self._find(address)
                elif in_place := cpu.serial_from(address, *steady) < 0:
                    calls = []  # that was all
            if not in_place:
                arrays = grads.check(items, "gradients", skip_none=True)
        if calls is None and arrays is None and self._nonfinite == "propagate":
            calls = self._steady_calls.get((in_place, kernel))
        if calls is None:
            calls = self._plan(kernel, items if in_place else None, arrays)
        if calls is None:
            self.skipped_steps += 1
        else:
            for update, arguments in calls:
                update(*arguments)
            self.steps += 1
        if self._chooser is not None:
            self._chooser.step_done()
        return params.views

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
            for update, arguments in calls:
                update(*arguments)
            self.steps += 1
            if present is not None:
                self._skipped[~present] += 1
            if self._chooser is not None:
                self._chooser.step_done()

    def _plan(self, kernel: str, found: tuple[Any, ...] | None, arrays: list[Any] | None) -> list[_Call] | None:
        """The kernel calls of this step, or None where it is skipped because a gradient is not finite.

        Gradients are in the arrays that were `found`, or in `arrays`, which are stored, or in the gradient buffer.
        """
        in_place = found is not None
        calls = self._steady_calls.get((in_place, kernel))
        rates = self._rates() if calls is None else None
        present = None
        if arrays is not None:
            self._grads.store(arrays)
            if any(array is None for array in arrays):
                present = np.array([array is not None for array in arrays])
                calls = None
        if calls is None:
            calls = self._make_calls(rates or self._rates(), kernel, present, in_place)
        if self._nonfinite != "propagate":
            wrong = self._not_finite(kernel, in_place, present)
            if len(wrong) and self._nonfinite == "raise":
                leaves, values = self._grads.layout.leaves, found or self._grads.leaves
                raise NonfiniteError.of({leaves[k].path: values[k] for k in wrong})
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
                finite[run.numbers] = run.norms.finite(run.part_of(self._grads), self._kernel_of(run, kernel))
        return np.flatnonzero(~finite if present is None else ~finite & present)

    def _prepare(self) -> None:
        """Make the state that the options ask for, and let the runs know."""
        for name, option in (("momentum_buffer", "momentum"), ("grad_avg", "centered")):
            if name not in self.buffers and any(group[option] for group in self.param_groups):
                self.buffers[name] = self._new_state()
        for run in self._runs:
            run.prepare(self.buffers)

    def _find(self, items: int) -> bool:
        """Find the gradients in the tuple whose items are at this address; False if one of them is not ordinary."""
        if not all(run.find(items) for run in self._runs):
            return False
        for run in self._runs:  # only now, so that nothing is written if any array is a wrong one
            run.gather()
        return True

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
            if in_place and name == "serial":
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

    def explain(self) -> list[str]:
        """Say which kernel updates which parameters, and why.

        Returns
        -------
        lines : list of str
            One for each group and dtype.
        """
        lines = []
        for run in self._runs:
            what = f"group {run.group_number}, {run.size:,} {run.dtype} in {len(run.numbers):,} arrays"
            if not choice.threads_work() and self._kernel in ("auto", "parallel"):
                lines.append(f"{what}: serial; this process was forked from one that had started OpenMP threads")
            elif self._kernel != "auto":
                lines.append(f"{what}: {self._kernel}, as asked for")
            elif self._chooser is None or run.size < choice.TRY_PARALLEL_FROM:
                few = f"{choice.TRY_PARALLEL_FROM:,} elements are too few for threads to gain"
                lines.append(f"{what}: serial; " + (few if self._threads() > 1 else "there is one thread"))
            else:
                lines.append(f"{what}: {self._chooser.kernel}; {self._chooser.reason}")
        return lines

    def check(self) -> list[str]:
        """Say what has happened to the views of parameters, gradients and state that should not: one line for each.

        Returns
        -------
        problems : list of str
            Empty if every item of `params`, `grads` and so on is the view that was there at first, and shows its part
            of the buffer. (A step looks for replaced items of `params`, and of `grads` where it uses them, and raises.)
        """
        return [problem for name, buffer in self.buffers.items() for problem in buffer.problems(name)]

    def _threads(self) -> int:
        return self._num_threads or choice.max_threads()

    def _clip_scales(self, of_run: list[str], present: NDArray[np.bool_] | None) -> NDArray[np.float64] | None:
        """The factor on each parameter's gradient that clipping by norm asks for, or None where it is off."""
        if self._global_clip_norm is None and all(group["clip_norm"] is None for group in self.param_groups):
            return None
        scales = np.ones(len(self._skipped))
        norms = np.zeros(len(self._skipped))
        self._norms = np.full(len(self._skipped), np.nan)
        for run, kernel in zip(self._runs, of_run, strict=True):
            options = run.group
            grads = run.part_of(self._grads)
            bound = np.inf if options["clip_value"] is None else options["clip_value"]
            own = run.norms(grads, bound, kernel)
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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def __copy__(self) -> "RMSProp":
        # A shallow copy would step the same memory with a count of steps of its own.
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        buffer = self.buffers["params"]
        return f"RMSProp({buffer!r}, groups={self.param_groups!r}, kernel={self._kernel!r}, steps={self.steps})"


# What `_connect` makes, and pickles and copies leave out.
_DERIVED = (
    "_grads", "_params", "_runs", "_steady_calls", "_steady_from", "_state", "_norms", "_lock", "_zero_copy", "_chooser"
)  # fmt: skip
