"""Buffers on a GPU, and pinned memory of the host for copies to them."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastrms._types import DType
from fastrms.backends.cuda.arrays import DeviceArray, Stream, cuda
from fastrms.buffers import Array, FlatBuffer, Layout
from fastrms.buffers.joined import JoinedBuffer
from fastrms.kernels import cuda as kernels

__all__ = ["DeviceBuffer", "JoinedDeviceBuffer", "PinnedGradients", "Scratch", "Staged"]

# The number of copies of a table that can be in flight to the device. Before a further copy the host waits.
_IN_FLIGHT = 16


class DeviceBuffer(FlatBuffer):
    """A `FlatBuffer` whose memory is on the device: `flat`, `segments`, `leaves` and `views` are Numba's device arrays.

    Other libraries see in the arrays the `stream` of all work.
    """

    def __init__(self, layout: Layout, stream: Stream) -> None:
        self.layout = layout
        self._stream = stream
        self.block: DeviceArray = cuda.device_array(max(1, layout.nbytes), np.uint8)
        self.segments: tuple[DeviceArray, ...] = tuple(
            self._part(s.dtype, s.offset, (s.size,)) for s in layout.segments
        )
        self.leaves: tuple[DeviceArray, ...] = tuple(
            self._part(dtype, layout.segments[leaf.segment].offset + leaf.start * dtype.itemsize, leaf.shape)
            for leaf, dtype in ((leaf, layout.dtype_of(leaf)) for leaf in layout.leaves)
        )
        self.views = layout.structure(self.leaves)
        self.use(stream)

    def _part(self, dtype: DType, offset: int, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view of the block."""
        size = math.prod(shape)
        if size == 0:  # an empty array has no address
            return cuda.device_array(shape, dtype)
        return self.block[offset : offset + size * dtype.itemsize].view(dtype).reshape(shape)

    def use(self, stream: Stream) -> None:
        """Use another stream from now on."""
        self._stream = stream
        for array in (self.block, *self.segments, *self.leaves):
            array.stream = stream

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first address of each block of memory, and the first address after it."""
        interface = kernels.interface_of(self.block)
        assert interface is not None
        low = interface["data"][0]
        return [(low, low + self.nbytes)]

    def upload(self, pinned: "Pinned") -> None:
        """Copy all of a buffer in pinned memory, of the same layout, to the device."""
        if pinned.nbytes:
            self.block.copy_to_device(pinned.block, stream=self._stream)

    def loading(self) -> AbstractContextManager[None]:
        """Return a context for writes of values of a checkpoint."""
        return nullcontext()

    def like(self, fill: float = 0, dtype: DTypeLike | None = None) -> "DeviceBuffer":
        """Return a new buffer of the same structure on the device, as `FlatBuffer.like`."""
        other = DeviceBuffer(self.layout if dtype is None else self.layout.with_dtype(dtype), self._stream)
        for segment in other.segments:
            other.write(segment, fill)
        return other

    def write(self, segment: DeviceArray, values: Any) -> None:
        """Set one of `segments` to an ndarray, or to a number."""
        if not segment.size:
            return
        if isinstance(values, np.ndarray):
            segment.copy_to_device(np.ascontiguousarray(values), stream=self._stream)
        else:
            blocks = -(-segment.size // kernels.THREADS)
            kernels.launch(kernels.fill, blocks, kernels.THREADS, self._stream, segment, segment.dtype.type(values))

    def read(self, array: DeviceArray) -> Array:
        """Return a copy of one of `segments` or `leaves` on the host, after all work on the stream."""
        copied: Array = np.zeros(array.shape, array.dtype)
        if array.size:
            copied = array.copy_to_host(stream=self._stream)
            self._stream.synchronize()
        return copied

    def part(self, number: int) -> DeviceArray:
        """Return the elements of one of `leaves`, 1-D."""
        leaf = self.layout.leaves[number]
        return self.segments[leaf.segment][leaf.start : leaf.stop]

    def store(self, arrays: Sequence[Any]) -> None:
        """Copy arrays on the host to the device. None leaves a leaf unchanged."""
        for k, array in enumerate(arrays):
            if array is not None and array.size:
                part = self.part(k)
                with np.errstate(all="ignore"):  # values that are too large become inf, as on the device
                    dense = np.array(array, part.dtype, order="C")
                part.copy_to_device(dense.reshape(-1), stream=self._stream)

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Return False for each array: arrays on the host share no memory with the device."""
        return [False] * len(arrays)

    def to_host(self) -> FlatBuffer:
        """Return a copy on the host."""
        host = FlatBuffer.from_layout(self.layout)
        for segment, ours in zip(host.segments, self.segments, strict=True):
            segment[...] = self.read(ours)
        return host

    @classmethod
    def of(cls, host: FlatBuffer, stream: Stream) -> "DeviceBuffer":
        """Return a copy of `host` on the device."""
        buffer = cls(host.layout, stream)
        for segment, theirs in zip(buffer.segments, host.segments, strict=True):
            buffer.write(segment, theirs)
        return buffer

    def contains(self, item: object) -> bool:
        """Return whether an array on the device lies in the buffer, as `FlatBuffer.contains`."""
        interface = kernels.interface_of(item)
        if interface is None or not math.prod(interface["shape"]):
            return interface is not None
        return any(low <= interface["data"][0] < high for low, high in self.spans)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.to_host().__reduce__()

    def __repr__(self) -> str:
        return super().__repr__().replace("FlatBuffer", "DeviceBuffer", 1)


class JoinedDeviceBuffer(JoinedBuffer, DeviceBuffer):
    """A `JoinedBuffer` whose parts are on the device."""

    def __init__(self, layout: Layout, parts: Sequence[DeviceBuffer], views: Any = None) -> None:
        super().__init__(layout, parts, views)
        self._stream = parts[0]._stream

    @property
    def _on_device(self) -> list[DeviceBuffer]:
        """The parts."""
        return [part for part in self.parts if isinstance(part, DeviceBuffer)]

    def use(self, stream: Stream) -> None:
        """Use another stream from now on."""
        self._stream = stream
        for part in self._on_device:
            part.use(stream)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first address of each block of memory, and the first address after it."""
        return [span for part in self._on_device for span in part.spans]

    def upload(self, pinned: "Pinned") -> None:
        """Copy all of a buffer in pinned memory, of the same layout, to the device."""
        for ours, theirs in zip(self.segments, pinned.segments, strict=True):
            if theirs.size:
                ours.copy_to_device(theirs, stream=self._stream)

    def like(self, fill: float = 0, dtype: DTypeLike | None = None) -> DeviceBuffer:
        """Return a new buffer of the same structure on the device, as `FlatBuffer.like`."""
        parts = [part.like(fill, dtype) for part in self._on_device]
        return JoinedDeviceBuffer(self.layout.of_parts([part.layout for part in parts]), parts)

    def to_host(self) -> FlatBuffer:
        """Return a copy on the host."""
        return JoinedBuffer(self.layout, [part.to_host() for part in self._on_device])

    def __reduce__(self) -> tuple[Any, ...]:
        return self.to_host().__reduce__()


class Pinned(FlatBuffer):
    """A `FlatBuffer` in pinned memory of the host. Copies from there to the device are asynchronous."""

    def __init__(self, layout: Layout) -> None:
        self._allocate(layout, cuda.pinned_array)


class PinnedGradients:
    """Two buffers in pinned memory. One is filled with gradients while the other is being copied to the device."""

    def __init__(self, grads: DeviceBuffer) -> None:
        self._grads = grads
        self._pinned: list[tuple[Pinned, Any]] = []  # each with the event after the copy from it

    def copy(self, arrays: Sequence[Any], whole: bool, stream: Stream) -> None:
        """Copy gradients on the host to the gradient buffer.

        Where `arrays` has None, the gradient buffer stays as it is, or has undefined values if `whole`.
        """
        grads = self._grads
        if len(self._pinned) < 2:
            self._pinned.append((Pinned(grads.layout), cuda.event()))
        else:
            self._pinned.reverse()
            self._pinned[-1][1].synchronize()
        pinned, event = self._pinned[-1]
        pinned.store(arrays)
        if whole:
            grads.upload(pinned)
        else:
            for k, (array, memory) in enumerate(zip(arrays, pinned.leaves, strict=True)):
                if array is not None and memory.size:
                    grads.part(k).copy_to_device(memory.reshape(-1), stream=stream)
        event.record(stream)


class Uploads:
    """Asynchronous copies of arrays to the device, through pinned memory. `most` of them can be in flight at once.

    Before a further copy the host waits.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pinned: list[tuple[Array, Any]] = []  # memory, and the event after the copy from it
        self._turn = -1

    def copy(self, values: Array, target: DeviceArray, stream: Stream) -> None:
        """Copy values to a 1-D array on the device of the same size, cast to its dtype."""
        self._turn = (self._turn + 1) % self._most
        if self._turn == len(self._pinned):
            self._pinned.append((cuda.pinned_array(target.nbytes, np.uint8), cuda.event()))
        else:
            memory, event = self._pinned[self._turn]
            event.synchronize()
            if memory.size < target.nbytes:
                self._pinned[self._turn] = cuda.pinned_array(target.nbytes, np.uint8), event
        memory, event = self._pinned[self._turn]
        vector = memory[: target.nbytes].view(target.dtype)
        with np.errstate(all="ignore"):  # values that are too large become inf
            vector.reshape(values.shape)[...] = values
        target.copy_to_device(vector, stream=stream)
        event.record(stream)


class Staged:
    """A 1-D array on the device that the host writes asynchronously."""

    def __init__(self, values: Array, stream: Stream) -> None:
        self.array: DeviceArray = cuda.device_array(max(1, values.size), values.dtype)
        self._now: Array | None = None
        self._uploads = Uploads(_IN_FLIGHT)
        self.write(values, stream)

    def write(self, values: Array, stream: Stream) -> None:
        """Write values, unless the array has them already."""
        if not values.size or (self._now is not None and np.array_equal(values, self._now)):
            return
        self._uploads.copy(values, self.array, stream)
        self._now = values.copy()


class Scratch:
    """Arrays on the device for intermediate values, each with a name. Their memory is used again, and grows."""

    def __init__(self) -> None:
        self._arrays: dict[str, tuple[tuple[int, ...], DType, DeviceArray]] = {}
        self._blocks: dict[str, DeviceArray] = {}
        self.gradients, self.tables = Uploads(2), Uploads(_IN_FLIGHT)

    def array(self, name: str, dtype: DTypeLike, *shape: int) -> DeviceArray:
        """Return an array that is not empty. It has the memory of the last array of this name."""
        known, dtype = self._arrays.get(name), np.dtype(dtype)
        if known is not None and known[:2] == (shape, dtype):
            return known[2]
        block, nbytes = self._blocks.get(name), math.prod(shape) * dtype.itemsize
        if block is None or block.size < nbytes:
            # A quarter more, so that sizes that grow slowly seldom allocate.
            grown = nbytes if block is None else max(nbytes, block.size * 5 // 4)
            block = self._blocks[name] = cuda.device_array(grown, np.uint8)
        array = block[:nbytes].view(dtype).reshape(shape)
        self._arrays[name] = shape, dtype, array
        return array
