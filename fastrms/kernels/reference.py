"""RMSProp in plain NumPy: the textbook class, and the oracles of the compiled kernels.

The compiled code shares nothing with this module, so that an error in one shows as a difference.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms._types import Array
from fastrms.buffers.bfloat16 import from_bfloat16, to_bfloat16
from fastrms.kernels.hyper import HYPER_FIELDS

__all__ = ["ReferenceRMSProp", "sum_squares", "update"]

# Elements that `update` works on at a time.
_PART = 16_384


class ReferenceRMSProp:
    """RMSProp as it is taught, and the baseline of all comparisons: a Python loop over parameters, with new arrays.

    ``cache = decay_rate * cache + (1 - decay_rate) * grad**2`` and
    ``param = param - lr * grad / (sqrt(cache) + epsilon)`` (G. Hinton, Neural Networks for Machine Learning,
    lecture 6e, 2012). The constructor copies `params`.
    """

    def __init__(
        self, params: Sequence[Array], lr: float = 1e-3, decay_rate: float = 0.9, epsilon: float = 1e-8
    ) -> None:
        self.lr = lr
        self.decay_rate = decay_rate
        self.epsilon = epsilon
        self.params = [np.array(param) for param in params]
        self.cache = [np.zeros_like(param) for param in self.params]

    def step(self, gradients: Sequence[Array]) -> list[Array]:
        """Take one step, and return the new parameters as new arrays."""
        for i, grad in enumerate(gradients):
            self.cache[i] = self.decay_rate * self.cache[i] + (1 - self.decay_rate) * grad**2
            self.params[i] = self.params[i] - self.lr * grad / (np.sqrt(self.cache[i]) + self.epsilon)
        return self.params


def update(
    params: Array,
    grads: Array,
    cache: Array,
    momentum_buffer: Array | None,
    grad_avg: Array | None,
    hyper: Array,
    spans: NDArray[np.int64],
    factors: Array,
    extended: bool | None = True,
    lines_ahead: int | None = None,
) -> None:
    """Take one step on 1-D arrays in place; the kernel ``"numpy"``, and the oracle of the compiled ones.

    Parameters
    ----------
    params : ndarray, shape (n,), float32 or float64
        Read and written.
    cache : ndarray, shape (n,), the same dtype, or uint16
        Read and written. uint16 holds bfloat16 numbers: the step computes in float32 and rounds stored values.
    grads : ndarray, shape (n,), the same dtype
        Read.
    momentum_buffer, grad_avg : ndarray, shape (n,), the dtype of the cache, or None
        Read and written; None where the options need none.
    hyper : ndarray, shape (len(HYPER_FIELDS),), the same dtype
        The options as numbers.
    spans : ndarray of int64, shape (k, 4)
        The elements to update: [start, stop) each, sorted and disjoint; other elements stay as they are. The third
        number is the address of a gradient that does not lie in `grads`, otherwise 0. The fourth number is the address
        of a parameter that does not lie in `params`, otherwise 0. Only compiled kernels read from addresses.
    factors : ndarray, shape (k, 2), the same dtype
        For each span, the factor on the gradient and the factor of the bias correction on the state.
    extended : True or None, default True
        None lets compiled kernels take a shorter loop. This function reads every option anyway.
    lines_ahead : int or None, default None
        How many cache lines ahead compiled kernels prefetch; 0 and None for none.
    """
    h = dict(zip(HYPER_FIELDS, hyper, strict=True))
    m = b = None
    tiny = h["state_floor"]  # 0 when subnormals are not flushed, so that no number is below
    with np.errstate(all="ignore"):
        for (first, last, *_), (scale, correction) in zip(spans, factors, strict=True):
            # In parts, so that intermediate arrays stay in the processor's caches.
            for start in range(first, last, _PART):
                stop = min(start + _PART, last)
                p, g, c = params[start:stop], grads[start:stop], _state(cache, start, stop)
                if np.isfinite(h["clip"]):
                    g = np.clip(g, -h["clip"], h["clip"])
                g = scale * g
                if h["l2"] > 0:
                    g = g + h["l2"] * p

                # Set numbers with subnormal squares to 0: such squares are as slow here as in compiled code. (A product
                # takes half the time of np.where. NaN and inf come through. The square drops the sign of 0.)
                squarable = g * (np.abs(g) >= h["gradient_floor"])
                c[:] = h["decay"] * c + h["rest"] * squarable**2
                _flush(c, tiny)
                v = correction * c

                if grad_avg is not None:
                    m = _state(grad_avg, start, stop)
                    m[:] = h["decay"] * m + h["rest"] * g
                    _flush(m, tiny)
                    mean = correction * m
                    mean_square = (mean * (np.abs(mean) >= h["mean_floor"])) ** 2
                    drop = v < mean_square + tiny
                    v = _without(drop, v) - _without(drop, mean_square)

                step = h["lr_inside"] * g / (np.sqrt(v + h["eps_inside"]) + h["eps_outside"])
                if momentum_buffer is not None:
                    b = _state(momentum_buffer, start, stop)
                    b[:] = h["momentum"] * b + step
                    _flush(b, tiny)
                    step = h["lr_outside"] * (step + h["momentum"] * b if h["nesterov"] else b)
                if h["decoupled"] > 0:
                    p[:] = p - h["decoupled"] * p
                p[:] = p - step

                for state, values in ((cache, c), (grad_avg, m), (momentum_buffer, b)):
                    if values is not None and state is not None and state.dtype == np.uint16:
                        state[start:stop] = to_bfloat16(values)


def _without(drop: Array, x: Array) -> Array:
    """Return `x` with 0 where `drop`, by operations on bits: np.where takes twice as long for an irregular `drop`."""
    integer = np.dtype(f"i{x.dtype.itemsize}")
    bits = x.view(integer) & np.subtract(drop.view(np.int8), 1, dtype=integer)
    return bits.view(x.dtype)


def _flush(state: Array, tiny: Any) -> None:
    """Set numbers below `tiny` to 0, in place."""
    if tiny > 0:
        state *= np.abs(state) >= tiny
        state += 0  # makes -0 of negative numbers 0


def _state(state: Array, start: int, stop: int) -> Array:
    """Return a part of a state array as numbers: a view, or a copy of bfloat16 numbers in float32."""
    return from_bfloat16(state[start:stop]) if state.dtype == np.uint16 else state[start:stop]


def sum_squares(
    grads: Array, spans: NDArray[np.int64], clip: float, prescale: float, chunk: int, lanes: int
) -> NDArray[np.float64]:
    """Return the sums of `fastrms.kernels.norms.SpanNorms.sum_squares`, added in the same order."""
    sums = np.zeros(len(spans))
    with np.errstate(all="ignore"):
        for k, (start, stop, *_) in enumerate(spans):
            values = np.clip(grads[start:stop], -clip, clip).astype(np.float64) * prescale
            chunks = -(-len(values) // chunk)
            padded = np.zeros(chunks * chunk)
            padded[: len(values)] = values
            squares = np.square(padded.reshape(chunks, chunk // lanes, lanes))
            lane = np.zeros((chunks, lanes))
            for row in range(chunk // lanes):
                lane += squares[:, row]
            while lane.shape[1] > 1:  # neighbours, then pairs of neighbours, and so on
                lane = lane[:, 0::2] + lane[:, 1::2]
            for partial in lane[:, 0]:
                sums[k] += partial
    return sums
