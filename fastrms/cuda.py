"""RMSProp on a GPU: `CudaRMSProp`, an `fastrms.RMSProp` with ``kernel="cuda"`` and a stream.

Options, layout and bits are those of `fastrms.RMSProp`. Parameters, gradients and state are on the device. docs/cuda.md
describes how to use arrays of CuPy, PyTorch and Numba, and when a step waits for the device.
"""

from typing import Any, Literal, Unpack

from fastrms._types import LearningRate
from fastrms.buffers.pytree import Params
from fastrms.kernels import check_cuda_kernel
from fastrms.kernels import cuda as kernels
from fastrms.optimizer import RMSProp
from fastrms.options import Keywords

__all__ = ["CudaRMSProp", "why_not"]


def why_not() -> str | None:
    """Return the reason why ``RMSProp(params, kernel="cuda")`` cannot work on this machine.

    Returns
    -------
    reason : str or None
        The missing package, driver or device, or None if nothing is missing.

    Examples
    --------
    >>> import numpy as np
    >>> import fastrms
    >>> from fastrms.cuda import why_not
    >>> kernel = "cuda" if why_not() is None else "auto"
    >>> opt = fastrms.RMSProp([np.ones(3)], kernel=kernel)
    """
    return kernels.missing()


class CudaRMSProp(RMSProp[Any]):
    """RMSProp with all buffers on a GPU: the options, the layout and the bits of `fastrms.RMSProp`.

    ``RMSProp(params, kernel="cuda")`` does the same. A step launches kernels on a stream and returns before they end.
    It waits for the device only with nonfinite="raise", or if lr is a function and nonfinite="skip".

    Parameters
    ----------
    params : as for `RMSProp`
        Arrays on the host or on the device (any object with ``__cuda_array_interface__``). They are copied, except with
        `in_place`.
    lr, decay_rate, epsilon : float
        As for `RMSProp`.
    stream : stream or int or None, default None
        The stream of all work: a stream object of Numba, CuPy or PyTorch, or its number. None is the default stream,
        which is also the default of CuPy and PyTorch. The attribute `stream` can be set later.
    kernel : {"cuda", "auto"}, default "cuda"
        Both mean the same.
    in_place : bool, default False
        Update the given arrays in place, as for `RMSProp`. All of them must be on the device.
    **options
        The other options of `RMSProp`, except cache_dtype and storage. `num_threads` has no effect.

    Attributes
    ----------
    params, grads, cache, momentum_buffer, grad_avg : as for `RMSProp`
        Device arrays of Numba, which are views of flat buffers on the device. CuPy and PyTorch can wrap them without a
        copy: ``cupy.asarray(view)``, ``torch.as_tensor(view, device="cuda")``. `numpy.asarray` copies them to the host.

    Raises
    ------
    DeviceError
        No GPU can be used. The message names the missing part.
    StructureError, DtypeError, OptionError, OptionTypeError
        As for `RMSProp`.

    See Also
    --------
    fastrms.RMSProp : the options.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms.cuda import CudaRMSProp, why_not
    >>> if why_not() is None:
    ...     opt = CudaRMSProp({"W": np.ones((3, 2)), "b": np.zeros(2)}, lr=0.1)
    ...     _ = opt.step({"W": np.full((3, 2), 0.5), "b": None})
    """

    def __init__(
        self,
        params: Params,
        lr: LearningRate = 1e-3,
        decay_rate: float = 0.9,
        epsilon: float = 1e-8,
        *,
        stream: object = None,
        kernel: Literal["cuda", "auto"] = "cuda",
        in_place: bool = False,
        **options: Unpack[Keywords],
    ) -> None:
        kernel = check_cuda_kernel(kernel)
        super().__init__(params, lr, decay_rate, epsilon, kernel=kernel, stream=stream, in_place=in_place, **options)
