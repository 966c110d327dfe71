"""`RMSprop`: PyTorch's optimizer, whose steps are divided between the compiled pass and PyTorch's own functions."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.rmsprop import rmsprop

from fastrms._checks import HOST_KERNELS, check_one_of
from fastrms._types import HostKernel
from fastrms.dialects import DIALECTS
from fastrms.errors import StructureError
from fastrms.torch.pack import ASKED_FOR, OPTIONS, Group, MovedParameters, Pack
from fastrms.torch.release import Release, Released, refuse_options
from fastrms.torch.state import StateFollower

__all__ = ["RMSprop"]

# The hooks of the steps of all optimizers.
_GLOBAL_HOOKS = _global_optimizer_pre_hooks, _global_optimizer_post_hooks


class RMSprop(torch.optim.RMSprop):
    """A drop-in replacement for `torch.optim.RMSprop` that is faster on the CPU.

    It computes the variant of A. Graves (2013, https://arxiv.org/abs/1308.0850), with epsilon outside the root.

    Parameters
    ----------
    params : iterable of torch.Tensor or of dict
        As for every optimizer of PyTorch. Dense parameters of dtype float32 or float64 on the CPU that share their
        memory with nothing are moved: their ``.data`` become views of one buffer for each group. All others (CUDA,
        bfloat16, complex, channels-last, with shared memory) keep their memory and take PyTorch's own step.
    lr : float or torch.Tensor, default 0.01
        Learning rate, >= 0.
    alpha : float, default 0.99
        Decay rate of the mean square, >= 0.
    eps : float, default 1e-8
        Constant that is added to the root, >= 0.
    weight_decay, momentum : float, default 0
        As for `torch.optim.RMSprop`, >= 0.
    centered : bool, default False
        As for `torch.optim.RMSprop`.
    capturable : bool, default False
        If True, all parameters take PyTorch's step.
    foreach : bool or None, default None
        As for `torch.optim.RMSprop`, for the parameters that take PyTorch's step.
    maximize : bool, default False
        As for `torch.optim.RMSprop`.
    differentiable : bool, default False
        If True, all parameters take PyTorch's step.
    kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
        The kernel of the compiled pass, as for `fastrms.RMSProp`.

    Notes
    -----
    Parameter groups, hooks, schedulers, closures and state are those of PyTorch. A ``state_dict()`` of either class
    loads into the other. The tensors of the state are views of the optimizer's buffers. Results differ from those of
    PyTorch by rounding. With ``centered=True``, the variance is clamped at 0; in PyTorch its root can become NaN. A
    parameter whose gradient is None is skipped.

    Each step locates gradients, parameters and state again, because ``zero_grad()``, ``p.data = ...`` and
    ``optimizer.state[p] = ...`` replace them. `explain` lists which parameters take which step. If most of a model
    takes PyTorch's step, the first step gives a RuntimeWarning.

    Examples
    --------
    >>> import torch
    >>> from fastrms.torch import RMSprop
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> optimizer = RMSprop([weight], lr=0.01)
    >>> (weight**2).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.9000, 1.9000])
    """

    _warned = False  # whether the first step has looked for a reason to warn

    def __init__(
        self,
        params: ParamsT,
        lr: "float | torch.Tensor" = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        kernel: HostKernel = "auto",
    ) -> None:
        self._kernel: HostKernel = check_one_of("kernel", kernel, HOST_KERNELS)
        self._start_following()
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )

    def _start_following(self) -> None:
        self._packs: list[Pack] = []
        self._follower = StateFollower()
        self._release: Release | None = None

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as for every optimizer of PyTorch. The group gets its own buffer.

        Parameters
        ----------
        param_group : dict
            Parameters under ``"params"``, and options that override the defaults of the optimizer.
        """
        super().add_param_group(param_group)
        self._packs.append(Pack(self.param_groups[-1], self._kernel))
        self._follower.forget()
        if self._release is not None:
            self._release.watch(self._packs)

    def release_gradients(self, release: bool = True) -> None:
        """Update each parameter within `backward()`, as soon as its gradient is complete, and drop the gradient then.

        This saves memory, because not all gradients exist at the same time. Parameters and state are the same as
        without it. Call `step()` as before; it ends the step. A step uses the options and learning rates at the time of
        `backward()`.

        Parameters
        ----------
        release : bool, default True
            With False, gradients are kept until `zero_grad()` again. Copies of the optimizer begin with False.

        Raises
        ------
        OptionError
            A group has ``differentiable=True`` or ``capturable=True``.

        Notes
        -----
        Between `backward()` and `step()`, every use of a dropped gradient raises StepInProgressError, and so do a
        second `backward()` and `zero_grad()`. Not available with it are accumulation over several `backward()`,
        clipping by the norm of all gradients, GradScaler, and exchange of gradients between processes.
        ``docs/torch.md`` has details.

        Examples
        --------
        >>> import torch
        >>> from fastrms.torch import RMSprop
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = RMSprop([weight], lr=0.01)
        >>> optimizer.release_gradients()
        >>> (weight**2).sum().backward()
        >>> weight.data
        tensor([0.9000, 1.9000])
        >>> optimizer.step()
        >>> weight.grad is None
        True
        """
        if release:
            refuse_options(self.param_groups)
            if self._release is None:
                self._release = Release(weakref.WeakMethod(self._take_gradient))
            self._follow_groups()
            self._release.watch(self._packs)
        elif self._release is not None:
            self._release.finish(self.state)
            self._release.watch([])
            self._release = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Function that computes the loss and its gradients again, and returns the loss.

        Returns
        -------
        loss
            The value that `closure` returned, or None.
        """
        hooks = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_GLOBAL_HOOKS
        # PyTorch has already put hooks around the `step` of a subclass that has one.
        profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage] # torch.optim's way
        if (any(hooks) or profiled) and type(self).step is RMSprop.step:
            return _step_with_hooks(self, *args, **kwargs)
        # `torch.compiler.disable` makes a wrapper, which takes 10 us at each call.
        if torch.compiler.is_dynamo_compiling():
            return self._step(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] # the decorator's type
        return self._step_uncompiled(*args, **kwargs)

    @torch.compiler.disable
    def zero_grad(  # pyright: ignore[reportIncompatibleMethodOverride] # the decorator's type is wrong
        self, set_to_none: bool = True
    ) -> None:
        """Drop all gradients, or set them to 0, as for every optimizer of PyTorch.

        Parameters
        ----------
        set_to_none : bool, default True
            If False, gradients are set to 0 and stay the same tensors. Dense gradients that share their memory with
            nothing become views of one buffer for each group. Then autograd adds to the buffer, one operation sets it
            to 0, and a step reads it as one array.
        """
        if self._release is not None:
            self._release.refuse_in_progress("zero_grad")
        if set_to_none:
            super().zero_grad()
            return
        self._follow_groups()
        for pack in self._packs:
            for gradient in pack.zero_gradients():
                if gradient.grad_fn is not None:
                    gradient.detach_()
                else:
                    gradient.requires_grad_(False)
                gradient.zero_()

    # PyTorch puts a wrapper around a `step` without this mark. The wrapper opens a range of the profiler, also when
    # nobody profiles. That takes 50 us for 1,000 parameters, longer than the whole step of a small model.
    step.hooked = True  # type: ignore[attr-defined] # pyright: ignore[reportFunctionMemberAccess] # by design

    def _step_uncompiled(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._warned:
            self._warned = True
            self._warn_of_fallback()
        if self._release is not None:
            self._end_step(self._release)
            return loss
        self._follow_groups()
        self._follow_state()
        differentiable = self.defaults["differentiable"]
        with torch.set_grad_enabled(differentiable):
            for pack in self._packs:
                fallback, gradients = (pack.group["params"], None) if differentiable else pack.plan(self.state)
                if fallback:  # first, because it may refuse a gradient
                    self._fallback_step(pack.group, fallback)
                if pack.moved is not None and gradients is not None:
                    pack.moved.step(gradients)
        return loss

    _step = torch.compiler.disable(_step_uncompiled)  # PyTorch's compiler cannot trace Numba's functions

    # The step without hooks, as PyTorch's own optimizers have it; PyTorch's tests, among others, call it.
    step.__wrapped__ = _step  # type: ignore[attr-defined] # pyright: ignore[reportFunctionMemberAccess] # by design

    def _take_gradient(self, p: torch.Tensor) -> None:
        """Update a parameter whose gradient is complete, within `backward()` or in `_end_step`."""
        if (release := self._release) is not None:
            with release.lock, torch.no_grad():  # `create_graph=True` would have operations recorded
                if not release.in_progress:
                    refuse_options(self.param_groups)
                    self._begin_step(release)
                release.update(p, self.state, self._fallback_step)

    def _begin_step(self, release: Release) -> None:
        self._follow_groups()
        self._follow_state()
        release.begin(self._packs, self.state)

    def _end_step(self, release: Release) -> None:
        """End a step whose parameters were updated within `backward()`."""
        try:
            release.refuse_unequal_options()
            # Gradients from before `release_gradients`, of parameters without a hook, or put there by the program.
            params = [p for group in self.param_groups for p in group["params"]]
            if waiting := [p for p in params if p.grad is not None and type(p.grad) is not Released]:
                if release.in_progress:
                    self._begin_step(release)
                for p in dict.fromkeys(waiting):
                    self._take_gradient(p)
        finally:
            release.finish(self.state)
            self._follow_groups()
            release.watch(self._packs)

    def explain(self) -> list[str]:
        """Describe which parameters take the compiled pass and which take PyTorch's step, and why.

        Returns
        -------
        lines : list of str
            One line for each group and reason, with the numbers or names of the first parameters. They are true for the
            next step if its gradients are of the same kinds as the gradients of the last step.
        """
        lines = []
        for number, (pack, reasons) in enumerate(self._reasons()):
            listed = pack.group["params"]
            names = pack.group.get("param_names") or range(len(listed))
            by_reason: dict[str | None, list[str]] = {}
            for name, reason in zip(names, reasons, strict=True):
                by_reason.setdefault(reason, []).append(str(name))
            for reason, which in by_reason.items():
                first = ", ".join(which[:5]) + (", ..." if len(which) > 5 else "")
                way = f"PyTorch's step; {reason}" if reason else f"the compiled pass ({pack.kernels()})"
                lines.append(f"group {number}, {len(which):,} of {len(listed):,} parameters ({first}): {way}")
        return lines

    def _reasons(self) -> list[tuple[Pack, list[str | None]]]:
        """Return the reasons of each pack (`Pack.reasons`), after moving parameters back that were put elsewhere."""
        self._follow_groups()
        for moved in self._moved():
            moved.move_back()
        self._follow_groups()
        self._follow_state()
        return [(pack, pack.reasons()) for pack in self._packs]

    def _warn_of_fallback(self) -> None:
        """Warn if most elements of the gradients would take PyTorch's step, though nobody has asked for it."""
        elements: Counter[str | None] = Counter()
        for pack, reasons in self._reasons():
            for p, reason in zip(pack.group["params"], reasons, strict=True):
                if p.grad is not None:
                    elements[None if reason == ASKED_FOR else reason] += p.numel()
        total = elements.total()
        left = total - elements.pop(None, 0)
        if 2 * left > total:
            warnings.warn(
                f"fastrms.torch.RMSprop: PyTorch's own step is used for {left:,} of {total:,} elements, mainly "
                f"because {elements.most_common(1)[0][0]}; optimizer.explain() has details",
                RuntimeWarning,
                stacklevel=4,  # the caller of `step`
            )

    def _moved(self) -> list[MovedParameters]:
        return [pack.moved for pack in self._packs if pack.moved is not None]

    def _follow_groups(self) -> None:
        """Replace packs whose group or parameters somebody has changed: `param_groups` are plain lists and dicts."""
        if len(self._packs) == len(self.param_groups) and all(map(Pack.is_of, self._packs, self.param_groups)):
            return
        old = {id(pack.group): pack for pack in self._packs}
        self._packs = []
        for group in self.param_groups:
            pack = old.get(id(group))
            self._packs.append(pack if pack is not None and pack.is_of(group) else Pack(group, self._kernel))
        self._follower.forget()

    def _follow_state(self) -> None:
        """Take over options and state that somebody has changed."""
        for pack in self._packs:
            if pack.moved is not None:
                pack.moved.take_options(pack.group)
        self._follower.follow(self.state, [moved.state for moved in self._moved()])

    def _fallback_step(self, group: Group, params: list[torch.Tensor]) -> None:
        """Take the step of `torch.optim.RMSprop` for some parameters of a group."""
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        has_complex = self._init_group({**group, "params": params}, *lists)
        with_grad, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        rmsprop(
            with_grad, grads, square_avgs, grad_avgs, momentum_buffers, steps, has_complex=has_complex,
            **{name: group[name] for name in (*OPTIONS, *DIALECTS["torch"].ignored)},
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel": self._kernel}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, or an object from pickle. Its first step moves the parameters, when nobody else holds them any more.
        if "_packs" not in self.__dict__:
            self._start_following()
            super().__setstate__(state)
            return
        # Called by `load_state_dict`: copy the state to the buffers, and put views of the buffers in its place.
        if self._release is not None:
            self._release.finish(self.state)
        self._follow_groups()
        before = dict(self.__dict__)
        super().__setstate__(state)
        try:
            for moved in self._moved():
                moved.state.check(self.state)
        except StructureError:
            self.__dict__.update(before)
            raise
        self._follower.forget()
        for pack, group in zip(self._packs, self.param_groups, strict=True):
            pack.group = group
            if pack.moved is not None:
                pack.moved.take_options(group)
                pack.moved.state.load(self.state)


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(
    RMSprop._step  # pyright: ignore[reportAttributeAccessIssue] # as above
)
