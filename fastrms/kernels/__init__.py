"""Kernels: functions that update contiguous elements of parameters and state.

Every kernel has the signature of `reference.update` and gives the same bits. `fastrms.backends.tuner` chooses by speed.
"""

from collections.abc import Callable

from fastrms.kernels import cpu, reference

__all__ = ["KERNELS", "UPDATES", "Kernel"]

Kernel = Callable[..., None]

UPDATES: dict[str, Kernel] = {"numpy": reference.update, "serial": cpu.serial, "parallel": cpu.parallel}

# The names that an optimizer on the host takes.
KERNELS = ("auto", *UPDATES)
