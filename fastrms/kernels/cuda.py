"""The CUDA kernels: the same update rule and the same sums of squares, run by the threads of a GPU.

This is the only module that imports CUDA: `numba.cuda`, which is numba-cuda where that is installed, and Numba's own
target otherwise.

What keeps the bits equal to the processor's
--------------------------------------------
The rule of an element is `fastrms.kernels.cpu.rule` itself. Two things in it mean something else on a GPU. A product
and a sum would be contracted to one instruction that rounds once, and neither CUDA target of Numba can be told not to
(NVVM has the option; they do not pass it on). And `np.sqrt` is not known there. So the rule's source is compiled with
each ``a * b`` as `multiply`, an instruction that is never contracted (``mul.rn``), and with CUDA's own square root.
Division and square root round correctly unless fastmath is asked for, and subnormal numbers are kept.
`tests/test_ptx.py` compiles everything without a GPU and reads the result.

Sums of squares are taken in the chunks, on the lanes and in the order of `fastrms.kernels.norms`, one warp a chunk, and
the sum over parameters is exact and rounded once, as `math.fsum` is.

Nothing here makes the processor wait for the device. Numba's simulator (NUMBA_ENABLE_CUDASIM=1) runs all of it in the
interpreter, on ordinary memory.
"""

import ast
import ctypes
import inspect
import math
import warnings
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import numba
import numpy as np
from llvmlite import ir

from fastrms.kernels import cpu, norms

with warnings.catch_warnings():  # numba-cuda 0.30 does what NumPy 2.5 warns of
    warnings.simplefilter("ignore", DeprecationWarning)
    from numba import cuda
    from numba.cuda.extending import intrinsic

__all__ = [
    "ABSENT", "CHUNK", "DOUBTFUL", "EVERY", "IN_BUFFER", "LANES", "LEGACY_STREAM", "PRESCALE", "SIMULATED", "THREADS",
    "TOO_LARGE", "TOO_SMALL", "add_partials", "convert_kernel", "cuda", "decide", "driver_version", "fill",
    "handle_of", "interface_of", "launch", "missing", "square_chunks", "update_kernel",
]  # fmt: skip

SIMULATED = bool(numba.config.ENABLE_CUDASIM)

CHUNK, LANES = norms.CHUNK, norms.LANES
_LANES_AND_SUMS = 2 * LANES  # a name, as Numba takes no expression for the size of shared memory

# Threads of a block of the update, and how many elements each has in flight: each has loaded all of them before it
# stores one, or too few bytes are under way to keep the memory of a large GPU busy.
THREADS, UNROLL = 256, 4
# Of a launch; a block that has done its chunk takes another one so many further on.
BLOCKS = 65_536

# Where a gradient is: at an address, in the gradient buffer, or nowhere, and then its parameter sits the step out.
IN_BUFFER, ABSENT = 0, -1

# Sums that have left the range of float64 are taken again, of gradients multiplied by this, or by its inverse.
PRESCALE = norms._PRESCALE

# The number of the default stream of a device, which waits for most others and they for it.
LEGACY_STREAM = 1

# What `square_chunks` and `add_partials` are to look at: every span; those whose sum has left the range of float64, at
# either end; those whose norm is no finite number.
EVERY, TOO_SMALL, TOO_LARGE, DOUBTFUL = range(4)

# An exact sum of squares of numbers of at most 1: digits of 32 bits, from the lowest bit that `math.frexp` gives to a
# subnormal number (2**-1126) to the sum of 2**29 ones.
_DIGITS, _LOWEST = 40, -1126
_DIGIT = 0xFFFFFFFF


if SIMULATED:

    def multiply(a, b):
        """The product, rounded by itself."""
        return a * b

    def number_at(address, like):
        """The number at an address, of the type of `like`."""
        return numba.carray(ctypes.c_void_p(int(address)), (1,), like.dtype)[0]

else:

    @intrinsic
    def multiply(typingctx, a, b):
        """The product, rounded by itself."""

        def codegen(context, builder, signature, arguments):
            number = arguments[0].type
            name = f"llvm.nvvm.mul.rn.{'f' if a.bitwidth == 32 else 'd'}"
            function = builder.module.declare_intrinsic(name, (), ir.FunctionType(number, [number, number]))
            return builder.call(function, arguments)

        return (a(a, b), codegen) if a == b else None  # otherwise one of them was meant to be cast

    @intrinsic
    def number_at(typingctx, address, like):
        """The number at an address, of the type of `like`."""

        def codegen(context, builder, signature, arguments):
            # 1 is the device's own memory; without it each load would have to find out which one is meant.
            return builder.load(builder.inttoptr(arguments[0], context.get_value_type(like).as_pointer(1)))

        return like(address, like), codegen


class _Products(ast.NodeTransformer):
    """`a * b` as `multiply(a, b)`."""

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult):
            return node
        call = ast.Call(ast.Name("multiply", ast.Load()), [node.left, node.right], [])
        return ast.copy_location(call, node)


def _for_device(function):
    """A function of the CPU kernels as a device function that has its bits."""
    function = getattr(function, "py_func", function)
    if SIMULATED:
        return cuda.jit(device=True)(function)
    tree = ast.parse(inspect.getsource(function))
    tree.body[0].decorator_list = []
    names = ModuleType("numpy")
    names.sqrt, names.float64 = math.sqrt, np.float64
    scope = {"multiply": multiply, "np": names}
    exec(compile(ast.fix_missing_locations(_Products().visit(tree)), inspect.getsourcefile(function), "exec"), scope)
    return cuda.jit(device=True)(scope[function.__name__])


@lru_cache(256)
def _configured(kernel, blocks, threads, stream):
    with warnings.catch_warnings():  # Numba warns of small launches, which are what small parameters need
        warnings.simplefilter("ignore")
        return kernel[blocks, threads, stream]


def launch(kernel: Any, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
    """Run a kernel on a stream: of `blocks` blocks at most `BLOCKS`, and at least one."""
    configure = _configured.__wrapped__ if SIMULATED else _configured  # the simulator's kernels hold one configuration
    configure(kernel, max(1, min(blocks, BLOCKS)), threads, stream)(*arguments)


def interface_of(thing: Any) -> dict[str, Any] | None:
    """What the CUDA array interface says of something on the device; None if it is something else."""
    try:
        found = getattr(thing, "__cuda_array_interface__", None)
        if found is None and getattr(thing, "__cuda_ndarray__", False):  # of the simulator, whose memory is ordinary
            found = thing.__array_interface__
    except Exception:  # whatever an attribute of the user's own raises; torch's, for dtypes that it cannot describe
        return None
    return found


def handle_of(stream: Any) -> int:
    """The number of a stream by which libraries tell each other of it; the simulator's only one is the default one."""
    return int(stream) or LEGACY_STREAM if hasattr(stream, "__int__") else LEGACY_STREAM


_rule = _for_device(cpu.rule)
_square = _for_device(norms._square)


@cuda.jit(device=True)
def _smaller(a, b):
    """The smaller one; `min` cannot be compiled by Numba's own target (0.68)."""
    return a if a < b else b


@cuda.jit(device=True)
def _span_of(chunk, first_chunk):
    """The number of the span that a chunk is part of."""
    low, high = 0, first_chunk.size - 1
    while high - low > 1:
        middle = (low + high) // 2
        if first_chunk[middle] <= chunk:
            low = middle
        else:
            high = middle
    return low


@cache
def update_kernel(dtype, momentum, centered, extended, factored, guarded):
    """The kernel that updates the parameters of a run; compiled only for the options that are used.

    Its arguments are 1-D arrays on the device (`params`, `grads`, `cache`, and where the options have them
    `momentum_buffer` and `grad_avg`; otherwise anything), the tuple `hyper` of `hyper.HYPER_FIELDS` in the
    parameters' dtype, `scale` and `correction` for all parameters in the same dtype, and then

    bounds : int64, shape (k, 2)
        Elements [start, stop) of each span.
    first_chunk : int64, shape (k + 1,)
        The number of the first chunk of each span; the last is how many chunks there are.
    sources : int64, shape (k,)
        Where the gradient of each span is: an address, `IN_BUFFER` or `ABSENT`.
    factors : float64, shape (k, 2)
        Instead of `scale` and `correction`, with `factored`.
    go : int64, shape (1,)
        0 where nothing is to be done; looked at with `guarded`.

    Parameters
    ----------
    dtype : numpy.dtype
        Of the parameters: float32 or float64.
    momentum, centered : bool
        Which state there is.
    extended : bool
        Whether `hyper.needs_extended_rule`, or `factored`.
    factored, guarded : bool
        Whether there are `factors`, and `go`.
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
                start = bounds[k, 0] + (chunk - first_chunk[k]) * CHUNK
                stop = _smaller(start + CHUNK, bounds[k, 1])
                for first in range(start + cuda.threadIdx.x, stop, UNROLL * width):
                    for u in range(UNROLL):
                        i = first + u * width
                        if i < stop:
                            p[u] = params[i]
                            if source == IN_BUFFER:
                                g[u] = grads[i]
                            else:
                                g[u] = number_at(source + (i - bounds[k, 0]) * params.itemsize, scale)
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
                            params[i] = p_new
                            cache[i] = c_new
                            if momentum:
                                momentum_buffer[i] = b_new
                            if centered:
                                grad_avg[i] = m_new

    return update


@cuda.jit(device=True)
def _is_wanted(which, total, norm):
    if which == TOO_SMALL:
        return total < norms._TOO_SMALL
    if which == TOO_LARGE:
        return math.isinf(total)
    return which == EVERY or not math.isfinite(norm)


@cuda.jit
def square_chunks(grads, bounds, first_chunk, sources, clip, prescale, which, sums, span_norms, partials):
    """Sum up the squares of each chunk of the spans that `which` asks for, into `partials`; with `LANES` threads."""
    lanes = cuda.shared.array(_LANES_AND_SUMS, numba.float64)  # and after them sums in pairs, pairs of those, ...
    lane = cuda.threadIdx.x
    for chunk in range(cuda.blockIdx.x, first_chunk[first_chunk.size - 1], cuda.gridDim.x):
        k = _span_of(chunk, first_chunk)
        source = sources[k]
        if source != ABSENT and _is_wanted(which, sums[k], span_norms[k]):  # alike for all threads of the block
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
    """Add up the chunks of each span in their order: its norm, and whether its gradient is finite."""
    tile = cuda.shared.array(THREADS, numba.float64)
    for k in range(cuda.blockIdx.x, sources.size, cuda.gridDim.x):
        wanted = _is_wanted(which, sums[k], span_norms[k])
        cuda.syncthreads()  # all have looked, before one writes what they look at
        if wanted:
            total = 0.0
            last = first_chunk[k] if sources[k] == ABSENT else first_chunk[k + 1]
            for low in range(first_chunk[k], last, THREADS):
                # Fetched by all threads, as one after another would wait for memory each time.
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
def _add_exactly(digits, x):
    """Add a number from 0 to 1 to a number of `_DIGITS` digits of 32 bits, which need not be normalised."""
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
    """The float64 nearest to the number that `digits` have, ties to even; it is at least 1."""
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
    """From norms and counts to the factors of each parameter, and whether there is a step; with one block.

    Read are `sources`, `span_norms` and `finite` of each parameter; its bound on the norm (`limits`, inf for none) and
    the one on all of them (`global_limit`); the sign of its gradient; and where bias is corrected the row of
    `corrections` (otherwise -1) that has the factors by number of steps, which are `calls` less `missed` ones less
    those that the parameter `sat_out`. Written are `factors`, `go` (0 where `guarded` and a gradient is not finite)
    and both counts.
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
                if not norm <= limits[k]:
                    scale = limits[k] / norm
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


@cuda.jit
def fill(array, value):
    """Set all elements of a 1-D array."""
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value


@cache
def convert_kernel(dimensions):
    """The kernel that copies an array of any dtype and strides (in bytes), at an address, into a 1-D array."""

    @cuda.jit
    def convert(target, address, like, shape, strides):
        for i in range(cuda.grid(1), target.size, cuda.gridsize(1)):
            rest = i
            place = address
            for d in range(dimensions):
                axis = dimensions - 1 - d
                place += rest % shape[axis] * strides[axis]
                rest //= shape[axis]
            target[i] = number_at(place, like)

    return convert


def driver_version() -> tuple[int, int]:
    """The newest version of CUDA that the driver can run."""
    from numba.cuda.cudadrv import driver

    found: tuple[int, int] = driver.driver.get_version()
    return found


@cache
def _unfit() -> str | None:
    """Why nothing can be compiled though CUDA is there: what the compiler knows of NumPy is loaded late."""
    from numba.cuda import descriptor

    try:
        descriptor.cuda_target.typing_context.refresh()
    except Exception as error:
        return (
            f"numba.cuda fails with NumPy {np.__version__} ({error}); numba-cuda 0.30 needs one before 2.5, install "
            'with: python -m pip install "numpy<2.5"'
        )
    return None


def missing() -> str | None:
    """What is missing to run these kernels: a sentence for the user; None if nothing is."""
    if SIMULATED:
        return None
    if cuda.is_available():
        return _unfit()
    why = str(cuda.cuda_error() or "").strip()
    if not why:
        return (
            "the driver is there, but NVIDIA's compiler for kernels (libNVVM) is not; install with: python -m pip "
            'install "fastrms[cuda]"'
        )
    last = why.splitlines()[-1].strip(" :")
    if "NO_DEVICE" in why:
        return f"there is a driver, but no device that this process can see (CUDA_VISIBLE_DEVICES?): {last}"
    if "cannot be found" in why or "not found" in why:
        return (
            "there is no NVIDIA driver (libcuda) on this machine; it comes with the system, not with a Python package"
        )
    return f"the driver cannot be started: {last}"
