"""The parameters of a group: some are in the buffers of an `RMSProp`, others take PyTorch's step."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastrms._types import HostKernel
from fastrms.backends.host import HostBackend
from fastrms.dialects import DIALECTS
from fastrms.errors import OptionError
from fastrms.kernels import dlpack, pointers
from fastrms.kernels.objects import attributes
from fastrms.optimizer import RMSProp
from fastrms.torch.placement import (
    Locator,
    fits,
    held_in_cpp,
    identities,
    is_viewed,
    kind_of,
    move,
    take_values,
    unalias,
    version_of,
    why_not_movable,
)
from fastrms.torch.state import BoundState, State

if TYPE_CHECKING:
    from fastrms.buffers import FlatBuffer

__all__ = ["ASKED_FOR", "OPTIONS", "Group", "Pack", "options_of"]

# A group of `optimizer.param_groups`.
Group = dict[str, Any]

# Options by PyTorch's names, and the names of `RMSProp`.
OPTIONS = DIALECTS["torch"].names

ASKED_FOR = "differentiable=True or capturable=True requires it"


def options_of(group: Group) -> tuple[float, ...]:
    """Return the options of a group that change its step, as numbers."""
    return tuple(float(group[name]) for name in OPTIONS)


class Gradients(NamedTuple):
    """The gradients of one compiled pass: one item for each parameter."""

    tensors: "tuple[torch.Tensor | None, ...]"  # quoted, as where the documentation is built torch may be a mock
    addresses: NDArray[np.int64]  # 0 for a parameter that is not in the pass
    present: NDArray[np.bool_] | None  # the parameters in the pass; None for all


class Pack:
    """The parameters of one group of `optimizer.param_groups`, divided by the step that they take.

    Parameters in `fallback` cannot be moved to a buffer, and always take PyTorch's step. `moved` has the others; None
    without any.
    """

    def __init__(self, group: Group, kernel: HostKernel) -> None:
        self.group = group
        self._listed = tuple(group["params"])
        self._listed_ids = identities(self._listed)
        times = Counter(map(id, self._listed))
        # Why a parameter is not moved, or None.
        self._obstacles = [
            ASKED_FOR if self._asks_for_fallback() else "it is listed twice" if times[id(p)] > 1 else why_not_movable(p)
            for p in self._listed
        ]
        divided = list(zip(self._listed, self._obstacles, strict=True))
        self.fallback = [p for p, obstacle in divided if obstacle is not None]
        movable = tuple(p for p, obstacle in divided if obstacle is None)
        self.moved = MovedParameters(movable, group, kernel) if movable else None

    def is_of(self, group: Group) -> bool:
        """Return whether this is the pack of `group` with its parameters as they are now, in the same shapes."""
        outgrown = self.moved is not None and self.moved.outgrown
        return self.group is group and not outgrown and identities(tuple(group["params"])) == self._listed_ids

    def _asks_for_fallback(self) -> bool:
        return bool(self.group["differentiable"] or self.group["capturable"])

    def reasons(self) -> list[str | None]:
        """Return for each parameter why it takes PyTorch's step, or None if it takes the compiled pass."""
        asked = self._asks_for_fallback()
        moved = iter(() if self.moved is None else self.moved.reasons())
        return [obstacle or (ASKED_FOR if asked else next(moved)) for obstacle in self._obstacles]

    def plan(self, state: State) -> tuple[list[torch.Tensor], Gradients | None]:
        """Return the parameters that take PyTorch's step this time, and the gradients of the compiled pass, if any.

        Parameters with a first gradient get state in `state`, which is `optimizer.state`.
        """
        if self.moved is None:
            return self.fallback, None
        if self.moved.refusal or self._asks_for_fallback():
            return list(self._listed), None
        fallback, gradients = self.moved.plan(state)
        return [*self.fallback, *fallback], gradients

    def places(self) -> Iterator[tuple[torch.Tensor, int | None]]:
        """Iterate over the parameters, each with its number in `moved`; None if it is in `fallback`."""
        numbers = itertools.count()
        for p, obstacle in zip(self._listed, self._obstacles, strict=True):
            yield p, None if obstacle is not None else next(numbers)

    def kernels(self) -> str:
        """Return the kernels of the compiled pass, and the reasons for them."""
        lines = [] if self.moved is None else self.moved.optimizer.explain()
        return " and ".join(sorted({line.partition(": ")[2] for line in lines}))

    def zero_gradients(self) -> list[torch.Tensor]:
        """Set the gradients in the gradient buffer to 0, and return all others."""
        others = [p.grad for p in self.fallback if p.grad is not None]
        return others if self.moved is None else others + self.moved.zero_gradients()


class MovedParameters:
    """Parameters that are moved to the buffers of an `RMSProp`, `optimizer`: their ``.data`` are views."""

    def __init__(self, params: tuple[torch.Tensor, ...], group: Group, kernel: HostKernel) -> None:
        self._params = params
        self.optimizer = RMSProp([p.detach().numpy() for p in params], kernel=kernel)
        backend = self.optimizer.backend
        assert isinstance(backend, HostBackend)
        self._backend = backend
        self.outgrown = False  # whether a parameter has got another shape or dtype, which needs a new pack
        self.refusal = ""  # why `RMSProp` cannot have the options of the group
        self.reads_tensors = kernel != "numpy" and pointers.available()  # whether steps read gradients in place
        views = self.optimizer.params
        self.locator = Locator(views, self.reads_tensors)
        self.state = BoundState(params, self.locator)
        self._addresses = np.array([view.ctypes.data if view.size else 0 for view in views])
        self._displaced: set[int] = set()  # the numbers of parameters that lie elsewhere and cannot be moved back
        self._gradient_kinds = np.zeros(len(params), np.int64)  # of the last step
        # A negative view is not ordinary, because it is strided; but one of a single element is not strided. Its memory
        # has the number with the other sign.
        self._scalars = [k for k, p in enumerate(params) if p.numel() == 1]
        # `zero_gradients` moves gradients here. The gradient buffer of `optimizer` would not do: steps may write there,
        # and somebody may keep a gradient that autograd has replaced.
        self._gradient_buffer: FlatBuffer | None = None
        self._gradient_addresses = [-1] * len(params)
        self._options: tuple[float, ...] = ()
        self.take_options(group)
        for p, view in zip(params, views, strict=True):
            move(p, view)
        self._versions = list(map(version_of, params))
        self._held = held_in_cpp(self._versions)

    def take_options(self, group: Group) -> None:
        """Take over the options of the group, which may change at any time; note the refusal of `RMSProp`, if any."""
        now = options_of(group)
        if now == self._options:
            return
        options, refusal = self.optimizer.param_groups[0], ""
        for (name, ours), number in zip(OPTIONS.items(), now, strict=True):
            value = bool(number) if name in ("centered", "maximize") else number
            try:
                if options[ours] != value:
                    options[ours] = value
            except OptionError as error:  # epsilon of 0, alpha or momentum of 1 and more: PyTorch takes them
                refusal = str(error)
                if name == "momentum":
                    options[ours] = 0.5  # the buffer is needed all the same
        buffers = self.optimizer.buffers
        needed = {"cache": True, "momentum_buffer": options["momentum"] > 0, "grad_avg": options["centered"]}
        parts = {theirs: buffers[ours].leaves for ours, theirs in DIALECTS["torch"].state.items() if needed[ours]}
        # The compiled pass writes there, and must not read a gradient that aliases these buffers.
        ranges = [(start := buffer.block.ctypes.data, start + buffer.nbytes) for buffer in buffers.values()]
        self._ranges = np.array(ranges, np.int64)
        self.state.use(parts, self._ranges)
        self.refusal, self._options = refusal, now

    def reasons(self) -> list[str | None]:
        """Return for each parameter why it takes PyTorch's step, or None if it takes the compiled pass."""
        return list(map(self._reason, range(len(self._params))))

    def _reason(self, k: int) -> str | None:
        if self.refusal:
            return f"the compiled pass cannot take the options of its group ({self.refusal})"
        if k in self._displaced:
            return why_not_movable(self._params[k]) or "it has another shape or dtype than before"
        if k in self.state.left_outside:
            return (
                "its state cannot be moved: it is incomplete, has another shape or dtype, or shares memory with other "
                "objects"
            )
        if self._gradient_kinds[k] == dlpack.UNUSUAL:
            return "its last gradient is not a dense tensor of its dtype and shape"
        return None

    def move_back(self) -> None:
        """Move parameters that were put elsewhere (``p.data = ...``) back to the buffer, where this is possible."""
        addresses = self.locator.locate(self._params).places[0]
        self._displaced.clear()
        if addresses.tobytes() == self._addresses.tobytes():
            return
        views = self.optimizer.params
        elsewhere = np.flatnonzero(addresses != self._addresses).tolist()
        for k in elsewhere:
            unalias(self._params[k], views[k], self._ranges)
        for k in elsewhere:
            p = self._params[k]
            movable = why_not_movable(p) is None
            if movable and fits(p, views[k]):
                take_values(p, views[k])
                self._versions[k] = version_of(p)  # another counter after `torch.utils.swap_tensors`
            else:
                self._displaced.add(k)
                self.outgrown = self.outgrown or movable
        self._held = held_in_cpp(self._versions)

    def plan(self, state: State) -> tuple[list[torch.Tensor], Gradients | None]:
        """Do for these parameters what `Pack.plan` does for all."""
        gradients = attributes(self._params, "grad")
        self.move_back()
        places, all_ordinary = self.locator.locate(gradients, self._ranges)
        addresses, kinds = places
        self._gradient_kinds = kinds
        excluded = self._displaced | self.state.left_outside
        excluded.update(k for k in self._scalars if gradients[k] is not None and gradients[k].is_neg())
        for k in excluded:
            if kinds[k] == dlpack.ORDINARY:
                kinds[k], addresses[k], all_ordinary = dlpack.UNUSUAL, 0, False
        if not self.state.all_begun:
            present = kinds != dlpack.ABSENT
            present[list(self._displaced)] = False
            self.state.begin(present, state)
        if all_ordinary:
            return [], Gradients(gradients, addresses, None)
        present = kinds == dlpack.ORDINARY
        fallback = [self._params[k] for k in np.flatnonzero(kinds == dlpack.UNUSUAL)]
        return fallback, Gradients(gradients, addresses, present) if present.any() else None

    def step(self, gradients: Gradients) -> None:
        """Take a step by the compiled pass, with the gradients that `plan` has found."""
        tensors, addresses, present = gradients
        if self.reads_tensors:
            self._backend.step_at(addresses, present)
        else:
            there = [True] * len(tensors) if present is None else present.tolist()
            self.optimizer.step(
                [g.detach().numpy() if g is not None and is_there else None
                 for g, is_there in zip(tensors, there, strict=True)]
            )  # fmt: skip
        self.state.count(present)
        stepped = self._versions if present is None else [self._versions[k] for k in np.flatnonzero(present)]
        torch.autograd.graph.increment_version(stepped)

    def begin_updates(self, again: bool) -> None:
        """Prepare `update` of single parameters. `again` tells whether the step has begun already."""
        self.move_back()
        if not again:
            self._gradient_kinds = np.full(len(self._params), dlpack.ABSENT)

    def update(self, k: int, state: State) -> bool:
        """Update parameter k by the compiled pass, with the bits of `step`; or return False if it takes PyTorch's step.

        The time does not depend on the number of parameters.
        """
        p, kind = self._params[k], kind_of(gradient := self._params[k].grad, self.optimizer.params[k], self._ranges)
        self._gradient_kinds[k] = kind
        if k in self._displaced:
            return False
        self.state.begin_one(k, state)
        there = p.data_ptr() == self._addresses[k]  # if not, somebody has moved it since the step began
        if gradient is None or kind != dlpack.ORDINARY or k in self.state.left_outside or not there:
            return False
        self.optimizer.step_parameter(k, gradient.detach().numpy())
        self.state.count(k)
        torch.autograd.graph.increment_version([self._versions[k]])
        return True

    def end_updates(self, state: State) -> None:
        """End a step of `update`."""
        self.optimizer.finish_step()
        self.state.record_begun(state)

    def zero_gradients(self) -> list[torch.Tensor]:
        """Set gradients that are views of one buffer, or can become one, to 0, and return the others."""
        gradients = attributes(self._params, "grad")
        addresses, kinds = self.locator.locate(gradients, self._ranges).places
        others, moved = [], []
        for k, (gradient, address, kind) in enumerate(zip(gradients, addresses.tolist(), kinds.tolist(), strict=True)):
            ordinary = kind == dlpack.ORDINARY and not gradient.requires_grad
            if ordinary and (address == self._gradient_addresses[k] or self._move_gradient(k, gradient)):
                moved.append(k)
            elif gradient is not None:
                others.append(gradient)
        if self._gradient_buffer is None:
            return others
        if len(moved) == len(gradients):
            torch.from_numpy(self._gradient_buffer.block).zero_()
            torch.autograd.graph.increment_version(gradients)
            return others
        for k in moved:
            self._gradient_buffer.leaves[k][...] = 0
            torch.autograd.graph.increment_version(gradients[k])
        return others

    def _move_gradient(self, k: int, gradient: torch.Tensor) -> bool:
        """Make the gradient of parameter k a view of its part of the buffer, and return whether that is possible."""
        if why_not_movable(gradient) is not None:
            return False
        if self._gradient_buffer is None:
            self._gradient_buffer = self.optimizer.buffers["params"].like()
            self._gradient_addresses = [part.ctypes.data for part in self._gradient_buffer.leaves]
        if is_viewed(self._gradient_addresses[k]):  # by an earlier gradient that somebody keeps
            return False
        move(gradient, self._gradient_buffer.leaves[k][...])  # an array of its own, which lives as long as the view
        return True
