"""``RMSprop`` for PyTorch: `torch.optim.RMSprop` with its step taken by the compiled kernels.

PyTorch has no fused RMSprop; on the CPU it runs some operations for each parameter and step. Here the parameters of a
group become views of one buffer, and one compiled pass updates them, reading gradients where autograd left them. What
that pass cannot take goes through PyTorch's own functions, parameter by parameter, with the same state.

    from fastrms.torch import RMSprop
    optimizer = RMSprop(model.parameters(), lr=1e-3)

Needs PyTorch (``python -m pip install "fastrms[torch]"``), and is not imported by ``import fastrms``.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import torch
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
    from torch.optim.rmsprop import rmsprop
    from torch.utils.weak import WeakIdKeyDictionary
except ImportError as error:
    raise ImportError('PyTorch is not installed; install with: python -m pip install "fastrms[torch]"') from error

from fastrms.dialects import DIALECTS
from fastrms.errors import OptionError, StructureError
from fastrms.kernels import dlpack, pointers
from fastrms.kernels.choice import KERNELS
from fastrms.optimizer import RMSProp
from fastrms.options import check_one_of

__all__ = ["RMSprop"]

_DTYPES = (torch.float32, torch.float64)
_gradient = operator.attrgetter("grad")

# What was registered for the steps of all optimizers.
_HOOKS_OF_ALL = _global_optimizer_pre_hooks, _global_optimizer_post_hooks

# Arguments by PyTorch's names, and what our state is called there.
_NAMES, _STATE = DIALECTS["torch"].names, DIALECTS["torch"].state


class RMSprop(torch.optim.RMSprop):
    """A drop-in for `torch.optim.RMSprop` (A. Graves 2013 with epsilon outside the root), faster on the CPU.

    Parameters
    ----------
    params : iterable of torch.Tensor or of dict
        As for every optimizer of PyTorch. Those of dtype float32 or float64 on the CPU that are dense, contiguous and
        share their memory with nothing are moved: their ``.data`` becomes a view of one buffer for each group. All
        others (CUDA, bfloat16, complex, channels-last, tied by memory, shared between processes) stay where they are
        and take PyTorch's own step.
    lr : float or torch.Tensor, default 0.01
        Learning rate, >= 0.
    alpha : float, default 0.99
        Decay rate of the mean square, >= 0.
    eps : float, default 1e-8
        Added to the root, >= 0.
    weight_decay, momentum : float, default 0
        As for `torch.optim.RMSprop`, >= 0.
    centered : bool, default False
        As for `torch.optim.RMSprop`.
    capturable : bool, default False
        If True, all parameters take PyTorch's step.
    foreach : bool or None, default None
        For those that take PyTorch's step.
    maximize : bool, default False
        As for `torch.optim.RMSprop`.
    differentiable : bool, default False
        If True, all parameters take PyTorch's step.
    kernel : {"auto", "numpy", "serial", "parallel"}, default "auto"
        What runs the pass, as for `fastrms.RMSProp`.

    Notes
    -----
    Everything else is inherited: parameter groups, hooks, schedulers, closures, and state with PyTorch's names and
    shapes (the tensors are views of the optimizer's buffers), so that a ``state_dict()`` of either loads into the
    other. Results differ from PyTorch's by rounding; with ``centered=True`` the variance is clamped at 0, where
    PyTorch's can become NaN. A gradient that is None is skipped. Each step looks where gradients and parameters lie
    (``zero_grad()`` and ``p.data = ...`` put them elsewhere), and takes them from there.

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

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
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
        kernel: str = "auto",
    ) -> None:
        self._kernel = check_one_of("kernel", kernel, KERNELS)
        self._packs: list[_Pack] = []
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for every optimizer of PyTorch; its parameters get a buffer of their own.

        Parameters
        ----------
        param_group : dict
            Parameters under ``"params"``, and options that differ from those of the optimizer.
        """
        super().add_param_group(param_group)
        self._packs.append(_Pack(self.param_groups[-1], self._kernel))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients again.

        Returns
        -------
        loss
            What `closure` returned, or None.
        """
        hooks = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks, *_HOOKS_OF_ALL
        if any(hooks) or torch.autograd._profiler_enabled():
            return _step_with_hooks(self, closure)
        return self._step(closure)

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to 0, as for every optimizer of PyTorch.

        Parameters
        ----------
        set_to_none : bool, default True
            If False, gradients are set to 0, and become views of one buffer for each group, where nobody would notice:
            dense ones that are alone in their memory. They stay the same tensors. Autograd adds to them there, one
            operation sets all to 0, and a step reads them as one array.
        """
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

    # PyTorch would put a wrapper around `step` that opens a range of the profiler, also when nobody profiles, which
    # takes longer (50 us for 1,000 parameters) than all that is in it for a small model. With this mark it does not.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.compiler.disable  # PyTorch's compiler cannot look into Numba's functions
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        in_torch = self.defaults["differentiable"]
        self._follow_groups()
        with torch.set_grad_enabled(in_torch):
            for pack in self._packs:
                left = pack.group["params"] if in_torch or pack.group["capturable"] else pack.step(self.state)
                if left:
                    self._step_in_torch(pack.group, left)
        return loss

    def _follow_groups(self) -> None:
        """Follow what somebody has done to `param_groups`, which are plain lists and dicts."""
        if len(self._packs) == len(self.param_groups) and all(map(_Pack.is_of, self._packs, self.param_groups)):
            return
        old = {id(pack.group): pack for pack in self._packs}
        self._packs = []
        for group in self.param_groups:
            pack = old.get(id(group))
            if pack is None or not pack.is_of(group):
                pack = _Pack(group, self._kernel)
                pack.take_over(self.state)
            self._packs.append(pack)

    def _step_in_torch(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        """The step of `torch.optim.RMSprop`, for some parameters of a group."""
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        has_complex = self._init_group({**group, "params": params}, *lists)
        with_grad, grads, square_avgs, momentum_buffers, grad_avgs, steps = lists
        rmsprop(
            with_grad, grads, square_avgs, grad_avgs, momentum_buffers, steps, has_complex=has_complex,
            **{name: group[name] for name in (*_NAMES, *DIALECTS["torch"].ignored)},
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kernel": self._kernel}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # `load_state_dict` ends here too: what came is copied to the buffers, and the state consists of views again.
        before = dict(self.__dict__)
        super().__setstate__(state)
        if len(before.get("_packs", ())) != len(self.param_groups):  # a copy, or unpickled
            self._packs = [_Pack(group, self._kernel) for group in self.param_groups]
        try:
            for pack in self._packs:
                pack.check_state(self.state)
        except StructureError:
            self.__dict__.update(before)
            raise
        for pack, group in zip(self._packs, self.param_groups, strict=True):
            pack.group = group
            pack.take_over(self.state)


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(RMSprop._step)


class _Pack:
    """The parameters of a group that one `RMSProp` holds, and how they are bound to its buffers.

    Parameters
    ----------
    group : dict
        PyTorch's group.
    kernel : str
    """

    def __init__(self, group: dict[str, Any], kernel: str) -> None:
        self.group = group
        self._listed = list(group["params"])
        # Without differentiable and capturable, which PyTorch's own step is needed for.
        moves = [_can_be_moved(p) and not (group["differentiable"] or group["capturable"]) for p in group["params"]]
        self.params = tuple(p for p, move in zip(group["params"], moves, strict=True) if move)
        self.rest = [p for p, move in zip(group["params"], moves, strict=True) if not move]
        if not self.params:
            return
        self.optimizer = RMSProp([p.detach().numpy() for p in self.params], kernel=kernel)
        count = len(self.params)
        self._own = np.array([view.ctypes.data if view.size else 0 for view in self.optimizer.params])
        self._lost = np.zeros(count, bool)  # those that became something that cannot be moved
        self._begun = np.zeros(count, bool)  # those that have had a gradient, and so have state
        self._steps = np.zeros(count, str(torch.get_default_dtype()).removeprefix("torch."))
        self._seen: tuple[Any, ...] = ()
        self._fits = False
        self._zero_copy = kernel != "numpy" and pointers.available()
        # For `dlpack.locate`.
        self._function = dlpack.exchange_function(torch.Tensor) if self._zero_copy else 0
        self._kinds = np.array([id(torch.Tensor), id(torch.nn.Parameter)], np.int64)
        self._expected = np.zeros((count, 2 + max(p.ndim for p in self.params)), np.int64)
        for row, p in zip(self._expected, self.params, strict=True):
            row[:2], row[2 : 2 + p.ndim] = (dlpack.kind_of(p.element_size()), p.ndim), p.shape
        self._single = [k for k, p in enumerate(self.params) if p.numel() == 1]
        self._words = np.zeros(dlpack.WORDS, np.int64)
        self._places, self._gradients = (np.zeros((2, count), np.int64) for _ in range(2))
        # Where `zero_gradients` moves gradients to. Not the gradient buffer of `optimizer`, which a step may write: who
        # keeps a gradient after PyTorch has put another one in its place would see it change.
        self._flat: Any = None
        self._places_in_flat = [-1] * count
        self._note_what_is_written()
        for k in range(count):
            self._bind(k)
        # What adds gradients up holds its parameter in C++. A tensor that only Python holds is slow for C++ to look at:
        # it makes sure each time that Python keeps it (in PyTorch 2.13 50 ns instead of 25, a version counter 45
        # instead of 12).
        self._held = [torch.autograd.graph.get_gradient_edge(p).node for p in self.params if p.requires_grad]

    def is_of(self, group: dict[str, Any]) -> bool:
        """Whether this is still the group, with the same parameters."""
        params = group["params"]
        return self.group is group and len(params) == len(self._listed) and all(map(operator.is_, params, self._listed))

    def step(self, state: dict[torch.Tensor, dict[str, Any]]) -> list[torch.Tensor]:
        """Take a step with all parameters that this can be done for, and return the others that have a gradient."""
        if not self.params:
            return self.rest
        if not self._options_fit(state):
            self._begin(np.array([p.grad is not None for p in self.params]), state)
            return [*self.rest, *self.params]
        gradients = tuple(map(_gradient, self.params))
        self._look_where_parameters_are()
        # What the step writes may not be a gradient of it.
        ordinary = self._locate(gradients, self._gradients, self._written)
        addresses, states = self._gradients
        present = None
        # Negative views, of which memory has the positive number, are imaginary parts of conjugates; as such they are
        # strided, and so not ordinary, unless they have one element.
        wrong = self._lost.copy()
        for k in self._single:
            wrong[k] |= gradients[k] is not None and gradients[k].is_neg()
        if wrong.any():
            states[wrong & (states == dlpack.ORDINARY)], addresses[wrong] = dlpack.UNUSUAL, 0
        if not ordinary or wrong.any():
            present = states == dlpack.ORDINARY
        if not self._begun.all():
            self._begin(states != dlpack.ABSENT, state)
        if present is None:
            self._update(addresses, None, gradients)
            self._steps += 1
            torch.autograd.graph.increment_version(self.params)
            return self.rest
        if present.any():
            self._update(addresses, present, gradients)
            self._steps[present] += 1
            torch.autograd.graph.increment_version([self.params[k] for k in np.flatnonzero(present)])
        return [*self.rest, *(self.params[k] for k in np.flatnonzero(states == dlpack.UNUSUAL))]

    def zero_gradients(self) -> list[torch.Tensor]:
        """Set gradients to 0 that lie in one buffer, or can be put there, and return the others."""
        others = [p.grad for p in self.rest if p.grad is not None]
        if not self.params:
            return others
        gradients = tuple(map(_gradient, self.params))
        self._locate(gradients, self._gradients, self._written)
        addresses, states = self._gradients
        there = []
        found = zip(gradients, addresses.tolist(), states.tolist(), self._places_in_flat, strict=True)
        for k, (gradient, address, kind, place) in enumerate(found):
            ours = kind == dlpack.ORDINARY and not gradient.requires_grad
            ours = ours and (address == place or self._move_gradient(k, gradient))
            there.append(ours)
            if not ours and gradient is not None:
                others.append(gradient)
        if all(there):
            torch.from_numpy(self._flat.block).zero_()
            torch.autograd.graph.increment_version(gradients)
            return others
        for k in np.flatnonzero(there).tolist():
            self._flat.leaves[k][...] = 0
            torch.autograd.graph.increment_version(gradients[k])
        return others

    def _move_gradient(self, k: int, gradient: torch.Tensor) -> bool:
        """Let the gradient of parameter k be a view of its place in one buffer, if nobody else would notice."""
        if not _can_be_moved(gradient):
            return False
        if self._flat is None:
            self._flat = self.optimizer.buffers["params"].like()
            self._places_in_flat = [leaf.ctypes.data for leaf in self._flat.leaves]
        gradient.data = torch.from_numpy(self._flat.leaves[k])
        return True

    def check_state(self, state: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Raise StructureError if there is state that does not belong to these parameters."""
        for k, p in enumerate(self.params):
            for name in _STATE.values():
                found, shape = state.get(p, {}).get(name), self.optimizer.params[k].shape
                if found is not None and tuple(found.shape) != shape:
                    raise StructureError(f"state: expected {name} of shape {shape}, got {tuple(found.shape)}")

    def take_over(self, state: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Copy the state to the buffers, and put views of them in its place."""
        if not self.params:
            return
        self._options_fit(state)
        for k, p in enumerate(self.params):
            given = state.get(p, {})
            self._begun[k] = len(given) > 0
            self._steps[k] = float(given.get("step", 0))
            views = self._state_of(k)
            for name in _STATE.values():
                if name in views:
                    views[name].copy_(given[name]) if name in given else views[name].zero_()
            if given:
                state[p] = {**given, **views}

    def _begin(self, which: NDArray[np.bool_], state: dict[torch.Tensor, dict[str, Any]]) -> None:
        """Show the state of these parameters, if it was not: PyTorch makes it with the first gradient."""
        for k in np.flatnonzero(which & ~self._begun).tolist():
            state[self.params[k]] = self._state_of(k)
            self._begun[k] = True

    def _state_of(self, k: int) -> dict[str, Any]:
        """The state of parameter k as PyTorch has it, in views of the buffers."""
        views = {"step": torch.from_numpy(self._steps[k : k + 1]).reshape(())}
        group = self.optimizer.param_groups[0]
        for buffer, name in _STATE.items():
            if name == "square_avg" or (group["momentum"] > 0 if name == "momentum_buffer" else group["centered"]):
                views[name] = torch.from_numpy(self.optimizer.buffers[buffer].leaves[k])
        return views

    def _options_fit(self, state: dict[torch.Tensor, dict[str, Any]]) -> bool:
        """Take over the options of the group, which may change at any time; False if `RMSProp` cannot have them."""
        now = tuple(float(self.group[name]) for name in _NAMES)
        if now == self._seen:
            return self._fits
        options = self.optimizer.param_groups[0]
        kept = options["momentum"] > 0, options["centered"]
        self._seen, self._fits, before = now, True, len(self.optimizer.buffers)
        for (name, ours), value in zip(_NAMES.items(), now, strict=True):
            value = bool(value) if name in ("centered", "maximize") else value
            try:
                if options[ours] != value:
                    options[ours] = value
            except OptionError:  # epsilon 0, alpha or momentum of 1 and more: PyTorch takes them
                self._fits = False
                if name == "momentum":
                    options[ours] = 0.5  # its buffer is needed
        if before != len(self.optimizer.buffers):
            self._note_what_is_written()
        if kept != (options["momentum"] > 0, options["centered"]):
            for k in np.flatnonzero(self._begun).tolist():
                state[self.params[k]].update(self._state_of(k))
        return self._fits

    def _note_what_is_written(self) -> None:
        ends = [(b.block.ctypes.data, b.block.ctypes.data + b.nbytes) for b in self.optimizer.buffers.values()]
        self._written = np.array(ends, np.int64)

    def _look_where_parameters_are(self) -> None:
        """Bring back parameters that were put elsewhere (``p.data = ...``), or note that this cannot be done."""
        addresses, _ = self._places
        self._locate(self.params, self._places, self._written[:0])
        self._lost[:] = False
        if np.array_equal(addresses, self._own):
            return
        for k in np.flatnonzero(addresses != self._own).tolist():
            p, view = self.params[k], self.optimizer.params[k]
            if _can_be_moved(p) and tuple(p.shape) == view.shape and p.element_size() == view.itemsize:
                view[...] = p.detach().numpy()
                self._bind(k)
            else:
                self._lost[k] = True

    def _bind(self, k: int) -> None:
        """Let parameter k be a view of its part of the buffer."""
        self.params[k].data = torch.from_numpy(self.optimizer.params[k])
        _moved[self.params[k]] = int(self._own[k])

    def _locate(self, tensors: tuple[Any, ...], into: NDArray[np.int64], excluded: NDArray[np.int64]) -> bool:
        """Write where tensors lie and what they are (`dlpack.ORDINARY` and so on); whether all are ordinary."""
        addresses, states = into
        if self._function:
            return bool(
                dlpack.locate(
                    self._function, pointers.items_of(tensors), self._kinds, id(None), self._expected, excluded,
                    self._words, addresses, states, dlpack.CPU,
                )
            )  # fmt: skip
        for k, tensor in enumerate(tensors):
            states[k], addresses[k] = dlpack.ABSENT if tensor is None else dlpack.UNUSUAL, 0
            view = self.optimizer.params[k]
            if _is_plain(tensor) and tuple(tensor.shape) == view.shape and tensor.element_size() == view.itemsize:
                address = tensor.data_ptr()
                if not any(address < high and address + tensor.nbytes > low for low, high in excluded):
                    states[k], addresses[k] = dlpack.ORDINARY, address
        return not states.any()

    def _update(self, addresses: NDArray[np.int64], present: NDArray[np.bool_] | None, gradients: Any) -> None:
        if self._zero_copy:
            self.optimizer._step_at(addresses, present)
            return
        there = np.ones(len(gradients), bool) if present is None else present
        self.optimizer.step([g.detach().numpy() if here else None for g, here in zip(gradients, there, strict=True)])


# Where parameters were moved to, also by optimizers that are gone: that memory is known to nobody else.
_moved: Any = WeakIdKeyDictionary()


def _is_plain(tensor: Any) -> bool:
    """Whether this is a tensor of numbers that lie one after another in memory that the processor sees."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _DTYPES
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _can_be_moved(p: Any) -> bool:
    """Whether nobody else would notice that the elements of `p` lie elsewhere from now on."""
    if not _is_plain(p) or p.is_inference() or p.is_shared():
        return False
    storage = p.untyped_storage()
    # One more is `storage` itself. Memory that cannot be resized is somebody else's, as that of torch.from_numpy.
    alone = torch._C._storage_Use_Count(storage._cdata) <= 2 and storage.nbytes() == p.numel() * p.element_size()
    return bool(alone and (storage.resizable() or _moved.get(p) == p.data_ptr()))
