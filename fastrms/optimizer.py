"""`RMSProp`: its constructor, step, explanation, check and copies. A backend takes the steps."""

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any, Literal, Self, Unpack, overload

from fastrms._guarded import refuse_unknown
from fastrms._parts import InParts
from fastrms._state import OptimizerState, Settings
from fastrms._types import CacheDType, Kernel, LearningRate, NonFinite
from fastrms.backends.factory import backend_of, new_backend
from fastrms.buffers.pytree import P, Params, PyTree
from fastrms.buffers.replaced import changed_views, foreign_arrays
from fastrms.kernels import threads
from fastrms.options import Group, Keywords

__all__ = ["RMSProp"]


class RMSProp(InParts[P]):
    """RMSProp in one compiled pass over one flat buffer, with the bits of the NumPy reference implementation.

    With default options, a step computes for each element of a parameter p, with gradient g and cache v::

        v = decay_rate * v + (1 - decay_rate) * g**2
        p = p - lr * g / (sqrt(v) + epsilon)

    The rule is from G. Hinton's `lecture 6e
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_ (2012). ``docs/options.md`` has the
    equations of all options, and the order in which they apply.

    Parameters
    ----------
    params : list, tuple, dict or ndarray, or any nesting of these, of float32 or float64 arrays
        Initial values, of any shape (0-d and empty too), strides and byte order. Copied and never written, except with
        `in_place`. Or parameter groups as in PyTorch: a list of dicts. Each dict has its parameters under ``"params"``,
        and may have options that override the arguments of the constructor.
    lr : float or callable, default 0.001
        Learning rate, >= 0. A callable gets the number of steps taken so far (0 at the first) and returns the rate.
    decay_rate : float, default 0.9
        Decay rate d of the running mean of squared gradients, in [0, 1). The mean remembers about 1/(1 - d) steps.
    epsilon : float, default 1e-8
        Constant that is added to the denominator. > 0, also after rounding to the dtype of the parameters.
    momentum : float, default 0.0
        Decay rate of a momentum buffer, in [0, 1); 0 for none.
    nesterov : bool, default False
        Look one step ahead along the momentum buffer. Needs momentum > 0.
    centered : bool, default False
        Divide by the root of the variance v - m^2 instead of the mean square v, with the average gradient m. The
        variance is clamped at 0, because rounding can make it negative.
    weight_decay : float, default 0.0
        Coefficient of weight decay, >= 0. The decay is added to the gradient (L2) unless `decoupled_weight_decay`.
    decoupled_weight_decay : bool, default False
        Subtract ``lr * weight_decay * p`` from the parameter before the step, instead of adding to the gradient.
    maximize : bool, default False
        Ascend instead of descend.
    eps_in_sqrt : bool, default False
        Divide by sqrt(v + epsilon) instead of sqrt(v) + epsilon.
    initial_scale : float, default 0.0
        Initial value of the cache, >= 0.
    bias_correction : bool, default False
        Divide v and m by 1 - d^t at the t-th step of a parameter. This corrects the bias from their start at 0.
    lr_in_momentum : bool, default False
        Multiply by lr before the momentum buffer, as Keras, TensorFlow and optax do, instead of after it, as PyTorch
        does. The results differ only when lr changes.
    clip_value : float or None, default None
        Limit each element of the gradients to [-clip_value, clip_value].
    clip_norm : float or None, default None
        Scale the gradient of a parameter down to this Euclidean norm if its norm is larger.
    global_clip_norm : float or None, default None
        Scale the gradients of all groups together down to this Euclidean norm if their norm is larger. Applied after
        `clip_value` and `clip_norm`. inf scales nothing, and has the norm computed for `last_grad_norm`.
    flush_subnormals : bool, default True
        Replace subnormal numbers in weighted squares and in the state by 0. They arise in ordinary training, and make
        arithmetic many times slower. Elements without subnormal numbers keep their bits. The other parameters change by
        at most one rounding if epsilon is at least 1e-10 (float32) or 1e-130 (float64).
    kernel : {"auto", "numpy", "serial", "parallel", "cuda"}, default "auto"
        Kernel of the update. All kernels give the same bits. "auto" begins with "serial". With many parameters, it
        tries "parallel" and prefetching after a few seconds, and keeps the variant with the fastest training steps
        (`explain` names it). "cuda" keeps all buffers on a GPU.
    num_threads : int or None, default None
        Number of threads of the parallel kernel, from 1 to Numba's number of threads; None for all of them.
    cache_dtype : {"bfloat16"} or None, default None
        "bfloat16" stores cache, momentum buffer and average gradient of float32 parameters in 16 bits. A step then
        moves 16 instead of 20 bytes for each parameter. Steps compute in float32 and round to nearest when they store.
        `cache` has arrays of the dtype bfloat16 of ml_dtypes, or of uint16 if ml_dtypes is not installed;
        `from_bfloat16` converts both. decay_rate and momentum must be less than 255/256, because rounding stops the
        decay of larger ones. ``docs/options.md`` has the accuracy.
    nonfinite : {"propagate", "raise", "skip"}, default "propagate"
        Reaction of a step to a gradient with an inf or NaN. "propagate" uses the gradient, which makes only its own
        element inf or NaN. "raise" raises NonfiniteError. "skip" skips the step and counts it in `skipped_steps`. With
        "raise" and "skip", parameters, state and `steps` stay unchanged. These two need an additional pass over the
        gradients, unless clipping computes norms anyway.
    storage : path of a new or empty folder, or None, default None
        Keep the buffers in memory-mapped files in this folder, and take steps in parts. This is for parameters that are
        larger than memory. `flush` and `close` write everything to the disk, and `reopen` continues later. The bits are
        the same. ``docs/storage.md`` describes the state after a crash.
    stream : stream or int or None, default None
        The stream of all work with kernel="cuda", as for `fastrms.cuda.CudaRMSProp`.
    in_place : bool, default False
        Update the given arrays in place, instead of copies in a flat buffer. `params` then contains the given arrays.
        This is for programs that must keep their own arrays. Each array must be writable, C-contiguous, and of dtype
        float32 or float64 in native byte order. With kernel="cuda" it must be on the GPU. State and gradients are still
        in flat buffers. The bits are the same, but a step takes longer, above all over many small arrays. Not available
        with `storage`, whose folder is a checkpoint with all parameters. ``docs/programs.md`` compares both ways.

    Attributes
    ----------
    params, grads, cache : the structure of `params`
        Views of flat buffers. They stay the same arrays as long as the optimizer exists. With parameter groups, a list
        with the structure of each group. To avoid a copy of gradients, write them into `grads`, and then call `step()`.
    momentum_buffer, grad_avg : the structure of `params`, or None
        State that `momentum` and `centered` need; None if no group has used these options.
    param_groups : list of ParamGroup
        The options of each group (one group if none were given): ``opt.param_groups[0]["lr"] = 0.1``.
    buffers : mapping of str to FlatBuffer
        The flat buffers behind the views: ``opt.buffers["grads"].flat`` is a dense vector of all gradients.
    steps, skipped_steps : int
        Number of steps taken, and number of steps skipped with nonfinite="skip".

    Raises
    ------
    StructureError
        There are no parameters, two parameters share memory, or a group has no ``"params"``.
    DtypeError
        A parameter is not an array of float32 or float64. Or, with `in_place`, it cannot be updated in place.
    OptionError, OptionTypeError
        An option is out of range or of the wrong kind, unknown, or not representable in the dtype of a parameter.
    DeviceError
        kernel="cuda" is set, and no GPU can be used.

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

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Return a new object, or raise OptionTypeError where the name of an argument is unknown."""
        refuse_unknown(cls, options)
        return super().__new__(cls)

    # For type checkers: if arrays stay NumPy arrays of the given dtypes and structure, `params` and so on have the type
    # of the argument. In all other cases their type promises nothing.
    @overload
    def __init__(
        self: "RMSProp[Any]",
        params: PyTree | Sequence[Group],
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        kernel: Literal["cuda"],
        stream: Any = ...,
        in_place: bool = ...,
        **options: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "RMSProp[Any]",
        params: PyTree | Sequence[Group],
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: Literal["bfloat16"],
        kernel: Kernel = ...,
        storage: str | os.PathLike[str] | None = ...,
        in_place: bool = ...,
        **options: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "RMSProp[list[Any]]",
        params: Sequence[Group],
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: CacheDType | None = ...,
        kernel: Kernel = ...,
        storage: str | os.PathLike[str] | None = ...,
        in_place: bool = ...,
        **options: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self,
        params: P,
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: CacheDType | None = ...,
        kernel: Kernel = ...,
        storage: str | os.PathLike[str] | None = ...,
        in_place: bool = ...,
        **options: Unpack[Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "RMSProp[Any]",
        params: Params,
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: CacheDType | None = ...,
        kernel: Kernel = ...,
        storage: str | os.PathLike[str] | None = ...,
        stream: Any = ...,
        in_place: bool = ...,
        **options: Unpack[Keywords],
    ) -> None: ...
    def __init__(
        self,
        params: Params,
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
        kernel: Kernel = "auto",
        num_threads: int | None = None,
        cache_dtype: CacheDType | None = None,
        nonfinite: NonFinite = "propagate",
        storage: str | os.PathLike[str] | None = None,
        stream: Any = None,
        in_place: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "decay_rate": decay_rate, "epsilon": epsilon, "momentum": momentum, "nesterov": nesterov,
            "centered": centered, "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize, "eps_in_sqrt": eps_in_sqrt, "initial_scale": initial_scale,
            "bias_correction": bias_correction, "lr_in_momentum": lr_in_momentum, "clip_value": clip_value,
            "clip_norm": clip_norm, "flush_subnormals": flush_subnormals,
        }  # fmt: skip
        settings = Settings(defaults, kernel, num_threads, cache_dtype, nonfinite, global_clip_norm)
        self._start(new_backend(params, settings, storage, stream, in_place))
        self._close_at_exit()

    def step(self, gradients: PyTree = None) -> P:
        """Take one step, and return the updated parameters, the same arrays as before.

        Parameters
        ----------
        gradients : the structure of the parameters, or None
            An array for each parameter, of the same shape and of any float or integer dtype, which is cast to the dtype
            of the parameter. The arrays are never written. Lists and tuples are interchangeable, and the keys of a dict
            may come in any order. An item that is None leaves its parameter and the state of the parameter unchanged.
            Without an argument, the step uses the gradients in `grads`.

        Returns
        -------
        params : the structure of the parameters
            `self.params`.

        Raises
        ------
        StructureError
            The number of gradients, a key or a shape is wrong. Or an item of `params` or `grads` was replaced, as in
            ``opt.params[0] = array``; no step would use the new array. Or an array that is updated in place is
            read-only, was moved, or has another shape or dtype.
        DtypeError
            A gradient is not an array, or has a complex, bool or object dtype.
        OptionError, OptionTypeError
            The function given as lr returned an unusable rate.
        NonfiniteError
            A gradient has an inf or NaN, and `nonfinite` is "raise".
        StepInProgressError
            A step of `step_parameter` or `step_rows` is in progress, and has updated only some parameters.

        Notes
        -----
        All errors are raised before the first write to parameters and state.
        """
        backend, at_once = self._backend, self._backend.at_once
        if at_once is None or not at_once.step(gradients):
            turns = self._turns
            with turns.lock:
                if turns.in_progress.locked():
                    turns.admit("step", changes=True)
                with turns.in_progress:
                    self._state.counts.admit(0)
                    if backend.thread_limit is None:
                        backend.step(gradients)
                    else:
                        with threads.limit_threads(backend.thread_limit):
                            backend.step(gradients)
        views: P = self._state.buffers["params"].views
        return views

    def explain(self) -> list[str]:
        """Describe which kernel updates which parameters, and why.

        Returns
        -------
        lines : list of str
            One line for each group and dtype.
        """
        return self._backend.explain()

    def check(self, **arrays: PyTree) -> list[str]:
        """List arrays that are no longer views of the optimizer: replaced items, copies and rebound names.

        Parameters
        ----------
        **arrays : array, or list, tuple or dict of these
            The arrays that your program uses as its parameters, under any name: ``opt.check(W1=W1, b1=b1)``. Each must
            be a view of the optimizer's parameters or gradients, or one of its arrays with `in_place`. Two actions
            break this: a copy (a copy or pickle of an object with views has its own arrays), and a name that is bound
            to a new array, as in ``W1 = W1 * 2``.

        Returns
        -------
        problems : list of str
            One line for each problem. Empty if all given arrays, and all items of `params`, `grads` and so on, are
            still the original views. (`step` raises an error for replaced items of `params`, and of `grads` if it uses
            them.)

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
        ['w: expected a view of the parameters, got an array in other memory; take the view from params again']
        >>> (copied_w,) = copied.params
        """
        replaced = [problem for name, buffer in self.buffers.items() for problem in changed_views(buffer, name)]
        params, grads = self.buffers["params"], self.buffers["grads"]
        return replaced + [
            problem for name, tree in arrays.items() for problem in foreign_arrays(params, grads, tree, name)
        ]

    def __getstate__(self) -> dict[str, Any]:
        self._backend.refuse_copy()
        # A copy: pickle writes later, when other threads may step.
        with self._turns.between_steps("pickle", changes=False):
            # lr may be a method of the optimizer. Arrays in place belong to the program, which pickles them too.
            kept = [self, *(self._state.buffers["params"].leaves if self._state.in_place else ())]
            return copy.deepcopy(self._to_copy(), {id(item): item for item in kept})

    def _to_copy(self) -> dict[str, Any]:
        """Return the attributes that a copy has too, with buffers on the host."""
        kept = {name: value for name, value in vars(self).items() if name not in ("_backend", "_turns")}
        return kept | {"_state": self._backend.state_on_host()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        data: OptimizerState = state["_state"]
        if data.num_threads is not None:  # a worker process may have fewer threads, and no bit depends on them
            data.num_threads = min(data.num_threads, threads.max_threads())
        self._start(backend_of(data))

    def __copy__(self) -> Self:
        # A shallow copy would update the same memory, but count steps by itself.
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        self._backend.refuse_copy()
        with self._turns.between_steps("copy", changes=False):
            other = object.__new__(type(self))
            memo[id(self)] = other
            other.__setstate__(copy.deepcopy(self._to_copy(), memo))
        return other

    def __repr__(self) -> str:
        buffer, kernel = self.buffers["params"], self._state.kernel
        return f"RMSProp({buffer!r}, groups={self.param_groups!r}, kernel={kernel!r}, steps={self.steps})"


# Otherwise help() and the documentation show the signature of __new__.
RMSProp.__new__.__signature__ = inspect.signature(RMSProp.__init__)  # type: ignore[attr-defined] # functions may have it
