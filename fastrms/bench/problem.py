"""The arrays of a case, which all implementations share, and the check that all compute the same numbers.

Every implementation gets the same parameters and gradients, and the options of the reference's rule (epsilon outside
the root, no momentum).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms._types import CacheDType, Kernel
from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Array, Case, make_arrays
from fastrms.bench.errors import BenchmarkError
from fastrms.buffers.bfloat16 import from_bfloat16
from fastrms.kernels import threads
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["Oracle", "Problem", "Runner", "State", "adagrad", "bfloat16_state", "check", "rmsprop", "to_float"]

State = tuple[Sequence[Array], Sequence[Array]]

# Steps that are compared with the reference before timing.
CHECKED_STEPS = 3
# The largest error of another library after those steps, in units of the dtype's eps. A step rounds a handful of times,
# and a library may reorder, fuse and approximate.
TOLERANCE = 16.0


class Problem:
    """The arrays of a case, shared by implementations so that a large case fits into memory."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case = case
        self.threads = threads
        self.params, self.grads = make_arrays(case)
        self.scalar = np.dtype(case.dtype).type
        self._optimizer: RMSProp | None = None
        self._arrays: tuple[list[Array], list[Array]] | None = None

    def optimizer(self) -> RMSProp:
        """Return the shared optimizer, reset to its start, with the gradients in its gradient buffer."""
        if self._optimizer is None:
            self._optimizer = self.new_optimizer("serial")
            for own, grad in zip(self._optimizer.grads, self.grads, strict=True):
                own[...] = grad
        for own, param in zip(self._optimizer.params, self.params, strict=True):
            own[...] = param
        self._optimizer.buffers["cache"].flat[...] = 0
        return self._optimizer

    def new_optimizer(self, kernel: Kernel, cache_dtype: CacheDType | None = None) -> RMSProp:
        """Return a new optimizer of the case's parameters."""
        # A limit on threads costs time in each step; without one, all threads run.
        threads.start_threads()
        num_threads = None if self.threads == numba.get_num_threads() else self.threads
        return RMSProp(
            self.params, LR, DECAY_RATE, EPSILON, kernel=kernel, num_threads=num_threads, cache_dtype=cache_dtype
        )

    def copies(self) -> tuple[list[Array], list[Array]]:
        """Return copies of the parameters to update in place, and a cache of zeros."""
        return [param.copy() for param in self.params], [np.zeros_like(param) for param in self.params]

    def arrays(self) -> tuple[list[Array], list[Array]]:
        """Return shared parameters and a shared cache to update in place, reset to their start."""
        if self._arrays is None:
            self._arrays = self.copies()
        params, cache = self._arrays
        for own, param, square in zip(params, self.params, cache, strict=True):
            own[...] = param
            square[...] = 0
        return params, cache

    def limited(self, step: Callable[[], object]) -> Callable[[], object]:
        """Return `step` with Numba's threads limited to `threads`; if all may run, without a cost."""
        if self.threads == numba.get_num_threads():
            return step

        def limited_step() -> None:
            before = numba.get_num_threads()
            numba.set_num_threads(self.threads)
            step()
            numba.set_num_threads(before)

        return limited_step


# A function that returns parameters and cache of a problem after `CHECKED_STEPS` steps.
Oracle = Callable[[Problem], State]


def rmsprop(problem: Problem) -> State:
    """Return the state after `CHECKED_STEPS` steps of the reference class."""
    reference = ReferenceRMSProp(problem.params, LR, DECAY_RATE, EPSILON)
    for _ in range(CHECKED_STEPS):
        reference.step(problem.grads)
    return reference.params, reference.cache


def bfloat16_state(problem: Problem) -> State:
    """Return the state after `CHECKED_STEPS` steps of the NumPy kernel with 16-bit state."""
    optimizer = problem.new_optimizer("numpy", "bfloat16")
    for _ in range(CHECKED_STEPS):
        optimizer.step(problem.grads)
    return optimizer.params, to_float(optimizer.cache)


def adagrad(problem: Problem) -> State:
    """Return the state after `CHECKED_STEPS` steps of Adagrad, whose cache is a sum of squares."""
    params, cache = problem.copies()
    for _ in range(CHECKED_STEPS):
        for p, g, c in zip(params, problem.grads, cache, strict=True):
            c += g * g
            p -= LR * g / (np.sqrt(c) + EPSILON)
    return params, cache


@dataclass(frozen=True)
class Runner:
    """An implementation that is ready to run on a problem; `state` returns parameters and cache."""

    step: Callable[[], object]
    state: Callable[[], State]
    # Called before each series of steps, since several implementations share one optimizer.
    prepare: Callable[[], object] = lambda: None


def to_float(cache: Sequence[NDArray[Any]]) -> list[Array]:
    """Return the arrays of a cache; bfloat16 is widened to float32."""
    return [from_bfloat16(array) if array.dtype.itemsize == 2 else array for array in cache]


def check(runner: Runner, problem: Problem, exact: bool, oracle: Oracle = rmsprop) -> str:
    """Take `CHECKED_STEPS` steps, compare the arrays with those of `oracle`, and return "same bits" or "1.5 eps".

    Raise BenchmarkError if bits differ that have to be equal (`exact`), or if the error is above `TOLERANCE`.
    """
    runner.prepare()
    for _ in range(CHECKED_STEPS):
        runner.step()
    errors = []
    starts: State = problem.params, [np.zeros(())] * len(problem.params)
    state = zip(("parameters", "cache"), runner.state(), oracle(problem), starts, strict=True)
    for name, ours, theirs, before in state:
        if len(ours) != len(theirs):
            raise BenchmarkError(f"expected {len(theirs)} arrays of {name}, got {len(ours)}")
        for own, expected, start in zip(ours, theirs, before, strict=True):
            array = np.asarray(own)
            if array.shape != expected.shape or array.dtype != expected.dtype:
                raise BenchmarkError(
                    f"{name}: expected {expected.dtype} of shape {expected.shape}, got {array.dtype} of {array.shape}"
                )
            if array.tobytes() != expected.tobytes():
                errors.append(_error(array, expected, start))
    if not errors:
        return "same bits"
    worst = max(errors)
    if exact:
        raise BenchmarkError(f"expected the same bits as the reference, got an error of {worst:.3g} eps")
    if worst > TOLERANCE:
        raise BenchmarkError(
            f"expected the reference's numbers within {TOLERANCE:g} eps after {CHECKED_STEPS} steps, got an error of "
            f"{worst:.3g} eps"
        )
    return f"{worst:.1f} eps"


def _error(array: Array, expected: Array, start: Array) -> float:
    """Return the largest relative error of an array, in units of the dtype's eps; inf if a number is not finite."""
    # The error of a parameter near 0 is relative to the steps that brought it there.
    size = np.maximum(np.abs(expected), np.abs(expected - start))
    with np.errstate(all="ignore"):
        error = float(np.max(np.abs(array.astype(np.float64) - expected) / size) / np.finfo(array.dtype).eps)
    return error if np.isfinite(error) else np.inf
