"""Sums of squares in a fixed order, for clipping by norm: the same bits for any number of threads.

Each span is cut into chunks of `CHUNK` elements. A chunk is summed in float64 on `LANES` lanes: lane j takes the
elements j, j + LANES, ..., and a short last chunk counts as filled up with zeros. Then the lanes are added in pairs,
and the chunks of a span one after another. Threads share out chunks, so the number of threads cannot change a bit.
"""

import math
from collections.abc import Callable

import numba
import numpy as np
from numpy.typing import NDArray

from fastrms._types import Array
from fastrms.kernels import reference
from fastrms.kernels.access import GRADIENT, part_of_span
from fastrms.kernels.compiled import ALLOCATES, inner, inner_options, jit
from fastrms.kernels.threads import one_at_a_time

__all__ = ["CHUNK", "LANES", "LEAST_SUM", "PRESCALE", "AddUp", "SpanNorms", "combine", "scale_to", "square"]

# Returns the sums of squares of whole spans, from those of the parts in this process.
AddUp = Callable[[NDArray[np.float64]], NDArray[np.float64]]

CHUNK = 4096
# With 8 or 16 lanes the compiler unrolls the inner loop and keeps it scalar: four times slower (75 us against 20 at
# 1e5 float32).
LANES = 32

# A sum of squares outside [2**-900, inf) may have left the range of float64, though its root is in that range. Such a
# sum is taken again, of gradients multiplied by `PRESCALE` or by its inverse. Only float64 gradients get there.
LEAST_SUM = 2.0**-900
PRESCALE = 2.0**600


@inner
def square(x, clip, prescale):
    """Limit a number to [-clip, clip], multiply it by `prescale` in float64, and return its square."""
    x = clip if x > clip else x
    x = -clip if x < -clip else x
    x = np.float64(x) * prescale
    return x * x


@inner
def _add_squares(grads, clip, prescale, lanes):
    """Add the square of each element to its lane."""
    whole = grads.size // LANES * LANES
    for i in range(0, whole, LANES):
        for j in range(LANES):
            lanes[j] += square(grads[i + j], clip, prescale)
    for j in range(grads.size - whole):
        lanes[j] += square(grads[whole + j], clip, prescale)


@numba.njit(**inner_options | ALLOCATES)
def _chunk_sum(j, grads, spans, first_chunk, clip, prescale):
    """Return the sum of squares of chunk `j`, counted through all spans."""
    k = np.searchsorted(first_chunk, j, side="right") - 1
    start = spans[k, 0] + (j - first_chunk[k]) * CHUNK
    lanes = np.zeros(LANES)
    part = part_of_span(grads, spans, k, GRADIENT, start, min(start + CHUNK, spans[k, 1]))
    _add_squares(part, clip, prescale, lanes)
    width = LANES
    while width > 1:
        width //= 2
        for lane in range(width):
            lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1]
    return lanes[0]


@inner
def _add_up(partials, first_chunk, sums):
    """Write the sum of the chunks of each span to `sums`."""
    for k in range(sums.size):
        sums[k] = 0.0
        for j in range(first_chunk[k], first_chunk[k + 1]):
            sums[k] += partials[j]


@jit(**ALLOCATES)
def _serial(grads, spans, first_chunk, clip, prescale, partials, sums):
    """Write the sum of squares of each chunk to `partials`, and of each span to `sums`."""
    for j in range(partials.size):
        partials[j] = _chunk_sum(j, grads, spans, first_chunk, clip, prescale)
    _add_up(partials, first_chunk, sums)


@jit(parallel=True, **ALLOCATES)
def _parallel(grads, spans, first_chunk, clip, prescale, partials, sums):
    """Do the same as `_serial`, with the chunks on Numba's threads."""
    for j in numba.prange(partials.size):
        partials[j] = _chunk_sum(j, grads, spans, first_chunk, clip, prescale)
    _add_up(partials, first_chunk, sums)


class SpanNorms:
    """The Euclidean norms of fixed spans of a gradient buffer. Memory for partial sums is allocated once."""

    def __init__(self, spans: NDArray[np.int64]) -> None:
        self.spans = spans  # shape (k, 4), as for `reference.update`
        chunks = -(-(spans[:, 1] - spans[:, 0]) // CHUNK)
        # The number of the first chunk of each span, and the number of all chunks.
        self.first_chunk = np.concatenate([[0], np.cumsum(chunks)])
        self._partials = np.empty(self.first_chunk[-1])

    def of(self, spans: NDArray[np.int64]) -> "SpanNorms":
        """Return an object of the same kind for other spans."""
        return SpanNorms(spans)

    def __call__(self, grads: Array, clip: float, kernel: str, add_up: AddUp | None = None) -> NDArray[np.float64]:
        """Return the norm of each span, of values limited to [-clip, clip]; NaN for a span with NaN.

        `add_up` is None if each span is whole.
        """
        sums = self.sum_squares(grads, clip, 1.0, kernel)
        sums = sums if add_up is None else add_up(sums)
        norms = np.sqrt(sums)
        if grads.dtype != np.float64:
            return norms
        for outside, prescale in ((sums < LEAST_SUM, PRESCALE), (np.isinf(sums), 1.0 / PRESCALE)):
            if outside.any():
                again = np.zeros(len(sums))
                again[outside] = self.of(self.spans[outside]).sum_squares(grads, clip, prescale, kernel)
                again = again if add_up is None else add_up(again)
                with np.errstate(over="ignore"):  # a norm above the range of float64 is inf
                    norms[outside] = np.sqrt(again[outside]) / prescale
        return norms

    def finite(self, grads: Array, kernel: str) -> NDArray[np.bool_]:
        """Tell for each span whether all its values are finite, in one pass over `grads`."""
        # A number times 0 is 0, and NaN if it is inf or NaN.
        return np.equal(self.sum_squares(grads, math.inf, 0.0, kernel), 0)

    def sum_squares(self, grads: Array, clip: float, prescale: float, kernel: str) -> NDArray[np.float64]:
        """Limit values to [-clip, clip], multiply them by `prescale`, and return the sum of squares of each span."""
        if kernel == "numpy":
            return reference.sum_squares(grads, self.spans, clip, prescale, CHUNK, LANES)
        write_sums = one_at_a_time(_parallel) if kernel == "parallel" else _serial
        sums = np.empty(len(self.spans))
        write_sums(grads, self.spans, self.first_chunk, grads.dtype.type(clip), prescale, self._partials, sums)
        return sums


def combine(norms: NDArray[np.float64]) -> float:
    """Return the norm of a whole from the norms of its parts, in any order; NaN if one is NaN."""
    largest = float(np.max(norms, initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    # fsum rounds once; the order of NumPy's sums depends on the processor.
    return largest * math.sqrt(math.fsum((norms / largest) ** 2))


def scale_to(limit: float, norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the factors that bring `norms` down to `limit`: 1 for norms within the limit, NaN for NaN."""
    with np.errstate(divide="ignore"):
        return np.where(norms <= limit, 1.0, limit / norms)
