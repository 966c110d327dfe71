"""The CUDA target of Numba: functions with the processor's bits, arrays and streams of other libraries, and absence.

This is the only module that imports CUDA: `numba.cuda`, that is numba-cuda if it is installed, and otherwise Numba's
own target. Numba's simulator (NUMBA_ENABLE_CUDASIM=1) runs all of it in the interpreter, on ordinary memory.

Two operations of the update rule differ on a GPU. The compiler would contract a product and a sum to one instruction
that rounds once; NVVM has an option against this, but neither CUDA target of Numba passes it on. And there is no
`np.sqrt`. So the rule's source is compiled with each ``a * b`` as `multiply`, an instruction that is never contracted
(``mul.rn``), and with CUDA's own square root. Division and square root round correctly unless fastmath is asked for,
and subnormal numbers are kept. `tests/kernels/test_ptx.py` compiles everything without a GPU and reads the result.
"""

import ast
import ctypes
import inspect
import math
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import numba
import numpy as np
from llvmlite import ir

with warnings.catch_warnings():  # NumPy 2.5 warns of code in numba-cuda 0.30
    warnings.simplefilter("ignore", DeprecationWarning)
    from numba import cuda
    from numba.cuda.extending import intrinsic

__all__ = [
    "LEGACY_STREAM", "SIMULATED", "cuda", "driver_version", "for_device", "handle_of", "interface_of", "missing",
    "multiply", "number_at", "store_at", "vector_at",
]  # fmt: skip

SIMULATED = bool(numba.config.ENABLE_CUDASIM)

# The number of the default stream of a device. It and most other streams wait for each other.
LEGACY_STREAM = 1


if SIMULATED:

    def multiply(a, b):
        """Return the product, rounded by itself."""
        return a * b

    def number_at(address, like):
        """Return the number at an address, of the type of `like`."""
        return numba.carray(ctypes.c_void_p(int(address)), (1,), like.dtype)[0]

    def store_at(address, number):
        """Write a number to an address, and return the number."""
        numba.carray(ctypes.c_void_p(int(address)), (1,), number.dtype)[0] = number
        return number

else:

    @intrinsic
    def multiply(typingctx, a, b):
        """Return the product, rounded by itself."""

        def codegen(context, builder, signature, arguments):
            number = arguments[0].type
            name = f"llvm.nvvm.mul.rn.{'f' if a.bitwidth == 32 else 'd'}"
            function = builder.module.declare_intrinsic(name, (), ir.FunctionType(number, [number, number]))
            return builder.call(function, arguments)

        return (a(a, b), codegen) if a == b else None  # otherwise a cast is missing

    @intrinsic
    def number_at(typingctx, address, like):
        """Return the number at an address, of the type of `like`."""

        def codegen(context, builder, signature, arguments):
            # Address space 1 is the device's own memory. Without it each load would have to find out its space.
            return builder.load(builder.inttoptr(arguments[0], context.get_value_type(like).as_pointer(1)))

        return like(address, like), codegen

    @intrinsic
    def store_at(typingctx, address, number):
        """Write a number to an address, and return the number."""

        def codegen(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], context.get_value_type(number).as_pointer(1))
            builder.store(arguments[1], pointer)
            return arguments[1]

        return number(address, number), codegen


class _Products(ast.NodeTransformer):
    """Rewriting of ``a * b`` as ``multiply(a, b)``."""

    def visit_BinOp(self, node):
        """Return the node, or a call in the place of a product."""
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult):
            return node
        call = ast.Call(ast.Name("multiply", ast.Load()), [node.left, node.right], [])
        return ast.copy_location(call, node)


def for_device(function):
    """Return a function of the CPU kernels as a device function with the same bits."""
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


def interface_of(thing: Any) -> dict[str, Any] | None:
    """Return the CUDA array interface of an array on the device, or None for any other object."""
    try:
        found = getattr(thing, "__cuda_array_interface__", None)
        if found is None and getattr(thing, "__cuda_ndarray__", False):  # an array of the simulator, in ordinary memory
            found = thing.__array_interface__
    except Exception:  # any error of a user's attribute; torch raises for dtypes without a description
        return None
    return found


def vector_at(address: int, size: int, dtype: Any) -> Any:
    """Return the dense 1-D array on the device at an address. The caller keeps its memory alive."""
    if SIMULATED:
        return type(cuda.device_array(0))(numba.carray(ctypes.c_void_p(address), (size,), dtype))
    described = {"shape": (size,), "typestr": dtype.str, "data": (address, False), "version": 3}
    return cuda.from_cuda_array_interface(described, sync=False)


def handle_of(stream: Any) -> int:
    """Return the number of a stream in other libraries; the simulator has the default stream only."""
    return int(stream) or LEGACY_STREAM if hasattr(stream, "__int__") else LEGACY_STREAM


def driver_version() -> tuple[int, int]:
    """Return the newest version of CUDA that the driver can run."""
    from numba.cuda.cudadrv import driver

    found: tuple[int, int] = driver.driver.get_version()
    return found


@cache
def _unfit() -> str | None:
    """Return why nothing can be compiled although CUDA is there, or None. The compiler loads NumPy's types late."""
    from numba.cuda import descriptor

    try:
        descriptor.cuda_target.typing_context.refresh()
    except Exception as error:
        return (
            f"numba.cuda fails with NumPy {np.__version__} ({error}); numba-cuda 0.30 needs NumPy < 2.5; install it "
            'with: python -m pip install "numpy<2.5"'
        )
    return None


def missing() -> str | None:
    """Return what is missing to run kernels on a device, as a sentence for the user, or None."""
    if SIMULATED:
        return None
    if cuda.is_available():
        return _unfit()
    why = str(cuda.cuda_error() or "").strip()
    if not why:
        return (
            "the NVIDIA driver is installed, but its kernel compiler (libNVVM) is not; install it with: python -m pip "
            'install "fastrms[cuda]"'
        )
    last = why.splitlines()[-1].strip(" :")
    if "NO_DEVICE" in why:
        return f"the NVIDIA driver is installed, but this process sees no GPU (check CUDA_VISIBLE_DEVICES): {last}"
    if "cannot be found" in why or "not found" in why:
        return (
            "there is no NVIDIA driver (libcuda) on this machine; install it with the system, not with a Python package"
        )
    return f"the driver cannot be started: {last}"
