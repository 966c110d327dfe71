"""`ShardedRMSProp`: `fastrms.RMSProp` divided among the ranks of an MPI program."""

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, Unpack, overload

from fastrms._checks import PARAMS_CHECKS, REDUCTIONS, check_flag, check_one_of
from fastrms._state import OptimizerState, Settings
from fastrms._types import CacheDType, HostKernel, LearningRate, ParamsCheck, Reduction
from fastrms.backends.making import add_group, new_sharded_backend
from fastrms.buffers.pytree import P, Params, PyTree
from fastrms.errors import OptionError, StepInProgressError, StructureError
from fastrms.kernels import check_host_kernel, threads
from fastrms.mpi.checkpoints import Unsharded
from fastrms.mpi.communicator import Communicator
from fastrms.mpi.ending import install_excepthook
from fastrms.mpi.shards import Shards
from fastrms.mpi.waiting import check_timeout, named
from fastrms.options import Group, Keywords

__all__ = ["ShardedRMSProp"]


class _Keywords(Keywords, total=False):
    """Keyword arguments of `ShardedRMSProp`, for type checkers."""

    kernel: HostKernel
    comm: Any
    reduction: Reduction
    check_params: ParamsCheck
    timeout: float | str | None
    in_place: bool


class ShardedRMSProp(Unsharded[P]):
    """RMSProp divided among P ranks of an MPI program. Each has 1/P of the state and computes 1/P of the update.

    Options and kernels are those of `fastrms.RMSProp`, and so are the bits for the same sums of gradients.
    ``docs/mpi.md`` lists the differences. All ranks make the optimizer, step, add groups, save and load together.

    Parameters
    ----------
    params : list, tuple, dict or ndarray, or any nesting of these, of float32 or float64 arrays
        As for `RMSProp`, including parameter groups. Each rank passes all parameters, with the same shapes.
    lr : float or callable, default 0.001
        Learning rate, >= 0, or a function of the number of steps taken so far. It is the same on all ranks.
    decay_rate : float, default 0.9
        Decay rate of the mean square, in [0, 1).
    epsilon : float, default 1e-8
        Constant that is added to the denominator, > 0.
    comm : mpi4py.MPI.Intracomm or None, default None
        The ranks that train together; None for MPI.COMM_WORLD. Messages use copies of the communicator.
    reduction : {"mean", "sum"}, default "mean"
        The reduction of the gradients of all ranks. The mean is right if the loss of each rank is a mean over the same
        number of rows. Otherwise use the sum, and scale the gradients of each rank by its share of the batch.
    check_params : {"broadcast", "raise"}, default "broadcast"
        With "broadcast", all ranks start from the values of rank 0, which are also written into arrays in place. With
        "raise", values that differ between ranks are an error.
    timeout : float, None or "auto", default "auto"
        Seconds that a rank waits for the others to make the same call (`step`, `save` and so on). After this time, each
        waiting rank reports where it waits and for which ranks, and all ranks are ended. 0 or None means no limit.
        "auto" means the value of the environment variable FASTRMS_MPI_TIMEOUT, or 600.
    in_place : bool, default False
        Update the given arrays of each rank in place, as `RMSProp` does. All ranks must pass the same value. The bits
        are the same as without it. Each of several ranks then keeps a flat copy of all parameters for the messages.
        This needs memory for one more copy of the parameters, and time in each step to copy them.
    **options
        The other options of `RMSProp`: momentum, clipping, `kernel`, `nonfinite` and so on. The default of
        `num_threads` is the number of cores of this rank, divided by the number of ranks that share them.

    Attributes
    ----------
    params, grads : the structure of `params`
        All parameters, and the gradients of this rank. They are views of flat buffers, and stay the same arrays. With
        `in_place`, the parameters are the given arrays.
    cache, momentum_buffer, grad_avg : the structure of `params`
        The state of this rank's shard. For each parameter, a 1-D array of its elements in the shard, in C order.
    buffers : mapping of str to FlatBuffer
        The flat buffers behind the views. State buffers contain only this rank's shard.
    rank, size : int
        The number of this rank, and the number of ranks.
    shard : list of slice
        For each segment of ``buffers["grads"]``, the elements that this rank updates, and whose state it has. There is
        a segment for each dtype, and further segments for each group that `add_param_group` added.
    timeout : float or None
        Seconds that this rank waits for the others. It can be set.

    Raises
    ------
    RankError
        Another rank could not make its optimizer, because `RMSProp` raised an error there. Or another rank calls
        `from_checkpoint` at the same time.
    StructureError
        The parameters of the ranks differ in structure, shapes or dtypes, or `check_params` or `in_place` differs. Or
        the parameters differ in values, and ``check_params="raise"`` is set.

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

    # As the overloads of `RMSProp`.
    @overload
    def __init__(
        self: "ShardedRMSProp[Any]",
        params: PyTree | Sequence[Group],
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: Literal["bfloat16"],
        **options: Unpack[_Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "ShardedRMSProp[list[Any]]",
        params: Sequence[Group],
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: CacheDType | None = ...,
        **options: Unpack[_Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self,
        params: P,
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: CacheDType | None = ...,
        **options: Unpack[_Keywords],
    ) -> None: ...
    @overload
    def __init__(
        self: "ShardedRMSProp[Any]",
        params: Params,
        lr: LearningRate = ...,
        decay_rate: float = ...,
        epsilon: float = ...,
        *,
        cache_dtype: CacheDType | None = ...,
        **options: Unpack[_Keywords],
    ) -> None: ...
    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        decay_rate: float = 0.9,
        epsilon: float = 1e-8,
        *,
        comm: Any = None,
        reduction: Reduction = "mean",
        check_params: ParamsCheck = "broadcast",
        timeout: float | str | None = "auto",
        in_place: bool = False,
        **options: Any,
    ) -> None:
        error: Exception | None = None
        try:
            seconds = check_timeout(timeout)
        except Exception as caught:  # `_agree` raises it on all ranks
            error, seconds = caught, check_timeout(None)
        self._ranks = Communicator(comm, "ShardedRMSProp", seconds)
        self._reduction: Reduction = reduction
        self._check_params: ParamsCheck = check_params
        if self._ranks.size > 1:
            install_excepthook()
        if options.get("num_threads") is None:
            options["num_threads"] = min(self._ranks.threads, threads.max_threads())
        with self._ranks.leaving():
            try:
                if error is None:
                    options |= {"lr": lr, "decay_rate": decay_rate, "epsilon": epsilon}
                    self._make(params, in_place, options)
            except Exception as caught:
                error = caught
            self._agree(error)
            self._shards.prepare_meet()
            if self._check_params == "broadcast":
                self._shards.broadcast_params()

    def _make(self, params: Params, in_place: object, options: dict[str, object]) -> None:
        """Check the arguments, and make state, shards and backend."""
        check_one_of("reduction", self._reduction, REDUCTIONS)
        check_one_of("check_params", self._check_params, PARAMS_CHECKS)
        in_place = check_flag("in_place", in_place)
        for name, kind in (("storage", "path"), ("stream", "stream")):
            if options.pop(name, None) is not None:
                raise OptionError(
                    f"{name}: expected None, because a ShardedRMSProp has its buffers in memory, got a {kind}"
                )
        settings = Settings.of(options)
        settings.check()
        check_host_kernel(settings.kernel)
        state = OptimizerState(params, settings, in_place)
        self._shards = Shards(self._ranks, state, self._reduction)
        self._start(new_sharded_backend(state, self._shards))

    def _agree(self, error: Exception | None, first: int = 0) -> None:
        """Raise on all ranks if one has an error, or if their parameters from number `first` on or options differ."""
        facts: tuple[object, ...] = ()
        if error is None:
            layout = self._state.layout
            leaves = [(leaf.path, leaf.shape, str(layout.dtype_of(leaf))) for leaf in layout.leaves]
            facts = leaves, self._check_params, self._state.in_place
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
        digests = self._ranks.agree(error, digest)
        if others := [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]:
            raise self._ranks.all_raise(StructureError(
                "params: expected the same structure, shapes, dtypes, check_params and in_place on all ranks, got "
                f"different ones on {named(others)} than on rank 0"
            ))  # fmt: skip
        # Learning rates that are functions are compared by each step.
        self._shards.check_facts(self._shards.facts("step", self._shards.fixed_rates()))
        if self._check_params == "raise":
            self._compare_params(first)

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        return self._ranks.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._ranks.size

    @property
    def reduction(self) -> Reduction:
        """The reduction of the gradients of all ranks, "sum" or "mean"."""
        return self._reduction

    @property
    def timeout(self) -> float | None:
        """Seconds that this rank waits for the others to make the same call, or None for no limit. It can be set."""
        return None if math.isinf(self._ranks.timeout) else self._ranks.timeout

    @timeout.setter
    def timeout(self, value: float | str | None) -> None:
        self._ranks.timeout = check_timeout(value)

    @property
    def shard(self) -> list[slice]:
        """The part of each segment of ``buffers["grads"]`` that this rank updates, and whose state it has."""
        return self._shards.slices

    def step(self, gradients: PyTree = None) -> P:
        """Take one step with the gradients of all ranks, and return the updated parameters, the same arrays as before.

        Parameters
        ----------
        gradients : the structure of the parameters, or None
            The gradients of this rank, as for `RMSProp.step`. If an item is None on all ranks, its parameter has no
            gradient. None on only some of the ranks counts as zeros. Without an argument, the step uses the gradients
            that were passed to `ready`. If there are none, it uses the gradients in `grads`.

        Returns
        -------
        params : the structure of the parameters
            `self.params`.

        Raises
        ------
        StructureError, DtypeError, OptionError, OptionTypeError
            As from `RMSProp.step`. Or only some gradients were passed to `ready`, or `gradients` was passed in
            addition. Or options, learning rates or numbers of steps differ between ranks.
        RankError
            One of these errors was raised on another rank.
        NonfiniteError
            The sum of the gradients has an inf or NaN, and `nonfinite` is "raise". This is raised on all ranks.

        Notes
        -----
        All ranks raise an error, or none. All errors are raised before the first write to parameters and state. After
        an error, gradients that were passed to `ready` are discarded.
        """
        return super().step(gradients)

    def ready(self, key: Hashable, grad: PyTree) -> None:
        """Pass one gradient while others are still being computed. Call `step()` after the last gradient.

        The reduction of a piece of the gradient buffer begins as soon as all gradients in the piece have been passed.
        The pieces are in the order of back-propagation, the last parameter first. The order of calls may differ between
        ranks.

        Parameters
        ----------
        key : int, str or other key, or tuple of these
            The index of the parameter in the list or dict. In nestings and groups, a tuple of indices, outermost first.
            For a single array, ``()``.
        grad : array or None
            The gradient, as an item of `gradients` in `step`. It is copied, unless it is the view in `grads`. None if
            the parameter has no gradient on this rank in this step.

        Raises
        ------
        StructureError
            `key` is unknown, its gradient was already passed in this step, or the shape is wrong.
        DtypeError
            As from `step`.
        """
        with self._turns.between_steps("ready"):
            self._shards.hand_over(key, grad)

    def discard(self) -> None:
        """Discard the gradients that were passed to `ready` since the last step. All ranks call it together."""
        with self._together("discard") as begun:
            if begun:
                self._shards.discard()

    def add_param_group(self, group: Group) -> None:
        """Add a parameter group, with its own buffers. All ranks call it together, with the same group.

        All existing views stay valid, as with `RMSProp.add_param_group`. The state of the new group is divided among
        the ranks. `check_params` applies to the new parameters. With `in_place`, the new arrays are updated in place,
        too. Each added group needs its own messages in every step, but the groups of the constructor share messages. So
        pass small groups to the constructor if you know them at the start.

        Parameters
        ----------
        group : dict
            As for `RMSProp.add_param_group`.

        Raises
        ------
        FastrmsError
            As from the constructor, for the new group. Or the groups of the ranks differ.
        StepInProgressError
            Gradients of the next step were passed to `ready` on any rank. They are kept.
        RankError
            One of these errors was raised on another rank.

        Notes
        -----
        All ranks raise an error, or none. After an error, nothing has changed.
        """
        with self._together("add_param_group") as begun:
            error: Exception | None = None
            undo = self._state.undo()
            parameters, segments = len(self._state.layout.leaves), len(self._shards.bounds)
            try:
                try:
                    if begun:
                        raise StepInProgressError(
                            "add_param_group: expected a call between two steps, got one after gradients were passed "
                            "to ready(); call step() or discard() on all ranks first"
                        )
                    add_group(self._backend, group)
                except Exception as caught:
                    error = caught
                self._agree(error, parameters)
                self._shards.prepare_meet()
            except BaseException:
                undo()
                self._backend.settle_parameters()
                if self.size == 1:  # after Ctrl-C, which ends several ranks
                    self._shards.prepare_meet()
                raise
            if self._check_params == "broadcast":
                self._shards.broadcast_params(segments)

    def _compare_params(self, first: int) -> None:
        """Raise StructureError on all ranks if parameters from number `first` on differ from those of rank 0."""
        views = self.buffers["params"].leaves[first:]
        own = [hashlib.blake2b(view.tobytes(), digest_size=8).digest() for view in views]
        theirs = self._ranks.control.bcast(own)
        different = [k for k, (a, b) in enumerate(zip(own, theirs, strict=True), first) if a != b]
        first_different = self._ranks.control.allgather(different[:1])
        others = [rank for rank, numbers in enumerate(first_different) if numbers]
        if others:
            path = self.buffers["params"].layout.leaves[first_different[others[0]][0]].path
            raise self._ranks.all_raise(StructureError(
                f"params{path}: expected the same values on all ranks, got different ones on {named(others)} than on "
                'rank 0; check_params="broadcast" starts all ranks from the values of rank 0'
            ))  # fmt: skip

    def __repr__(self) -> str:
        return f"Sharded{super().__repr__()[:-1]}, rank={self.rank} of {self.size})"
