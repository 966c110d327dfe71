"""Arrays on a GPU, of Numba and other libraries: streams, and copies from and to the host."""

import math
import sys
from collections.abc import Callable, Mapping, Set
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from fastrms._types import DType, Options
from fastrms.buffers import Array
from fastrms.errors import DeviceError, OptionTypeError
from fastrms.kernels import cuda as kernels

__all__ = [
    "DeviceArray", "Interface", "Shadow", "Stream", "as_stream", "copy_in", "copy_out", "cuda", "dense_strides",
    "let_wait", "require_gpu", "shadows", "stream_of", "to_host", "wait_for",
]  # fmt: skip

Interface = Options

# Untyped, as the GPU and the simulator have different types.
cuda: Any = kernels.cuda
DeviceArray: TypeAlias = Any


class Stream(Protocol):
    """A stream of Numba."""

    def synchronize(self) -> None:
        """Wait until all work on it is done."""
        ...


def as_stream(value: Any) -> Stream:
    """Return a stream of Numba for None, a number, or a stream of another library, or raise OptionTypeError."""
    given = value
    if value is None:
        return _default_stream()
    if hasattr(value, "auto_synchronize"):  # Numba's; its default stream is 0, but 1 in other libraries
        return value if kernels.handle_of(value) != kernels.LEGACY_STREAM else _default_stream()
    for name in ("cuda_stream", "ptr"):  # PyTorch's and CuPy's
        value = getattr(value, name, value)
    if hasattr(value, "__cuda_stream__"):
        value = value.__cuda_stream__()[1]
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise OptionTypeError(
            f"stream: expected None, the number of a stream, or a stream of Numba, CuPy or PyTorch, got {value!r} "
            f"({type(value).__name__})"
        )
    if value <= kernels.LEGACY_STREAM:
        return _default_stream()
    stream: Any = cuda.external_stream(int(value))
    stream.given = given  # keeps the stream of the other library alive
    return cast("Stream", stream)


def _default_stream() -> Stream:
    # The simulator has no `legacy_default_stream`.
    return cast("Stream", getattr(cuda, "legacy_default_stream", cuda.stream)())


def let_wait(waiting: Stream, other: Stream) -> None:
    """Make future work on one stream wait for the present work on another."""
    event = cuda.event()
    event.record(other)
    event.wait(waiting)


def wait_for(numbers: Set[int], stream: Stream) -> list[Stream]:
    """Make a stream wait for the present work on other streams, which are given by number, and return the others."""
    others = [as_stream(number) for number in numbers - {kernels.handle_of(stream)}]
    for other in others:
        let_wait(stream, other)
    return others


def dense_strides(shape: tuple[int, ...], dtype: DType) -> tuple[int, ...]:
    """Return the strides of a dense array in C order, in bytes."""
    return tuple(dtype.itemsize * math.prod(shape[d + 1 :]) for d in range(len(shape)))


def stream_of(item: Any, interface: Interface) -> int:
    """Return the number of the stream that computes an array, or 0 if it is unknown or there is none."""
    if interface.get("stream") is not None:
        return int(interface["stream"])
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(item, torch.Tensor):  # its interface is of an older version without streams
        return torch.cuda.current_stream(item.device).cuda_stream or kernels.LEGACY_STREAM
    return 0


def copy_in(target: DeviceArray, interface: Interface, stream: Stream) -> None:
    """Copy an array on the device, of any dtype and strides, into a 1-D array on the device."""
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides") or dense_strides(shape, dtype)
    if not shape:
        shape, strides = (1,), (dtype.itemsize,)
    blocks = -(-target.size // kernels.THREADS)
    kernels.launch(
        kernels.convert_kernel(len(shape)), blocks, kernels.THREADS, stream, target,
        np.int64(interface["data"][0]), dtype.type(0), tuple(map(np.int64, shape)), tuple(map(np.int64, strides)),
    )  # fmt: skip


def copy_out(item: Any, interface: Interface, stream: Stream) -> Array:
    """Return a copy on the host of an array on the device, of any strides and a native dtype. Wait for the device."""
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    if theirs := stream_of(item, interface):
        let_wait(stream, as_stream(theirs))
    dense = cuda.device_array(math.prod(shape), dtype)
    copy_in(dense, interface, stream)
    host: Array = dense.copy_to_host(stream=stream)
    stream.synchronize()
    return host.reshape(shape)


def to_host(tree: Any, stream: Stream) -> Any:
    """Return a copy of a nesting with all arrays on the host. Arrays of other dtypes than float32 and float64 become 0.

    An optimizer refuses them later.
    """

    def copied(item: Any, interface: Interface) -> Array:
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        if dtype not in (np.float32, np.float64) or not dtype.isnative:
            return np.broadcast_to(np.zeros((), dtype), shape)
        return copy_out(item, interface, stream)

    return _mapped(tree, copied)


class Shadow(np.ndarray[Any, Any]):
    """A NumPy array with the address, shape, strides and dtype of `given`, an array on the device. Do not read it."""

    given: Any

    @classmethod
    def of(cls, item: object, interface: Interface) -> "Shadow":
        """Return the shadow of an array with this interface."""
        place = {name: interface[name] for name in ("shape", "typestr", "data")}
        described = {**place, "strides": interface.get("strides"), "version": 3}
        shadow = np.asarray(SimpleNamespace(__array_interface__=described)).view(cls)
        shadow.given = item
        return shadow


def shadows(tree: object) -> Any:
    """Return a copy of a nesting with shadows of its arrays on the device."""
    return _mapped(tree, Shadow.of)


def _mapped(tree: object, change: Callable[[Any, Interface], Any]) -> Any:
    """Return a copy of a nesting with `change` applied to each array on the device."""
    if isinstance(tree, Mapping):
        return {key: _mapped(item, change) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_mapped(item, change) for item in tree]
        return (type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)) if isinstance(tree, tuple) else items
    interface = kernels.interface_of(tree)
    return tree if interface is None else change(tree, interface)


def require_gpu() -> None:
    """Raise DeviceError if there is no GPU that can be used."""
    reason = kernels.missing()
    if reason is not None:
        raise DeviceError(f'kernel: expected a GPU for "cuda", got none: {reason}')
