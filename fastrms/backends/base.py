"""The protocols that parts of an optimizer meet: a backend takes its steps, a memory holds the buffers of the host."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastrms._state import OptimizerState
from fastrms.backends.turns import Turns
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.checkpoints.state import Target
from fastrms.errors import NonfiniteError
from fastrms.kernels.norms import AddUp, SpanNorms

if TYPE_CHECKING:
    from fastrms.backends.host import HostBackend

__all__ = ["Backend", "Call", "Memory", "Ranks", "RunCalls"]


# A kernel and its arguments.
Call = tuple[Any, ...]

# Makes kernel calls while its result is iterated over.
RunCalls = Callable[[Sequence[Call]], Iterable[None]]


class Backend(Target, Protocol):
    """Where an optimizer has its buffers, and how it takes a step."""

    @property
    def turns(self) -> Turns:
        """The lock of the optimizer."""

    @property
    def thread_limit(self) -> int | None:
        """The number of threads to which a step is limited, or None where it is not."""

    @property
    def stream(self) -> Any:
        """The stream of all work on a GPU; None on the host."""

    @stream.setter
    def stream(self, value: Any) -> None: ...

    def synchronize(self) -> None:
        """Wait until all work on a GPU is done."""

    def step(self, gradients: Any) -> None:
        """Take one step with gradients in the structure of the parameters, or None for the gradient buffer.

        The caller holds the lock of `turns`.
        """

    def add_state(self, options: Iterable[Mapping[str, Any]]) -> None:
        """Make the state buffers that groups with these options need and that do not exist."""

    def check_kernel(self, value: Any) -> str:
        """Return the kernel that `value` names, if the optimizer can change to it."""

    def kernel_changed(self) -> None:
        """Follow `state.kernel` and `state.num_threads`."""

    def discard(self) -> None:
        """Remove files that the optimizer made, after an error in making it."""

    def refuse_copy(self) -> None:
        """Raise where the optimizer cannot be copied or pickled."""

    def state_on_host(self) -> OptimizerState:
        """Return the data of the optimizer with buffers in ordinary memory."""

    def explain(self) -> list[str]:
        """Say which kernel updates which parameters, and why, a line each."""


class Memory(Protocol):
    """Where a host backend has its buffers: in ordinary memory, or in mapped files."""

    @property
    def in_parts(self) -> bool:
        """Whether buffers may be larger than memory."""

    def new_buffer(self, name: str, layout: Layout) -> FlatBuffer:
        """Return a buffer of this layout, of zeros."""

    def run(self, calls: Sequence[Call]) -> Iterable[None]:
        """Make kernel calls while the result is iterated over."""

    def norms(self, spans: NDArray[np.int64]) -> SpanNorms:
        """Return an object that computes the norm of each span of the gradient buffer."""

    def parts(self, array: Array) -> Iterator[slice]:
        """Iterate over slices of an array, small enough to be in memory."""


class Ranks(Protocol):
    """The processes that share a host backend: each updates its own shard."""

    @property
    def exchange(self) -> bool:
        """Whether the next step exchanges gradients with other ranks."""

    def step(self, backend: "HostBackend", gradients: Any) -> None:
        """Exchange gradients with the other ranks, and let `backend` take the step."""

    def shard_of(self, buffers: dict[str, FlatBuffer]) -> Mapping[str, FlatBuffer]:
        """Return the buffers of which this process updates every element."""

    def run_with(self, run: RunCalls) -> RunCalls:
        """Return a function that runs kernel calls, and then sends the new parameters to all ranks."""

    def add_up(self, numbers: NDArray[np.int64]) -> AddUp | None:
        """Return a function that adds up sums of squares of these parameters over ranks, or None on one rank."""

    def nonfinite_anywhere(self, nonfinite: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which parameters have a gradient that is not finite on any rank."""

    def nonfinite_error(self, numbers: NDArray[np.intp]) -> NonfiniteError:
        """Return the error about the gradients of these parameters, with counts of all ranks."""

    def options_change(self) -> None:
        """Note that options are about to change, or raise where ranks have compared them already."""

    def refuse_copy(self) -> None:
        """Raise: the other shards are in other processes."""
