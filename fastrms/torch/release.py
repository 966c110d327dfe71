"""Steps within `backward()`: a parameter is updated when its gradient is complete, and the gradient is dropped."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastrms.errors import OptionError, StepInProgressError
from fastrms.torch.pack import Group, Pack, options_of
from fastrms.torch.state import State

if TYPE_CHECKING:
    import weakref

    from torch.utils.hooks import RemovableHandle

__all__ = ["Release", "Released"]


class Released(torch.Tensor):
    """A gradient that was dropped. It has the shape and dtype of `p` and no memory; every operation on it raises.

    With None in its place, clipping would silently do nothing, and so would sums of norms. A second `backward()` before
    `step()` would add nothing up, and an optimizer that shares the parameter would skip it.
    """

    # `__torch_dispatch__` gets the operations of every function of PyTorch.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, p: torch.Tensor) -> "Released":
        """Return the dropped gradient of a parameter."""
        made: Released = torch.Tensor._make_wrapper_subclass(cls, p.shape, dtype=p.dtype, device=p.device)
        return made

    def __repr__(self, **_: Any) -> str:
        return "<a gradient that release_gradients() has dropped>"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise StepInProgressError."""
        raise StepInProgressError(
            f"gradient: expected no use of it between backward() and step(), got {function}; release_gradients() drops "
            "each gradient when its parameter is updated. Call step() after each backward(); or call "
            "release_gradients(False) to accumulate, clip, unscale, exchange or read gradients"
        )


class Release:
    """The hooks of parameters, and the progress of a step that is taken within `backward()`.

    `take` is called with each parameter whose gradient is complete. It is a weak reference: a parameter outlives its
    optimizer, and then its hook does nothing.
    """

    def __init__(self, take: "weakref.WeakMethod[Callable[[torch.Tensor], None]]") -> None:
        @torch.compiler.disable  # compiled autograd would trace it
        def hook(p: torch.Tensor) -> None:
            if (taking := take()) is not None:
                taking(p)

        self._hook = hook
        # By the ids of parameters, as tensors have no `==` of their own; the parameters are kept, as ids may recur.
        self._hooked: dict[int, tuple[torch.Tensor, RemovableHandle]] = {}
        self._dropped: dict[int, Released] = {}
        self._updated: dict[int, torch.Tensor] = {}
        self._packs: list[Pack] = []
        # For each parameter its packs, and its number in `Pack.moved`; None if it is not moved. One that is listed
        # twice has several.
        self._places: dict[int, list[tuple[Pack, int | None]]] = {}
        self._options: list[tuple[Group, tuple[float, ...]]] = []  # of each group, when the step began
        self.in_progress = False
        # Autograd calls hooks on a thread for each device.
        self.lock = threading.RLock()

    def watch(self, packs: Sequence[Pack]) -> None:
        """Register hooks on all parameters of these packs that need gradients, and remove the hooks of others.

        All that later steps need is made here, and not within `backward()`: small objects that are made between large
        gradients keep the allocator from giving the memory of these back.
        """
        listed = {id(p): p for pack in packs for p, _ in pack.places() if p.requires_grad}
        for number in self._hooked.keys() - listed.keys():
            self._hooked.pop(number)[1].remove()
            del self._dropped[number]
        for number, p in listed.items():
            if number not in self._hooked:
                self._hooked[number] = p, p.register_post_accumulate_grad_hook(self._hook)
                self._dropped[number] = Released(p)
        for pack in packs:
            if pack.moved is not None:
                pack.moved.state.prepare()

    def begin(self, packs: Sequence[Pack], state: State) -> None:
        """Begin a step with these packs, which have followed all changes; or go on with other packs than before."""
        if self.in_progress:
            self._record(state)
        else:
            self._options = [(pack.group, options_of(pack.group)) for pack in packs]
        if list(map(id, packs)) != list(map(id, self._packs)):
            self._packs, self._places = list(packs), {}
            for pack in packs:
                for p, k in pack.places():
                    self._places.setdefault(id(p), []).append((pack, k))
        for pack in packs:
            if pack.moved is not None:
                pack.moved.begin_updates(again=self.in_progress)
        self.in_progress = True

    def update(self, p: torch.Tensor, state: State, fallback: Callable[[Group, list[torch.Tensor]], None]) -> None:
        """Update one parameter, by `fallback` if it takes PyTorch's step, and drop its gradient.

        Nothing happens if no step would update it: it is in no pack, or another hook has taken its gradient away.
        """
        if id(p) not in self._places or p.grad is None:
            return
        if id(p) in self._updated:
            raise StepInProgressError(
                "backward: expected one gradient for each parameter in a step, got a second one before step(); with "
                "release_gradients() the first one has updated the parameter already. Call step() after each "
                "backward(), or release_gradients(False) to accumulate gradients"
            )
        for pack, k in self._places[id(p)]:
            if k is None or pack.moved is None or pack.moved.refusal or not pack.moved.update(k, state):
                fallback(pack.group, [p])
        self._updated[id(p)] = p
        dropped = self._dropped.get(id(p))
        if dropped is None or (dropped.shape, dropped.dtype, dropped.device) != (p.shape, p.dtype, p.device):
            dropped = Released(p)
        p.grad = dropped

    def refuse_unequal_options(self) -> None:
        """Raise OptionError if the options of a group are not those that the step began with."""
        for group, options in self._options if self.in_progress else ():
            if options_of(group) != options:
                raise OptionError(
                    "param_groups: expected the same options from backward() to step(), got options that were set "
                    "between them; with release_gradients() parameters are updated within backward(), so set the "
                    "options of a step before its backward()"
                )

    def refuse_in_progress(self, name: str) -> None:
        """Raise StepInProgressError if parameters were updated since the last step."""
        if self._updated:
            raise StepInProgressError(
                f"{name}: expected a call between two steps, got one after backward(); release_gradients() has updated "
                f"{len(self._updated)} parameters within it, so that their gradients cannot be discarded. Call step()"
            )

    def finish(self, state: State) -> None:
        """End the step: parameters without an update have no gradient. Nothing happens between two steps."""
        if self.in_progress:
            self._record(state)
            for p in self._updated.values():
                if type(p.grad) is Released:
                    p.grad = None
            self._updated.clear()
            self.in_progress = False

    def _record(self, state: State) -> None:
        for pack in self._packs:
            if pack.moved is not None:
                pack.moved.end_updates(state)


def refuse_options(groups: Iterable[Group]) -> None:
    """Raise OptionError if an option of a group needs gradients that stay."""
    for group in groups:
        for name in ("differentiable", "capturable"):
            if group[name]:
                raise OptionError(f"{name}: expected False with release_gradients(), got {group[name]!r}")
