"""The state of a step: `optimizer.state`, a plain dict of dicts that anybody may change between two steps."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastrms.dialects import DIALECTS
from fastrms.errors import StructureError
from fastrms.kernels.objects import Record
from fastrms.torch.placement import (
    Array,
    Locator,
    fits,
    held_in_cpp,
    identities,
    lies_at,
    take_values,
    unalias,
    view_of,
    why_not_movable,
)

__all__ = ["BoundState", "State", "StateFollower"]

# `optimizer.state`; its dicts may hold other objects beside tensors.
State = dict[torch.Tensor, dict[str, Any]]


class BoundState:
    """The state of parameters, whose tensors are views of the buffers of an `RMSProp`.

    A parameter has no state until its first gradient. State that cannot be moved to the buffers stays where it is, and
    its parameter takes PyTorch's step. `locator` finds tensors of the parameters' dtypes and shapes.
    """

    def __init__(self, params: tuple[torch.Tensor, ...], locator: Locator) -> None:
        count = len(params)
        self._params = params
        self._locator = locator
        self.begun, self.all_begun = np.zeros(count, bool), False  # the parameters that have state
        self.left_outside: set[int] = set()  # the numbers of parameters whose state cannot be moved to the buffers
        # A step count for each parameter, of PyTorch's dtype; and a view of shape () for each count.
        self._steps = np.zeros(count, "f8" if torch.get_default_dtype() == torch.float64 else "f4")
        self._counts = [self._steps[k : k + 1].reshape(()) for k in range(count)]
        # The parts of the buffers that the options need, one for each parameter, by PyTorch's names.
        self._parts: dict[str, Sequence[Array]] = {}
        self._ranges = np.zeros((0, 2), np.int64)
        # For each parameter its dict in `optimizer.state`, and the tensors of the dict that are views of the buffers.
        self._dicts: tuple[Any, ...] = (None,) * count
        self._views: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
        self._prepared: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]  # views for state that is not made
        self._stale = True  # whether the dicts may have other tensors than the record below
        # For each name its tensors in the dicts, at the end of the last search, and their places.
        self._found: dict[str, tuple[Any, ...]] = {}
        self._places: dict[str, NDArray[np.int64]] = {}
        self.grown = False  # whether a step has added to the dicts since they were looked up
        self._unrecorded = False  # whether `begin_one` has

    def use(self, parts: Mapping[str, Sequence[Array]], ranges: NDArray[np.int64]) -> None:
        """Set the buffers of the state: their `parts` by PyTorch's names, and the memory [low, high) of each buffer."""
        self._stale = self._stale or parts.keys() != self._parts.keys() - {"step"}
        self._parts = {"step": self._counts, **parts}
        self._ranges = ranges

    def find(self, state: State) -> None:
        """Look up the dict of each parameter, and its tensors."""
        self._dicts = tuple(map(state.get, self._params))
        self.grown = False
        if list(map(bool, self._dicts)) != self.begun.tolist() or any(
            identities(self._tensors(name)) != identities(known) for name, known in self._found.items()
        ):
            self._stale = True

    def has_changed(self) -> bool:
        """Return whether the dicts have other tensors than were recorded, or tensors that lie elsewhere."""
        for name, places in self._places.items():
            if self._locator.have_moved(self._found[name], places):
                self._stale = True
        return self._stale

    def _record(self) -> None:
        self._found = {name: self._tensors(name) for name in self._parts}
        # No kernel reads step counts, which may lie anywhere.
        self._places = {
            name: self._locator.locate(tensors).places for name, tensors in self._found.items() if name != "step"
        }
        self._held = held_in_cpp([view for views in self._views for name, view in views.items() if name != "step"])
        self.all_begun = bool(self.begun.all())
        self._stale = False

    def _tensors(self, name: str) -> tuple[Any, ...]:
        return tuple(given.get(name) if type(given) is dict else None for given in self._dicts)

    def release(self) -> None:
        """Give tensors that are no longer in the dicts memory of their own, as other objects may hold them."""
        self._stale = True
        for k, views in enumerate(self._views):
            given = self._dicts[k] or {}
            for name in [name for name, view in views.items() if given.get(name) is not view]:
                view = views.pop(name)
                if name in self._parts and lies_at(view, self._parts[name][k]):
                    view.data = view.detach().clone()

    def adopt(self, shared: Set[int]) -> None:
        """Make the tensors of the dicts views of the buffers, unless other objects would notice.

        `shared` has the ids of tensors that are in the state of the optimizer more than once.
        """
        self._bind(lambda k, given: self._adopt(k, given, shared))

    def load(self, state: State) -> None:
        """Copy the values of a new `optimizer.state` to the buffers, and replace its tensors by views of these."""
        self.find(state)
        self.release()
        self._bind(self._copy)

    def _bind(self, bind: Callable[[int, dict[str, Any]], bool]) -> None:
        """Bind the dict of each parameter to the buffers by `bind`, which returns whether this was possible."""
        for k, given in enumerate(self._dicts):
            for name in self._parts.keys() & (given or {}).keys():
                unalias(given[name], self._parts[name][k], self._ranges)
        for k, given in enumerate(self._dicts):
            if given:
                (self.left_outside.discard if bind(k, given) else self.left_outside.add)(k)
            elif self.begun[k]:
                self.left_outside.discard(k)
                for parts in self._parts.values():
                    parts[k][...] = 0
            self.begun[k] = bool(given)
        self._record()

    def _adopt(self, k: int, given: dict[str, Any], shared: Set[int]) -> bool:
        if type(given) is not dict or not {"step", "square_avg"} <= given.keys():
            return False
        if not isinstance(given["step"], torch.Tensor):  # old versions of PyTorch have numbers
            given["step"] = torch.tensor(float(given["step"]), dtype=torch.from_numpy(self._steps).dtype)
        tensors = {name: given[name] for name in self._parts if name in given}
        if any(id(tensor) in shared for tensor in tensors.values()):
            return False
        elsewhere = {}  # tensors, each with the part of the buffer that gets its values
        for name, tensor in tensors.items():
            part = self._parts[name][k]
            if not lies_at(tensor, part):
                if name == "step" and tensor.numel() == 1:  # of shape () or (1,)
                    part = part.reshape(tuple(tensor.shape))
                if not fits(tensor, part) or why_not_movable(tensor) is not None:
                    return False
                elsewhere[name] = tensor, part
        for tensor, part in elsewhere.values():
            take_values(tensor, part)
        self._views[k].update(tensors)
        self._complete(k, given)
        return True

    def _copy(self, k: int, given: dict[str, Any]) -> bool:
        for name in self._parts.keys() & given.keys():
            value, part = given[name], self._parts[name][k]
            if self._views[k].get(name) is not value:
                torch.from_numpy(part).copy_(torch.as_tensor(value).reshape(part.shape))
        self._complete(k, given)
        return True

    def _complete(self, k: int, given: dict[str, Any]) -> None:
        """Add views of the buffers to the dict of parameter k."""
        for name, parts in self._parts.items():
            if name not in self._views[k]:
                if name not in given:
                    parts[k][...] = 0
                view = self._prepared[k].pop(name, None)
                given[name] = self._views[k][name] = view_of(parts[k]) if view is None else view

    def begin(self, which: NDArray[np.bool_], state: State) -> None:
        """Make the state of the parameters that `which` marks and that have none."""
        for k in np.flatnonzero(which & ~self.begun).tolist():
            self.begin_one(k, state)
        self.record_begun(state)

    def prepare(self) -> None:
        """Make the tensors of the state of parameters that have none, for a later `begin_one`."""
        if not self.all_begun:
            for k in np.flatnonzero(~self.begun).tolist():
                for name, parts in self._parts.items():
                    if name not in self._prepared[k]:
                        self._prepared[k][name] = view_of(parts[k])

    def begin_one(self, k: int, state: State) -> None:
        """Make the state of parameter k if it has none. The caller calls `record_begun` before the next step."""
        if not self.begun[k]:
            self._complete(k, state.setdefault(self._params[k], {}))
            self.begun[k] = self._unrecorded = True

    def record_begun(self, state: State) -> None:
        """Record the state that `begin_one` has made."""
        if self._unrecorded:
            self.find(state)
            self._record()
            self.grown, self._unrecorded = True, False

    def count(self, present: NDArray[np.bool_] | int | None) -> None:
        """Add 1 to the step counts of the parameters that are present (one if it is a number), or of all if None."""
        if present is None:
            self._steps += 1
        else:
            self._steps[present] += 1

    def check(self, state: State) -> None:
        """Raise StructureError if a tensor in `state` has another shape than its parameter."""
        for p, part in zip(self._params, self._parts["square_avg"], strict=True):
            for name in DIALECTS["torch"].state.values():
                found, shape = state.get(p, {}).get(name), part.shape
                if found is not None and tuple(found.shape) != shape:
                    raise StructureError(f"state: expected {name} of shape {shape}, got {tuple(found.shape)}")


class StateFollower:
    """Follows the changes of `optimizer.state` from step to step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the state of the last step, so that `follow` looks up all of it."""
        self._record: Record | None = None

    def follow(self, state: State, bound: Sequence[BoundState]) -> None:
        """Bring the buffers of all packs, whose state is `bound`, up to date with `state`."""
        # The record is older than the additions of a step, and would not show that somebody has removed them.
        grown = any(each.grown for each in bound)
        same = not grown and self._record is not None and self._record.is_of(state)
        if not same:
            self.forget()
            for each in bound:
                each.find(state)
        if any(each.has_changed() for each in bound):
            for each in bound:
                each.release()
            times = Counter(
                id(tensor) for given in state.values() if isinstance(given, dict) for tensor in given.values()
            )
            shared = {number for number, count in times.items() if count > 1}
            for each in bound:
                each.adopt(shared)
            same = False
        if not same:
            self._record = Record(state)
