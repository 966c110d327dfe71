"""Kernels: what updates a run of elements.

Every kernel has the signature of `reference.update` and gives the same bits. `fastrms.backends.tuner` finds the faster
one.
"""

from collections.abc import Callable

from fastrms.kernels import cpu, reference

__all__ = ["KERNELS", "UPDATES", "Kernel"]

Kernel = Callable[..., None]

UPDATES: dict[str, Kernel] = {"numpy": reference.update, "serial": cpu.serial, "parallel": cpu.parallel}

# The names that an optimizer on the host takes.
KERNELS = ("auto", *UPDATES)
