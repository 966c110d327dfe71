"""Kernels: functions that update contiguous elements of parameters and state.

Every kernel has the signature of `reference.update` and gives the same bits. `fastrms.backends.tuner` chooses by speed.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from fastrms._checks import HOST_KERNELS, check_one_of
from fastrms._types import HostKernel
from fastrms.errors import OptionError
from fastrms.kernels import cpu, reference

__all__ = ["UPDATES", "Update", "check_cuda_kernel", "check_host_kernel"]

Update: TypeAlias = Callable[..., Any]

UPDATES: dict[str, Update] = {"numpy": reference.update, "serial": cpu.serial, "parallel": cpu.parallel}


def check_host_kernel(value: object) -> HostKernel:
    """Return a kernel that runs on the host as it is; raise for another value."""
    if isinstance(value, str) and value == "cuda":
        raise OptionError(
            'kernel: expected a kernel that runs on the host, got "cuda", which keeps all buffers on a GPU; make a new '
            'optimizer, RMSProp(params, kernel="cuda") or a class derived from fastrms.cuda.CudaRMSProp, and load the '
            "state_dict() of this one into it"
        )
    return check_one_of("kernel", value, HOST_KERNELS)


def check_cuda_kernel(value: object) -> Literal["cuda"]:
    """Return "cuda" for "cuda" or "auto", the kernels of an optimizer on a GPU; raise OptionError for another value."""
    if value not in ("cuda", "auto"):
        raise OptionError(
            f'kernel: expected "cuda", because all buffers are on the GPU, got {value!r}; make a new optimizer for '
            "the host, RMSProp(params), and load the state_dict() of this one into it"
        )
    return "cuda"
