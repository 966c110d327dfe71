"""Steps that are taken one parameter at a time, so that a program need not hold all gradients at once."""

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastrms._state import Counts, OptimizerState
from fastrms.backends import plan
from fastrms.backends.base import Backend, Call
from fastrms.backends.plan import Run
from fastrms.buffers import Layout
from fastrms.buffers.conversion import as_array
from fastrms.buffers.replaced import changed_views
from fastrms.errors import DtypeError, OptionError, StructureError

__all__ = ["OneByOne", "Parameter", "SortedRows"]

B = TypeVar("B", bound=Backend)


class SortedRows(NamedTuple):
    """Rows of a parameter, sorted, and the gradients of each.

    The gradients of row ``numbers[k]`` are ``order[first[k]]``, ..., ``order[first[k + 1] - 1]``, in the order in which
    they are added up. The gradients of the last row end with the last item of `order`.
    """

    numbers: NDArray[np.int64]
    order: NDArray[np.int64]
    first: NDArray[np.int64]

    @property
    def repeated(self) -> bool:
        """Whether a row has several gradients."""
        return len(self.numbers) < len(self.order)

    @property
    def sources(self) -> NDArray[np.int64]:
        """For each row the index of its gradient, or of its sum if rows are repeated."""
        return np.arange(len(self.numbers)) if self.repeated else self.order


class OneByOne(Generic[B]):
    """Updates one parameter of a backend at a time. A step is counted when every parameter was updated."""

    def __init__(self, kind: type["Parameter[B]"]) -> None:
        self._kind = kind
        self._parameters: dict[int, Parameter[B]] = {}
        # Of the step in progress: which parameters have no gradient, and by group the option lr and its present rate.
        self._missing: NDArray[np.bool_] = np.zeros(0, bool)
        self._schedules: list[Any] = []
        self._rates: list[float] | None = None

    def update(self, backend: B, number: int, gradient: Any, rows: Any = None) -> None:
        """Update one parameter, or some of its rows. Count the step if this was the last parameter.

        The caller holds the lock of `Backend.turns`.
        """
        state = backend.state
        counts = state.counts
        _refuse_options(state)
        self._kind.begin(backend)
        parameter = self._parameters.get(number)
        if parameter is None:
            parameter = self._parameters[number] = self._kind(backend, number)
        updated = counts.updated
        if updated is None:
            self._rates = backend.rates()  # first, because functions of the user may set options
            self._schedules = [group["lr"] for group in state.param_groups]
            self._missing, updated = np.zeros(len(counts.absent), bool), np.zeros(len(counts.absent), bool)
        elif updated[number]:
            raise StructureError(
                f"gradients{parameter.path}: expected one gradient for each parameter in a step, got a second one; add "
                f"them up, or end the step with finish_step(): {int(updated.sum())} of {len(updated)} parameters were "
                "updated"
            )
        parameter.refuse_replaced(state)
        calls: list[Call] = []
        found = None if gradient is None else parameter.find(backend, gradient, rows)
        version = None
        while found is not None and version is not backend.version:  # a signal handler may set options meanwhile
            version = backend.version
            calls = parameter.calls(backend, found, self._rates, self._schedules)
        self._missing[number] = found is None
        work = backend.run_calls(calls)
        last = np.count_nonzero(updated) == len(updated) - 1
        backend.forget_last_step()
        counts.writing = True
        # As in `HostBackend.take`, one statement updates and counts.
        if last:
            steps, absent, memory = counts.steps + 1, counts.absent + self._missing, counts.memory
            _, memory[0], counts.absent, counts.updated, counts.writing = [*work], steps, absent, None, False
            backend.step_ended()
        else:
            _, updated[number], counts.updated, counts.writing = [*work], True, updated, False

    def finish(self, backend: B) -> None:
        """End the step, with no gradient for the parameters that were not updated. Do nothing between two steps."""
        counts = backend.state.counts
        updated = counts.updated
        if updated is not None:
            self._kind.begin(backend)
            memory, steps, absent = counts.memory, counts.steps + 1, counts.absent + (self._missing | ~updated)
            memory[0], counts.absent, counts.updated = steps, absent, None
            backend.step_ended()


class Parameter(ABC, Generic[B]):
    """One parameter that a backend updates by itself."""

    def __init__(self, backend: B, number: int) -> None:
        state = backend.state
        layout = state.buffers["grads"].layout
        leaf = layout.leaves[number]
        self.path, self.shape, self.number = leaf.path, leaf.shape, number
        self.group_number = int(state.group_of[number])
        self.layout = Layout(np.broadcast_to(np.zeros((), layout.dtype_of(leaf)), leaf.shape))
        self.dtype = self.layout.segments[0].dtype
        self._keys = state.layout.keys[number]

    @staticmethod
    @abstractmethod
    def begin(backend: B) -> None:
        """Prepare the backend for the update of a parameter, or raise an error if it cannot update any."""

    def refuse_replaced(self, state: OptimizerState) -> None:
        """Raise StructureError if another object took the place of the parameter in `params`."""
        params = state.buffers["params"]
        item = params.views
        try:
            for key in self._keys:
                item = item[key]
        except (LookupError, TypeError):
            item = None
        if item is not params.leaves[self.number] and (problems := changed_views(params, "params")):
            raise StructureError(problems[0])

    @abstractmethod
    def find(self, backend: B, gradient: Any, rows: Any) -> Any:
        """Check a gradient, of the whole parameter or of `rows`. Return it, or a copy, in the form for `calls`."""

    @abstractmethod
    def calls(self, backend: B, found: Any, rates: list[float] | None, schedules: list[Any]) -> list[Call]:
        """Return the calls that update the parameter with a gradient from `find`.

        `rates` has the rates of the groups whose option lr is still the one in `schedules`.
        """

    def rate(self, run: Run, rates: list[float] | None, schedules: list[Any], counts: Counts) -> float:
        """Return the learning rate of the run."""
        number = run.group_number
        return plan.rate_of(run.group, number, rates if run.group["lr"] is schedules[number] else None, counts.steps)

    def rows_of(self, rows: Any) -> SortedRows:
        """Return rows of the parameter, sorted, or raise StructureError or DtypeError."""
        if not self.shape:
            raise StructureError(f"rows: expected a parameter with rows, params{self.path} has no axis")
        numbers = _row_numbers(rows, self.shape[0])
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        first = np.flatnonzero(np.diff(numbers, prepend=-1))
        return SortedRows(numbers[first], order, first)


def _row_numbers(rows: Any, size: int) -> NDArray[np.int64]:
    """Return row numbers from 0 to size - 1, or raise an error. Negative ones among `rows` count from the end."""
    numbers = as_array(rows, "rows")
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        mask = "; np.flatnonzero(mask) gives the rows of a mask" if numbers.dtype.kind == "b" else ""
        raise DtypeError(f"rows: expected a 1-D array of integers, got {numbers.dtype} of shape {numbers.shape}{mask}")
    lowest = 0 if numbers.dtype.kind == "u" else -size
    wrong = numbers[(numbers < lowest) | (numbers >= size)]
    if len(wrong):
        raise StructureError(f"rows: expected row numbers from -{size} to {size - 1}, got {wrong[0]}")
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + size, numbers)


def _refuse_options(state: OptimizerState) -> None:
    """Raise OptionError if an option needs the gradients of all parameters together."""
    if state.global_clip_norm is not None:
        raise OptionError(
            f"global_clip_norm: expected None for steps of one parameter at a time, got {state.global_clip_norm!r}, "
            "which needs all gradients together; clip_norm limits the norm of each gradient"
        )
    if state.nonfinite != "propagate":
        raise OptionError(
            f'nonfinite: expected "propagate" for steps of one parameter at a time, got {state.nonfinite!r}, which '
            "needs all gradients together"
        )
