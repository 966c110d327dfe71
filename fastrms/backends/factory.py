"""Choose and make the backend of an optimizer by its options."""

from os import PathLike
from typing import TYPE_CHECKING

from fastrms._checks import KERNELS, check_flag, check_one_of
from fastrms._state import OptimizerState, Settings
from fastrms.backends.base import Backend
from fastrms.backends.host import HostBackend
from fastrms.backends.making import new_host_backend
from fastrms.backends.memory import Ram
from fastrms.backends.storage import Storage, check_storage
from fastrms.buffers.pytree import Params
from fastrms.errors import DeviceError, OptionError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["backend_of", "new_backend"]


def new_backend(
    params: Params, settings: Settings, storage: str | PathLike[str] | Storage | None, stream: object, in_place: object
) -> Backend:
    """Return the backend of a new optimizer. The arguments are those of `fastrms.RMSProp`, and are checked here.

    `storage` may also be a Storage that `fastrms.RMSProp.reopen` has opened.
    """
    settings.check()
    check_one_of("kernel", settings.kernel, KERNELS)
    check_storage(storage)
    in_place = check_flag("in_place", in_place)
    if in_place and storage is not None:
        raise OptionError(
            "in_place: expected False with storage, because the folder is a checkpoint with all parameters, and arrays "
            "of the program would be missing from it; to update arrays in files, pass np.memmap arrays without storage"
        )
    if settings.kernel == "cuda":
        if storage is not None:
            raise OptionError('storage: expected None with kernel="cuda", which keeps the buffers on a GPU, got a path')
        backend: Backend = _cuda().new_cuda_backend(params, settings, stream, in_place)
        return backend
    if stream is not None:
        raise OptionError(f'stream: expected None unless kernel is "cuda", got {stream!r}')
    return new_host_backend(OptimizerState(params, settings, in_place), storage)


def backend_of(state: OptimizerState) -> Backend:
    """Return a backend for data with buffers on the host, as after unpickling."""
    if state.kernel == "cuda":
        backend: Backend = _cuda().CudaBackend(state, None)
        return backend
    return HostBackend(state, Ram())


def _cuda() -> "ModuleType":
    """Import the module that makes backends on a GPU, or raise DeviceError."""
    try:  # here, because importing CUDA takes long and needs an extra
        from fastrms.backends.cuda import making
    except ImportError as error:
        raise DeviceError(
            f'kernel: expected a GPU for "cuda", but the package numba-cuda cannot be imported ({error}); '
            'install with: python -m pip install "fastrms[cuda]"'
        ) from None
    return making
