"""The shards of an optimizer on the ranks of an MPI program, and the exchange of gradients and parameters."""

import zlib
from collections import ChainMap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fastrms._state import OptimizerState
from fastrms._types import Reduction
from fastrms.backends.base import Call, RunCalls
from fastrms.backends.host import HostBackend
from fastrms.backends.plan import Located
from fastrms.backends.turns import Turns
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.flat import as_arrays
from fastrms.buffers.replaced import Watch, changed_views, refuse_replaced
from fastrms.errors import NonfiniteError, OptionError, StepInProgressError, StructureError
from fastrms.kernels.norms import AddUp
from fastrms.mpi.buckets import GradientBuckets
from fastrms.mpi.communicator import Communicator
from fastrms.mpi.parts import BufferPart, Exchanged
from fastrms.mpi.waiting import named

__all__ = ["Shards"]

_CALLS = ("step", "discard", "state_dict", "load_state_dict", "save", "load", "add_param_group")
_FACTS = 3  # the number of facts without learning rates


class Shards:
    """The shards of an optimizer: each rank has the state of its shard, and updates it. The `Ranks` of a host backend.

    For each segment of the gradient buffer, `bounds` has the start of each shard and the end of the last one, and
    `slices` has the elements of this rank.
    """

    def __init__(self, communicator: Communicator, state: OptimizerState, reduction: Reduction) -> None:
        self.communicator = communicator
        self.reduction: Reduction = reduction
        self._state = state
        self._digest: int | None = None
        self._options_fixed = False  # whether ranks compare options, or have compared them, for a step in progress

    # The methods of `Ranks` but `step`.

    def shard_of(self, buffers: dict[str, FlatBuffer]) -> Mapping[str, FlatBuffer]:
        """Return the buffers of this rank's shard: its parameters, the sum of their gradients, and the state.

        A group that was added has segments of its own in `buffers`, and each of them is divided among the ranks.
        """
        communicator, self._params, self._whole = self.communicator, buffers["params"], buffers["grads"]
        self._watched_params, self._watched_grads = Watch(self._params), Watch(self._whole)
        self._layout = self._whole.layout
        self.bounds = [communicator.bounds(segment.size) for segment in self._layout.segments]
        rank = communicator.rank
        self.slices = [slice(*bounds[rank : rank + 2].tolist()) for bounds in self.bounds]
        self._pieces: dict[int, tuple[list[int], NDArray[np.intp]]] = {}
        self._leaves: dict[int, BufferPart] = {}
        self._own: Mapping[str, FlatBuffer] = buffers
        if communicator.size > 1:
            self._exchanged = Exchanged(self._params, self._whole, self.slices)
            whole = self._exchanged.buffer
            segments = [segment[part] for segment, part in zip(whole.segments, self.slices, strict=True)]
            params = BufferPart(whole, self._layout.cut(self.slices), segments)
            self._own = ChainMap({"params": params, "grads": params.like()}, buffers)
        self._buckets = GradientBuckets(communicator, self._whole, self._own["grads"], self.bounds)
        return self._own

    def of_group(self, new: OptimizerState) -> "Shards":
        """Return the shards of a group that will be added."""
        return Shards(self.communicator, new, self.reduction)

    def run_with(self, run: RunCalls) -> RunCalls:
        """Return a function that makes kernel calls, and then all-gathers the parameters."""
        if self.communicator.size == 1:
            return run
        exchanged, bounds_of = self._exchanged, self.bounds

        def run_and_gather(calls: Sequence[Call]) -> Iterator[None]:
            exchanged.read_shard()
            yield from run(calls)
            for segment, bounds in zip(exchanged.buffer.segments, bounds_of, strict=True):
                self.communicator.all_gather(segment, bounds)
                yield
            exchanged.write()

        return run_and_gather

    def broadcast_params(self, first: int = 0) -> None:
        """Copy the parameters of rank 0 to all ranks, from segment number `first` on. All ranks call it together."""
        if self.communicator.size == 1:
            return
        self._exchanged.read()
        for segment in self._exchanged.buffer.segments[first:]:
            self.communicator.broadcast(segment)
        self._exchanged.write()

    def _refuse_changed(self, to_write: bool = True) -> None:
        """Raise StructureError if an array that is updated in place was changed, or is read-only and `to_write`."""
        if self._state.in_place and not to_write:
            self._params.segments  # noqa: B018 - reading raises
        elif self._state.in_place and (problems := changed_views(self._params, "params")):
            raise StructureError(problems[0])

    def add_up(self, numbers: NDArray[np.int64]) -> AddUp | None:
        """Return a function that sums the squared norms of these parameters across ranks, or None on one rank."""
        if self.communicator.size == 1:
            return None
        counts, order = self._pieces_of(numbers)
        first = sum(counts[: self.communicator.rank])
        mine = order[first : first + counts[self.communicator.rank]]

        def add_up(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            gathered = np.empty(len(order))
            self.communicator.control.Allgatherv(sums[mine], [gathered, counts])
            # Sequentially, in the order of ranks, so that all ranks get the same bits.
            whole = np.zeros(len(sums))
            np.add.at(whole, order, gathered)
            return whole

        return add_up

    def _pieces_of(self, numbers: NDArray[np.int64]) -> tuple[list[int], NDArray[np.intp]]:
        """Return the number of these parameters on each rank, and their places in `numbers`, rank by rank.

        A parameter may lie on several ranks.
        """
        key = int(numbers[0])
        if key not in self._pieces:
            leaves = [self._layout.leaves[k] for k in numbers]
            starts, stops = (np.array([getattr(leaf, end) for leaf in leaves]) for end in ("start", "stop"))
            bounds = self.bounds[leaves[0].segment]
            found = [
                np.flatnonzero(np.minimum(stops, high) > np.maximum(starts, low)) for low, high in pairwise(bounds)
            ]
            self._pieces[key] = [len(one) for one in found], np.concatenate(found)
        return self._pieces[key]

    def nonfinite_anywhere(self, nonfinite: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return for each parameter whether its gradient is not finite on any rank."""
        found = nonfinite.astype(np.uint8)
        self.communicator.allreduce_max(found)
        return found > 0

    def nonfinite_error(self, numbers: NDArray[np.intp]) -> NonfiniteError:
        """Return the error about the gradients of these parameters, with the counts of all ranks."""
        own = self._own["grads"].leaves
        counts = np.array([(np.isnan(own[k]).sum(), np.isinf(own[k]).sum()) for k in numbers], np.int64)
        self.communicator.allreduce_sum(counts)
        found_in = {}
        for k, (nans, infs) in zip(numbers, counts, strict=True):
            found_in[self._layout.leaves[k].path] = int(nans), int(infs), self._whole.leaves[k].size
        error = NonfiniteError.of_counts(found_in)
        self.communicator.all_raise(error)
        return error

    def options_change(self) -> None:
        """Record that options are about to change, or raise if ranks have compared them already."""
        self._digest = None
        if self._options_fixed:
            raise StepInProgressError(
                "options: expected changes between two steps, or by a function that the step calls on all ranks, got a "
                "change during a step, after the ranks compared their options, for example by a signal handler"
            )

    def refuse_copy(self) -> NoReturn:
        """Raise TypeError: the other shards are in other processes."""
        raise TypeError(
            "a ShardedRMSProp cannot be copied or pickled, because other processes hold its other parts; "
            "use state_dict() or save()"
        )

    # Facts: numbers that must be equal on all ranks.

    def facts(self, call: str, rates: list[float]) -> NDArray[np.float64]:
        """Return the numbers that must be equal on all ranks: call, digest of options, steps, learning rates."""
        if self._digest is None:
            groups = [
                {k: v for k, v in group.items() if k not in ("params", "lr")} for group in self._state.param_groups
            ]
            state = self._state
            options = groups, state.global_clip_norm, state.nonfinite, state.cache_dtype, self.reduction
            self._digest = zlib.crc32(repr(options).encode())
        return np.array([_CALLS.index(call), self._digest, self._state.counts.steps, *rates])

    def fixed_rates(self) -> list[float]:
        """Return the learning rate of each group, 0 for a function."""
        return [0.0 if callable(group["lr"]) else group["lr"] for group in self._state.param_groups]

    def check_facts(self, facts: NDArray[np.float64]) -> None:
        """Raise OptionError on all ranks if their facts differ."""
        gathered = self.communicator.control.allgather(facts)
        if others := [rank for rank, theirs in enumerate(gathered) if not np.array_equal(theirs, gathered[0])]:
            parts = {
                "options" if facts[0] == 0 else "options or kinds of state": slice(1, 2),
                "steps": slice(2, 3),
                "lr": slice(3, None),
            }
            differ = [name for name, part in parts.items() if any(
                not np.array_equal(gathered[rank][part], gathered[0][part]) for rank in others
            )]  # fmt: skip
            raise self.communicator.all_raise(OptionError(
                f"{' and '.join(differ)}: expected the same on all ranks, got different ones on "
                f"{named(others)} than on rank 0; nothing was changed"
            ))  # fmt: skip

    def prepare_meet(self) -> None:
        """Make the message that ranks exchange at the beginning of each call. All ranks call it at the same time."""
        leaves, facts = len(self._whole.leaves), len(self._state.param_groups) + _FACTS
        message = self.communicator.prepare_meet(2 + leaves + 2 * facts)
        # The reduction is a maximum. The facts are in it with both signs, for their maximum and their minimum.
        self._flags, self._present = message[:2], message[2 : 2 + leaves]
        self._largest, self._negated = message[2 + leaves : -facts], message[-facts:]

    def _meet(
        self, call: str, facts: NDArray[np.float64], present: NDArray[np.bool_], error: Exception | None = None
    ) -> tuple[bool, NDArray[np.bool_]]:
        """Begin a call on all ranks: compare errors and facts in one reduction, and raise on all ranks or none.

        `present` tells for each parameter whether it has a gradient on this rank. Return whether any rank has handed
        over gradients, and for each parameter whether it has a gradient on any rank.
        """
        self._flags[0], self._flags[1] = error is not None, self._buckets.begun
        self._present[:] = present
        self._largest[:], self._negated[:] = facts, -facts
        self.communicator.meet(call, self._state.counts.steps)
        failed, begun = self._flags
        smallest = -self._negated
        if self._largest[0] != smallest[0]:
            self.communicator.refuse_different(call)
        if failed or (self._largest != smallest).any():
            if begun:  # all ranks take part in reductions that one has begun
                self._buckets.finish()
            self.communicator.agree(error)
            self.check_facts(facts)
            raise AssertionError("ranks found a difference, and then none")
        return bool(begun), self._present > 0

    @contextmanager
    def together(self, turns: Turns, call: str) -> Iterator[bool]:
        """Return a context for a call of all ranks other than `step`.

        Its value is whether any rank has handed over gradients.
        """
        # No other call may come in between, not even a read, because reads exchange messages too.
        with turns.between_steps(call), self.communicator.leaving():
            facts = self.facts(call, self.fixed_rates())
            if call in ("discard", "load", "load_state_dict"):  # these may make ranks equal again
                facts[1:] = 0
            # All ranks send or receive the same state buffers, also the buffers of options that are off by now.
            facts[1] = zlib.crc32(repr((facts[1], sorted(self._state.buffers))).encode())
            error: Exception | None = None
            try:
                if call != "discard":
                    self._refuse_changed(to_write=call not in ("save", "state_dict"))
            except StructureError as caught:
                error = caught
            yield self._meet(call, facts, np.zeros(len(self._whole.leaves), bool), error)[0]

    # Gradients that are handed over one by one (`ShardedRMSProp.ready`).

    def hand_over(self, key: Hashable, grad: object) -> None:
        """Store one gradient, and begin the reductions that now have all their gradients."""
        k = self._state.layout.number_of(key)
        name = f"gradients{self._layout.leaves[k].path}"
        if self._buckets.ready[k]:
            raise StructureError(f"{name}: expected one call of ready() before each step, got a second one")
        part = self._leaf(k)
        if grad is None:
            part.flat = 0
        else:
            part.store(as_arrays([grad], part.layout, name))
        self._buckets.mark_ready(k, grad is not None)

    def discard(self) -> None:
        """Forget the gradients that were handed over. All ranks call it at the same time."""
        self._buckets.finish()

    def _leaf(self, k: int) -> BufferPart:
        """Return a buffer that aliases the gradient of one parameter."""
        if k not in self._leaves:
            leaf = self._layout.leaves[k]
            segment = self._whole.segments[leaf.segment][leaf.start : leaf.stop]
            self._leaves[k] = BufferPart(self._whole, Layout(self._whole.leaves[k]), [segment])
        return self._leaves[k]

    # Steps.

    @property
    def exchange(self) -> bool:
        """Whether the next step exchanges gradients with other ranks, or uses gradients that were handed over."""
        return self.communicator.size > 1 or self._buckets.begun

    def step(self, backend: HostBackend, gradients: object) -> None:
        """Exchange gradients with the other ranks, and let `backend` take the step."""
        self._options_fixed = False
        rates, present, error = self._prepare(backend, gradients)
        counts = self._state.counts
        try:  # not `leaving()`: a context manager costs a step too much
            counts.writing = self._options_fixed = True
            backend.take(Located(False, self._exchange(rates, present, error)), rates, backend.variant)
        except BaseException as caught:
            self.communicator.leave(caught)
            raise
        finally:
            counts.writing = self._options_fixed = False

    def _prepare(
        self, backend: HostBackend, gradients: object
    ) -> tuple[list[float], NDArray[np.bool_], Exception | None]:
        """Compute learning rates, and copy the gradients of this rank to the gradient buffer.

        Return the rates, for each parameter whether it has a gradient, and the error of this rank. `_meet` raises it.
        """
        handover, grads = self._buckets, self._whole
        present = np.ones(len(grads.leaves), bool)
        rates, error = [0.0] * len(self._state.param_groups), None
        from_buffer = gradients is None or gradients is grads.views
        try:
            # Functions of the user come first, because they may set options.
            found = backend.all_rates()
            arrays = None
            if handover.begun:
                self._check_handed_over(from_buffer)
                present = np.array(handover.present)
            elif not from_buffer:
                items = grads.layout.flatten(gradients, "gradients")
                arrays = as_arrays(items, grads.layout, "gradients", allow_none=True)
                present = np.array([array is not None for array in arrays])
            # From here on other calls and changes of options are refused, because ranks compare their options.
            self._state.counts.writing = self._options_fixed = True
            backend.use_options()
            refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
            backend.refuse_changed()
            # A function may have replaced itself by a number.
            rates = [each if callable(group["lr"]) else group["lr"]
                     for group, each in zip(self._state.param_groups, found, strict=True)]  # fmt: skip
            if arrays is not None:
                grads.store(arrays)
        except Exception as caught:
            error = caught
        return rates, present, error

    def _exchange(
        self, rates: list[float], present: NDArray[np.bool_], error: Exception | None
    ) -> NDArray[np.bool_] | None:
        """Reduce the gradients of all ranks, or raise on all ranks.

        Return for each parameter whether it has a gradient on any rank, or None if all have one.
        """
        handover, grads = self._buckets, self._whole
        begun, anywhere = self._meet("step", self.facts("step", rates), present, error)
        for k in np.flatnonzero(anywhere & ~present):
            grads.leaves[k][...] = 0
        if begun:
            handover.finish()
        if self.communicator.size > 1:
            for whole, own, bounds in zip(grads.segments, self._own["grads"].segments, self.bounds, strict=True):
                if not begun:
                    self.communicator.reduce_scatter(whole, own, bounds)
                if self.reduction == "mean":
                    with np.errstate(all="ignore"):
                        own /= own.dtype.type(self.communicator.size)
        return None if anywhere.all() else anywhere

    def _check_handed_over(self, from_buffer: bool) -> None:
        """Raise StructureError unless all gradients were handed over, and `step` got none."""
        leaves = self._whole.layout.leaves
        if not from_buffer:
            raise StructureError(
                "gradients: expected step() without an argument after ready(), got one; the gradients given to "
                "ready() are discarded"
            )
        if missing := [leaves[k].path for k, given in enumerate(self._buckets.ready) if not given]:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise StructureError(
                f"gradients: expected a call of ready() for every parameter before step(), got none for "
                f"{', '.join(missing[:10])}{more}; call ready(key, None) for a parameter without a gradient; the "
                "gradients given to ready() are discarded"
            )
