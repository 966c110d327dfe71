"""`HeldDeviceArrays`: parameters that stay in the caller's arrays on a GPU."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.backends.cuda.arrays import (
    DeviceArray,
    Interface,
    Shadow,
    Stream,
    as_stream,
    cuda,
    let_wait,
    stream_of,
    wait_for,
)
from fastrms.backends.cuda.buffer import DeviceBuffer
from fastrms.backends.cuda.gradients import Finder, Found, Pieces
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.held import HeldArrays
from fastrms.buffers.pytree import describe
from fastrms.buffers.replaced import changed_views
from fastrms.errors import DtypeError, StructureError
from fastrms.kernels import cuda as kernels

__all__ = ["HeldDeviceArrays", "interface_on_device", "on_device"]

_NOTHING = Pieces(())


class HeldDeviceArrays(HeldArrays, DeviceBuffer):
    """A buffer that consists of the caller's arrays on a GPU: any objects with ``__cuda_array_interface__``.

    The kernels of a step get the addresses that the arrays had at first. `located` compares them with the present ones.
    """

    def __init__(
        self,
        layout: Layout,
        arrays: Sequence[Any],
        views: Any = None,
        check: bool = True,
        name: str = "params",
        stream: Stream | None = None,
    ) -> None:
        interfaces = [
            interface_on_device(array, name + leaf.path) for array, leaf in zip(arrays, layout.leaves, strict=True)
        ]
        super().__init__(layout, arrays, views, check, name)
        self._stream: Stream = as_stream(None) if stream is None else stream
        self._finder = Finder(layout, self._originals, name)
        self._known = list(map(_place, interfaces))
        self._addresses = np.array([place[0][0] for place in self._known], np.int64)

    def present(self, array: Any) -> Any:
        """Return the shadow of an array, as `HeldArrays.present`. Return None if the array is not on the device."""
        interface = kernels.interface_of(array)
        return None if interface is None else Shadow.of(array, interface)

    def joined(self, layout: Layout, more: FlatBuffer, views: Any) -> "HeldDeviceArrays":
        """Return a buffer with the arrays of this buffer and of another one, as `HeldArrays.joined`."""
        return HeldDeviceArrays(layout, [*self.leaves, *more.leaves], views, stream=self._stream)

    def located(self, number: int | None = None) -> set[int]:
        """Return the numbers of the streams that work on the arrays, or on one array.

        Raise StructureError if a step cannot update an array in place any more.
        """
        if number is None:
            found = Found(len(self.leaves))
            left: Iterable[int] = self._finder.locate_tensors(self.leaves, _NOTHING, found)
            unchanged = bool(np.all((found.sources == self._addresses) | (found.sources == kernels.IN_BUFFER)))
            streams = found.streams
        else:
            left, unchanged, streams = (number,), True, set()
        for k in left:
            item = self.leaves[k]
            interface = kernels.interface_of(item)
            unchanged = unchanged and interface is not None and self._is_as_before(k, item, interface)
            streams.add(0 if interface is None else stream_of(item, interface))
        if not unchanged:
            problems = changed_views(self, "params")
            raise StructureError(problems[0] if problems else "params: expected the original arrays, got changed ones")
        return streams - {0}

    def _is_as_before(self, number: int, item: object, interface: Interface) -> bool:
        """Tell whether an array has the place, shape, dtype and order that it had at first."""
        dense = interface.get("strides") is None or Shadow.of(item, interface).flags.c_contiguous
        return dense and _place(interface) == self._known[number]

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Return a context for writes to the arrays. Raise as `located` before the first write.

        The writes wait for the streams that work on the arrays, and later work on these streams waits for the writes.
        """
        others = wait_for(self.located(), self._stream)
        yield
        for other in others:
            let_wait(other, self._stream)

    @property
    def segments(self) -> tuple[DeviceArray, ...]:  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride]
        """A vector for each array, in its memory. Reading it raises StructureError as `located`."""
        wait_for(self.located(), self._stream)
        return tuple(map(self.part, range(len(self.leaves))))

    def part(self, number: int) -> DeviceArray:
        """Return the vector of one of the arrays, at the address that it had at first."""
        leaf = self.layout.leaves[number]
        size, dtype = leaf.stop - leaf.start, self.layout.dtype_of(leaf)
        return kernels.vector_at(int(self._addresses[number]), size, dtype) if size else cuda.device_array(0, dtype)

    def table(self, numbers: NDArray[np.int64]) -> DeviceArray:
        """Return the addresses of arrays, in an array on the device."""
        return cuda.to_device(self._addresses[numbers])

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first address of each array with elements, and the first address after it."""
        return [
            (address, address + original.nbytes)
            for address, original in zip(self._addresses.tolist(), self._originals, strict=True)
            if original.size
        ]

    def use(self, stream: Stream) -> None:
        """Use another stream from now on."""
        self._stream = stream

    def store(self, arrays: Sequence[Any]) -> None:
        """Copy arrays on the host to the device. None leaves an array unchanged."""
        with self.loading():
            super().store(arrays)

    def contains(self, item: object) -> bool:
        """Return whether an array on the device lies in one of the arrays, as `FlatBuffer.contains`."""
        shadow = self.present(item)
        return shadow is not None and super().contains(shadow)

    def to_host(self) -> FlatBuffer:
        """Return the buffer itself, for a copy or pickle of the optimizer. Its arrays are copied with the program.

        Raise TypeError if an array cannot be copied.
        """
        self.located()
        for leaf, array in zip(self.layout.leaves, self.leaves, strict=True):
            if getattr(array, "__cuda_ndarray__", False):
                raise TypeError(
                    f"params{leaf.path}: expected an array that can be copied and pickled, got an array of Numba; use "
                    "an array of CuPy or PyTorch, or save the optimizer and load the file into another one"
                )
        return self


def _place(interface: Interface) -> tuple[Any, ...]:
    """Return address and read-only flag, shape and dtype of an array on the device."""
    return tuple(interface["data"]), tuple(interface["shape"]), interface["typestr"]


def interface_on_device(item: Any, path: str) -> Interface:
    """Return the interface of an array that is updated in place, or raise DtypeError if it is not on the device."""
    interface = kernels.interface_of(item)
    if interface is None:
        hint = ""
        if isinstance(item, np.ndarray):
            hint = '; copy it to the GPU, or use a kernel of the host instead of kernel="cuda"'
        elif getattr(item, "requires_grad", False):
            hint = " that requires gradients; pass its .detach(), which has the same memory"
        raise DtypeError(
            f"{path}: expected an array on the GPU, which a step can update in place, got {describe(item)}{hint}"
        )
    if interface.get("mask") is not None:
        raise DtypeError(f"{path}: expected an array, got a masked array on the device, whose mask would be lost")
    if getattr(item, "is_neg", bool)():  # a view of PyTorch whose memory has the opposite sign
        raise DtypeError(f"{path}: expected an array on the GPU, got a negative view of PyTorch; copy it")
    return interface


def on_device(buffer: FlatBuffer, stream: Stream) -> DeviceBuffer:
    """Return a copy of a buffer on the device. For arrays that are updated in place, return a buffer of these arrays.

    The arrays of a `HeldArrays` are shadows of them.
    """
    if isinstance(buffer, HeldDeviceArrays):
        buffer.use(stream)
        return buffer
    if isinstance(buffer, HeldArrays):
        arrays = [shadow.given for shadow in buffer.leaves if isinstance(shadow, Shadow)]
        return HeldDeviceArrays(buffer.layout, arrays, check=False, stream=stream)
    return DeviceBuffer.of(buffer, stream)
