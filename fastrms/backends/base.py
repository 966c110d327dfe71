"""The interfaces of the parts of an optimizer: a backend takes its steps, a memory holds the buffers of the host."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrms._state import Counts, OptimizerState, optional_state
from fastrms._types import Options
from fastrms.backends.turns import Turns
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.errors import NonfiniteError
from fastrms.kernels.norms import AddUp, SpanNorms, combine

if TYPE_CHECKING:
    from fastrms.backends.at_once import AtOnce
    from fastrms.backends.host import HostBackend
    from fastrms.backends.one_by_one import OneByOne
    from fastrms.backends.storage import Storage

__all__ = ["Backend", "Call", "Memory", "Ranks", "RunCalls"]

# A kernel and its arguments.
Call = tuple[Any, ...]

# Makes kernel calls while its result is iterated over.
RunCalls = Callable[[Sequence[Call]], Iterable[None]]


class Backend(ABC):
    """The part of an optimizer that has its buffers and takes its steps; a `checkpoints.state.Target`.

    The methods that are not abstract are right for buffers in the memory of one process, without files.
    """

    at_once: "AtOnce | None" = None  # steps that need no lock
    one_by_one: "OneByOne[Any] | None" = None  # steps of one parameter at a time
    run_calls: RunCalls
    version: object  # of the options: another object after each change
    thread_limit: int | None = None  # the number of threads of a step
    in_parts: bool = False  # whether buffers may be larger than memory, and are read and written part by part
    storage: "Storage | None" = None  # the folder with the buffers

    def __init__(self, state: OptimizerState) -> None:
        self.state, self.turns = state, Turns(state.counts)

    # Steps.

    @abstractmethod
    def step(self, gradients: object) -> None:
        """Take one step with gradients in the structure of the parameters, or None for the gradient buffer.

        The caller holds the lock of `turns`.
        """

    def grad_norm(self) -> float | None:
        """Return the norm of all gradients of the last step, if the step computed it."""
        norms = self.settle_steps().last_norms
        return None if norms is None else combine(norms)

    def last_skipped(self) -> bool:
        """Tell whether the last step was skipped."""
        return self.settle_steps().last_skipped

    def forget_last_step(self) -> None:
        """Forget the norms of the last step, and whether it was skipped."""
        self.state.counts.last_norms, self.state.counts.last_skipped = None, False

    @abstractmethod
    def adding(self, new: OptimizerState) -> "AbstractContextManager[Memory]":
        """Return a context for adding a group: the memory for the buffers of `new`, which has none yet.

        Call `take_in` within the context. After an error in the context the optimizer is as before.
        """

    def ranks_of(self, new: OptimizerState) -> "Ranks | None":
        """Return the processes that share the buffers of a group to be added; None for this process alone."""
        return None

    def params_on_host(self, params: Any, name: str) -> Any:
        """Return new parameters with all arrays on the host, for a new group. Errors call the parameters `name`."""
        return params

    def take_in(self, new: OptimizerState, made: Mapping[str, FlatBuffer]) -> None:
        """Append the only group of a state with buffers on the host, as `OptimizerState.take_in`."""
        self.state.take_in(new, made)

    @property
    def decided(self) -> bool:
        """Whether the choice of the kernel has been made. On the host, "auto" makes it during training."""
        return True

    @abstractmethod
    def settle_parameters(self) -> None:
        """Prepare all that depends on the parameters, if groups were added or taken out."""

    def settle_steps(self) -> Counts:
        """Return the counts as `settle` does, except that `absent` may be that of an earlier step."""
        return self.settle()

    @abstractmethod
    def rates(self) -> list[float] | None:
        """Return the learning rate of each group, from functions too. Return None if no rate is a function."""

    def step_ended(self) -> None:  # noqa: B027 - a default
        """Record the end of a step that has been counted. Here nothing is recorded."""

    @abstractmethod
    def settle(self) -> Counts:
        """Return the counts, after the last step has been counted."""

    @abstractmethod
    def counts_changed(self) -> None:
        """Use the counts in `state` from the next step on. They were changed."""

    @abstractmethod
    def explain(self) -> list[str]:
        """Return a line for each group and dtype: which kernel updates it, and why."""

    # Options.

    @abstractmethod
    def options_changed(self) -> None:
        """Forget everything that was computed from options. The next step computes it again."""

    @abstractmethod
    def check_kernel(self, value: object) -> str:
        """Return the kernel that `value` names, or raise if the optimizer cannot change to it."""

    @abstractmethod
    def kernel_changed(self) -> None:
        """Use the kernel and the number of threads in `state`, from the next step on."""

    @property
    @abstractmethod
    def stream(self) -> Any:
        """The stream of all work on a GPU; None on the host."""

    @stream.setter
    @abstractmethod
    def stream(self, value: object) -> None: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work on a GPU is done."""

    # Buffers.

    @abstractmethod
    def new_buffer(self, name: str) -> FlatBuffer:
        """Return a state buffer of zeros."""

    def add_state(self, options: Iterable[Options]) -> None:
        """Make the state buffers that groups with these options need and that do not exist."""
        self.state.add_buffers(optional_state(options), self.new_buffer)

    @abstractmethod
    def read(self, segments: Sequence[Array]) -> Array:
        """Return segments of a buffer, joined in their order, as one array on the host."""

    @abstractmethod
    def write(self, segments: Sequence[Array], values: Array | float) -> None:
        """Set the elements of segments of a buffer to a number, or to an array such as `read` returns."""

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array that fit into memory; here one slice of the whole."""
        yield slice(None)

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for all writes of a load. Here it does nothing."""
        return nullcontext()

    def discard(self) -> None:  # noqa: B027 - a default
        """Remove new files after an error in making the optimizer. Here there are none."""

    # Copies and processes.

    def refuse_copy(self) -> None:  # noqa: B027 - a default
        """Raise if the optimizer cannot be copied or pickled. Here it can."""

    @abstractmethod
    def state_on_host(self) -> OptimizerState:
        """Return the data of the optimizer with buffers in the memory of the host."""

    @abstractmethod
    def after_fork(self) -> None:
        """Prepare the optimizer of a child process."""


class Memory(Protocol):
    """The memory of a host backend: ordinary memory, or mapped files."""

    @property
    def in_parts(self) -> bool:
        """Whether buffers may be larger than memory."""
        ...

    def new_buffer(self, name: str, layout: Layout) -> FlatBuffer:
        """Return a buffer of zeros with this layout. An opened folder returns the stored buffer."""
        ...

    def run(self, calls: Sequence[Call], /) -> Iterable[None]:
        """Return an iterator that makes one kernel call, or all its parts, for each item."""
        ...

    def norms(self, spans: NDArray[np.int64]) -> SpanNorms:
        """Return an object that computes the norm of each span of the gradient buffer."""
        ...

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array that fit into memory."""
        ...


class Ranks(Protocol):
    """The processes that share a host backend: each updates its own shard."""

    @property
    def exchange(self) -> bool:
        """Whether the next step exchanges gradients with other ranks."""
        ...

    def step(self, backend: "HostBackend", gradients: object) -> None:
        """Exchange gradients with the other ranks, and let `backend` take the step."""
        ...

    def of_group(self, new: OptimizerState) -> "Ranks":
        """Return the ranks that share the buffers of a group to be added."""
        ...

    def shard_of(self, buffers: dict[str, FlatBuffer]) -> Mapping[str, FlatBuffer]:
        """Return the buffers of this process. It updates all their elements."""
        ...

    def run_with(self, run: RunCalls) -> RunCalls:
        """Return a function that runs kernel calls, and then sends the new parameters to all ranks."""
        ...

    def add_up(self, numbers: NDArray[np.int64]) -> AddUp | None:
        """Return a function that adds up sums of squares of these parameters across ranks, or None on one rank."""
        ...

    def nonfinite_anywhere(self, nonfinite: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return for each parameter whether its gradient is not finite on any rank."""
        ...

    def nonfinite_error(self, numbers: NDArray[np.intp]) -> NonfiniteError:
        """Return the error about the gradients of these parameters, with counts of all ranks."""
        ...

    def options_change(self) -> None:
        """Note that options are about to change, or raise if ranks have compared them already."""
        ...

    def refuse_copy(self) -> None:
        """Raise TypeError: the other shards are in other processes."""
        ...
