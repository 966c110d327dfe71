"""The attributes of an optimizer: views of its buffers, options, and counts."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeAlias

from fastrms._checks import NONFINITE, check_count, check_one_of, check_option, check_threads
from fastrms._guarded import Guarded
from fastrms._properties import Attribute, change, checked, option_of_all_groups, views
from fastrms._state import OptimizerState
from fastrms._types import CacheDType, Kernel, LearningRate, NonFinite, Options
from fastrms.backends.base import Backend
from fastrms.backends.turns import Turns
from fastrms.buffers import FlatBuffer
from fastrms.buffers.pytree import P
from fastrms.kernels import threads
from fastrms.options import ParamGroup, ParamGroups, resolve_lr

__all__ = ["OptimizerBase"]


_Number: TypeAlias = Attribute[float, float]
_Flag: TypeAlias = Attribute[bool, bool]
_Bound: TypeAlias = Attribute[float | None, float | None]


class _Views(Protocol):
    """The type of a property whose value is arrays in the structure of the parameters."""

    def __get__(self, instance: "OptimizerBase[P]", owner: type | None = None, /) -> P: ...

    def __set__(self, instance: "OptimizerBase[P]", value: P, /) -> None: ...


class _StateViews(Protocol):
    """The type of a property whose value is such arrays, or None if no option needs them."""

    def __get__(self, instance: "OptimizerBase[P]", owner: type | None = None, /) -> P | None: ...

    def __set__(self, instance: "OptimizerBase[P]", value: P | None, /) -> None: ...


class OptimizerBase(Guarded, Generic[P]):
    """An optimizer with all its attributes, but without a step."""

    _state: OptimizerState
    _backend: Backend
    _turns: Turns

    def _start(self, backend: Backend) -> None:
        """Connect the optimizer with its backend, and its parameter groups with the optimizer."""
        self._state, self._backend, self._turns = backend.state, backend, backend.turns
        views_of = self._state.buffers["params"].views
        for k, group in enumerate(self._state.param_groups):
            group.bind(views_of[k] if self._state.grouped else views_of, self._set_options)

    @property
    def backend(self) -> Backend:
        """The object that holds the buffers and takes the steps, for adapters to other libraries."""
        return self._backend

    @property
    def buffers(self) -> Mapping[str, FlatBuffer]:
        """The flat buffers behind the views, by name: ``opt.buffers["grads"].flat`` is a dense vector."""
        return MappingProxyType(self._state.buffers)  # no step would update a buffer that a user adds

    @property
    def param_groups(self) -> ParamGroups:
        """The options of each group, as a list of mappings. Options can be set; `add_param_group` adds a group."""
        return self._state.param_groups

    @property
    def steps(self) -> int:
        """The number of steps taken. On a GPU with nonfinite="skip", reading it waits for the device."""
        return self._backend.settle_steps().steps

    @steps.setter
    def steps(self, value: int) -> None:
        value = check_count("steps", value)
        self._turns.refuse_in_pass("steps")
        counts = self._backend.settle()
        counts.steps, counts.absent = value, counts.absent.clip(max=value)
        self._backend.counts_changed()

    @property
    def skipped_steps(self) -> int:
        """The number of steps that nonfinite="skip" has skipped."""
        return self._backend.settle_steps().skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        value = check_count("skipped_steps", value)
        self._backend.settle_steps().skipped_steps = value

    @property
    def last_skipped(self) -> bool:
        """Whether the last step was skipped because of nonfinite="skip". On a GPU, reading it waits for the device."""
        return self._backend.last_skipped()

    @property
    def last_grad_norm(self) -> float | None:
        """The Euclidean norm of all gradients of the last step together, after `clip_value` and before other clipping.

        None if the step did not compute the norm. A step computes it only if `clip_norm` or `global_clip_norm` is set.
        Also None after `step_parameter`, which gets one gradient at a time. On a GPU, reading this waits for the
        device.
        """
        return self._backend.grad_norm()

    @property
    def current_lr(self) -> list[float]:
        """The learning rates of the next step, one for each group. Functions given as lr are called to compute them."""
        steps = self.steps
        return [resolve_lr(group, steps) for group in self.param_groups]

    def zero_grad(self) -> None:
        """Set all gradients in `grads` to 0.

        This is for programs that add to `grads`, in several batches or from several places in the code. It is not
        needed if gradients are assigned (``opt.grads[0][...] = gradient``) or passed to `step`. ``step()`` reads
        `grads` and does not change them.
        """
        with self._turns.between_steps("zero_grad", within_pass=True):
            for segment in self._state.buffers["grads"].segments:
                if self._backend.in_parts:
                    for part in self._backend.parts(segment):
                        segment[part] = 0
                else:
                    self._backend.write([segment], 0)

    params: _Views = views("params", "The parameters, in the structure that was given.")
    grads: _Views = views(
        "grads",
        "The gradient buffer: write gradients here, and call `step()` without arguments. `step(gradients)` may copy "
        "gradients here too, so the values are undefined after it.",
    )
    cache: _Views = views("cache", "The running mean of squared gradients, v in the equations.")
    momentum_buffer: _StateViews = views("momentum_buffer", "The momentum buffer, or None if no group uses momentum.")
    grad_avg: _StateViews = views("grad_avg", "The running mean of gradients, or None if no group is centered.")

    # Reading can return a function. With its exact type, a type checker would refuse `opt.lr *= 0.5`.
    lr: Attribute[float | Any, LearningRate] = option_of_all_groups(
        "lr", "Learning rate, or the function that returns it."
    )
    decay_rate: _Number = option_of_all_groups("decay_rate", "Decay rate of the mean square.")
    epsilon: _Number = option_of_all_groups("epsilon", "Constant added to the denominator.")
    momentum: _Number = option_of_all_groups("momentum", "Decay rate of the momentum buffer, or 0.")
    nesterov: _Flag = option_of_all_groups("nesterov", "Whether a step looks ahead along the momentum buffer.")
    centered: _Flag = option_of_all_groups("centered", "Whether the variance is used instead of the mean square.")
    weight_decay: _Number = option_of_all_groups("weight_decay", "Coefficient of weight decay.")
    decoupled_weight_decay: _Flag = option_of_all_groups(
        "decoupled_weight_decay", "Whether weight decay is subtracted from the parameter, not added to the gradient."
    )
    maximize: _Flag = option_of_all_groups("maximize", "Whether steps ascend.")
    eps_in_sqrt: _Flag = option_of_all_groups("eps_in_sqrt", "Whether epsilon is added under the root.")
    initial_scale: _Number = option_of_all_groups("initial_scale", "The initial value of the cache; it cannot change.")
    bias_correction: _Flag = option_of_all_groups(
        "bias_correction", "Whether the bias of the first steps is corrected."
    )
    lr_in_momentum: _Flag = option_of_all_groups(
        "lr_in_momentum", "Whether the learning rate is applied before the momentum buffer."
    )
    clip_value: _Bound = option_of_all_groups("clip_value", "Bound on each gradient element, or None.")
    clip_norm: _Bound = option_of_all_groups("clip_norm", "Bound on the norm of each parameter's gradient, or None.")
    flush_subnormals: _Flag = option_of_all_groups("flush_subnormals", "Whether subnormal numbers count as 0.")

    global_clip_norm: _Bound = checked(
        "global_clip_norm",
        lambda value: check_option("global_clip_norm", value),
        "options_changed",
        "Bound on the Euclidean norm of all gradients together, or None.",
    )
    nonfinite: Attribute[NonFinite, NonFinite] = checked(
        "nonfinite",
        lambda value: check_one_of("nonfinite", value, NONFINITE),
        "options_changed",
        'The reaction of a step to a gradient with an inf or NaN: "propagate", "raise" or "skip".',
    )

    @property
    def kernel(self) -> Kernel:
        """The kernel of the update: "auto", "numpy", "serial", "parallel" or "cuda"."""
        return self._state.kernel

    @kernel.setter
    def kernel(self, value: Kernel) -> None:
        change(self, "kernel", self._backend.check_kernel(value), "kernel_changed")

    @property
    def stream(self) -> Any:
        """The stream of all work on a GPU, as Numba's object; None on the host. Set it to any `stream` of `RMSProp`."""
        return self._backend.stream

    @stream.setter
    def stream(self, value: object) -> None:
        self._backend.stream = value

    def synchronize(self) -> None:
        """Wait until a GPU has done all work on this optimizer's stream. On the host it returns at once."""
        self._backend.synchronize()

    num_threads: Attribute[int | None, int | None] = checked(
        "num_threads",
        lambda value: check_threads(value, threads.max_threads()),
        "kernel_changed",
        "Threads of the parallel kernel, or None for all threads of Numba.",
    )

    @property
    def cache_dtype(self) -> CacheDType | None:
        """The dtype of the state: "bfloat16", or None for that of the parameters."""
        return self._state.cache_dtype

    def _set_options(self, changes: Iterable[tuple[ParamGroup, Options]]) -> None:
        """Set options of groups: all of them, or none after an error."""
        with self._turns.lock:
            checked_changes = [(group, options, group.with_changes(options)) for group, options in changes]
            self._backend.add_state(values for _, _, values in checked_changes)
            self._backend.options_changed()  # before the change too, since Ctrl-C may come right after it
            for group, options, values in checked_changes:
                # Only these options: a signal handler may have set others meanwhile.
                group.assign({name: values[name] for name in options})
            self._backend.options_changed()  # a signal handler may have taken a step meanwhile
