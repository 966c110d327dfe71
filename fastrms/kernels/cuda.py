"""The CUDA kernels: the update rule and the sums of squares of the processor, run by the threads of a GPU.

The update of an element is `fastrms.kernels.rule.rule` itself, compiled by `cuda_target.for_device` with the same bits.
Sums of squares are taken in the chunks, on the lanes and in the order of `fastrms.kernels.norms`, one warp a chunk. The
sum over parameters is exact and rounded once, as `math.fsum` is.

No kernel makes the processor wait for the device.
"""

import math
import warnings
from functools import cache, lru_cache
from typing import Any

import numba
import numpy as np

from fastrms.kernels import norms
from fastrms.kernels.cuda_arrays import add_up_rows, convert_kernel, fill
from fastrms.kernels.cuda_target import (
    LEGACY_STREAM,
    SIMULATED,
    cuda,
    driver_version,
    for_device,
    handle_of,
    interface_of,
    missing,
    multiply,
    number_at,
    store_at,
    vector_at,
)
from fastrms.kernels.rule import rule

__all__ = [
    "ABSENT", "CHUNK", "DOUBTFUL", "EVERY", "IN_BUFFER", "LANES", "LEGACY_STREAM", "PRESCALE", "SIMULATED", "THREADS",
    "TOO_LARGE", "TOO_SMALL", "add_partials", "add_up_rows", "convert_kernel", "cuda", "decide", "driver_version",
    "fill", "handle_of", "interface_of", "launch", "limit_norm", "missing", "square_chunks", "update_kernel",
    "vector_at",
]  # fmt: skip

CHUNK, LANES = norms.CHUNK, norms.LANES
_LANES_AND_SUMS = 2 * LANES  # a name, as Numba takes no expression for the size of shared memory

# Threads of a block of the update, and the elements that each has in flight: a thread loads all of them before it
# stores one, or too few bytes are under way to keep the memory of a large GPU busy.
THREADS, UNROLL = 256, 4
# The most blocks of a launch; a block that has done its chunk takes the chunk that many further on.
BLOCKS = 65_536

# The source of a gradient: an address, the gradient buffer, or absent, and then its parameter sits the step out.
IN_BUFFER, ABSENT = 0, -1

PRESCALE = norms.PRESCALE

# The spans for `square_chunks` and `add_partials`: every span; spans with a sum below or above the range of float64;
# spans with a norm that is not finite.
EVERY, TOO_SMALL, TOO_LARGE, DOUBTFUL = range(4)

# An exact sum of squares of numbers of at most 1 has digits of 32 bits, from the lowest bit that `math.frexp` gives to
# a subnormal number (2**-1126) to the sum of 2**29 ones.
_DIGITS, _LOWEST = 40, -1126
_DIGIT = 0xFFFFFFFF


@lru_cache(256)
def _configured(kernel, blocks, threads, stream):
    with warnings.catch_warnings():  # Numba warns of small launches, which small parameters need
        warnings.simplefilter("ignore")
        return kernel[blocks, threads, stream]


def launch(kernel: Any, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
    """Launch a kernel on a stream, with `blocks` blocks, but at most `BLOCKS` and at least one."""
    configure = _configured.__wrapped__ if SIMULATED else _configured  # the simulator's kernels hold one configuration
    configure(kernel, max(1, min(blocks, BLOCKS)), threads, stream)(*arguments)


_rule = for_device(rule)
_square = for_device(norms.square)


@cuda.jit(device=True)
def _smaller(a, b):
    """Return the smaller number; Numba's own target (0.68) cannot compile `min`."""
    return a if a < b else b


@cuda.jit(device=True)
def _span_of(chunk, first_chunk):
    """Return the number of the span of a chunk."""
    low, high = 0, first_chunk.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if first_chunk[middle] <= chunk:
            low = middle
        else:
            high = middle
    return low


@cache
def update_kernel(dtype, momentum, centered, extended, factored, guarded, held):
    """Return the kernel that updates the parameters of a run, compiled for their dtype and the options in use.

    The kernel takes 1-D arrays on the device (`params`, `grads`, `cache`, `momentum_buffer` and `grad_avg`; the last
    two can be anything if unused), the tuple `hyper` of `hyper.HYPER_FIELDS` in the parameters' dtype, `scale` and
    `correction` for all parameters in the same dtype, and then the arrays below. If `held`, `params` is an int64 array
    of shape (k,) instead: the address of the parameter of each span.

    bounds : int64, shape (k, 2)
        Elements [start, stop) of each span.
    first_chunk : int64, shape (k + 1,)
        The number of the first chunk of each span, and the number of all chunks.
    sources : int64, shape (k,)
        The source of the gradient of each span: an address, `IN_BUFFER` or `ABSENT`.
    factors : float64, shape (k, 2)
        If `factored`, which needs `extended`: used instead of `scale` and `correction`.
    go : int64, shape (1,)
        If `guarded`: 0 to update nothing.
    """
    number = dtype.type
    more = True if extended else None

    @cuda.jit
    def update(params, grads, cache, momentum_buffer, grad_avg, hyper, scale, correction, bounds, first_chunk,
               sources, factors, go):  # fmt: skip
        if guarded and go[0] == 0:
            return
        p = cuda.local.array(UNROLL, number)
        g = cuda.local.array(UNROLL, number)
        c = cuda.local.array(UNROLL, number)
        b = cuda.local.array(UNROLL, number)
        m = cuda.local.array(UNROLL, number)
        width = cuda.blockDim.x
        for chunk in range(cuda.blockIdx.x, first_chunk[first_chunk.size - 1], cuda.gridDim.x):
            k = _span_of(chunk, first_chunk)
            source = sources[k]
            if source != ABSENT:
                if factored:
                    scale = number(factors[k, 0])
                    correction = number(factors[k, 1])
                if held:
                    place = params[k] - bounds[k, 0] * grads.itemsize  # plus the bytes up to an element: its address
                start = bounds[k, 0] + (chunk - first_chunk[k]) * CHUNK
                stop = _smaller(start + CHUNK, bounds[k, 1])
                for first in range(start + cuda.threadIdx.x, stop, UNROLL * width):
                    for u in range(UNROLL):
                        i = first + u * width
                        if i < stop:
                            p[u] = number_at(place + i * grads.itemsize, scale) if held else params[i]
                            if source == IN_BUFFER:
                                g[u] = grads[i]
                            else:
                                g[u] = number_at(source + (i - bounds[k, 0]) * grads.itemsize, scale)
                            c[u] = cache[i]
                            if momentum:
                                b[u] = momentum_buffer[i]
                            if centered:
                                m[u] = grad_avg[i]
                    for u in range(UNROLL):
                        i = first + u * width
                        if i < stop:
                            b_now = b[u] if momentum else None
                            m_now = m[u] if centered else None
                            p_new, c_new, b_new, m_new = _rule(
                                p[u], g[u], c[u], b_now, m_now, hyper, scale, correction, more
                            )
                            if held:
                                store_at(place + i * grads.itemsize, number(p_new))
                            else:
                                params[i] = p_new
                            cache[i] = c_new
                            if momentum:
                                momentum_buffer[i] = b_new
                            if centered:
                                grad_avg[i] = m_new

    return update


@cuda.jit(device=True)
def _is_wanted(which, total, norm):
    """Tell whether `which` selects a span with this sum of squares and norm."""
    if which == TOO_SMALL:
        return total < norms.LEAST_SUM
    if which == TOO_LARGE:
        return math.isinf(total)
    return which == EVERY or not math.isfinite(norm)


@cuda.jit
def square_chunks(grads, bounds, first_chunk, sources, clip, prescale, which, sums, span_norms, partials):
    """Write the sum of squares of each chunk of the spans selected by `which` to `partials`; with `LANES` threads."""
    lanes = cuda.shared.array(_LANES_AND_SUMS, numba.float64)  # lanes, then sums of pairs, pairs of pairs, ...
    lane = cuda.threadIdx.x
    for chunk in range(cuda.blockIdx.x, first_chunk[first_chunk.size - 1], cuda.gridDim.x):
        k = _span_of(chunk, first_chunk)
        source = sources[k]
        if source != ABSENT and _is_wanted(which, sums[k], span_norms[k]):  # the same for all threads
            start = bounds[k, 0] + (chunk - first_chunk[k]) * CHUNK
            stop = _smaller(start + CHUNK, bounds[k, 1])
            total = 0.0
            for i in range(start + lane, stop, LANES):
                g = grads[i] if source == IN_BUFFER else number_at(source + (i - bounds[k, 0]) * grads.itemsize, clip)
                total += _square(g, clip, prescale)
            lanes[lane] = total
            cuda.syncthreads()
            low, width = 0, LANES
            while width > 1:
                pairs = low + width
                width //= 2
                if lane < width:
                    lanes[pairs + lane] = lanes[low + 2 * lane] + lanes[low + 2 * lane + 1]
                low = pairs
                cuda.syncthreads()
            if lane == 0:
                partials[chunk] = lanes[low]


@cuda.jit
def add_partials(first_chunk, sources, which, prescale, partials, sums, span_norms, finite):
    """Add up the chunks of each span in order, and write its norm and whether its gradient is finite."""
    tile = cuda.shared.array(THREADS, numba.float64)
    for k in range(cuda.blockIdx.x, sources.size, cuda.gridDim.x):
        wanted = _is_wanted(which, sums[k], span_norms[k])
        cuda.syncthreads()  # all threads have read sums and norms, before one writes them
        if wanted:
            total = 0.0
            last = first_chunk[k] if sources[k] == ABSENT else first_chunk[k + 1]
            for low in range(first_chunk[k], last, THREADS):
                # All threads fetch: one thread alone would wait for memory at each partial sum.
                for i in range(low + cuda.threadIdx.x, _smaller(low + THREADS, last), cuda.blockDim.x):
                    tile[i - low] = partials[i]
                cuda.syncthreads()
                if cuda.threadIdx.x == 0:
                    for i in range(_smaller(THREADS, last - low)):
                        total += tile[i]
                cuda.syncthreads()
            if cuda.threadIdx.x == 0:
                if prescale == 0.0:  # a number times 0 is 0, and NaN if it is inf or NaN
                    finite[k] = 1 if total == 0.0 else 0
                else:
                    norm = math.sqrt(total) / prescale
                    span_norms[k] = norm
                    finite[k] = 1 if math.isfinite(norm) else 0
                    if which == EVERY:
                        sums[k] = total


@cuda.jit(device=True)
def _scale_to(limit, norm):
    """Return the factor that brings a norm down to a limit, as `norms.scale_to`."""
    return 1.0 if norm <= limit else limit / norm


@cuda.jit
def limit_norm(span_norms, limit, sign, correction, factors):
    """Write the factors of a gradient with the first norm to each row of `factors`, for a step of one parameter.

    The factors are that of the gradient, with its `sign`, and `correction`.
    """
    for k in range(cuda.grid(1), factors.shape[0], cuda.gridsize(1)):
        factors[k, 0] = multiply(sign, _scale_to(limit, span_norms[0]))
        factors[k, 1] = correction


@cuda.jit(device=True)
def _add_exactly(digits, x):
    """Add a number from 0 to 1 to a number of `_DIGITS` digits of 32 bits; `_rounded` carries what exceeds 32 bits."""
    fraction, exponent = math.frexp(x)
    mantissa = np.int64(fraction * 9007199254740992.0)  # 2**53
    shift = exponent - 53 - _LOWEST
    word, bit = shift // 32, shift % 32
    low = (mantissa & _DIGIT) << bit
    high = (mantissa >> 32) << bit
    cuda.atomic.add(digits, word, low & _DIGIT)
    cuda.atomic.add(digits, word + 1, (low >> 32) + (high & _DIGIT))
    cuda.atomic.add(digits, word + 2, high >> 32)


@cuda.jit(device=True)
def _rounded(digits):
    """Return the float64 nearest to the number in `digits`, ties to even; the number is at least 1."""
    carry = 0
    for word in range(_DIGITS):
        total = digits[word] + carry
        digits[word] = total & _DIGIT
        carry = total >> 32
    top = 32 * _DIGITS - 1
    while (digits[top // 32] >> (top % 32)) & 1 == 0:
        top -= 1
    mantissa = 0
    for position in range(top, top - 53, -1):
        mantissa = 2 * mantissa + ((digits[position // 32] >> (position % 32)) & 1)
    half = top - 53
    if (digits[half // 32] >> (half % 32)) & 1 == 1:
        rest = digits[half // 32] & ((1 << (half % 32)) - 1)
        for word in range(half // 32):
            rest |= digits[word]
        if rest != 0 or mantissa & 1 == 1:
            mantissa += 1
    return math.ldexp(float(mantissa), top - 52 + _LOWEST)


@cuda.jit
def decide(sources, span_norms, finite, guarded, limits, global_limit, signs, rows, corrections, calls, sat_out, missed,
           factors, go):  # fmt: skip
    """Decide from norms and counts whether there is a step, and the factors of each parameter; with one block.

    The kernel reads for each parameter `sources`, `span_norms` and `finite`; `limits`, the bound on its norm (inf for
    none); `signs`, the sign of its gradient; and `rows`, the row of `corrections` with its factors by number of steps
    (-1 without bias correction). The number of steps of a parameter is ``calls - missed - sat_out``. `global_limit` is
    the bound on the norm of all gradients. The kernel writes `factors`, `go` (0 if `guarded` and a gradient is not
    finite), `sat_out` and `missed`.
    """
    digits = cuda.shared.array(_DIGITS, numba.int64)
    largest_of = cuda.shared.array(THREADS, numba.float64)
    common = cuda.shared.array(1, numba.float64)
    wrong = cuda.shared.array(1, numba.int64)
    me, width, size = cuda.threadIdx.x, cuda.blockDim.x, sources.size
    for i in range(me, _DIGITS, width):
        digits[i] = 0
    if me == 0:
        wrong[0] = 0
    cuda.syncthreads()

    largest = 0.0
    for k in range(me, size, width):
        scale, norm = 1.0, span_norms[k]
        if sources[k] == ABSENT:
            norm = 0.0
        else:
            if guarded and finite[k] == 0:
                wrong[0] = 1
            if limits[k] < math.inf:
                scale = _scale_to(limits[k], norm)
                if norm > limits[k]:
                    norm = limits[k]
        factors[k, 0] = scale
        span_norms[k] = norm
        if norm > largest or norm != norm:
            largest = norm
    largest_of[me] = largest
    cuda.syncthreads()
    if me == 0:
        for i in range(width):
            other = largest_of[i]
            if other > largest or other != other:
                largest = other
        common[0] = largest
    cuda.syncthreads()
    largest = common[0]
    if global_limit < math.inf and largest > 0.0 and largest < math.inf:
        for k in range(me, size, width):
            if span_norms[k] > 0.0:
                part = span_norms[k] / largest
                square = multiply(part, part)
                if square > 0.0:
                    _add_exactly(digits, square)
    cuda.syncthreads()
    if me == 0:
        common[0] = 1.0
        if global_limit < math.inf:
            norm = largest
            if largest > 0.0 and largest < math.inf:
                norm = multiply(largest, math.sqrt(_rounded(digits)))
            if not norm <= global_limit:
                common[0] = global_limit / norm
    cuda.syncthreads()

    takes_step = not (guarded and wrong[0] == 1)
    for k in range(me, size, width):
        factors[k, 0] = multiply(signs[k], multiply(factors[k, 0], common[0]))
        factors[k, 1] = 1.0
        if rows[k] >= 0:
            number = _smaller(calls - missed[0] + 1 - sat_out[k], corrections.shape[1])
            factors[k, 1] = corrections[rows[k], number - 1 if number > 1 else 0]
        if takes_step and sources[k] == ABSENT:
            sat_out[k] += 1
    cuda.syncthreads()
    if me == 0:
        go[0] = 1 if takes_step else 0
        if not takes_step:
            missed[0] += 1
