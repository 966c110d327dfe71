"""The arrays that `fastrms bench` gives to every way to take a step, and the check that all compute the same.

Every way gets the same parameters and gradients, and options with which it computes the reference's rule (epsilon
outside the root, no momentum).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Case, make_arrays
from fastrms.cli.common import CommandError
from fastrms.kernels import threads
from fastrms.kernels.reference import ReferenceRMSProp, from_bfloat16
from fastrms.optimizer import RMSProp

__all__ = ["TOLERANCE", "Problem", "Runner", "check", "numbers"]

Array = NDArray[Any]
State = tuple[Sequence[Any], Sequence[Any]]

# Steps that are compared with the reference ahead of timing.
CHECKED_STEPS = 3
# Rounding errors (units of the dtype's eps) by which another library may differ after those steps: each step rounds a
# handful of times, and a library is free to order, fuse and approximate.
TOLERANCE = 16.0


class Problem:
    """The arrays of a case, and what several ways share so that a large case fits into memory."""

    def __init__(self, case: Case, threads: int) -> None:
        self.case = case
        self.threads = threads
        self.params, self.grads = make_arrays(case)
        self.scalar = np.dtype(case.dtype).type
        self._optimizer: RMSProp | None = None
        self._expected: State | None = None

    def optimizer(self) -> RMSProp:
        """One optimizer with the gradients in its buffer, back at the start."""
        if self._optimizer is None:
            self._optimizer = self.new_optimizer("serial")
            for own, grad in zip(self._optimizer.grads, self.grads, strict=True):
                own[...] = grad
        for own, param in zip(self._optimizer.params, self.params, strict=True):
            own[...] = param
        self._optimizer.buffers["cache"].flat[...] = 0
        return self._optimizer

    def new_optimizer(self, kernel: str, cache_dtype: str | None = None) -> RMSProp:
        """An optimizer of this case's arrays."""
        # Setting the number for each step takes time, which no one pays who wants all threads.
        threads.start_threads()
        num_threads = None if self.threads == numba.get_num_threads() else self.threads
        return RMSProp(
            self.params, LR, DECAY_RATE, EPSILON, kernel=kernel, num_threads=num_threads, cache_dtype=cache_dtype
        )

    def copies(self) -> tuple[list[Array], list[Array]]:
        """Parameters to be changed in place, and a cache of zeros."""
        return [param.copy() for param in self.params], [np.zeros_like(param) for param in self.params]

    def expected(self, cache_dtype: str | None = None) -> State:
        """Parameters and cache after the steps that are checked, of the reference or of NumPy with 16-bit state."""
        if cache_dtype is not None:
            oracle = self.new_optimizer("numpy", cache_dtype)
            for _ in range(CHECKED_STEPS):
                oracle.step(self.grads)
            return oracle.params, numbers(oracle.cache)
        if self._expected is None:
            reference = ReferenceRMSProp(self.params, LR, DECAY_RATE, EPSILON)
            for _ in range(CHECKED_STEPS):
                reference.step(self.grads)
            self._expected = reference.params, reference.cache
        return self._expected

    def forget_expected(self) -> None:
        """Give back the memory of what is only needed for checks."""
        self._expected = None


@dataclass(frozen=True)
class Runner:
    """A way that is ready to run: `step` takes a step, `state` gives parameters and cache as arrays.

    `prepare` is called ahead of each series of steps, where several ways share one optimizer.
    """

    step: Callable[[], object]
    state: Callable[[], State]
    prepare: Callable[[], object] = lambda: None


def numbers(cache: Sequence[Array]) -> list[Array]:
    """The numbers in a cache, also where it has 16 bits."""
    return [from_bfloat16(array) if array.dtype == np.uint16 else array for array in cache]


def check(runner: Runner, problem: Problem, exact: bool, cache_dtype: str | None = None) -> str:
    """Take some steps and compare with `Problem.expected`: "same bits", or the largest error where that is allowed.

    Raises
    ------
    CommandError
        Other bits where they have to be the same (`exact`), or an error beyond `TOLERANCE` rounding errors.
    """
    runner.prepare()
    for _ in range(CHECKED_STEPS):
        runner.step()
    same, worst = True, 0.0
    eps = float(np.finfo(problem.case.dtype).eps)
    starts = problem.params, [np.zeros(())] * len(problem.params)
    state = zip(("parameters", "cache"), runner.state(), problem.expected(cache_dtype), starts, strict=True)
    for name, ours, theirs, before in state:
        if len(ours) != len(theirs):
            raise CommandError(f"expected {len(theirs)} arrays of {name}, got {len(ours)}")
        for own, oracle, start in zip(ours, theirs, before, strict=True):
            array = np.asarray(own)
            if array.shape != oracle.shape or array.dtype != oracle.dtype:
                raise CommandError(
                    f"{name}: expected {oracle.dtype} of shape {oracle.shape}, got {array.dtype} of {array.shape}"
                )
            if array.tobytes() == oracle.tobytes():
                continue
            same = False
            # Errors of a parameter near 0 are those of the steps that brought it there.
            size = np.maximum(np.abs(oracle), np.abs(oracle - start))
            with np.errstate(all="ignore"):
                error = np.max(np.abs(array.astype(np.float64) - oracle) / size) / eps
            worst = max(worst, float(error)) if np.isfinite(error) else np.inf
    if same:
        return "same bits"
    if exact:
        raise CommandError(f"expected the bits of the reference, got an error of {worst:.3g} eps")
    if worst > TOLERANCE:
        raise CommandError(
            f"expected the reference's numbers within {TOLERANCE:g} eps after {CHECKED_STEPS} steps, got an error of "
            f"{worst:.3g} eps"
        )
    return f"{worst:.1f} eps"
