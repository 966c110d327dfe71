"""Sums of squares in a fixed order, for clipping by norm: the same bits for any number of threads.

Each span is cut into chunks of `CHUNK` elements. A chunk is summed in float64 on `LANES` lanes (lane j takes the
elements j, j + LANES, ...; a short last chunk counts as filled up with zeros), the lanes are added in pairs, and
the chunks of a span one after another. Threads share out chunks, so who computes what cannot change a bit.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms.kernels import reference
from fastrms.kernels.compiled import inner, jit
from fastrms.kernels.cpu import gradient_part
from fastrms.kernels.threads import one_at_a_time

__all__ = ["CHUNK", "LANES", "AddUp", "SpanNorms", "combine", "scale_to"]

# Makes sums of squares of whole spans from those of the parts that this process has.
AddUp = Callable[[NDArray[np.float64]], NDArray[np.float64]]

CHUNK = 4096
# With 8 or 16 lanes the compiler unrolls the inner loop and keeps it scalar: four times slower (75 us against 20 at
# 1e5 float32).
LANES = 32

# A sum of squares outside (2**-900, inf) may have left the range of float64, though its root is within it: it is then
# taken again, of gradients multiplied by this power of two, or by its inverse. Only float64 gradients get there.
_TOO_SMALL = 2.0**-900
_PRESCALE = 2.0**600


@inner
def _square(x, clip, prescale):
    x = clip if x > clip else x
    x = -clip if x < -clip else x
    x = np.float64(x) * prescale
    return x * x


@inner
def _add_squares(grads, clip, prescale, lanes):
    whole = grads.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += _square(grads[i + j], clip, prescale)
    for j in range(grads.size - whole):
        lanes[j] += _square(grads[whole + j], clip, prescale)


@inner
def _chunk_sum(j, grads, spans, first_chunk, clip, prescale):
    k = np.searchsorted(first_chunk, j, side="right") - 1
    start = spans[k, 0] + (j - first_chunk[k]) * CHUNK
    lanes = np.zeros(LANES)
    part = gradient_part(grads, spans, k, start, min(start + CHUNK, spans[k, 1]))
    _add_squares(part, clip, prescale, lanes)
    width = LANES
    while width > 1:
        width //= 2
        for lane in range(width):
            lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1]
    return lanes[0]


@inner
def _add_up(partials, first_chunk, sums):
    for k in range(sums.size):
        sums[k] = 0.0
        for j in range(first_chunk[k], first_chunk[k + 1]):
            sums[k] += partials[j]


@jit()
def _serial(grads, spans, first_chunk, clip, prescale, partials, sums):
    for j in range(partials.size):
        partials[j] = _chunk_sum(j, grads, spans, first_chunk, clip, prescale)
    _add_up(partials, first_chunk, sums)


@jit(parallel=True)
def _parallel(grads, spans, first_chunk, clip, prescale, partials, sums):
    for j in numba.prange(partials.size):
        partials[j] = _chunk_sum(j, grads, spans, first_chunk, clip, prescale)
    _add_up(partials, first_chunk, sums)


class SpanNorms:
    """The Euclidean norms of fixed spans of a gradient array, with room for the partial sums made once.

    Parameters
    ----------
    spans : ndarray of int64, shape (k, 3)
        Elements [start, stop) each, and where they lie, as for `reference.update`.
    """

    def __init__(self, spans: NDArray[np.int64]) -> None:
        self.spans = spans
        chunks = -(-(spans[:, 1] - spans[:, 0]) // CHUNK)
        self._first_chunk = np.concatenate([[0], np.cumsum(chunks)])
        self._partials = np.empty(self._first_chunk[-1])
        self._sums = np.empty(len(spans))

    def of(self, spans: NDArray[np.int64]) -> "SpanNorms":
        """The same for other spans."""
        return SpanNorms(spans)

    def __call__(
        self, grads: NDArray[Any], clip: float, kernel: str, add_up: AddUp | None = None
    ) -> NDArray[np.float64]:
        """The norms of `grads` with its values limited to [-clip, clip], by the serial, parallel or numpy code.

        With `add_up`, which gets a sum for each span, spans are parts, and the norms are those of the whole.
        """
        sums = self._sum_squares(grads, clip, 1.0, kernel)
        sums = sums if add_up is None else add_up(sums)
        norms = np.sqrt(sums)
        for outside, prescale in ((sums < _TOO_SMALL, _PRESCALE), (np.isinf(sums), 1.0 / _PRESCALE)):
            if grads.dtype == np.float64 and outside.any():
                again = np.zeros(len(sums))
                again[outside] = self.of(self.spans[outside])._sum_squares(grads, clip, prescale, kernel)
                again = again if add_up is None else add_up(again)
                with np.errstate(over="ignore"):  # a norm above the range of float64 is inf
                    norms[outside] = np.sqrt(again[outside]) / prescale
        return norms

    def finite(self, grads: NDArray[Any], kernel: str) -> NDArray[np.bool_]:
        """Whether all values of each span are finite, in one reading."""
        # A number times 0 is 0, and NaN if it is inf or NaN.
        return np.equal(self._sum_squares(grads, math.inf, 0.0, kernel), 0)

    def _sum_squares(self, grads: NDArray[Any], clip: float, prescale: float, kernel: str) -> NDArray[np.float64]:
        if kernel == "numpy":
            return reference.sum_squares(grads, self.spans, clip, prescale, CHUNK, LANES)
        sum_squares = one_at_a_time(_parallel) if kernel == "parallel" else _serial
        bound = grads.dtype.type(clip)
        sum_squares(grads, self.spans, self._first_chunk, bound, prescale, self._partials, self._sums)
        return self._sums.copy()


def combine(norms: NDArray[np.float64]) -> float:
    """The norm of all from the norms of the parts; NaN if one is NaN. The order of the parts does not matter."""
    largest = float(np.max(norms, initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    # fsum rounds once; sums of NumPy have an order that depends on the processor.
    return largest * math.sqrt(math.fsum((norms / largest) ** 2))


def scale_to(limit: float, norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The factors that bring `norms` down to `limit`: 1 where they are within it, NaN where they are NaN."""
    with np.errstate(divide="ignore"):
        return np.where(norms <= limit, 1.0, limit / norms)
