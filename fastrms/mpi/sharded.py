"""`ShardedRMSProp`: `fastrms.RMSProp` over the ranks of an MPI program."""

import hashlib
import math
import zlib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise, starmap
from operator import call
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import LearningRate, check_one_of
from fastrms.backends.plan import Run
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.flat import as_arrays, views_of
from fastrms.buffers.replaced import refuse_replaced
from fastrms.errors import NonfiniteError, OptionError, StepInProgressError, StructureError
from fastrms.kernels import threads
from fastrms.kernels.norms import AddUp
from fastrms.mpi.buckets import Handover
from fastrms.mpi.checkpoints import Unsharded
from fastrms.mpi.communicator import Bounds, Ranks, check_timeout, end_together, named
from fastrms.optimizer import RMSProp

__all__ = ["ShardedRMSProp"]

Array = NDArray[Any]

_REDUCTIONS = ("mean", "sum")
_CHECKS = ("broadcast", "raise")
_CALLS = ("step", "discard", "state_dict", "load_state_dict", "save", "load")


class ShardedRMSProp(Unsharded, RMSProp):  # type: ignore[misc] # from_checkpoint has no storage
    """RMSProp over the ranks of an MPI program, each of which has 1/P of the state and does 1/P of the update.

    As `fastrms.RMSProp`, with the same options, kernels and bits; ``docs/mpi.md`` has what is different. All ranks
    make the optimizer, step, load and save at the same time.

    Parameters
    ----------
    params : list, tuple, dict or ndarray, or any nesting of these, of float32 or float64 arrays
        As for `RMSProp`, parameter groups too. Each rank gives all of them, with the same shapes.
    lr : float or callable, default 0.001
        Learning rate, >= 0, or a function of the number of steps taken so far; the same on all ranks.
    decay_rate : float, default 0.9
        Decay rate of the mean square, in [0, 1).
    epsilon : float, default 1e-8
        Added to the denominator, > 0.
    comm : mpi4py.MPI.Intracomm or None, default None
        The ranks that train together; None for MPI.COMM_WORLD. Messages go through copies of it.
    reduction : {"mean", "sum"}, default "mean"
        How the ranks' gradients are combined. The mean is right if each rank's loss is a mean over the same number of
        rows. If ranks have different numbers of rows, use the sum, and scale each gradient by the rank's share of the
        batch.
    check_params : {"broadcast", "raise"}, default "broadcast"
        Whether all ranks start from the values of rank 0, or values have to be the same.
    timeout : float, None or "auto", default "auto"
        Seconds that a rank waits for the others to come to the same call (`step`, `save` and so on). Then each rank
        that waits writes where it waits and for which ranks, and all ranks are ended. 0 or None: they wait for ever.
        "auto": as the environment variable FASTRMS_MPI_TIMEOUT says, or 600.
    **options
        All others of `RMSProp`: momentum, clipping, `kernel`, `nonfinite` and so on. `num_threads` is by default what
        this rank may use: its cores, shared with the other ranks that may run on them.

    Attributes
    ----------
    params, grads : the structure of `params`
        All parameters, and the gradients of this rank; views of flat buffers, the same for the optimizer's life.
    cache, momentum_buffer, grad_avg : the structure of `params`
        State of this rank's shard: for each parameter a 1-D array of those of its elements that lie there, in C order.
    buffers : dict of str to FlatBuffer
        The flat buffers behind the views; those of the state are of this rank's shard.
    rank, size : int
        The number of this rank, and how many there are.
    shard : list of slice
        Which elements of each segment of the flat buffers are this rank's.
    timeout : float or None
        Seconds that this rank waits for the others; may be set.

    Raises
    ------
    RankError
        Another rank could not make its optimizer. There the error is one of those of `RMSProp`. Or this rank makes the
        optimizer, and another one calls `from_checkpoint`.
    StructureError
        Ranks have parameters of different structure, shapes or dtypes, or with ``check_params="raise"`` values.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms.mpi import ShardedRMSProp
    >>> opt = ShardedRMSProp([np.array([1.0, 2.0])], lr=0.1)    # here there is one rank, as without mpiexec
    >>> opt.step([np.array([0.5, -0.5])])
    [array([0.68377225, 2.31622775])]
    >>> opt.ready(0, np.array([0.0, 0.0]))
    >>> _ = opt.step()
    """

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        decay_rate: float = 0.9,
        epsilon: float = 1e-8,
        *,
        comm: Any = None,
        reduction: str = "mean",
        check_params: str = "broadcast",
        timeout: float | str | None = "auto",
        **options: Any,
    ) -> None:
        error: Exception | None = None
        try:
            seconds = check_timeout(timeout)
        except Exception as caught:  # which the others are told, as of all errors
            error, seconds = caught, check_timeout(None)
        self._ranks = Ranks(comm, "ShardedRMSProp", seconds)
        self._reduction = reduction
        if self._ranks.size > 1:
            end_together()
        if options.get("num_threads") is None:
            options["num_threads"] = min(self._ranks.threads, threads.max_threads())
        with self._ranks.leaving():
            try:
                if error is None:
                    check_one_of("reduction", reduction, _REDUCTIONS)
                    check_one_of("check_params", check_params, _CHECKS)
                    if options.get("storage") is not None:
                        raise OptionError(
                            "storage: expected None, as a ShardedRMSProp has its buffers in memory, got a path"
                        )
                    super().__init__(params, lr, decay_rate, epsilon, **options)
            except Exception as caught:
                error = caught
            leaves = () if error is not None else self._params.layout.leaves
            facts = [(leaf.path, leaf.shape, str(self._params.layout.dtype_of(leaf))) for leaf in leaves]
            digest = hashlib.blake2b(repr((facts, check_params)).encode(), digest_size=8).hexdigest()
            digests = self._ranks.agree(error, digest)
            if others := [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]:
                raise self._ranks.all_raise(StructureError(
                    "params: expected the same structure, shapes, dtypes and check_params on all ranks, got others "
                    f"than on rank 0 on {named(others)}"
                ))  # fmt: skip
            # Functions are not called yet: steps compare what they return.
            facts_of_step = self._facts("step", self._fixed_rates())
            self._check_facts(facts_of_step)
            self._ranks.prepare_meet(2 + len(leaves) + 2 * len(facts_of_step))
            if check_params == "raise":
                self._compare_params()
            else:
                self._broadcast_params()

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self._ranks.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._ranks.size

    @property
    def reduction(self) -> str:
        """What becomes of the gradients of the ranks: their "sum" or "mean"."""
        return self._reduction

    @property
    def timeout(self) -> float | None:
        """Seconds that this rank waits for the others to come to the same call, or None for no end; may be set."""
        return None if math.isinf(self._ranks.timeout) else self._ranks.timeout

    @timeout.setter
    def timeout(self, value: float | str | None) -> None:
        self._ranks.timeout = check_timeout(value)

    @property
    def shard(self) -> list[slice]:
        """Which elements of each segment of the flat buffers this rank updates and has the state of."""
        return [slice(*bounds[self.rank : self.rank + 2].tolist()) for bounds in self._bounds]

    @cached_property
    def _bounds(self) -> list[Bounds]:
        return [self._ranks.bounds(segment.size) for segment in self.buffers["params"].layout.segments]

    @cached_property
    def _own(self) -> Mapping[str, FlatBuffer]:
        """The shard: its parameters, which lie where all do, the sum of their gradients, and the state."""
        if self.size == 1:
            return self.buffers
        whole = self.buffers["params"]
        segments = [segment[part] for segment, part in zip(whole.segments, self.shard, strict=True)]
        params = _Part(whole, self._shard_layout(), segments)
        return ChainMap({"params": params, "grads": params.like()}, self.buffers)

    def _shard_layout(self) -> Layout:
        """The layout of this rank's shard: the same leaves, of each of which it has some elements, or none."""
        layout = self.buffers["params"].layout
        pieces = []
        for leaf in layout.leaves:
            shard = self.shard[leaf.segment]
            size = max(0, min(leaf.stop, shard.stop) - max(leaf.start, shard.start))
            pieces.append(np.broadcast_to(np.zeros((), layout.dtype_of(leaf)), (size,)))
        return Layout(layout.structure(pieces))

    @cached_property
    def _handover(self) -> Handover:
        return Handover(self._ranks, self.buffers["grads"], self._own["grads"], self._bounds)

    @cached_property
    def _numbers(self) -> dict[Any, int]:
        """The number of each leaf by its keys, from the outermost to its own; a single one stands for itself."""
        layout = self.buffers["params"].layout
        numbers: dict[Any, int] = {}

        def walk(tree: Any, keys: tuple[Any, ...]) -> None:
            if isinstance(tree, int):
                numbers[keys] = tree
                return
            for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
                walk(item, (*keys, key))

        walk(layout.structure(range(len(layout.leaves))), ())
        return numbers | {keys[0]: k for keys, k in numbers.items() if len(keys) == 1}

    def _connect(self) -> None:
        self._pieces: dict[int, tuple[list[int], NDArray[np.intp]]] = {}
        self._leaves: dict[int, _Part] = {}
        super()._connect()
        self._in_memory = self.size == 1

    def _add_state(self, options: Sequence[Mapping[str, Any]]) -> None:
        self._refuse_options_in_an_exchange()
        super()._add_state(options)

    def _kernel_changed(self) -> None:
        self._refuse_options_in_an_exchange()
        super()._kernel_changed()

    def _options_changed(self) -> None:
        self._refuse_options_in_an_exchange()
        super()._options_changed()
        self._digest: int | None = None

    # Whether a step is in progress for which the ranks compare, or have compared, their options.
    _options_fixed = False

    def _refuse_options_in_an_exchange(self) -> None:
        if self._turn.locked() and self._options_fixed:
            raise StepInProgressError(
                "options: expected to be set between two steps, or by a function that the step calls on all ranks, got "
                "a change in the midst of a step, after the ranks have compared their options, as a signal handler can "
                "make it"
            )

    # Making sure that all ranks do the same.

    def _facts(self, call: str, rates: list[float]) -> NDArray[np.float64]:
        """Numbers that have to be the same on all ranks; the first says which call this is, the last are the rates."""
        if self._digest is None:
            groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.param_groups]
            options = (groups, self._global_clip_norm, self._nonfinite, self._cache_dtype, self._reduction)
            self._digest = zlib.crc32(repr(options).encode())
        return np.array([_CALLS.index(call), self._digest, self.steps, *rates])

    def _fixed_rates(self) -> list[float]:
        return [0.0 if callable(group["lr"]) else group["lr"] for group in self.param_groups]

    def _check_facts(self, facts: NDArray[np.float64]) -> None:
        """Raise on all ranks where facts differ."""
        told = self._ranks.control.allgather(facts)
        if others := [rank for rank, theirs in enumerate(told) if not np.array_equal(theirs, told[0])]:
            parts = {
                "options" if facts[0] == 0 else "options or kinds of state": slice(1, 2),
                "steps": slice(2, 3),
                "lr": slice(3, None),
            }
            differ = [name for name, part in parts.items() if any(
                not np.array_equal(told[rank][part], told[0][part]) for rank in others
            )]  # fmt: skip
            raise self._ranks.all_raise(OptionError(
                f"{' and '.join(differ)}: expected the same on all ranks, got others than on rank 0 on "
                f"{named(others)}; nothing was changed"
            ))  # fmt: skip

    def _meet(
        self, call: str, facts: NDArray[np.float64], present: NDArray[np.bool_], error: Exception | None = None
    ) -> tuple[bool, NDArray[np.bool_]]:
        """Tell all ranks, in one message, what each has to know of the others before it goes on; or raise on all.

        Returns whether any rank has begun to hand over gradients, and for which parameters any has a gradient.
        """
        # Facts are told with both signs: they are the same everywhere if the largest and the smallest are.
        told, count = self._ranks.told, len(facts)
        told[0], told[1] = error is not None, self._handover.begun
        told[2 : -2 * count], told[-2 * count : -count], told[-count:] = present, facts, -facts
        self._ranks.meet(call, self.steps)
        failed, begun = told[:2]
        largest, smallest = told[-2 * count : -count], -told[-count:]
        if largest[0] != smallest[0]:
            self._ranks.refuse_different(call)
        if failed or (largest != smallest).any():
            if begun:  # what one rank has begun, all have to
                self._handover.finish()
            self._ranks.agree(error)
            self._check_facts(facts)
            raise AssertionError("ranks found that they differ, and then that they do not")
        return bool(begun), told[2 : -2 * count] > 0

    @contextmanager
    def _together(self, call: str) -> Iterator[bool]:
        """What all ranks do together, in a call other than `step`."""
        # Nobody may come in between, not even to read, as that is an exchange of its own.
        with self._between_steps(call), self._ranks.leaving():
            facts = self._facts(call, self._fixed_rates())
            if call in ("discard", "load", "load_state_dict"):  # which may well be there to mend what differs
                facts[1:] = 0
            # Whoever had an option on has its state, which all send or receive.
            facts[1] = zlib.crc32(repr((facts[1], sorted(self.buffers))).encode())
            yield self._meet(call, facts, np.zeros(len(self._grads.leaves), bool))[0]

    def _compare_params(self) -> None:
        own = [hashlib.blake2b(view.tobytes(), digest_size=8).digest() for view in self._params.leaves]
        first = self._ranks.control.bcast(own)
        different = [k for k, (a, b) in enumerate(zip(own, first, strict=True)) if a != b]
        told = self._ranks.control.allgather(different[:1])
        others = [rank for rank, numbers in enumerate(told) if numbers]
        if others:
            path = self._params.layout.leaves[told[others[0]][0]].path
            raise self._ranks.all_raise(StructureError(
                f"params{path}: expected the same values on all ranks, got others than on rank 0 on {named(others)}; "
                'check_params="broadcast" starts all ranks from those of rank 0'
            ))  # fmt: skip

    def _broadcast_params(self) -> None:
        for segment in self._params.segments:
            self._ranks.broadcast(segment)

    # Steps.

    def step(self, gradients: Any = None) -> Any:
        """Take one step with the gradients of all ranks and return the updated parameters, the same views as before.

        Parameters
        ----------
        gradients : the structure of the parameters, or None
            Those of this rank, as for `RMSProp.step`. Where an item is None on all ranks, its parameter is skipped;
            on some, it counts as zeros there. Without an argument the step uses what was handed over to `ready`, and
            if nothing was, what was written to `grads`.

        Returns
        -------
        params : the structure of the parameters
            `self.params`.

        Raises
        ------
        StructureError, DtypeError, OptionError, OptionTypeError
            As from `RMSProp.step`; or gradients were handed over to `ready` and are given here too, or some of them
            were not handed over; or options, learning rates or the number of steps differ between ranks.
        RankError
            One of these on another rank.
        NonfiniteError
            On all ranks: the sum of the gradients has an inf or NaN, and `nonfinite` is "raise".

        Notes
        -----
        All ranks raise or none. All errors come before the first write to parameters and state. Gradients that were
        handed over are forgotten then.
        """
        return super().step(gradients)

    def ready(self, key: Any, grad: Any) -> None:
        """Hand over one gradient, while the others are still computed; `step()` follows when all were handed over.

        What a rank adds up with the others begins as soon as all gradients of a piece of the buffer are there, the
        last parameter first, as back-propagation finds them. The order of the calls may differ between ranks.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            The place in the list or dict of parameters; for nestings and groups a tuple, from the outermost key to
            the innermost. ``()`` where `params` is a single array.
        grad : array or None
            As an item of what `step` takes; copied, unless it is the view in `grads`. None for a parameter without a
            gradient on this rank, in this step.

        Raises
        ------
        StructureError
            There is no such parameter, its gradient was handed over already, or has another shape.
        DtypeError
            As from `step`.
        """
        with self._between_steps("ready"):
            try:
                k = self._numbers[key]
            except (KeyError, TypeError):
                keys = [keys[0] if len(keys) == 1 else keys for keys in self._numbers if isinstance(keys, tuple)]
                known = ", ".join(map(repr, keys[:10])) + (f", ... ({len(keys)} in all)" if len(keys) > 10 else "")
                raise StructureError(f"key: expected one of {known}, got {key!r}") from None
            name = f"gradients{self._grads.layout.leaves[k].path}"
            if self._handover.given[k]:
                raise StructureError(f"{name}: expected once before each step, got it a second time")
            part = self._leaf(k)
            if grad is None:
                part.flat = 0
            else:
                part.store(as_arrays([grad], part.layout, name))
            self._handover.give(k, grad is not None)

    def discard(self) -> None:
        """Forget the gradients that were handed over since the last step; all ranks do so at the same time."""
        with self._together("discard") as begun:
            if begun:
                self._handover.finish()

    def _leaf(self, k: int) -> "_Part":
        """The gradient of one parameter, as a buffer, which checks and stores as others do."""
        if k not in self._leaves:
            whole = self._grads
            leaf = whole.layout.leaves[k]
            segment = whole.segments[leaf.segment][leaf.start : leaf.stop]
            self._leaves[k] = _Part(whole, Layout(whole.leaves[k]), [segment])
        return self._leaves[k]

    def _step(self, gradients: Any) -> Any:
        if self.size == 1 and not self._handover.begun:
            return super()._step(gradients)
        self._options_fixed = False
        rates, present, error = self._look_at(gradients)
        try:  # not `leaving()`, which a step would notice
            self._counts.writing = self._options_fixed = True
            anywhere = self._exchange(rates, present, error)
            kernel = self._kernel if self._tuner is None else self._tuner.kernel
            calls = self._calls_for(rates, kernel, anywhere, None)
            if calls is None:
                self.skipped_steps += 1
            else:
                self._run(calls, None if anywhere is None else ~anywhere)
        except BaseException as caught:
            self._ranks.leave(caught)
            raise
        finally:
            self._counts.writing = self._options_fixed = False
        if self._tuner is not None:
            self._tuner.step_done()
        return self._params.views

    def _elsewhere(self, calls: list[Any]) -> Iterable[None]:
        yield from starmap(call, calls)
        for segment, bounds in zip(self._params.segments, self._bounds, strict=True):
            self._ranks.all_gather(segment, bounds)
            yield

    def _look_at(self, gradients: Any) -> tuple[list[float], NDArray[np.bool_], Exception | None]:
        """Store this rank's gradients, unless something is wrong with them.

        Returns the learning rates, for which parameters there are gradients, and what is wrong.
        """
        handover, grads = self._handover, self._grads
        present = np.ones(len(grads.leaves), bool)
        rates = [0.0] * len(self.param_groups)
        from_buffer = gradients is None or gradients is grads.views
        try:
            # First what may call functions of the user's.
            found = self._rates()
            arrays = None
            if handover.begun:
                self._refuse_half(from_buffer)
                present = np.array(handover.present)
            elif not from_buffer:
                items = grads.layout.flatten(gradients, "gradients")
                arrays = as_arrays(items, grads.layout, "gradients", allow_none=True)
                present = np.array([array is not None for array in arrays])
            # From here on no other call may come in between, and no option may be set: ranks compare them.
            self._counts.writing = self._options_fixed = True
            if self._taken is not self._version:
                self._take_options()
            refuse_replaced(self._watched_params, self._watched_grads if from_buffer else None)
            # A function may have put a number in its own place.
            rates = [each if callable(group["lr"]) else group["lr"]
                     for group, each in zip(self.param_groups, found, strict=True)]  # fmt: skip
            if arrays is not None:
                grads.store(arrays)
        except Exception as caught:
            return rates, present, caught
        return rates, present, None

    def _exchange(
        self, rates: list[float], present: NDArray[np.bool_], error: Exception | None
    ) -> NDArray[np.bool_] | None:
        """Add up the gradients of all ranks, or raise on all; return which parameters have one anywhere (None: all)."""
        handover, grads = self._handover, self._grads
        begun, anywhere = self._meet("step", self._facts("step", rates), present, error)
        for k in np.flatnonzero(anywhere & ~present):
            grads.leaves[k][...] = 0
        if begun:
            handover.finish()
        for whole, own, bounds in zip(grads.segments, self._own["grads"].segments, self._bounds, strict=True):
            if self.size > 1 and not begun:
                self._ranks.reduce(whole, own, bounds)
            if self._reduction == "mean" and self.size > 1:
                with np.errstate(all="ignore"):
                    own /= own.dtype.type(self.size)
        return None if anywhere.all() else anywhere

    def _refuse_half(self, from_buffer: bool) -> None:
        """Raise where gradients were handed over, but not all of them, or others come with the step."""
        leaves = self._grads.layout.leaves
        if not from_buffer:
            raise StructureError(
                "gradients: expected step() without an argument after ready(), got one; what was handed over is "
                "forgotten"
            )
        if missing := [leaves[k].path for k, given in enumerate(self._handover.given) if not given]:
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise StructureError(
                f"gradients: expected all of them to be handed over to ready() ahead of step(), got none for "
                f"{', '.join(missing[:10])}{more}; hand over None for a parameter without a gradient; what was handed "
                "over is forgotten"
            )

    # What a step asks of all gradients together.

    def _add_up_of(self, run: Run) -> AddUp | None:
        if self.size == 1:
            return None
        counts, order = self._pieces_of(run)
        first = sum(counts[: self.rank])
        mine = order[first : first + counts[self.rank]]

        def add_up(sums: NDArray[np.float64]) -> NDArray[np.float64]:
            told = np.empty(len(order))
            self._ranks.control.Allgatherv(sums[mine], [told, counts])
            # In the order of ranks, and one after another, so that all ranks have the same bits.
            whole = np.zeros(len(sums))
            np.add.at(whole, order, told)
            return whole

        return add_up

    def _pieces_of(self, run: Run) -> tuple[list[int], NDArray[np.intp]]:
        """How many parameters of the run each rank has a piece of, and which, counted in the run."""
        if id(run) not in self._pieces:
            leaves = [self._grads.layout.leaves[k] for k in run.numbers]
            starts, stops = (np.array([getattr(leaf, end) for leaf in leaves]) for end in ("start", "stop"))
            bounds = self._bounds[leaves[0].segment]
            found = [
                np.flatnonzero(np.minimum(stops, high) > np.maximum(starts, low)) for low, high in pairwise(bounds)
            ]
            self._pieces[id(run)] = [len(one) for one in found], np.concatenate(found)
        return self._pieces[id(run)]

    def _not_finite(self, kernel: str, in_place: bool, present: NDArray[np.bool_] | None) -> NDArray[np.intp]:
        found = np.zeros(len(self._skipped), np.uint8)
        found[super()._not_finite(kernel, in_place, present)] = 1
        self._ranks.take_largest(found)
        return np.flatnonzero(found)

    def _error_about(self, wrong: NDArray[np.intp], found: tuple[Any, ...] | None) -> NonfiniteError:
        own = self._own["grads"].leaves
        counts = np.array([(np.isnan(own[k]).sum(), np.isinf(own[k]).sum()) for k in wrong], np.int64)
        self._ranks.add_up(counts)
        found_in = {}
        for k, (nans, infs) in zip(wrong, counts, strict=True):
            found_in[self._grads.layout.leaves[k].path] = int(nans), int(infs), self._grads.leaves[k].size
        error = NonfiniteError.of_counts(found_in)
        self._ranks.all_raise(error)
        return error

    def _refuse_copy(self) -> NoReturn:
        raise TypeError(
            "a ShardedRMSProp cannot be copied or pickled, as its other parts are in other processes: "
            "use state_dict() or save()"
        )

    def __repr__(self) -> str:
        return f"Sharded{super().__repr__()[:-1]}, rank={self.rank} of {self.size})"


class _Part(FlatBuffer):
    """A buffer whose segments lie in those of another one."""

    def __init__(self, whole: FlatBuffer, layout: Layout, segments: Sequence[Array]) -> None:
        self.layout, self.segments = layout, tuple(segments)
        self._memory, self.block = whole._memory, whole.block
        self.leaves = tuple(views_of(self.segments, layout))
        self.views = layout.structure(self.leaves)
