"""Parameters of a new group, on the host or on the device."""

import math
from collections.abc import Iterable
from typing import Any

from fastrms.backends.cuda.arrays import Stream, shadows, to_host
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.errors import StructureError
from fastrms.kernels import cuda as kernels

__all__ = ["params_on_host"]


def params_on_host(params: Any, stream: Stream, name: str, buffers: Iterable[FlatBuffer]) -> Any:
    """Return the parameters of a new group with copies on the host of all arrays on the device.

    Raise StructureError if two of the arrays share memory, or if one lies in one of `buffers`. Errors call the
    parameters `name`.
    """
    try:
        on_host, places = to_host(params, stream), shadows(params)
    except RecursionError:  # Layout raises an error with a better message
        return params
    layout = Layout(on_host, name)
    refuse_overlap(layout, places, name)
    own = list(buffers)
    for item in layout.flatten(params, name):
        interface = kernels.interface_of(item)
        if interface and math.prod(interface["shape"]) and any(buffer.contains(item) for buffer in own):
            raise StructureError(
                f"{name}: expected new parameters, got an array that shares memory with a parameter of another group, "
                "or with gradients or state"
            )
    return on_host
