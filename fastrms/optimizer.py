"""`RMSProp`: the buffers, the options and what users call; `stepping` has what a step does."""

import copy
import importlib
import inspect
import os
from typing import Any, Self

import numpy as np

from fastrms import kernels
from fastrms._checks import (
    NONFINITE,
    LearningRate,
    check_cache_dtype,
    check_one_of,
    check_option,
    check_threads,
)
from fastrms._guarded import refuse_unknown
from fastrms._properties import checked, option_of_all_groups, views
from fastrms.backends import tuner
from fastrms.backends.host import Counts, Stepping
from fastrms.backends.storage import Storage, Stored, check_storage
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.buffers.replaced import changed_views, paths_outside
from fastrms.checkpoints.state import Checkpointed
from fastrms.errors import DeviceError, DtypeError, OptionError, StorageError
from fastrms.kernels import threads
from fastrms.kernels.reference import to_bfloat16
from fastrms.options import ParamGroup, ParamGroups, parameter_groups

__all__ = ["RMSProp"]


def _check_kernel(value: Any) -> str:
    """Return `value` if it is the name of a kernel that an optimizer on the host can change to."""
    if isinstance(value, str) and value == "cuda":
        raise OptionError(
            'kernel: expected a kernel that runs on the host, got "cuda", which keeps all buffers on a GPU: make a new '
            'optimizer, RMSProp(params, kernel="cuda") or a class derived from fastrms.cuda.CudaRMSProp, and let it '
            "load_state_dict() of this one"
        )
    return check_one_of("kernel", value, kernels.KERNELS)


class RMSProp(Stepping, Checkpointed, Stored):
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
    kernel : {"auto", "numpy", "serial", "parallel", "cuda"}, default "auto"
        What runs the update. All give the same bits. "auto" begins with serial; in a training of some seconds with
        many parameters it tries parallel, and keeps what makes whole training steps faster (`explain` says which).
        "cuda" makes a `fastrms.cuda.CudaRMSProp`, which keeps everything on a GPU and takes `stream` too.
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
    storage : path of a new or empty folder, or None, default None
        Keep the buffers in files there, mapped into memory, and take steps in parts of some MB: for parameters larger
        than memory. `reopen` goes on with them later, `flush` and `close` say when all is on the disk. Bits are the
        same. ``docs/storage.md`` has what happens after a crash.

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
    DeviceError
        With kernel="cuda", where there is no GPU that can be used.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp
    >>> opt = RMSProp([np.array([1.0, 2.0]), np.array(3.0)], lr=0.1)
    >>> opt.step([np.array([0.5, -0.5]), np.array(0.0)])
    [array([0.68377225, 2.31622775]), array(3.)]
    >>> opt.grads[0][...], opt.grads[1][...] = [0.5, -0.5], 0.0
    >>> opt.step()
    [array([0.45435653, 2.54564347]), array(3.)]
    """

    def __new__(cls, *args: Any, kernel: Any = "auto", **options: Any) -> Self:
        """Make an optimizer; with kernel="cuda" one of the class whose buffers are on a GPU."""
        if cls is RMSProp and isinstance(kernel, str) and kernel == "cuda":
            try:  # by name, so that only who asks for it imports CUDA
                cls = importlib.import_module("fastrms.cuda").CudaRMSProp
            except ImportError as error:
                raise DeviceError(
                    f'kernel: expected a GPU for "cuda", but the package numba-cuda cannot be imported ({error}); '
                    'install with: python -m pip install "fastrms[cuda]"'
                ) from None
        refuse_unknown(cls, options)
        return super().__new__(cls)

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
        storage: str | os.PathLike[str] | None = None,
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
        self._kernel = _check_kernel(check_one_of("kernel", kernel, (*kernels.KERNELS, "cuda")))
        self._num_threads = check_threads(num_threads, threads.max_threads())
        check_storage(storage)

        groups = parameter_groups(params)
        self._grouped = groups is not None
        arrays = params if groups is None else [group["params"] for group in groups]
        values = FlatBuffer(arrays, "params") if storage is None else None
        layout = Layout(arrays, "params") if values is None else values.layout
        for leaf in layout.leaves:
            if (dtype := layout.dtype_of(leaf)) not in (np.float32, np.float64):
                raise DtypeError(
                    f"params{leaf.path}: expected float32 or float64, got {dtype}; convert it with .astype(np.float32)"
                )
        refuse_overlap(layout, arrays)

        self._cache_dtype = check_cache_dtype(cache_dtype, {segment.dtype for segment in layout.segments})

        # With groups, the outermost list of the structure is the list of groups.
        sizes = layout.child_sizes() if self._grouped else [len(layout.leaves)]
        self._group_of = np.repeat(np.arange(len(sizes)), sizes)
        made = []
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        for number, group in enumerate(groups or [{}]):
            own = {name: value for name, value in group.items() if name != "params"}
            dtypes = {layout.dtype_of(leaf) for leaf in layout.leaves[bounds[number] : bounds[number + 1]]}
            made.append(ParamGroup(defaults | own, f"param_groups[{number}]", dtypes, self._cache_dtype))
        self._param_groups = ParamGroups(made)

        self._buffers: dict[str, FlatBuffer] = {}
        self._counts = Counts(len(layout.leaves))
        self._storage = None if storage is None else Storage.of(storage, layout)
        if values is not None:
            self._buffers = {"params": values, "grads": values.like()}
            self._start_state()
            self._connect()
        elif self._storage is not None:
            with self._storage.making(self, layout) as reopened:
                if not reopened:
                    self._buffers["params"].gather(arrays, "params")
                    self._start_state()
                self._connect()

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
    momentum: Any = option_of_all_groups("momentum", "Decay rate of the momentum buffer, or 0.")
    nesterov: Any = option_of_all_groups("nesterov", "Whether a step looks ahead along the momentum buffer.")
    centered: Any = option_of_all_groups("centered", "Whether the variance takes the place of the mean square.")
    weight_decay: Any = option_of_all_groups("weight_decay", "Coefficient of weight decay.")
    decoupled_weight_decay: Any = option_of_all_groups(
        "decoupled_weight_decay", "Whether weight decay is taken off the parameter instead of added to the gradient."
    )
    maximize: Any = option_of_all_groups("maximize", "Whether steps climb.")
    eps_in_sqrt: Any = option_of_all_groups("eps_in_sqrt", "Whether epsilon is added under the root.")
    initial_scale: Any = option_of_all_groups("initial_scale", "What the cache started from; it cannot change later.")
    bias_correction: Any = option_of_all_groups("bias_correction", "Whether the start of the cache is corrected for.")
    lr_in_momentum: Any = option_of_all_groups(
        "lr_in_momentum", "Whether the learning rate is applied ahead of the momentum buffer."
    )
    clip_value: Any = option_of_all_groups("clip_value", "Bound on each gradient element, or None.")
    clip_norm: Any = option_of_all_groups("clip_norm", "Bound on the norm of each parameter's gradient, or None.")
    flush_subnormals: Any = option_of_all_groups("flush_subnormals", "Whether subnormal numbers count as 0.")

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
        _check_kernel,
        "_kernel_changed",
        'What runs the update: "auto", "numpy", "serial" or "parallel".',
    )
    num_threads: Any = checked(
        "num_threads",
        lambda value: check_threads(value, threads.max_threads()),
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
            if self._turn.locked():
                self._admit("step", changes=True)
            with self._turn:
                if self._num_threads is None or not self._uses_threads:
                    return self._step(gradients)
                with threads.limit_threads(self._num_threads):
                    return self._step(gradients)

    def _start_state(self) -> None:
        self.buffers["cache"] = self._new_state("cache")
        for cache, k in zip(self.buffers["cache"].leaves, self._group_of, strict=True):
            if start := self.param_groups[k]["initial_scale"]:  # new memory is 0
                flat = cache.reshape(-1)
                for part in self._in_parts(flat):
                    flat[part] = start if self._cache_dtype is None else to_bfloat16(start)

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
            if not threads.threads_work() and self._kernel in ("auto", "parallel"):
                lines.append(f"{what}: serial; this process was forked from one that had started OpenMP threads")
            elif self._kernel != "auto":
                lines.append(f"{what}: {self._kernel}, as asked for")
            elif self._tuner is None or run.size < tuner.TRY_PARALLEL_FROM:
                few = f"{tuner.TRY_PARALLEL_FROM:,} elements are too few for threads to gain"
                lines.append(f"{what}: serial; " + (few if self._threads() > 1 else "there is one thread"))
            else:
                lines.append(f"{what}: {self._tuner.kernel}; {self._tuner.reason}")
        return lines

    def check(self, **arrays: Any) -> list[str]:
        """Say what has happened to the views of parameters, gradients and state that should not: one line for each.

        Parameters
        ----------
        **arrays : array, or list, tuple or dict of these
            What your program holds as its parameters, under any name: ``opt.check(W1=W1, b1=b1)``. Each must lie in
            the memory of the optimizer's parameters. An array does not if it was copied (a copy or a pickle of an
            object that holds views beside the optimizer has arrays of its own), or if its name was bound to a new
            array, as by ``W1 = W1 * 2``.

        Returns
        -------
        problems : list of str
            Empty if every item of `params`, `grads` and so on is the view that was there at first, and shows its part
            of the buffer. (A step looks for replaced items of `params`, and of `grads` where it uses them, and raises.)

        Examples
        --------
        >>> import copy
        >>> import numpy as np
        >>> from fastrms import RMSProp
        >>> opt = RMSProp([np.ones(2)])
        >>> (w,) = opt.params
        >>> opt.check(w=w)
        []
        >>> copied_w, copied = copy.deepcopy((w, opt))
        >>> copied.check(w=copied_w)
        ['w: expected a view of the parameters, got something else; take it from params again']
        >>> (copied_w,) = copied.params
        """
        problems = [problem for name, buffer in self.buffers.items() for problem in changed_views(buffer, name)]
        return problems + [
            f"{path}: expected a view of the parameters, got something else; take it from params again"
            for name, tree in arrays.items()
            for path in paths_outside(self._params, tree, name)
        ]

    def _refuse_copy(self) -> None:
        if self._storage is not None:  # a copy would be in memory, for which this one may well be too large
            raise StorageError(
                f"{self.storage}: an optimizer with storage cannot be copied or pickled; use save() and "
                "RMSProp.from_checkpoint(), or close() and RMSProp.reopen()"
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_copy()
        # A copy, since it is written later, when other threads may step.
        with self._between_steps("pickle", changes=False):
            return copy.deepcopy(self._to_copy())

    def _to_copy(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._num_threads is not None:  # no bit depends on it, and a worker process may have fewer
            self._num_threads = min(self._num_threads, threads.max_threads())
        self._connect()

    def __copy__(self) -> Self:
        # A shallow copy would step the same memory with a count of steps of its own.
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._refuse_copy()
        with self._between_steps("copy", changes=False):
            other = object.__new__(type(self))
            memo[id(self)] = other
            other.__setstate__(copy.deepcopy(self._to_copy(), memo))
        return other

    def __repr__(self) -> str:
        buffer = self.buffers["params"]
        return f"RMSProp({buffer!r}, groups={self.param_groups!r}, kernel={self._kernel!r}, steps={self.steps})"


# help() and the documentation would show the signature of __new__.
RMSProp.__new__.__signature__ = inspect.signature(RMSProp.__init__)  # type: ignore[attr-defined]

# What `_connect` makes, and pickles and copies leave out.
_DERIVED = (
    "_grads", "_params", "_watched_grads", "_watched_params", "_runs", "_steady_calls", "_steady_from", "_state",
    "_norms", "_lock", "_turn", "_zero_copy", "_tuner", "_uses_threads", "_version", "_taken", "_scheduled",
    "_compiled",
)  # fmt: skip
