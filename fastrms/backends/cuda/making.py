"""Make backends on a GPU."""

from fastrms._state import OptimizerState, Settings
from fastrms.backends.cuda.arrays import as_stream, require_gpu, shadows, to_host
from fastrms.backends.cuda.backend import CudaBackend
from fastrms.backends.cuda.given import held_params
from fastrms.backends.making import new_host_backend
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.buffers.pytree import Params
from fastrms.errors import OptionError
from fastrms.options import parameter_groups

__all__ = ["CudaBackend", "new_cuda_backend"]


def new_cuda_backend(params: Params, settings: Settings, stream: object, in_place: bool) -> CudaBackend:
    """Return a backend with new buffers on the device.

    The values in `params` may be on the host or on the device. With `in_place`, the backend updates the given arrays,
    which must be on the device.
    """
    if settings.cache_dtype is not None:
        raise OptionError(
            f'cache_dtype: expected None with kernel="cuda", which keeps state in the dtype of the parameters, got '
            f"{settings.cache_dtype!r}"
        )
    require_gpu()
    stream = as_stream(stream)
    if in_place:
        state = OptimizerState(held_params(params, "params"), settings, in_place=True)
        new_host_backend(state)
        return CudaBackend(state, stream)
    try:
        on_host, places = to_host(params, stream), shadows(params)
    except RecursionError:  # Layout raises an error with a better message
        on_host = places = params
    state = OptimizerState(on_host, settings)
    if on_host is not places:
        groups = parameter_groups(places)
        refuse_overlap(state.layout, places if groups is None else [group["params"] for group in groups])
    new_host_backend(state)
    return CudaBackend(state, stream)
