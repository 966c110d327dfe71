"""Memory and C in compiled code: state in float or bfloat16, addresses of arrays, prefetching, calls of C functions."""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

from fastrms.kernels.compiled import inner_options

__all__ = [
    "GRADIENT", "PARAMETER", "array_at", "call_c", "int32_at", "int64_at", "integers_at", "load_state", "num_threads",
    "part", "part_of_span", "prefetch", "store_state",
]  # fmt: skip

# The columns of spans with the addresses of gradients and of parameters; see `reference.update`.
GRADIENT, PARAMETER = 2, 3

# A state array has the parameters' dtype, or is uint16 with bfloat16 numbers, or is None. The compiler chooses the
# function for the type of the array (`overload`); the interpreter chooses it at each call.


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
    """Write `x` rounded to nearest, ties to even."""
    bits = np.float32(x).view(np.uint32)
    # The sum of just under half of the last kept place and that place itself carries if rounding goes up.
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    carried = np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd))
    # A carry could make NaN inf.
    state[i] = np.uint16(0x7FC0) if x != x else np.uint16(carried >> np.uint32(16))


def load_state(state, i):
    """Return element `i` of a state array as a number, or None without the array."""
    return _form(state, _load_nothing, _load_bfloat16, _load_number)(state, i)


def store_state(state, i, x):
    """Round `x` to the numbers of a state array, and write it to element `i`; do nothing without the array."""
    _form(state, _store_nothing, _store_bfloat16, _store_number)(state, i, x)


def prefetch(array: Any, i: int) -> None:
    """Ask the processor to fetch the cache line of element `i` of an array; do nothing for None.

    The interpreter ignores this hint.
    """


def num_threads() -> int:
    """Return the number of threads of the next parallel loop.

    ``numba.get_num_threads`` would keep compiled code from being cached. Start Numba's threads before.
    """
    return numba.get_num_threads()


def _form(state, for_nothing, for_bfloat16, for_numbers):
    """Return one of three functions by the kind of `state`, a value or a type of Numba's."""
    if state is None or isinstance(state, types.NoneType):
        return for_nothing
    return for_bfloat16 if state.dtype in (np.uint16, types.uint16) else for_numbers


@overload(load_state, jit_options=inner_options)
def _typed_load(state, i):
    return _form(state, _load_nothing, _load_bfloat16, _load_number)


@overload(store_state, jit_options=inner_options)
def _typed_store(state, i, x):
    return _form(state, _store_nothing, _store_bfloat16, _store_number)


@overload(prefetch, jit_options=inner_options)
def _typed_prefetch(array, i):
    if isinstance(array, types.NoneType):
        return lambda array, i: None
    return lambda array, i: _prefetch_line(array, i)


def call_c(builder, name, result, *arguments):
    """Emit a call of the C function `name`, which returns a value of the type `result`."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


# Numba counts references to the owner of each array and slice. In the loop over spans that would take longer than the
# update of a small array, and the threads of a parallel loop would count at one address. So these arrays have no owner.


def _dense(dtype, shape):
    """Return the type of a dense array whose shape has the type `shape`: an integer, or a tuple of integers."""
    return types.Array(dtype, getattr(shape, "count", 1), "C")


def _make(context, builder, kind, data, sizes):
    """Emit a dense array without an owner, of a type, at a pointer."""
    itemsize = ir.Constant(sizes[0].type, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [itemsize]
    for size in reversed(sizes[1:]):
        strides.insert(0, builder.mul(strides[0], size))
    made = context.make_array(kind)(context, builder)
    populate_array(made, data, sizes, strides, itemsize, meminfo=None)
    return made._getvalue()


def _make_at(context, builder, signature, arguments):
    """Emit an array of the type that `signature` returns, from an address and a shape."""
    kind, (address, shape) = signature.return_type, arguments[:2]
    sizes = cgutils.unpack_tuple(builder, shape) if isinstance(signature.args[1], types.BaseTuple) else [shape]
    return _make(context, builder, kind, _pointer(context, builder, kind, address), sizes)


def _pointer(context, builder, kind, address):
    """Emit a pointer to elements of an array of type `kind`."""
    return builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())


@intrinsic
def array_at(typingctx, address, shape, like):
    """Return the dense array of this shape at an address, of the dtype of the array `like`."""
    return _dense(like.dtype, shape)(types.int64, shape, like), _make_at


@intrinsic
def integers_at(typingctx, address, shape):
    """Return the dense array of int64 of this shape at an address."""
    return _dense(types.int64, shape)(types.int64, shape), _make_at


@intrinsic
def _part(typingctx, array, start, stop):
    """Return elements [start, stop) of a vector, without a check of the bounds; None for None."""
    if isinstance(array, types.NoneType):
        return types.none(array, start, stop), lambda context, *_: context.get_dummy_value()

    def codegen(context, builder, signature, arguments):
        whole, low, high = arguments
        first = builder.gep(context.make_array(signature.args[0])(context, builder, whole).data, [low])
        return _make(context, builder, signature.return_type, first, [builder.sub(high, low)])

    return types.Array(array.dtype, 1, "C")(array, types.intp, types.intp), codegen


@intrinsic
def _part_of_span(typingctx, array, spans, k, column, start, stop):
    """Return elements [start, stop) of the run, all in span `k`: from `array`, or from the address in a column.

    `spans` is dense.
    """

    def codegen(context, builder, signature, arguments):
        kind, kind_of_spans = signature.args[:2]
        whole, rows, number, wanted, low, high = arguments
        data = context.make_array(kind)(context, builder, whole).data
        table = context.make_array(kind_of_spans)(context, builder, rows)
        row = builder.mul(number, cgutils.unpack_tuple(builder, table.shape)[1])
        address = builder.load(builder.gep(table.data, [builder.add(row, wanted)]))
        before = builder.sub(low, builder.load(builder.gep(table.data, [row])))
        itemsize = ir.Constant(low.type, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        elsewhere = _pointer(context, builder, kind, builder.add(address, builder.mul(before, itemsize)))
        in_array = builder.icmp_signed("==", address, ir.Constant(address.type, 0))
        first = builder.select(in_array, builder.gep(data, [low]), elsewhere)
        return _make(context, builder, signature.return_type, first, [builder.sub(high, low)])

    return types.Array(array.dtype, 1, "C")(array, spans, *[types.intp] * 4), codegen


def _slice(array, start, stop):
    """Do the same as `_part`, for the interpreter."""
    return None if array is None else array[start:stop]


def _slice_of_span(array, spans, k, column, start, stop):
    """Do the same as `_part_of_span`, for the interpreter, which never gets addresses."""
    return array[start:stop]


part, part_of_span = (_slice, _slice_of_span) if numba.config.DISABLE_JIT else (_part, _part_of_span)


@intrinsic
def _prefetch_line(typingctx, array, i):
    """Emit LLVM's request to prefetch element `i` of an array."""

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


@overload(num_threads, jit_options=inner_options)
def _typed_num_threads():
    return lambda: _num_threads()


@intrinsic
def _num_threads(typingctx):
    """Emit a call of Numba's own function, which each parallel loop calls too."""

    def codegen(context, builder, signature, arguments):
        return call_c(builder, "get_num_threads", ir.IntType(types.intp.bitwidth))

    return types.intp(), codegen


def _number_at(kind):
    """Return an intrinsic that reads an integer of type `kind` at an address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, arguments):
            return builder.load(builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer()))

        return kind(types.int64), codegen

    return load


int64_at, int32_at = _number_at(types.int64), _number_at(types.int32)
