"""Kernels: what updates a run of elements, and the choice of which to use.

Every kernel has the signature of `reference.update` and gives the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba

from fastrms.errors import OptionError, OptionTypeError
from fastrms.kernels import cpu, reference

__all__ = ["KERNELS", "PARALLEL_FROM", "UPDATES", "check_kernel", "choose", "limit_threads", "max_threads"]

Kernel = Callable[..., None]

KERNELS = ("auto", "numpy", "serial", "parallel")

UPDATES: dict[str, Kernel] = {"numpy": reference.update, "serial": cpu.serial, "parallel": cpu.parallel}

# From how many elements "auto" uses all threads. Alone, two threads win from 3e4 elements on, but a training loop is
# not alone: the threads of the matrix products still spin when the step begins, and below some millions of
# parameters the launch costs more than it brings (docs/kernels.md has the measurement).
PARALLEL_FROM = 1 << 22


def max_threads() -> int:
    """How many threads Numba started with: NUMBA_NUM_THREADS, or the processor's cores."""
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def check_kernel(kernel: Any) -> str:
    """Return `kernel` if it is one of `KERNELS`."""
    if not isinstance(kernel, str):
        raise OptionTypeError(f"kernel: expected one of {KERNELS}, got {kernel!r} ({type(kernel).__name__})")
    if kernel not in KERNELS:
        raise OptionError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    return kernel


def choose(kernel: str, size: int, num_threads: int | None) -> str:
    """The name of the kernel that updates `size` elements when the user asked for `kernel`."""
    if kernel != "auto":
        return kernel
    threads = num_threads or numba.get_num_threads()
    return "parallel" if threads > 1 and size >= PARALLEL_FROM else "serial"


@contextmanager
def limit_threads(num_threads: int) -> Iterator[None]:
    """Let parallel kernels use `num_threads` threads inside the block."""
    before = numba.get_num_threads()
    numba.set_num_threads(num_threads)
    try:
        yield
    finally:  # the setting is the calling thread's, and the user's own parallel code reads it
        numba.set_num_threads(before)
