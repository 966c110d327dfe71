"""Parameters as users give them, on the host or on the device."""

import math
from collections.abc import Iterable
from typing import Any

from fastrms.backends.cuda.arrays import Stream, shadows, to_host
from fastrms.backends.cuda.held import HeldDeviceArrays, interface_on_device
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.buffers.pytree import take_apart
from fastrms.errors import StructureError
from fastrms.kernels import cuda as kernels
from fastrms.options import parameter_groups

__all__ = ["held_params", "params_on_host"]


def held_params(params: Any, name: str) -> Any:
    """Return parameters, or groups of them, with shadows of their arrays. They are updated in place.

    Raise DtypeError for an array that is not on the device. Errors call the parameters `name`.
    """
    groups = parameter_groups(params)
    try:
        arrays = take_apart(params if groups is None else [group["params"] for group in groups], name)[1]
    except RecursionError:  # Layout raises an error with a better message
        return params
    for path, item in arrays:
        interface_on_device(item, path)
    return shadows(params)


def params_on_host(params: Any, stream: Stream, name: str, buffers: Iterable[FlatBuffer]) -> Any:
    """Return the parameters of a new group with copies on the host of all arrays on the device.

    If parameters are updated in place, return their shadows instead. Raise StructureError if two of the arrays share
    memory, or if one lies in one of `buffers`. Errors call the parameters `name`.
    """
    own = list(buffers)
    held = [buffer for buffer in own if isinstance(buffer, HeldDeviceArrays)]
    for buffer in held:
        buffer.located()  # after an error the optimizer is as before
    try:
        on_host = held_params(params, name) if held else to_host(params, stream)
        places = shadows(params)
    except RecursionError:  # Layout raises an error with a better message
        return params
    layout = Layout(on_host, name)
    refuse_overlap(layout, places, name)
    for item in layout.flatten(params, name):
        interface = kernels.interface_of(item)
        if interface and math.prod(interface["shape"]) and any(buffer.contains(item) for buffer in own):
            raise StructureError(
                f"{name}: expected new parameters, got an array that shares memory with a parameter of another group, "
                "or with gradients or state"
            )
    return on_host
