"""``RMSprop`` for PyTorch: `torch.optim.RMSprop` with its step taken by the compiled kernels.

PyTorch has no fused RMSprop; on the CPU it runs some operations for each parameter and step. Here the parameters of a
group become views of one buffer, and one compiled pass updates them, reading gradients where autograd left them. What
that pass cannot take goes through PyTorch's own functions, parameter by parameter, with the same state.

    from fastrms.torch import RMSprop
    optimizer = RMSprop(model.parameters(), lr=1e-3)

Needs PyTorch (``python -m pip install "fastrms[torch]"``), and is not imported by ``import fastrms``.
"""

import ctypes
import operator
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import torch
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
    from torch.optim.rmsprop import rmsprop
except ImportError as error:
    raise ImportError('PyTorch is not installed; install with: python -m pip install "fastrms[torch]"') from error

from fastrms._checks import check_one_of
from fastrms.dialects import DIALECTS
from fastrms.errors import OptionError, StructureError
from fastrms.kernels import KERNELS, dlpack, pointers
from fastrms.optimizer import RMSProp

__all__ = ["RMSprop"]

_TYPES = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64)
_gradient = operator.attrgetter("grad")
_State = dict[torch.Tensor, dict[str, Any]]

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
    PyTorch's can become NaN. A gradient that is None is skipped. Each step looks where gradients, parameters and state
    lie (``zero_grad()``, ``p.data = ...`` and ``optimizer.state[p] = ...`` put them elsewhere), and takes them from
    there. `explain` says which parameters take which step; where most of a model takes PyTorch's, the first step says
    so with a RuntimeWarning.

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

    # What was last seen of `state`, and whether the first step has warned.
    _seen: Any = None
    _told = False

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
        self._seen = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
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
        # PyTorch has put hooks around the `step` of a subclass that has its own.
        if (any(hooks) or torch.autograd._profiler_enabled()) and type(self).step is RMSprop.step:
            return _step_with_hooks(self, *args, **kwargs)
        return self._step(*args, **kwargs)

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
    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._told:
            self._told = True
            self._tell_of_pytorchs_step()
        self._follow_groups()
        self._follow_state()
        in_torch = self.defaults["differentiable"]
        with torch.set_grad_enabled(in_torch):
            for pack in self._packs:
                left = pack.group["params"] if in_torch else pack.look(self.state)
                if left:  # first, because it may refuse a gradient
                    self._step_in_torch(pack.group, left)
                if not in_torch:
                    pack.update()
        if len(self.state) != len(self._kept[0]):
            self._seen = None  # else what was made in this step could be taken out again unseen
        return loss

    # PyTorch's tests, among others, go by way of this attribute to the step without hooks.
    step.__wrapped__ = _step  # type: ignore[attr-defined]

    def explain(self) -> list[str]:
        """Say which parameters take the compiled pass and which take PyTorch's step, and why.

        Returns
        -------
        lines : list of str
            One for each group and reason, with the numbers (or names) of the first parameters. The next step does what
            they say if its gradients are of the same kinds as those of the last step.
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

    def _reasons(self) -> "list[tuple[_Pack, list[str | None]]]":
        """Why each parameter takes PyTorch's step, or None where it takes the compiled pass."""
        self._follow_groups()
        for pack in self._packs:
            pack.look_where_parameters_are()
        self._follow_groups()
        self._follow_state()
        return [(pack, pack.reasons()) for pack in self._packs]

    def _tell_of_pytorchs_step(self) -> None:
        """Warn where most of what is trained would take PyTorch's step, though nobody has asked for it."""
        elements: Counter[str | None] = Counter()
        for pack, reasons in self._reasons():
            for p, reason in zip(pack.group["params"], reasons, strict=True):
                if p.grad is not None:
                    elements[None if reason == _ASKED_FOR else reason] += p.numel()
        total = elements.total()
        left = total - elements.pop(None, 0)
        if 2 * left > total:
            warnings.warn(
                f"fastrms.torch.RMSprop: PyTorch's own step is taken for {left:,} of {total:,} elements, mainly "
                f"because {elements.most_common(1)[0][0]}; optimizer.explain() says more",
                RuntimeWarning,
                stacklevel=5,  # `_step`, PyTorch's wrapper around it, `step`, and who called that
            )

    def _follow_groups(self) -> None:
        """Follow what somebody has done to `param_groups`, which are plain lists and dicts, and to their parameters."""
        if len(self._packs) == len(self.param_groups) and all(map(_Pack.is_of, self._packs, self.param_groups)):
            return
        old = {id(pack.group): pack for pack in self._packs}
        self._packs = []
        for group in self.param_groups:
            pack = old.get(id(group))
            self._packs.append(pack if pack is not None and pack.is_of(group) else _Pack(group, self._kernel))
        self._seen = None

    def _follow_state(self) -> None:
        """Follow what somebody has done to `state`, which is a plain dict of dicts of tensors."""
        seen = tuple(self.state), tuple(self.state.values())
        if (now := (_ids(seen[0]), _ids(seen[1]))) != self._seen:
            self._seen, self._kept = now, seen  # kept, so that nothing new gets the same ids
            for pack in self._packs:
                pack.find_state(self.state)
        changed = [pack.has_changed() for pack in self._packs]
        if not any(changed):
            return
        for pack in self._packs:
            pack.release_state()
        every = [id(tensor) for given in self.state.values() if isinstance(given, dict) for tensor in given.values()]
        shared = {number for number, times in Counter(every).items() if times > 1}
        for pack in self._packs:
            pack.take_over(shared)

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
        if "_packs" not in self.__dict__:  # a copy, or unpickled: moved at the first step, when nobody else holds it
            self._packs = []
            super().__setstate__(state)
            return
        self._follow_groups()
        before = dict(self.__dict__)
        super().__setstate__(state)
        try:
            for pack in self._packs:
                pack.check_state(self.state)
        except StructureError:
            self.__dict__.update(before)
            raise
        self._seen = None
        for pack, group in zip(self._packs, self.param_groups, strict=True):
            pack.group = group
            pack.find_state(self.state)
            pack.has_changed()
            pack.release_state()
            pack.take_over(copying=True)


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(RMSprop._step)

_ASKED_FOR = "differentiable=True or capturable=True asks for it"


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
        self._listed = tuple(group["params"])
        self._ids = _ids(self._listed)
        self._outgrown = False  # whether a parameter has got another shape or dtype, for which new buffers are needed
        times = Counter(map(id, self._listed))
        # Why they cannot be moved, or None.
        self._obstacles = [
            _ASKED_FOR if self._is_asked_for() else "it is listed twice" if times[id(p)] > 1 else _obstacle(p)
            for p in self._listed
        ]
        self.params = tuple(p for p, obstacle in zip(self._listed, self._obstacles, strict=True) if obstacle is None)
        self.rest = [p for p, obstacle in zip(self._listed, self._obstacles, strict=True) if obstacle is not None]
        if not self.params:
            return
        self.optimizer = RMSProp([p.detach().numpy() for p in self.params], kernel=kernel)
        count = len(self.params)
        self._own = np.array([view.ctypes.data if view.size else 0 for view in self.optimizer.params])
        self._lost = np.zeros(count, bool)  # those that became something that cannot be moved
        self._begun = np.zeros(count, bool)  # those that have state
        self._foreign = np.zeros(count, bool)  # those whose state cannot be moved to the buffers
        self._steps = np.zeros(count, "f8" if torch.get_default_dtype() == torch.float64 else "f4")  # as PyTorch's
        self._seen: tuple[Any, ...] = ()
        self._misfit = ""  # why `RMSProp` cannot have the options of the group
        self._ready: Any = None  # for `update`
        self._zero_copy = kernel != "numpy" and pointers.available()
        # For `dlpack.locate`.
        self._function = dlpack.exchange_function(torch.Tensor) if self._zero_copy else 0
        self._kinds = np.array([id(kind) for kind in _TYPES], np.int64)
        self._expected = np.zeros((count, 2 + max(p.ndim for p in self.params)), np.int64)
        for row, p in zip(self._expected, self.params, strict=True):
            row[:2], row[2 : 2 + p.ndim] = (dlpack.kind_of(p.element_size()), p.ndim), p.shape
        self._single = [k for k, p in enumerate(self.params) if p.numel() == 1]
        self._words = np.zeros(dlpack.WORDS, np.int64)
        self._places, self._gradients = (np.zeros((2, count), np.int64) for _ in range(2))
        # The state of each parameter as it was found or made: the dicts of `Optimizer.state`, those of their tensors
        # that are views of the buffers, and for each name what `_look_at` has found.
        self._dicts: tuple[Any, ...] = (None,) * count
        self._views: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        self._noted: dict[str, bytes] = {}
        self._items = np.zeros(count, np.int64)
        self._items_at = self._items.ctypes.data
        # Where `zero_gradients` moves gradients to. Not the gradient buffer of `optimizer`, which a step may write: who
        # keeps a gradient after PyTorch has put another one in its place would see it change.
        self._flat: Any = None
        self._places_in_flat = [-1] * count
        self._stale = True  # whether buffers and dicts have to be brought together again
        # The parts of the buffers, by the names of the state that the options ask for.
        self._leaves: dict[str, Sequence[NDArray[Any]]] = {}
        self._take_options()
        # Tensors without elements that share the parameters' version counters.
        self._versions: list[torch.Tensor] = []
        for p, view in zip(self.params, self.optimizer.params, strict=True):
            _move(p, view)
            self._versions.append(_version_of(p))
        self._hold()

    def is_of(self, group: dict[str, Any]) -> bool:
        """Whether this is still the group, with the same parameters in the same shapes."""
        return self.group is group and not self._outgrown and _ids(tuple(group["params"])) == self._ids

    def _is_asked_for(self) -> bool:
        """Whether somebody wants what only PyTorch's step can do."""
        return bool(self.group["differentiable"] or self.group["capturable"])

    def reasons(self) -> list[str | None]:
        """Why each parameter takes PyTorch's step, or None where it takes the compiled pass."""
        of_moved = map(self._reason, range(len(self.params)))
        return [next(of_moved) if obstacle is None else obstacle for obstacle in self._obstacles]

    def _reason(self, k: int) -> str | None:
        if self._is_asked_for():
            return _ASKED_FOR
        if self._misfit:
            return f"the compiled pass cannot take the options of its group ({self._misfit})"
        if self._lost[k]:
            return _obstacle(self.params[k]) or "it has another shape or dtype than before"
        if self._foreign[k]:
            return "its state cannot be moved: it is incomplete, of another shape or dtype, or others share its memory"
        if self._gradients[1][k] == dlpack.UNUSUAL:
            return "its last gradient is not a dense tensor of its dtype and shape"
        return None

    def kernels(self) -> str:
        """What runs the compiled pass, and why."""
        return " and ".join(sorted({line.partition(": ")[2] for line in self.optimizer.explain()}))

    def look(self, state: _State) -> list[torch.Tensor]:
        """Find what `update` will do, and return the parameters that take PyTorch's step instead."""
        self._ready = None
        if not self.params:
            return self.rest
        if self._misfit or self._is_asked_for():
            return list(self._listed)
        gradients = tuple(map(_gradient, self.params))
        self.look_where_parameters_are()
        # What the step writes may not be a gradient of it.
        ordinary = self._locate(gradients, self._gradients, self._written)
        addresses, states = self._gradients
        # Negative views, of which memory has the positive number, are imaginary parts of conjugates; as such they are
        # strided, and so not ordinary, unless they have one element.
        wrong = self._lost | self._foreign
        for k in self._single:
            wrong[k] |= gradients[k] is not None and gradients[k].is_neg()
        if wrong.any():
            states[wrong & (states == dlpack.ORDINARY)], addresses[wrong] = dlpack.UNUSUAL, 0
            ordinary = False
        if not self._begun.all():
            self._begin((states != dlpack.ABSENT) & ~self._lost, state)
        if ordinary:
            self._ready = addresses, None, gradients
            return self.rest
        present = states == dlpack.ORDINARY
        if present.any():
            self._ready = addresses, present, gradients
        return [*self.rest, *(self.params[k] for k in np.flatnonzero(states == dlpack.UNUSUAL))]

    def update(self) -> None:
        """Take the step that `look` has prepared."""
        if self._ready is None:
            return
        (addresses, present, gradients), self._ready = self._ready, None
        if self._zero_copy:
            self.optimizer._step_at(addresses, present)
        else:
            there = np.ones(len(gradients), bool) if present is None else present
            self.optimizer.step(
                [g.detach().numpy() if here else None for g, here in zip(gradients, there, strict=True)]
            )
        if present is None:
            self._steps += 1
            torch.autograd.graph.increment_version(self._versions)
        else:
            self._steps[present] += 1
            torch.autograd.graph.increment_version([self._versions[k] for k in np.flatnonzero(present)])

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
        if _obstacle(gradient) is not None:
            return False
        if self._flat is None:
            self._flat = self.optimizer.buffers["params"].like()
            self._places_in_flat = [leaf.ctypes.data for leaf in self._flat.leaves]
        if self._places_in_flat[k] in _places:  # somebody keeps an earlier one, which is still there
            return False
        _move(gradient, self._flat.leaves[k][...])
        return True

    def check_state(self, state: _State) -> None:
        """Raise StructureError if there is state that does not belong to these parameters."""
        for k, p in enumerate(self.params):
            for name in _STATE.values():
                found, shape = state.get(p, {}).get(name), self.optimizer.params[k].shape
                if found is not None and tuple(found.shape) != shape:
                    raise StructureError(f"state: expected {name} of shape {shape}, got {tuple(found.shape)}")

    def find_state(self, state: _State) -> None:
        """Take note of the dicts that have the state of the parameters."""
        if not self.params:
            return
        self._dicts = tuple(map(state.get, self.params))
        self._stale = self._stale or list(map(bool, self._dicts)) != self._begun.tolist()

    def has_changed(self) -> bool:
        """Follow the options, and say whether the state is no longer what was noted."""
        if not self.params:
            return False
        self._take_options()
        return self._stale or any(self._look_at(name) != noted for name, noted in self._noted.items())

    def _take_options(self) -> None:
        """Take over the options of the group, which may change at any time, as far as `RMSProp` can have them."""
        now = tuple(float(self.group[name]) for name in _NAMES)
        if now == self._seen:
            return
        options, misfit = self.optimizer.param_groups[0], ""
        for (name, ours), value in zip(_NAMES.items(), now, strict=True):
            value = bool(value) if name in ("centered", "maximize") else value
            try:
                if options[ours] != value:
                    options[ours] = value
            except OptionError as error:  # epsilon 0, alpha or momentum of 1 and more: PyTorch takes them
                misfit = str(error)
                if name == "momentum":
                    options[ours] = 0.5  # its buffer is needed
        used = {"cache": True, "momentum_buffer": options["momentum"] > 0, "grad_avg": options["centered"]}
        buffers = {_STATE[buffer]: self.optimizer.buffers[buffer].leaves for buffer in _STATE if used[buffer]}
        counts = [self._steps[k : k + 1].reshape(()) for k in range(len(self._steps))]
        self._stale = self._stale or buffers.keys() != self._leaves.keys() - {"step"}
        self._leaves = {"step": counts, **buffers}
        # What the step writes, of which no gradient may be a part.
        ends = [(b.block.ctypes.data, b.block.ctypes.data + b.nbytes) for b in self.optimizer.buffers.values()]
        self._written = np.array(ends, np.int64)
        self._misfit, self._seen = misfit, now

    def _look_at(self, name: str) -> bytes:
        """Look at what is under this name in the dicts, and return something that is equal if it is the same.

        Buffers are told by where they lie, and counts, which nothing is computed from, by which objects they are.
        """
        if self._function:
            dlpack.look_up(pointers.items_of(self._dicts), id(dict), id(name), self._items)
            if name != "step":
                self._locate_at(self._items_at, self._places, self._written[:0])
        else:
            found = tuple(d.get(name) if type(d) is dict else None for d in self._dicts)
            self._items[:] = [0 if item is None else id(item) for item in found]
            if name != "step":
                self._locate(found, self._places, self._written[:0])
        return (self._items if name == "step" else self._places).tobytes()

    def release_state(self) -> None:
        """Give tensors that are no longer in the state memory of their own: they may be in somebody's hands."""
        self._stale = True
        for k in range(len(self.params)):
            given, views = self._dicts[k] or {}, self._views[k]
            for name in [name for name, view in views.items() if given.get(name) is not view]:
                view = views.pop(name)
                if name in self._leaves and _lies_at(view, self._leaves[name][k]):
                    view.data = view.detach().clone()

    def take_over(self, shared: Set[int] = frozenset(), copying: bool = False) -> None:
        """Let the buffers have the state that the dicts have, or leave it to PyTorch's step where that cannot be.

        Parameters
        ----------
        shared : set of int
            The ids of what is more than once in the state of the optimizer.
        copying : bool
            Whether the tensors of the state stay as they are, and copies of them take their place.
        """
        if not self.params:
            return
        for k, given in enumerate(self._dicts):
            for name in self._leaves.keys() & (given or {}).keys():
                self._set_aside(given[name], self._leaves[name][k])
        for k, given in enumerate(self._dicts):
            if given:
                self._foreign[k] = not (self._copy(k, given) if copying else self._adopt(k, given, shared))
            elif self._begun[k]:
                self._foreign[k] = False
                for leaves in self._leaves.values():
                    leaves[k][...] = 0
            self._begun[k] = bool(given)
        self._note_state()

    def _set_aside(self, tensor: Any, leaf: NDArray[Any]) -> None:
        """Give memory of its own to a tensor that lies in another part of the buffers, which may be written first."""
        if _is_plain(tensor) and not _lies_at(tensor, leaf) and _obstacle(tensor) is None:
            low, high = self._written.T
            if ((low <= tensor.data_ptr()) & (tensor.data_ptr() < high)).any():
                tensor.data = tensor.detach().clone()

    def _adopt(self, k: int, given: dict[str, Any], shared: Set[int]) -> bool:
        """Let the tensors of the state of parameter k be views of the buffers, if nobody else would notice."""
        if type(given) is not dict or not {"step", "square_avg"} <= given.keys():
            return False
        if not isinstance(given["step"], torch.Tensor):  # as old versions of PyTorch have it
            given["step"] = torch.tensor(float(given["step"]), dtype=torch.from_numpy(self._steps).dtype)
        tensors = {name: given[name] for name in self._leaves if name in given}
        if any(id(tensor) in shared for tensor in tensors.values()):
            return False
        elsewhere = {name: t for name, t in tensors.items() if not _lies_at(t, self._leaves[name][k])}
        for name, tensor in elsewhere.items():
            leaf = self._leaves[name][k]
            if not _is_plain(tensor) or tensor.element_size() != leaf.itemsize or _obstacle(tensor) is not None:
                return False
            if tuple(tensor.shape) != leaf.shape and (name != "step" or tensor.numel() != 1):
                return False
        for name, tensor in elsewhere.items():
            part = self._leaves[name][k].reshape(tensor.shape)
            part[...] = tensor.detach().numpy()
            _move(tensor, part)
        self._views[k].update(tensors)
        self._show(k, given)
        return True

    def _copy(self, k: int, given: dict[str, Any]) -> bool:
        """Put a copy of the state of parameter k into the buffers."""
        for name in self._leaves.keys() & given.keys():
            value, leaf = given[name], self._leaves[name][k]
            if self._views[k].get(name) is not value:
                torch.from_numpy(leaf).copy_(torch.as_tensor(value).reshape(leaf.shape))
        self._show(k, given)
        return True

    def _begin(self, which: NDArray[np.bool_], state: _State) -> None:
        """Show the state of these parameters, if it was not: PyTorch makes it with the first gradient."""
        new = np.flatnonzero(which & ~self._begun).tolist()
        for k in new:
            self._show(k, state.setdefault(self.params[k], {}))
            self._begun[k] = True
        if new:
            self.find_state(state)
            self._note_state()

    def _show(self, k: int, given: dict[str, Any]) -> None:
        """Complete the state of parameter k with views of the buffers."""
        for name, leaves in self._leaves.items():
            if name not in self._views[k]:
                if name not in given:
                    leaves[k][...] = 0
                given[name] = self._views[k][name] = _view_of(leaves[k])

    def _note_state(self) -> None:
        self._noted = {name: self._look_at(name) for name in self._leaves}
        self._hold()
        self._stale = False

    def _hold(self) -> None:
        """Let C++ hold tensors that it looks at in each step.

        One that only Python holds is slow to look at: C++ makes sure each time that Python keeps it (in PyTorch 2.13
        50 ns instead of 25, a version counter 45 instead of 12). Parameters are not held so, because
        `torch.utils.swap_tensors` would refuse them. Nor are the autograd nodes that add up their gradients, because
        then the parameters could not grow.
        """
        views = [view for views in self._views for name, view in views.items() if name != "step"]
        self._held = getattr(torch._C, "ScriptList", list)([*self._versions, *views])

    def look_where_parameters_are(self) -> None:
        """Bring back parameters that were put elsewhere (``p.data = ...``), or note that this cannot be done."""
        if not self.params:
            return
        addresses, _ = self._places
        self._locate(self.params, self._places, self._written[:0])
        self._lost[:] = False
        if np.array_equal(addresses, self._own):
            return
        elsewhere = np.flatnonzero(addresses != self._own).tolist()
        for k in elsewhere:
            self._set_aside(self.params[k], self.optimizer.params[k])
        for k in elsewhere:
            p, view = self.params[k], self.optimizer.params[k]
            movable = _obstacle(p) is None
            if movable and tuple(p.shape) == view.shape and p.element_size() == view.itemsize:
                view[...] = p.detach().numpy()
                _move(p, view)
                self._versions[k] = _version_of(p)  # another one after `torch.utils.swap_tensors`
            else:
                self._lost[k] = True
                self._outgrown = self._outgrown or movable
        if len(elsewhere) > self._lost.sum():
            self._hold()

    def _locate(self, tensors: tuple[Any, ...], into: NDArray[np.int64], excluded: NDArray[np.int64]) -> bool:
        """Write where tensors lie and what they are (`dlpack.ORDINARY` and so on); whether all are ordinary."""
        if self._function:
            return self._locate_at(pointers.items_of(tensors), into, excluded)
        addresses, states = into
        for k, tensor in enumerate(tensors):
            states[k], addresses[k] = dlpack.ABSENT if tensor is None else dlpack.UNUSUAL, 0
            view = self.optimizer.params[k]
            if _is_plain(tensor) and tuple(tensor.shape) == view.shape and tensor.element_size() == view.itemsize:
                address = tensor.data_ptr()
                if not any(address < high and address + tensor.nbytes > low for low, high in excluded):
                    states[k], addresses[k] = dlpack.ORDINARY, address
        return not states.any()

    def _locate_at(self, items: int, into: NDArray[np.int64], excluded: NDArray[np.int64]) -> bool:
        addresses, states = into
        return bool(
            dlpack.locate(
                self._function, items, self._kinds, id(None), self._expected, excluded, self._words, addresses, states,
                dlpack.CPU,
            )
        )  # fmt: skip


# The arrays that tensors were moved to, by address, for as long as these are there, also of optimizers that are gone:
# nobody else knows that memory.
_places: "weakref.WeakValueDictionary[int, NDArray[Any]]" = weakref.WeakValueDictionary()


def _move(tensor: torch.Tensor, part: NDArray[Any]) -> None:
    """Let a tensor be a view of `part` of a buffer, which has its elements."""
    tensor.data = _view_of(part)


def _view_of(part: NDArray[Any]) -> torch.Tensor:
    """A tensor that is a view of `part` of a buffer."""
    view = torch.from_numpy(part)
    if part.size:
        _places[view.data_ptr()] = part  # lives as long as the tensor's memory
    return view


def _version_of(p: torch.Tensor) -> torch.Tensor:
    """A tensor without elements that shares the version counter of `p`."""
    version = p.detach()
    version.data = p.new_empty(0)
    return version


def _lies_at(tensor: Any, leaf: NDArray[Any]) -> bool:
    """Whether the elements of a tensor are those of this part of a buffer."""
    if not _is_plain(tensor) or tensor.numel() != leaf.size or tensor.element_size() != leaf.itemsize:
        return False
    return tensor.data_ptr() == leaf.ctypes.data or (leaf.size == 0 and tuple(tensor.shape) == leaf.shape)


def _is_plain(tensor: Any) -> bool:
    """Whether this is a tensor of numbers that lie one after another in memory that the processor sees."""
    return _oddity(tensor) is None


def _oddity(tensor: Any) -> str | None:
    """What makes this something else than a tensor of numbers that lie one after another, or None."""
    if type(tensor) not in _TYPES:
        return f"it is of type {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"it is on the device {tensor.device}"
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
        return f"its dtype is {tensor.dtype}" if tensor.layout is torch.strided else f"its layout is {tensor.layout}"
    if not tensor.is_contiguous() or tensor.is_neg():
        return "its elements do not lie one after another"
    return None


# Tells how many hold a storage in C++. PyTorch 2.6 and 2.7 do not have it in builds for the CPU.
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold the storage of a tensor in Python, where all have the same object, and how many in C++."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), _use_count(storage._cdata)


_ALONE = (0, 0) if _use_count is None else _holders(torch.empty(1, device="cpu"))


def _obstacle(p: Any) -> str | None:
    """Why the elements of `p` have to stay where they lie, or None where nobody would notice that they move."""
    if (oddity := _oddity(p)) is not None:
        return oddity
    if p.is_inference():
        return "it was made in inference mode"
    if p.is_shared():
        return "its memory is shared between processes"
    if _use_count is None:
        return "this version of PyTorch cannot tell whether others share its memory (2.8 can)"
    if _holders(p) != _ALONE or p.untyped_storage().nbytes() != p.numel() * p.element_size():
        return "others share its memory"
    # Memory that cannot be resized is somebody else's, as that of torch.from_numpy, or of one of our buffers.
    if p.numel() > 0 and not p.untyped_storage().resizable() and p.data_ptr() not in _places:
        return "its memory came from outside of PyTorch or from torch.load of a whole model (copy.deepcopy of it helps)"
    return None


def _ids(objects: tuple[Any, ...]) -> Any:
    """Something that is equal for tuples of the same objects."""
    if pointers.available():
        return ctypes.string_at(pointers.items_of(objects), ctypes.sizeof(ctypes.c_void_p) * len(objects))
    return tuple(map(id, objects))
