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
        groups as in PyTorch: a list of dicts, each with its parameters under ``"params"`` and with options that
        override those given here.
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
        is clamped at 0, because rounding can make it negative.
    weight_decay : float, default 0.0
        Coefficient of weight decay, >= 0. Added to the gradient (L2) unless `decoupled_weight_decay`.
    decoupled_weight_decay : bool, default False
        Subtract ``lr * weight_decay * p`` from the parameter itself, before the step.
    maximize : bool, default False
        Ascend instead of descend.
    eps_in_sqrt : bool, default False
        Divide by sqrt(v + epsilon) instead of sqrt(v) + epsilon.
    initial_scale : float, default 0.0
        Initial value of the cache, >= 0.
    bias_correction : bool, default False
        Divide v (and m) by 1 - d^t at the t-th step of a parameter, which corrects the bias of the start from 0.
    lr_in_momentum : bool, default False
        Multiply by lr before the momentum buffer, as Keras, TensorFlow and optax do. False is PyTorch's form. They
        differ only when lr changes.
    clip_value : float or None, default None
        Limit each gradient element to [-clip_value, clip_value].
    clip_norm : float or None, default None
        Scale the gradient of each parameter down to this Euclidean norm if its norm is larger.
    global_clip_norm : float or None, default None
        Scale the gradients of all groups together down to this norm, after the other two.
    flush_subnormals : bool, default True
        Count weighted squares and state below the smallest normal number as 0: subnormal numbers make a vector of
        arithmetic many times slower and arise in ordinary training. Elements without subnormal numbers keep their bits;
        the parameters of the others stay within one rounding for epsilon >= 1e-10 (float32) or 1e-130 (float64).
    kernel : {"auto", "numpy", "serial", "parallel", "cuda"}, default "auto"
        Kernel of the update. All give the same bits. "auto" begins with serial. With many parameters it tries parallel
        and prefetching after some seconds, and keeps what makes training steps fastest (`explain` says which). "cuda"
        keeps all buffers on a GPU.
    num_threads : int or None, default None
        Threads of the parallel kernel, at most Numba's number of threads; None for all.
    cache_dtype : {"bfloat16"} or None, default None
        "bfloat16" keeps cache, momentum buffer and mean gradient of float32 parameters in 16 bits: 16 instead of 20
        bytes move through memory for each parameter. Steps compute in float32, and stored values are rounded to
        nearest. `cache` then has arrays of ml_dtypes' bfloat16, or of uint16 if ml_dtypes is not installed.
        `from_bfloat16` converts both. decay_rate and momentum must be less than 255/256, because from there on
        rounding stops the decay. ``docs/options.md`` has the arithmetic.
    nonfinite : {"propagate", "raise", "skip"}, default "propagate"
        Reaction of a step to a gradient with an inf or NaN: use it, which spoils only its element; raise
        NonfiniteError; or skip the step and count it in `skipped_steps`. The latter two leave parameters, state and
        `steps` unchanged. They cost one pass over the gradients, or none if clipping computes norms anyway.
    storage : path of a new or empty folder, or None, default None
        Keep the buffers in memory-mapped files in this folder, and take steps in parts: for parameters larger than
        memory. `flush` and `close` write all to the disk, and `reopen` continues later. Bits are the same.
        ``docs/storage.md`` explains the state after a crash.
    stream : stream or int or None, default None
        With kernel="cuda", as for `fastrms.cuda.CudaRMSProp`.
    in_place : bool, default False
        Update the given arrays in place, instead of copies in a flat buffer. `params` then has the given arrays. This
        is for programs that must keep their own arrays. Each array must be writable, C-contiguous, and of dtype float32
        or float64 in native byte order. State and gradients are still in flat buffers. The bits are the same, but a
        step over many small arrays takes longer. Not available with `storage` or kernel="cuda".

    Attributes
    ----------
    params, grads, cache : the structure of `params`
        Views of flat buffers, the same arrays for the optimizer's life. With parameter groups a list with the
        structure of each group. Gradients that are written straight into `grads` before `step()` are not copied.
    momentum_buffer, grad_avg : the structure of `params`, or None
        State of `momentum` and `centered`; None if no group has used them.
    param_groups : list of ParamGroup
        One mapping of options for each group (one group if none were given): ``opt.param_groups[0]["lr"] = 0.1``.
    buffers : mapping of str to FlatBuffer
        The flat buffers behind the views: ``opt.buffers["grads"].flat`` is one dense vector.
    steps, skipped_steps : int
        Steps taken, and steps skipped with nonfinite="skip".

    Raises
    ------
    StructureError
        No parameters; the same array, or overlapping memory, given twice; a group without ``"params"``.
    DtypeError
        Parameters that are not float32 or float64 arrays.
    OptionError, OptionTypeError
        An option out of range or of the wrong kind, unknown in a group, or of no use in the dtype of a parameter.
    DeviceError
        With kernel="cuda", if no GPU can be used.

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
        """Take one step and return the updated parameters, which are the same views as before.

        Parameters
        ----------
        gradients : the structure of the parameters, or None
            An array for each parameter, of the same shape and any float or integer dtype (cast to the parameter's);
            never written. Lists and tuples stand for one another; the keys of a dict may come in any order. Where an
            item is None, its parameter has no gradient, and neither value nor state changes. Without an argument the
            step uses the gradients in `grads`.

        Returns
        -------
        params : the structure of the parameters
            `self.params`.

        Raises
        ------
        StructureError
            Wrong count, missing or unknown key, wrong shape; or a view in `params` or `grads` was replaced, as in
            ``opt.params[0] = array``, which no step would see; or an array that is updated in place is read-only.
        DtypeError
            A gradient is no array, or of complex, bool or object dtype.
        OptionError, OptionTypeError
            The function given as lr returned no usable rate.
        NonfiniteError
            A gradient has an inf or NaN, and `nonfinite` is "raise".
        StepInProgressError
            A step of `step_parameter` or `step_rows` is in progress, and has updated only some parameters.

        Notes
        -----
        All errors come before the first write to parameters and state.
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
        """Return which kernel updates which parameters, and why.

        Returns
        -------
        lines : list of str
            One line for each group and dtype.
        """
        return self._backend.explain()

    def check(self, **arrays: PyTree) -> list[str]:
        """Return problems with the views of parameters, gradients and state: a line for each.

        Parameters
        ----------
        **arrays : array, or list, tuple or dict of these
            The arrays that your program holds as its parameters, under any name: ``opt.check(W1=W1, b1=b1)``. Each must
            be a view of the optimizer's parameters or gradients, or with `in_place` one of its arrays. It is not if it
            was copied (a copy or pickle of an object that holds views has arrays of its own), or if its name was bound
            to a new array, as by ``W1 = W1 * 2``.

        Returns
        -------
        problems : list of str
            Empty if every item of `params`, `grads` and so on is still the original view of its part of the buffer. (A
            step itself raises for replaced items of `params`, and of `grads` where it uses them.)

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
        ['w: expected a view of the parameters, got an array with other memory; take it from params again']
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
