"""RMSProp without fastrms: NumPy in place, and the naive loop, each as an optimizer of a list of arrays."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Array
from fastrms.bench.naive import naive, naive_parallel
from fastrms.kernels import threads

__all__ = ["NaiveLoop", "NoOptimizer", "NumpyInPlace"]

# Elements of a part in the NumPy loop, so that intermediate results stay in the processor's cache.
_PART = 16_384


class NumpyInPlace:
    """The rule with ``out=`` throughout, in parts, without allocations; updates the arrays that it is given."""

    def __init__(self, params: Sequence[Array], cache: Sequence[Array]) -> None:
        self.params, self.cache = params, cache
        scratch, other = np.empty((2, _PART), params[0].dtype)
        self._parts = []
        for k, (param, square) in enumerate(zip(params, cache, strict=True)):
            p, c = param.reshape(-1), square.reshape(-1)
            for start in range(0, p.size, _PART):
                part = slice(start, start + _PART)
                size = len(p[part])
                self._parts.append((k, part, p[part], c[part], scratch[:size], other[:size]))

    def bind(self, gradients: Sequence[Array]) -> Callable[[], None]:
        """Return a function that takes a step with these gradients."""
        flat = [gradient.reshape(-1) for gradient in gradients]
        parts = [(p, flat[k][part], c, a, b) for k, part, p, c, a, b in self._parts]
        rest = 1 - DECAY_RATE

        def step() -> None:
            for p, g, c, a, b in parts:
                np.multiply(g, g, out=a)
                np.multiply(a, rest, out=a)
                np.multiply(c, DECAY_RATE, out=c)
                np.add(c, a, out=c)
                np.sqrt(c, out=a)
                np.add(a, EPSILON, out=a)
                np.multiply(g, LR, out=b)
                np.divide(b, a, out=b)
                np.subtract(p, b, out=p)

        return step

    def step(self, gradients: Sequence[Array]) -> None:
        """Take one step."""
        self.bind(gradients)()


class NaiveLoop:
    """The naive loop, called array by array; updates the arrays that it is given."""

    def __init__(self, params: Sequence[Array], cache: Sequence[Array], *, parallel: bool = False) -> None:
        threads.start_threads()  # with the settings that the kernels of fastrms have
        self.params, self.cache = params, cache
        self._update: Callable[..., None] = naive_parallel if parallel else naive
        kind = params[0].dtype.type
        # Scalars of the arrays' dtype: one float64 number would make the loop compute everything in float64.
        self._numbers = [kind(number) for number in (LR, DECAY_RATE, 1 - DECAY_RATE, EPSILON)]
        self._flat = [(p.reshape(-1), c.reshape(-1)) for p, c in zip(params, cache, strict=True)]

    def bind(self, gradients: Sequence[Array]) -> Callable[[], None]:
        """Return a function that takes a step with these gradients; of one array, the bare call."""
        calls = [
            partial(self._update, p, g.reshape(-1), c, *self._numbers)
            for (p, c), g in zip(self._flat, gradients, strict=True)
        ]
        if len(calls) == 1:
            return calls[0]

        def step() -> None:
            for call in calls:
                call()

        return step

    def step(self, gradients: Sequence[Array]) -> None:
        """Take one step."""
        for (p, c), g in zip(self._flat, gradients, strict=True):
            self._update(p, g.reshape(-1), c, *self._numbers)


class NoOptimizer:
    """Leave the parameters as they are; the rest of a training step is its limit."""

    def __init__(self, params: Sequence[Array]) -> None:
        self.params = params

    def step(self, gradients: Sequence[Array]) -> None:
        """Do nothing."""
