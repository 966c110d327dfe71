"""Kernels: what updates a run of elements.

Every kernel has the signature of `reference.update` and gives the same bits; `choice` says which to use.
"""

from collections.abc import Callable

from fastrms.kernels import cpu, reference

__all__ = ["UPDATES", "Kernel"]

Kernel = Callable[..., None]

UPDATES: dict[str, Kernel] = {"numpy": reference.update, "serial": cpu.serial, "parallel": cpu.parallel}
