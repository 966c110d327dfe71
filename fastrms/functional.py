"""Functions over `RMSProp`: one step as a pure function, and compilation ahead of time."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike

from fastrms._types import Kernel
from fastrms.buffers.pytree import P, PyTree
from fastrms.optimizer import RMSProp

__all__ = ["rmsprop_update", "warmup"]


@overload
def rmsprop_update(
    params: P, gradients: PyTree, cache: PyTree, lr: float = ..., decay_rate: float = ..., epsilon: float = ...
) -> tuple[P, P]: ...
@overload
def rmsprop_update(
    params: PyTree, gradients: PyTree, cache: PyTree, lr: float = ..., decay_rate: float = ..., epsilon: float = ...
) -> tuple[Any, Any]: ...
def rmsprop_update(
    params: PyTree,
    gradients: PyTree,
    cache: PyTree,
    lr: float = 1e-3,
    decay_rate: float = 0.9,
    epsilon: float = 1e-8,
) -> tuple[Any, Any]:
    """Return the parameters and the cache after one step of RMSProp, without changing the arguments.

    The result has the bits that NumPy computes for ::

        cache = decay_rate * cache + (1 - decay_rate) * gradients**2
        params = params - lr * gradients / (sqrt(cache) + epsilon)

    Parameters
    ----------
    params : list, tuple, dict or ndarray, or any nesting of these, of float32 or float64 arrays
        As for `RMSProp`.
    gradients : the structure of `params`
        An item that is None leaves its parameter and its cache unchanged.
    cache : the structure of `params`, or None
        The running mean of squared gradients, which is cast to the dtypes of the parameters. None means zeros, as at
        the start.
    lr, decay_rate, epsilon : float
        As for `RMSProp`.

    Returns
    -------
    new_params, new_cache : the structure of `params`
        New arrays. The parameters are views of one flat buffer, the cache of another.

    Raises
    ------
    StructureError, DtypeError, OptionError, OptionTypeError
        As `RMSProp` and its `step` raise them.

    Notes
    -----
    Each call copies all arrays into new buffers. In a training loop, `RMSProp` is many times faster.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import rmsprop_update
    >>> rmsprop_update(np.array([1.0]), np.array([0.1]), np.array([1.0]), lr=0.01)
    (array([0.99894649]), array([0.901]))
    """
    optimizer = RMSProp(params, lr, decay_rate, epsilon)
    if cache is not None:
        optimizer.buffers["cache"].gather(cache, "cache")
    return optimizer.step(gradients), optimizer.cache


def warmup(
    dtypes: Sequence[DTypeLike] = (np.float32, np.float64),
    kernels: Sequence[Kernel] = ("serial", "parallel"),
    **options: Any,
) -> None:
    """Compile the kernels of steps, or load them from disk, before the first step of training needs them.

    Parameters
    ----------
    dtypes : sequence of dtype, default float32 and float64
        Dtypes of the parameters.
    kernels : sequence of str, default ("serial", "parallel")
        Kernels to compile. "auto" chooses from the default two.
    **options
        Options of `RMSProp` that the program will use. There are separate kernels for momentum, for centering and for a
        16-bit cache. Another one handles weight decay, maximizing, epsilon under the root, bias correction and clipping
        together.

    Raises
    ------
    OptionError, OptionTypeError, DtypeError
        As `RMSProp` raises them.

    Examples
    --------
    >>> import fastrms
    >>> fastrms.warmup(["float32"], momentum=0.9)
    """
    for dtype in dtypes:
        for kernel in kernels:
            with_kernel: dict[str, Any] = options | {"kernel": kernel}
            optimizer = RMSProp([np.zeros(1, dtype)], **with_kernel)
            optimizer.step()  # first, with zeros in `grads`: its contents are not defined after step(gradients)
            optimizer.step([np.zeros(1, dtype)])
