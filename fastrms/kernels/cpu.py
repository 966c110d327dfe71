"""The update on the CPU: the serial and the parallel loop over the elements, and the search for gradients in a tuple.

`extended` is True or None, and `lines_ahead` is a number or None. Numba compiles a function for each type of argument,
and leaves out the code that None switches off. So the first step compiles only the short loop without prefetching. If
there were only the loop with the extended terms, a step over 1e5 float32 with momentum would take a third longer (57 us
instead of 43).
"""

import numba
import numpy as np

from fastrms.kernels import pointers
from fastrms.kernels.access import (
    GRADIENT,
    PARAMETER,
    array_at,
    int32_at,
    int64_at,
    integers_at,
    load_state,
    num_threads,
    part,
    part_of_span,
    prefetch,
    store_state,
)
from fastrms.kernels.compiled import inner, inner_options, jit
from fastrms.kernels.rule import rule

__all__ = [
    "CHANGED", "COMPILED", "FOUND", "FOUND_SOME", "LINES_AHEAD", "MIN_SHARE", "NOT_ADMITTED", "STRIP_LINES", "TABLE",
    "parallel", "parallel_from", "serial", "serial_from", "share",
]  # fmt: skip

# Whether these functions are compiled. The interpreter ignores prefetching.
COMPILED = not numba.config.DISABLE_JIT

# What `serial_from` returns if all arrays are as expected, if some gradients are None, if the ticket is not admitted,
# and if an array with parameters has changed.
FOUND, FOUND_SOME, NOT_ADMITTED, CHANGED = -1, -2, -3, -4

# The fewest elements of a thread in a parallel loop: a thread takes longer to wake up than to update these.
MIN_SHARE = 1024

# A processor prefetches memory by itself, but not beyond a page of 4 KiB. So before each strip of 8 cache lines, the
# loop can request the lines of each array that come `LINES_AHEAD` lines later. Whether this helps depends on the
# processor (benchmarks/prefetch.py): a step over 5e7 float32 took 12 % less time on an Intel Xeon (Skylake), and up to
# 50 % more on an AMD EPYC (Zen 4). Hence the caller decides, and `backends.tuner` measures. On the Xeon, any distance
# from 24 to 48 lines gives nearly the same time. Strips of 16 lines gain half as much, and so do requests array by
# array instead of line by line.
STRIP_LINES, LINES_AHEAD = 8, 48


# The arguments of `serial_from` that are the same in all steps, as one record: each further array argument would take
# 30 ns per call. `*_at` are addresses of dense arrays, which the caller keeps alive.
TABLE = np.dtype([
    ("size", np.int64),  # elements of the run
    ("params_at", np.int64), ("grads_at", np.int64),
    ("spans_at", np.int64), ("span_count", np.int64),  # int64, shape (span_count, 4)
    ("factors_at", np.int64),  # shape (span_count, 2)
    ("from_buffer", np.int64),  # whether `sources` may have addresses of earlier gradients, which do not count
    ("held_at", np.int64),  # the items of a tuple of all parameters; 0 if the parameters lie at `params_at`
    ("sources_at", np.int64), ("source_count", np.int64),  # int64, shape (source_count, 4): the spans of all parameters
    ("shapes_at", np.int64), ("shape_columns", np.int64),  # int64, shape (source_count, shape_columns)
    ("expected_at", np.int64),  # int64, shape (2, 5): `pointers.identity` of gradients and of parameters
    ("written_at", np.int64), ("written_count", np.int64),  # int64, shape (written_count, 2)
    ("control_at", np.int64), ("ticket", np.int64),  # `Counts.memory`; 0 if this call does not count the step
])  # fmt: skip

_rule = numba.njit(**inner_options, forceinline=True)(rule)


@inner
def _first_from(spans, low):
    """Return the number of the first span that ends after element `low`. Spans are sorted and disjoint."""
    # (With np.searchsorted, compiling would take a quarter longer.)
    first = 0
    last = spans.shape[0]
    while first < last:
        middle = (first + last) // 2
        if spans[middle, 1] <= low:
            first = middle + 1
        else:
            last = middle
    return first


@inner
def _find(items, column, expected, written, shapes, sources):
    """Write the addresses of the arrays to a column of `sources`, and return a status of `serial_from`.

    `pointers` has the offsets of the fields of an array.
    """
    status = FOUND
    for k in range(sources.shape[0]):
        array = int64_at(items + 8 * shapes[k, 0])
        if array == expected[3]:
            sources[k, column] = 0
            status = FOUND_SOME
            continue
        if expected[0] == 0:  # a parameter that is held: any type, and the dtype object that it had at first
            if int64_at(array + pointers.DTYPE) != shapes[k, 2]:
                return k
        elif int64_at(array + pointers.TYPE) != expected[0] or int64_at(array + pointers.DTYPE) != expected[1]:
            return k
        if int32_at(array + pointers.FLAGS) & expected[4] != expected[4]:
            return k
        if int32_at(array + pointers.NDIM) != shapes[k, 1]:
            return k
        shape = int64_at(array + pointers.SHAPE)
        for d in range(shapes[k, 1]):
            if int64_at(shape + 8 * d) != shapes[k, 3 + d]:
                return k
        data = int64_at(array + pointers.DATA)
        if expected[0] == 0 and data != sources[k, column]:
            return k
        end = data + (sources[k, 1] - sources[k, 0]) * expected[2]
        j = _first_from(written, data)
        if j < written.shape[0] and written[j, 0] < end:
            return k
        sources[k, column] = data
    return status


@inner
def _unpack(hyper):
    """Return all numbers of `hyper`, for local variables. Stores in the loop could alias `hyper` and force rereads."""
    return (hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6], hyper[7], hyper[8], hyper[9],
            hyper[10], hyper[11], hyper[12], hyper[13], hyper[14])  # fmt: skip


@inner
def _update(params, grads, cache, momentum_buffer, grad_avg, h, scale, correction, extended):
    """Update all elements of contiguous arrays that have one factor and one correction."""
    for i in range(params.size):
        b, m = load_state(momentum_buffer, i), load_state(grad_avg, i)
        p, c, b, m = _rule(params[i], grads[i], load_state(cache, i), b, m, h, scale, correction, extended)
        params[i] = p
        store_state(cache, i, c)
        store_state(momentum_buffer, i, b)
        store_state(grad_avg, i, m)


@numba.njit(**inner_options, forceinline=True)
def _update_in_strips(params, grads, cache, momentum_buffer, grad_avg, h, scale, correction, extended, lines_ahead):
    """Update in strips, each after a request to prefetch a later strip; in one strip if `lines_ahead` is None or 0."""
    if lines_ahead is None:
        _update(params, grads, cache, momentum_buffer, grad_avg, h, scale, correction, extended)
        return
    line = 64 // params.itemsize
    strip = STRIP_LINES * line if lines_ahead else params.size
    ahead = lines_ahead * line
    start = 0
    while start < params.size:  # a range would be divided by its step, which takes longer than a small span
        stop = start + strip if start + strip < params.size else params.size
        if lines_ahead and stop + ahead <= params.size:
            for i in range(start + ahead, stop + ahead, line):
                prefetch(params, i)
                prefetch(grads, i)
                prefetch(cache, i)
                prefetch(momentum_buffer, i)
                prefetch(grad_avg, i)
        b, m = part(momentum_buffer, start, stop), part(grad_avg, start, stop)
        p, g, c = part(params, start, stop), part(grads, start, stop), part(cache, start, stop)
        _update(p, g, c, b, m, h, scale, correction, extended)
        start = stop


@inner
def _update_between(low, high, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended,
                    lines_ahead):  # fmt: skip
    """Update all elements of `spans` in [low, high)."""
    h = _unpack(hyper)
    for k in range(_first_from(spans, low), spans.shape[0]):
        if spans[k, 0] >= high:
            break
        start = spans[k, 0] if spans[k, 0] > low else low  # max() and min() would be functions to compile
        stop = spans[k, 1] if spans[k, 1] < high else high
        # Slices with a loop from 0: a loop from start to stop over the whole arrays is not vectorised in a prange.
        p = part_of_span(params, spans, k, PARAMETER, start, stop)
        g = part_of_span(grads, spans, k, GRADIENT, start, stop)
        c = part(cache, start, stop)
        b = part(momentum_buffer, start, stop)
        m = part(grad_avg, start, stop)
        _update_in_strips(p, g, c, b, m, h, factors[k, 0], factors[k, 1], extended, lines_ahead)


@inner
def share(size):
    """Return the number of elements of each thread in a parallel loop over `size` elements."""
    threads = num_threads()
    # Multiples of a cache line in all dtypes: no two threads write to the same line if the arrays begin at one.
    whole = ((size + threads - 1) // threads + 63) // 64 * 64
    return whole if whole > MIN_SHARE else MIN_SHARE


@jit()
def serial(params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended, lines_ahead):
    """Update `params` and the state in place on the calling thread. Arguments as for `reference.update`."""
    _update_between(np.int64(0), params.size, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors,
                    extended, lines_ahead)  # fmt: skip


@inner
def _locate(t, items):
    """Find the gradients of a step, and parameters that are held in place; return the status of `serial_from`."""
    if t.control_at != 0 and integers_at(t.control_at, 2)[1] != t.ticket:
        return NOT_ADMITTED
    shapes = integers_at(t.shapes_at, (t.source_count, t.shape_columns))
    sources = integers_at(t.sources_at, (t.source_count, 4))
    # Numba would compile `_find` for each constant, but compiles it once for int64.
    if t.held_at != 0:
        expected, nothing = integers_at(t.expected_at + 8 * 5, 5), integers_at(t.written_at, (0, 2))
        if _find(t.held_at, np.int64(PARAMETER), expected, nothing, shapes, sources) != FOUND:
            return CHANGED
    if t.from_buffer:
        for k in range(sources.shape[0]):
            sources[k, GRADIENT] = 0
    if items == 0:
        return FOUND
    expected, written = integers_at(t.expected_at, 5), integers_at(t.written_at, (t.written_count, 2))
    return _find(items, np.int64(GRADIENT), expected, written, shapes, sources)


@inner
def _update_from(low, high, table, hyper, cache, momentum_buffer, grad_avg, extended, lines_ahead):
    """Update the elements [low, high) of the run."""
    t = table[0]
    _update_between(low, high, array_at(t.params_at, t.size, hyper), array_at(t.grads_at, t.size, hyper), cache,
                    momentum_buffer, grad_avg, hyper, integers_at(t.spans_at, (t.span_count, 4)),
                    array_at(t.factors_at, (t.span_count, 2), hyper), extended, lines_ahead)  # fmt: skip


@inner
def _count(t):
    """Count the step if the table says that this call does."""
    if t.control_at != 0:
        integers_at(t.control_at, 2)[0] += 1


@jit()
def serial_from(table, hyper, cache, momentum_buffer, grad_avg, extended, lines_ahead, items):
    """Find the gradients in a tuple of arrays, and update as `serial` does if all are as expected. Return the status.

    `items` is the address of the items of the tuple (`pointers.items_of`), which the caller keeps alive; 0 if the spans
    already have all addresses. The status is `FOUND`; `FOUND_SOME` if some gradients are None; the number of the first
    gradient that is not exactly as expected; `NOT_ADMITTED`; or `CHANGED`. Nothing is updated unless it is `FOUND`.

    `table` has the addresses of these arrays, among others. `written` has the bounds [low, high) of each piece of
    memory that no gradient may alias, sorted: the arrays that the step writes, and the gradient buffer. `shapes` has a
    row for each parameter: its number in the tuple, its number of dimensions, and its shape. `sources` has a row for
    each parameter: its [start, stop) in the run, the address of its gradient (0 for None), and its own address. This
    function writes both addresses.
    """
    t = table[0]
    status = _locate(t, items)
    if status == FOUND:
        _update_from(np.int64(0), t.size, table, hyper, cache, momentum_buffer, grad_avg, extended, lines_ahead)
        _count(t)
    return status


@jit(parallel=True)
def parallel_from(table, hyper, cache, momentum_buffer, grad_avg, extended, lines_ahead, items):
    """Do the same as `serial_from`, but update as `parallel` does."""
    t = table[0]
    status = _locate(t, items)
    if status == FOUND:
        elements = t.size  # Numba cannot give a record to the threads
        size = share(elements)
        for k in numba.prange((elements + size - 1) // size):
            stop = (k + 1) * size if (k + 1) * size < elements else elements
            _update_from(k * size, stop, table, hyper, cache, momentum_buffer, grad_avg, extended, lines_ahead)
        _count(t)
    return status


@jit(parallel=True)
def parallel(params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended, lines_ahead):
    """Update as `serial` does, on Numba's threads, each with a share of the elements. The bits are the same."""
    size = share(params.size)
    for k in numba.prange((params.size + size - 1) // size):
        stop = (k + 1) * size if (k + 1) * size < params.size else params.size
        _update_between(k * size, stop, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors,
                        extended, lines_ahead)  # fmt: skip
