"""The parameters of a group: the ones in the buffers of an `RMSProp`, and the ones left to PyTorch's step."""

import operator
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastrms.dialects import DIALECTS
from fastrms.errors import OptionError
from fastrms.kernels import dlpack, pointers
from fastrms.optimizer import RMSProp
from fastrms.torch.placement import (
    Locator,
    fits,
    held_in_cpp,
    identities,
    is_viewed,
    move,
    take_values,
    unalias,
    version_of,
    why_not_movable,
)
from fastrms.torch.state import BoundState, State

if TYPE_CHECKING:
    from fastrms.buffers.flat import FlatBuffer

__all__ = ["ASKED_FOR", "OPTIONS", "Group", "Pack"]

# A group of `optimizer.param_groups`.
Group = dict[str, Any]

# Options by PyTorch's names, and the names of `RMSProp`.
OPTIONS = DIALECTS["torch"].names

ASKED_FOR = "differentiable=True or capturable=True asks for it"

_gradient_of = operator.attrgetter("grad")


class Gradients(NamedTuple):
    """The gradients of one compiled pass.

    Attributes
    ----------
    tensors : tuple
        For each parameter its gradient, or None.
    addresses : ndarray of int64
        Where they lie; 0 for parameters that are not in the pass.
    present : ndarray of bool, or None
        Which parameters are in the pass; None for all.
    """

    tensors: tuple[torch.Tensor | None, ...]
    addresses: NDArray[np.int64]
    present: NDArray[np.bool_] | None


class Pack:
    """The parameters of one group, divided by the step that they take.

    Parameters
    ----------
    group : dict
        A group of `optimizer.param_groups`.
    kernel : str
        As for `RMSProp`.

    Attributes
    ----------
    group : dict
        The group.
    fallback : list of torch.Tensor
        The parameters that were not moved to a buffer, and take PyTorch's step.
    moved : MovedParameters or None
        The others, if there are any.
    """

    def __init__(self, group: Group, kernel: str) -> None:
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
        """Divide the parameters by the step that they take this time.

        Parameters
        ----------
        state : dict
            `optimizer.state`, to which the state of parameters with a first gradient is added.

        Returns
        -------
        fallback : list of torch.Tensor
            The parameters that take PyTorch's step.
        gradients : Gradients or None
            The gradients of the compiled pass, for `MovedParameters.step`, if there are any.
        """
        if self.moved is None:
            return self.fallback, None
        if self.moved.refusal or self._asks_for_fallback():
            return list(self._listed), None
        fallback, gradients = self.moved.plan(state)
        return [*self.fallback, *fallback], gradients

    def kernels(self) -> str:
        """Return the kernels of the compiled pass, and why these."""
        lines = [] if self.moved is None else self.moved.optimizer.explain()
        return " and ".join(sorted({line.partition(": ")[2] for line in lines}))

    def zero_gradients(self) -> list[torch.Tensor]:
        """Set the gradients in the gradient buffer to 0, and return all others."""
        others = [p.grad for p in self.fallback if p.grad is not None]
        return others if self.moved is None else others + self.moved.zero_gradients()


class MovedParameters:
    """Parameters that are views of the buffers of an `RMSProp`.

    Parameters
    ----------
    params : tuple of torch.Tensor
        Parameters that can be moved; their ``.data`` become views.
    group : dict
        The group that has their options.
    kernel : str
        As for `RMSProp`.

    Attributes
    ----------
    optimizer : RMSProp
        The owner of the buffers.
    state : BoundState
        The state of the parameters.
    outgrown : bool
        Whether a parameter has got another shape or dtype, for which a new pack is needed.
    refusal : str
        Why `RMSProp` cannot have the options of the group; empty if it can.
    reads_tensors : bool
        Whether steps read gradients where they lie.
    """

    def __init__(self, params: tuple[torch.Tensor, ...], group: Group, kernel: str) -> None:
        self._params = params
        self.optimizer = RMSProp([p.detach().numpy() for p in params], kernel=kernel)
        self.outgrown = False
        self.refusal = ""
        self.reads_tensors = kernel != "numpy" and pointers.available()
        views = self.optimizer.params
        self.locator = Locator(views, self.reads_tensors)
        self.state = BoundState(params, self.locator)
        self._addresses = np.array([view.ctypes.data if view.size else 0 for view in views])
        self._displaced = np.zeros(len(params), bool)  # the parameters that lie elsewhere and cannot be moved back
        self._gradient_kinds = np.zeros(len(params), np.int64)  # of the last step
        # A negative view, whose memory has the numbers with the other sign, is strided and so not ordinary, unless it
        # has one element.
        self._scalars = [k for k, p in enumerate(params) if p.numel() == 1]
        # Where `zero_gradients` moves gradients. It is not the gradient buffer of `optimizer`, which a step may write:
        # whoever keeps a gradient after autograd has replaced it would see it change.
        self._gradient_buffer: FlatBuffer | None = None
        self._gradient_addresses = [-1] * len(params)
        self._options: tuple[float, ...] = ()
        self.take_options(group)
        for p, view in zip(params, views, strict=True):
            move(p, view)
        self._versions = list(map(version_of, params))
        self._held = held_in_cpp(self._versions)

    def take_options(self, group: Group) -> None:
        """Take over the options of the group, which may change at any time, as far as `RMSProp` takes them."""
        now = tuple(float(group[name]) for name in OPTIONS)
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
        # A gradient that aliases these may not be read by the compiled pass, which writes there.
        starts = [(buffer.block.ctypes.data, buffer.nbytes) for buffer in buffers.values()]
        self._ranges = np.array([(start, start + nbytes) for start, nbytes in starts], np.int64)
        self.state.use(parts, self._ranges)
        self.refusal, self._options = refusal, now

    def reasons(self) -> list[str | None]:
        """Return for each parameter why it takes PyTorch's step, or None if it takes the compiled pass."""
        return list(map(self._reason, range(len(self._params))))

    def _reason(self, k: int) -> str | None:
        if self.refusal:
            return f"the compiled pass cannot take the options of its group ({self.refusal})"
        if self._displaced[k]:
            return why_not_movable(self._params[k]) or "it has another shape or dtype than before"
        if self.state.left_outside[k]:
            return "its state cannot be moved: it is incomplete, of another shape or dtype, or others share its memory"
        if self._gradient_kinds[k] == dlpack.UNUSUAL:
            return "its last gradient is not a dense tensor of its dtype and shape"
        return None

    def move_back(self) -> None:
        """Move parameters that were put elsewhere (``p.data = ...``) back to the buffer, where this is possible."""
        located = self.locator.locate(self._params)
        self._displaced[:] = False
        if np.array_equal(located.addresses, self._addresses):
            return
        views = self.optimizer.params
        elsewhere = np.flatnonzero(located.addresses != self._addresses).tolist()
        for k in elsewhere:
            unalias(self._params[k], views[k], self._ranges)
        for k in elsewhere:
            p = self._params[k]
            movable = why_not_movable(p) is None
            if movable and fits(p, views[k]):
                take_values(p, views[k])
                self._versions[k] = version_of(p)  # another counter after `torch.utils.swap_tensors`
            else:
                self._displaced[k] = True
                self.outgrown = self.outgrown or movable
        self._held = held_in_cpp(self._versions)

    def plan(self, state: State) -> tuple[list[torch.Tensor], Gradients | None]:
        """Return the parameters that take PyTorch's step, and the gradients of the others, as `Pack.plan` does."""
        gradients = tuple(map(_gradient_of, self._params))
        self.move_back()
        addresses, kinds, all_ordinary = self.locator.locate(gradients, self._ranges)
        self._gradient_kinds = kinds
        excluded = self._displaced | self.state.left_outside
        for k in self._scalars:
            excluded[k] |= gradients[k] is not None and gradients[k].is_neg()
        if excluded.any():
            kinds[excluded & (kinds == dlpack.ORDINARY)], addresses[excluded] = dlpack.UNUSUAL, 0
            all_ordinary = False
        if not self.state.begun.all():
            self.state.begin((kinds != dlpack.ABSENT) & ~self._displaced, state)
        if all_ordinary:
            return [], Gradients(gradients, addresses, None)
        present = kinds == dlpack.ORDINARY
        fallback = [self._params[k] for k in np.flatnonzero(kinds == dlpack.UNUSUAL)]
        return fallback, Gradients(gradients, addresses, present) if present.any() else None

    def step(self, gradients: Gradients) -> None:
        """Take a step by the compiled pass, with the gradients that `plan` has found."""
        tensors, addresses, present = gradients
        if self.reads_tensors:
            self.optimizer._step_at(addresses, present)
        else:
            there = [True] * len(tensors) if present is None else present.tolist()
            self.optimizer.step(
                [g.detach().numpy() if g is not None and is_there else None
                 for g, is_there in zip(tensors, there, strict=True)]
            )  # fmt: skip
        self.state.count(present)
        stepped = self._versions if present is None else [self._versions[k] for k in np.flatnonzero(present)]
        torch.autograd.graph.increment_version(stepped)

    def zero_gradients(self) -> list[torch.Tensor]:
        """Set gradients that are views of one buffer, or can become one, to 0, and return the others."""
        gradients = tuple(map(_gradient_of, self._params))
        addresses, kinds, _ = self.locator.locate(gradients, self._ranges)
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
