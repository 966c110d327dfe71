"""The compiled kernels: the update rule of one element, and the serial and the parallel loop over it.

How options reach the rule
--------------------------
Only what changes the memory that is touched is decided at compile time: the momentum buffer and the mean gradient,
each an array or ``None`` (Numba prunes ``is not None`` branches). Every other option is a number in ``hyper``, and off
is the number that leaves the bits alone (a factor of 1, a bound of inf, a threshold of 0), so that changing an option
compiles nothing. One compiled function holds the loop twice, with and without the ``extended`` terms, and picks one
at run time: always carrying the extended terms made a step of 1e5 float32 with momentum a third slower (57 us against
43), and two loops in one function cost 0.3 s more of compiling, once.

What keeps the bits equal to NumPy's: ``fastmath`` is off and nothing is contracted into fused multiply-adds, every
scalar has the dtype of the arrays, and the operations stand in the reference's order. ``error_model="numpy"`` is
needed for speed: Python's check for division by zero keeps the loop from being vectorised.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic, overload

from fastrms.kernels import pointers
from fastrms.kernels.compiled import inner, inner_options, jit

__all__ = [
    "BLOCK",
    "FOUND",
    "FOUND_SOME",
    "block_size",
    "gradient_part",
    "int64_at",
    "parallel",
    "prefetch",
    "rule",
    "serial",
    "serial_from",
]


# What `serial_from` returns where all arrays are as expected, or all but those that are None.
FOUND, FOUND_SOME = -1, -2

# About the fewest elements in one work item of a parallel loop: small enough to share 1e5 elements evenly, large enough
# that finding its spans (some 30 ns) does not show. Large arrays have 256 work items: with 4,096 elements each, a step
# over 5e7 took 22.1 ms instead of 21.0. Multiples of a cache line, so that threads never write to the same one.
BLOCK = 4096

# A processor fetches memory ahead by itself, but not beyond a page of 4 KiB, and it is so full of divisions and square
# roots that it does not look far. So the loop asks, ahead of each strip of 8 cache lines, for those of each array that
# come 48 lines later: a step over 5e7 float32 takes 12 % less time, with 16-bit state 30 %. 24 to 48 lines are much the
# same; strips of 16 gain half of that, and so do requests array by array instead of line by line.
STRIP_LINES, LINES_AHEAD = 8, 48

# The fewest elements for which it does. In a training loop the matrix products have pushed all of it out of the caches
# (784-512-512-10: 310 us instead of 350 a step, with 16-bit state 325 instead of 430); alone, with 2.6e5 to 2e6
# elements in the second and third level, asking costs up to 10 %, more in the loop of `parallel` than it ever gains.
SERIAL_PREFETCHES_FROM, PARALLEL_PREFETCHES_FROM = 1 << 18, 1 << 21


def rule(p, g, c, b, m, h, scale, correction, extended):
    """One step of one element: takes parameter, gradient and state, returns parameter and state, ``(p, c, b, m)``.

    `c` is the cache, `b` the momentum buffer and `m` the mean gradient; the last two are None where unused, and then
    returned as None. `h` is the tuple of `fastrms.kernels.hyper.HYPER_FIELDS`; `scale` multiplies the gradient (norm
    clipping, and -1 to maximize), `correction` is 1/(1 - decay^t) or 1. `extended` is None to leave out all that
    default options do not need. `docs/options.md` has the equations; `reference.update` is the same in plain NumPy.

    Selections are written ``0 if x < bound else x`` so that NaN falls through unchanged.
    """
    (lr_inside, lr_outside, decay, rest, eps_inside, eps_outside, l2, decoupled, momentum, nesterov, clip,
     gradient_floor, mean_floor, state_floor, zero) = h  # fmt: skip

    if extended is not None:
        g = clip if g > clip else g
        g = -clip if g < -clip else g
        g = g * scale
        g = g + l2 * p if l2 != zero else g  # not `g + 0 * p`, which is NaN where p is inf

    # Subnormal numbers make a vector of arithmetic up to 30 times slower, so they are kept from arising, not just
    # from being stored. The floors are 0, hence without effect, when flush_subnormals is off.
    g_squarable = zero if abs(g) < gradient_floor else g
    c = decay * c + rest * (g_squarable * g_squarable)
    c = zero if c < state_floor else c

    v = c * correction if extended is not None else c
    if m is not None:
        m = decay * m + rest * g
        m = zero if abs(m) < state_floor else m
        mean = m * correction if extended is not None else m
        mean = zero if abs(mean) < mean_floor else mean
        square = mean * mean
        # Rounding can make the variance negative, and its root NaN: clamp it at 0. Where it would be subnormal it is
        # 0 too, by taking v from itself: a difference that is computed first and dropped then is slow all the same.
        square = v if v < square + state_floor else square
        v = v - square

    if extended is not None:
        step = lr_inside * g / (np.sqrt(v + eps_inside) + eps_outside)
        p = p - decoupled * p if decoupled != zero else p
    else:
        step = lr_inside * g / (np.sqrt(v) + eps_outside)

    if b is not None:
        b = momentum * b + step
        b = zero if abs(b) < state_floor else b
        step = step + momentum * b if nesterov != zero else b
        step = lr_outside * step
    return p - step, c, b, m


# A state array holds numbers of the parameters' dtype, or bfloat16 numbers as uint16, or there is none. Which function
# is meant is known with the type: the compiler takes that one (`overload`), the interpreter looks each time.


def _load_nothing(state, i):
    return None


def _load_number(state, i):
    return state[i]


def _load_bfloat16(state, i):
    # Numba computes uint32 << uint32 in uint64.
    return np.uint32(np.uint32(state[i]) << np.uint32(16)).view(np.float32)


def _store_nothing(state, i, x):
    pass


def _store_number(state, i, x):
    state[i] = x


def _store_bfloat16(state, i, x):
    """Round to nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    # Just under half of the last place that stays, and that place itself, carry where it has to be rounded up.
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    carried = np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd))
    # NaN must not carry, which could make it inf.
    state[i] = np.uint16(0x7FC0) if x != x else np.uint16(carried >> np.uint32(16))


def _part_of_nothing(state, start, stop):
    return None


def _part_of_array(state, start, stop):
    return state[start:stop]


def _load(state, i):
    return _form(state, _load_nothing, _load_bfloat16, _load_number)(state, i)


def _store(state, i, x):
    _form(state, _store_nothing, _store_bfloat16, _store_number)(state, i, x)


def _part(state, start, stop):
    return _form(state, _part_of_nothing, _part_of_array, _part_of_array)(state, start, stop)


def prefetch(array: Any, i: int) -> None:
    """Ask for the cache line of element `i` of an array, if it is one, ahead of its turn: a hint, no more."""
    # For the interpreter there is nothing to do.


def _form(state, for_nothing, for_bfloat16, for_numbers):
    """One of three functions by what `state` is, a value or a type of Numba's."""
    if state is None or isinstance(state, types.NoneType):
        return for_nothing
    return for_bfloat16 if state.dtype in (np.uint16, types.uint16) else for_numbers


@overload(_load, jit_options=inner_options)
def _typed_load(state, i):
    return _form(state, _load_nothing, _load_bfloat16, _load_number)


@overload(_store, jit_options=inner_options)
def _typed_store(state, i, x):
    return _form(state, _store_nothing, _store_bfloat16, _store_number)


@overload(_part, jit_options=inner_options)
def _typed_part(state, start, stop):
    return _form(state, _part_of_nothing, _part_of_array, _part_of_array)


@overload(prefetch, jit_options=inner_options)
def _typed_prefetch(array, i):
    if isinstance(array, types.NoneType):
        return lambda array, i: None
    return lambda array, i: _prefetch_line(array, i)


_rule = numba.njit(**inner_options, forceinline=True)(rule)


@intrinsic
def _pointer_at(typingctx, address, like):
    """`address` as a pointer to what the array `like` has."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), codegen


@intrinsic
def _prefetch_line(typingctx, array, i):
    def codegen(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), pointer)
        # To be read, into the cache next to the processor, as data.
        builder.call(function, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@inner
def _array_at(address, size, like):
    """The 1-D array of `size` elements at an address, of the dtype of the array `like`."""
    return carray(_pointer_at(address, like), (size,))


@inner
def gradient_part(grads, spans, k, start, stop):
    """Elements [start, stop) of the run, which lie in span k: of `grads`, or of an array elsewhere in memory."""
    address = spans[k, 2]
    if address == 0:
        return grads[start:stop]
    return _array_at(address + (start - spans[k, 0]) * grads.itemsize, stop - start, grads)


def _number_at(kind):
    """An intrinsic that reads an integer of type `kind` at an address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, arguments):
            return builder.load(builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer()))

        return kind(types.int64), codegen

    return load


int64_at, int32_at = _number_at(types.int64), _number_at(types.int32)


@inner
def _find(items, expected, shapes, sources):
    """The part of `serial_from` that looks into the arrays; `pointers` has where their fields lie."""
    status = FOUND
    for k in range(sources.shape[0]):
        array = int64_at(items + 8 * shapes[k, 0])
        if array == expected[3]:
            sources[k, 2] = 0
            status = FOUND_SOME
            continue
        if int64_at(array + pointers.TYPE) != expected[0] or int64_at(array + pointers.DTYPE) != expected[1]:
            return k
        if int32_at(array + pointers.FLAGS) & pointers.ORDINARY != pointers.ORDINARY:
            return k
        if int32_at(array + pointers.NDIM) != shapes[k, 1]:
            return k
        shape = int64_at(array + pointers.SHAPE)
        for d in range(shapes[k, 1]):
            if int64_at(shape + 8 * d) != shapes[k, 2 + d]:
                return k
        data = int64_at(array + pointers.DATA)
        end = data + (sources[k, 1] - sources[k, 0]) * expected[2]
        for j in range(4, expected.size, 2):
            if data < expected[j + 1] and end > expected[j]:
                return k
        sources[k, 2] = data
    return status


@inner
def _gather(sources, grads):
    """Copy each array that was found to its place in `grads`, and let `sources` point there."""
    for k in range(sources.shape[0]):
        if sources[k, 2] == 0:
            continue
        target = grads[sources[k, 0] : sources[k, 1]]
        source = _array_at(sources[k, 2], target.size, grads)
        for i in range(target.size):
            target[i] = source[i]
        sources[k, 2] = 0


@inner
def _unpack(hyper):
    # Into locals ahead of the loop: inside it, a store to cache could alias `hyper`, and each number would be read
    # again for each element.
    return (hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6], hyper[7], hyper[8], hyper[9],
            hyper[10], hyper[11], hyper[12], hyper[13], hyper[14])  # fmt: skip


@inner
def _update(params, grads, cache, momentum_buffer, grad_avg, h, scale, correction, extended):
    for i in range(params.size):
        b, m = _load(momentum_buffer, i), _load(grad_avg, i)
        p, c, b, m = _rule(params[i], grads[i], _load(cache, i), b, m, h, scale, correction, extended)
        params[i] = p
        _store(cache, i, c)
        _store(momentum_buffer, i, b)
        _store(grad_avg, i, m)


@numba.njit(**inner_options, forceinline=True)
def _update_in_strips(params, grads, cache, momentum_buffer, grad_avg, h, scale, correction, extended, strip):
    """Update in strips of `strip` elements, and ask ahead of each for a later one; a single strip asks for nothing."""
    line = 64 // params.itemsize
    ahead = LINES_AHEAD * line
    for start in range(0, params.size, strip):
        stop = min(start + strip, params.size)
        if stop + ahead <= params.size:
            for i in range(start + ahead, stop + ahead, line):
                prefetch(params, i)
                prefetch(grads, i)
                prefetch(cache, i)
                prefetch(momentum_buffer, i)
                prefetch(grad_avg, i)
        b, m = _part(momentum_buffer, start, stop), _part(grad_avg, start, stop)
        p, g, c = params[start:stop], grads[start:stop], cache[start:stop]
        if extended:
            _update(p, g, c, b, m, h, scale, correction, True)
        else:
            _update(p, g, c, b, m, h, scale, correction, None)


@inner
def _update_between(low, high, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended,
                    prefetches_from):  # fmt: skip
    """Update those elements of `spans` that lie in [low, high)."""
    h = _unpack(hyper)
    strip = STRIP_LINES * 64 // params.itemsize if params.size >= prefetches_from else max(1, params.size)
    # Bisect for the first span that ends after `low`; spans are sorted and disjoint. (np.searchsorted would add a
    # quarter to the time that compiling takes.)
    first = 0
    last = spans.shape[0]
    while first < last:
        middle = (first + last) // 2
        if spans[middle, 1] <= low:
            first = middle + 1
        else:
            last = middle
    for k in range(first, spans.shape[0]):
        if spans[k, 0] >= high:
            break
        start = max(low, spans[k, 0])
        stop = min(high, spans[k, 1])
        # Slices with a loop from 0: a loop from start to stop over the whole arrays is not vectorised in a prange.
        p = params[start:stop]
        g = gradient_part(grads, spans, k, start, stop)
        c = cache[start:stop]
        b = _part(momentum_buffer, start, stop)
        m = _part(grad_avg, start, stop)
        # Twice the same, and inlined: in each LLVM knows what `extended` is, and keeps the numbers of that loop in
        # registers from strip to strip. Numba has one function to compile.
        if extended:
            _update_in_strips(p, g, c, b, m, h, factors[k, 0], factors[k, 1], extended, strip)
        else:
            _update_in_strips(p, g, c, b, m, h, factors[k, 0], factors[k, 1], extended, strip)


@inner
def block_size(size):
    """How many elements a work item of a parallel loop over `size` elements has."""
    # A multiple of 16 work items, so that usual numbers of threads have as many each: 25 for 1e5 took 3 % longer.
    blocks = min(256, (size // BLOCK + 16) // 16 * 16)
    return max(1024, (size // blocks + 64) // 64 * 64)


@jit()
def serial(params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended):
    """Update `params` and the state in place on the calling thread. Arguments as for `reference.update`."""
    _update_between(0, params.size, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended,
                    SERIAL_PREFETCHES_FROM)  # fmt: skip


@jit()
def serial_from(
    items, expected, shapes, sources, gathers,
    params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended,
):  # fmt: skip
    """Find the gradients in a tuple of arrays, then do as `serial`; nothing is updated if one is not as expected.

    Returns `FOUND`; or `FOUND_SOME` where some are None and the others as expected; or the number of the first array
    that is not exactly as expected. Whoever calls holds the tuple, so that the arrays live until they were read.

    Parameters
    ----------
    items : int
        Address of the items of the tuple (`pointers.items_of`), or 0 if `sources` has what was found before.
    expected : ndarray of int64, shape (4 + 2 m,)
        Type, dtype, bytes of an element and None (`pointers.identity`), and then [low, high) of each piece of memory
        that a gradient may not touch: what the step writes, and where it is copied to.
    shapes : ndarray of int64, shape (k, 2 + most dimensions)
        For each array its number in the tuple, its number of dimensions, and its shape.
    sources : ndarray of int64, shape (k, 3)
        For each array its [start, stop) in the run, and the address that is found, which is written; 0 for None.
    gathers : bool
        Copy what was found to `grads`: for small arrays, which are faster updated as one (1,000 of 100 float32 each
        in 50 us, instead of 70 one by one).
    """
    if items != 0:
        status = _find(items, expected, shapes, sources)
        if status != FOUND:
            return status
    if gathers:
        _gather(sources, grads)
    _update_between(0, params.size, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended,
                    SERIAL_PREFETCHES_FROM)  # fmt: skip
    return FOUND


@jit(parallel=True)
def parallel(params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended):
    """The same as `serial` on Numba's threads, block by block; no bit depends on the blocks or on how many threads."""
    size = block_size(params.size)
    for block in numba.prange((params.size + size - 1) // size):
        low = block * size
        high = min(params.size, low + size)
        _update_between(low, high, params, grads, cache, momentum_buffer, grad_avg, hyper, spans, factors, extended,
                        PARALLEL_PREFETCHES_FROM)  # fmt: skip
