"""What lies on a GPU: buffers, tables that a step reads, and the arrays of other libraries that it is given.

`fastrms.cuda` is made of this; `fastrms.kernels.cuda` has what runs on the device.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.conversion import can_store, castable_to
from fastrms.buffers.flat import as_arrays
from fastrms.errors import DtypeError, OptionTypeError, StructureError
from fastrms.kernels import cuda as kernels
from fastrms.kernels import dlpack, pointers

__all__ = [
    "DeviceBuffer", "Finder", "Found", "Pinned", "Staged", "as_stream", "copy_in", "let_wait", "shadows", "to_host",
]  # fmt: skip

Array = NDArray[Any]
Interface = Mapping[str, Any]

# How many copies of a table can be on their way to the device. The host waits only if it is further ahead than that.
_ON_THEIR_WAY = 16

cuda: Any = kernels.cuda  # with the types of none of its targets


def as_stream(value: Any) -> Any:
    """A stream of Numba's from what `stream` may be: None, a number, or a stream of another library.

    Raises
    ------
    OptionTypeError
        It is something else.
    """
    given = value
    if value is None:
        return _default_stream()
    if hasattr(value, "auto_synchronize"):  # Numba's; 0 is its default stream, which others know by another number
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
    stream = cuda.external_stream(int(value))
    stream.given = given  # which ends its stream when nobody has it any more
    return stream


def _default_stream() -> Any:
    # The simulator of Numba's own target has no name for it.
    return getattr(cuda, "legacy_default_stream", cuda.stream)()


def let_wait(waiting: Any, handle: int, for_it: bool) -> None:
    """Let the work that is yet to come on a stream wait for that on another, which is known by its number.

    Parameters
    ----------
    waiting : stream of Numba's
    handle : int
        Of the other one.
    for_it : bool
        False for the other way round.
    """
    if handle in (kernels.handle_of(waiting), 0):
        return
    other = cuda.external_stream(handle)
    event = cuda.event()
    event.record(other if for_it else waiting)
    event.wait(waiting if for_it else other)


class DeviceBuffer(FlatBuffer):
    """A `FlatBuffer` whose memory is on the device: `flat`, `segments`, `leaves` and `views` are Numba's device arrays.

    Parameters
    ----------
    layout : Layout
    stream : stream of Numba's
        On which all is done, and which the arrays tell others of.
    """

    def __init__(self, layout: Layout, stream: Any) -> None:
        self.layout = layout
        self._stream = stream
        self.block: Any = cuda.device_array(max(1, layout.nbytes), np.uint8)
        self.segments: Any = tuple(self._part(s.dtype, s.offset, (s.size,)) for s in layout.segments)
        self.leaves: Any = tuple(
            self._part(dtype, layout.segments[leaf.segment].offset + leaf.start * dtype.itemsize, leaf.shape)
            for leaf, dtype in ((leaf, layout.dtype_of(leaf)) for leaf in layout.leaves)
        )
        self.views = layout.structure(self.leaves)
        self.use(stream)

    def _part(self, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> Any:
        size = math.prod(shape)
        if size == 0:  # there is no address for it
            return cuda.device_array(shape, dtype)
        return self.block[offset : offset + size * dtype.itemsize].view(dtype).reshape(shape)

    def use(self, stream: Any) -> None:
        """Do everything on another stream from now on."""
        self._stream = stream
        for array in (self.block, *self.segments, *self.leaves):
            array.stream = stream

    @property
    def span(self) -> tuple[int, int]:
        """The first address of the block, and the first one after it."""
        interface = kernels.interface_of(self.block)
        assert interface is not None
        low = interface["data"][0]
        return low, low + self.nbytes

    def like(self, fill: float = 0, dtype: DTypeLike | None = None) -> "DeviceBuffer":
        """Return a new buffer of the same structure on the device; as `FlatBuffer.like`."""
        other = DeviceBuffer(self.layout if dtype is None else self.layout.with_dtype(dtype), self._stream)
        for segment in other.segments:
            other.write(segment, fill)
        return other

    def write(self, segment: Any, values: Any) -> None:
        """Set one of `segments` to an ndarray, or to a number."""
        if not segment.size:
            return
        if isinstance(values, np.ndarray):
            segment.copy_to_device(np.ascontiguousarray(values), stream=self._stream)
        else:
            blocks = -(-segment.size // kernels.THREADS)
            kernels.launch(kernels.fill, blocks, kernels.THREADS, self._stream, segment, segment.dtype.type(values))

    def read(self, array: Any) -> Array:
        """A copy of one of `segments` or `leaves`; waits for all that is under way on the stream."""
        copied: Array = np.zeros(array.shape, array.dtype)
        if array.size:
            copied = array.copy_to_host(stream=self._stream)
            self._stream.synchronize()
        return copied

    def part(self, number: int) -> Any:
        """The elements of one of `leaves`, 1-D."""
        leaf = self.layout.leaves[number]
        return self.segments[leaf.segment][leaf.start : leaf.stop]

    def store(self, arrays: Sequence[Any]) -> None:
        """Copy what `check` returned to the device."""
        for k, (array, view) in enumerate(zip(arrays, self.leaves, strict=True)):
            if array is not None and view.size:
                with np.errstate(all="ignore"):  # as on the device, a number that is too large becomes inf
                    dense = np.array(array, view.dtype, order="C")
                self.part(k).copy_to_device(dense.reshape(-1), stream=self._stream)

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """As `FlatBuffer.aliases`, of arrays in ordinary memory."""
        return [False] * len(arrays)

    def to_host(self) -> FlatBuffer:
        """A copy in ordinary memory."""
        host = FlatBuffer.from_layout(self.layout)
        for segment, ours in zip(host.segments, self.segments, strict=True):
            segment[...] = self.read(ours)
        return host

    @classmethod
    def of(cls, host: FlatBuffer, stream: Any) -> "DeviceBuffer":
        """A copy of `host` on the device."""
        buffer = cls(host.layout, stream)
        for segment, theirs in zip(buffer.segments, host.segments, strict=True):
            buffer.write(segment, theirs)
        return buffer

    def contains(self, item: object) -> bool:
        """As `FlatBuffer.contains`, of arrays on the device."""
        interface = kernels.interface_of(item)
        if interface is None or not math.prod(interface["shape"]):
            return interface is not None
        low, high = self.span
        return bool(low <= interface["data"][0] < high)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.to_host().__reduce__()

    def __repr__(self) -> str:
        return super().__repr__().replace("FlatBuffer", "DeviceBuffer", 1)


class Pinned(FlatBuffer):
    """A `FlatBuffer` in memory of the host that the device can read by itself, while the host does something else."""

    def __init__(self, layout: Layout) -> None:
        self._allocate(layout, cuda.pinned_array)


class Staged:
    """A 1-D array on the device that the host writes, without waiting: through pinned memory, as often as it likes.

    Parameters
    ----------
    values : ndarray, shape (n,)
        What it has at first.
    stream : stream of Numba's
        On which it is written now.
    """

    def __init__(self, values: Array, stream: Any) -> None:
        self.array: Any = cuda.device_array(max(1, values.size), values.dtype)
        self._now: Array | None = None
        self._pinned: list[tuple[Array, Any]] = []
        self._turn = 0
        self.write(values, stream)

    def write(self, values: Array, stream: Any) -> None:
        """Write `values`, unless the array has them already."""
        if not values.size or (self._now is not None and np.array_equal(values, self._now)):
            return
        if len(self._pinned) < _ON_THEIR_WAY:
            self._pinned.append((cuda.pinned_array(values.size, values.dtype), cuda.event()))
            self._turn = -1
        else:
            self._turn = (self._turn + 1) % _ON_THEIR_WAY
            self._pinned[self._turn][1].synchronize()
        memory, event = self._pinned[self._turn]
        memory[...] = values
        self.array.copy_to_device(memory, stream=stream)
        event.record(stream)
        self._now = values.copy()

    def forget(self) -> None:
        """Note that somebody else has written it."""
        self._now = None


class Found:
    """Where the gradients of a step are.

    Attributes
    ----------
    sources : ndarray of int64
        For each parameter an address, `IN_BUFFER` or `ABSENT`.
    arrays : list of ndarray or None
        Those in ordinary memory, or an empty list.
    others : list of (int, interface, bool)
        Number and description of those on the device that have to be copied to the gradient buffer first, and whether
        they lie in the optimizer's own memory.
    streams : set of int
        Of those who made them.
    kept : list
        What has to live until the step has been asked for.
    """

    def __init__(self, count: int) -> None:
        self.sources = np.zeros(count, np.int64)
        self.arrays: list[Any] = []
        self.others: list[tuple[int, Interface, bool]] = []
        self.streams: set[int] = set()
        self.kept: list[Any] = []


class Finder:
    """Finds out where gradients are, and checks them; nothing is written.

    Parameters
    ----------
    grads : DeviceBuffer
        The gradient buffer.
    """

    def __init__(self, grads: DeviceBuffer) -> None:
        self._grads = grads
        layout = grads.layout
        self._leaves = layout.leaves
        self._dtypes = [layout.dtype_of(leaf) for leaf in layout.leaves]
        self._known: dict[tuple[str, np.dtype[Any]], np.dtype[Any]] = {}  # which dtypes can be stored as which
        # For `dlpack.locate`.
        self._expected = np.zeros((len(self._leaves), 2 + max(len(leaf.shape) for leaf in self._leaves)), np.int64)
        for row, leaf, dtype in zip(self._expected, self._leaves, self._dtypes, strict=True):
            row[0], row[1] = dlpack.kind_of(dtype.itemsize), len(leaf.shape)
            row[2 : 2 + len(leaf.shape)] = leaf.shape
        self._words = np.zeros(dlpack.WORDS, np.int64)
        self._places = np.zeros((2, len(self._leaves)), np.int64)
        self._device = dlpack.CUDA | getattr(getattr(cuda.current_context(), "device", None), "id", 0) << 32
        # Negative views of PyTorch's are parts of complex tensors, and dense only if they have one element.
        self._singles = [k for k, leaf in enumerate(self._leaves) if leaf.stop - leaf.start == 1]

    def find(self, items: tuple[Any, ...], written: NDArray[np.int64]) -> Found:
        """Find the gradients `items`, one for each parameter, or None.

        Parameters
        ----------
        items : tuple
        written : ndarray of int64, shape (m, 2)
            Pieces of memory [low, high) that the step writes: what lies there is copied first.

        Raises
        ------
        StructureError, DtypeError
            As `RMSProp.step` raises them.
        """
        found = Found(len(items))
        spans = written.tolist()
        left: Iterable[int] = range(len(items))
        if dlpack.exchange_function(type(items[0])):
            left = self._locate(items, written, found)
        on_host: list[int] = []
        for k in left:
            item = items[k]
            if item is None:
                found.sources[k] = kernels.ABSENT
            elif item is not self._grads.leaves[k]:
                interface = kernels.interface_of(item)
                if interface is None:
                    on_host.append(k)
                    continue
                if getattr(item, "is_neg", bool)():  # a view of PyTorch's, of which memory has the positive numbers
                    item = item.resolve_neg()
                    found.kept.append(item)
                    interface = kernels.interface_of(item) or interface
                self._look_at(k, item, interface, spans, found)
        if on_host:
            wanted = set(on_host)
            chosen = [item if k in wanted else None for k, item in enumerate(items)]
            found.arrays = as_arrays(chosen, self._grads.layout, "gradients", allow_none=True)
        return found

    def _locate(self, items: tuple[Any, ...], written: NDArray[np.int64], found: Found) -> list[int]:
        """Find those that can be found by compiled code, and return the numbers of the others."""
        kind = type(items[0])
        addresses, states = self._places
        dlpack.locate(
            dlpack.exchange_function(kind), pointers.items_of(items), np.array([id(kind)]), id(None), self._expected,
            written, self._words, addresses, states, self._device,
        )  # fmt: skip
        ordinary = states == dlpack.ORDINARY
        for k in self._singles:
            ordinary[k] = ordinary[k] and not getattr(items[k], "is_neg", bool)()
        found.sources[ordinary] = addresses[ordinary]
        if ordinary.any():
            found.streams.add(dlpack.current_stream(kind, self._device) or kernels.LEGACY_STREAM)
        return np.flatnonzero(~ordinary).tolist()

    def _look_at(self, k: int, item: Any, interface: Interface, spans: list[list[int]], found: Found) -> None:
        # 1,000 arrays come here one by one: texts are made where they are needed.
        leaf, dtype, shape = self._leaves[k], self._dtypes[k], interface["shape"]
        if interface.get("mask") is not None:
            raise DtypeError(
                f"gradients{leaf.path}: expected an array, got a masked one on the device; the mask would be lost"
            )
        if shape != leaf.shape and tuple(shape) != leaf.shape:
            raise StructureError(f"gradients{leaf.path}: expected shape {leaf.shape}, got {tuple(shape)}")
        theirs = self._known.get((interface["typestr"], dtype))
        if theirs is None:
            theirs = np.dtype(interface["typestr"])
            if not can_store(theirs, dtype) or not theirs.isnative:
                raise DtypeError(f"gradients{leaf.path}: expected {castable_to(dtype)}, got {theirs}")
            self._known[interface["typestr"], dtype] = theirs
        if leaf.stop == leaf.start:
            return
        address, strides = interface["data"][0], interface.get("strides")
        found.streams.add(_stream_of(item, interface))
        if strides is not None and tuple(strides) == _dense_strides(leaf.shape, theirs):
            strides = None
        start, end = address, address + (leaf.stop - leaf.start) * theirs.itemsize
        if strides is not None:
            reach = [(size - 1) * stride for size, stride in zip(leaf.shape, strides, strict=True)]
            start = address + sum(step for step in reach if step < 0)
            end = address + sum(step for step in reach if step > 0) + theirs.itemsize
        ours = False
        for low, high in spans:
            ours = ours or (start < high and end > low)
        if theirs is dtype and not ours and strides is None:
            found.sources[k] = address
        else:
            found.others.append((k, interface, ours))


def _dense_strides(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    return tuple(dtype.itemsize * math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _stream_of(item: Any, interface: Interface) -> int:
    """The stream on which something was computed, or 0 where there is nothing to wait for."""
    if interface.get("stream") is not None:
        return int(interface["stream"])
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(item, torch.Tensor):  # whose interface is an older one that has no streams
        return torch.cuda.current_stream(item.device).cuda_stream or kernels.LEGACY_STREAM
    return 0


def copy_in(target: Any, interface: Interface, stream: Any) -> None:
    """Copy an array on the device, of any dtype and strides, into a 1-D array there."""
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides = interface.get("strides") or _dense_strides(shape, dtype)
    if not shape:
        shape, strides = (1,), (dtype.itemsize,)
    blocks = -(-target.size // kernels.THREADS)
    kernels.launch(
        kernels.convert_kernel(len(shape)), blocks, kernels.THREADS, stream, target,
        np.int64(interface["data"][0]), dtype.type(0), tuple(map(np.int64, shape)), tuple(map(np.int64, strides)),
    )  # fmt: skip


def to_host(tree: Any, stream: Any) -> Any:
    """The same nesting of lists, tuples and dicts with arrays in ordinary memory in the place of those on the device.

    Those of dtypes other than float32 and float64, which no optimizer takes, come without their values.
    """

    def copied(item: Any, interface: Interface) -> Array:
        shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        if dtype not in (np.float32, np.float64) or not dtype.isnative or not math.prod(shape):
            return np.broadcast_to(np.zeros((), dtype), shape)
        let_wait(stream, _stream_of(item, interface), True)
        dense = cuda.device_array(math.prod(shape), dtype)
        copy_in(dense, interface, stream)
        host: Array = dense.copy_to_host(stream=stream)
        stream.synchronize()
        return host.reshape(shape)

    return _mapped(tree, copied)


def shadows(tree: Any) -> Any:
    """The same with arrays that have the addresses, shapes and strides of those on the device, and cannot be read."""

    def shadow(item: Any, interface: Interface) -> Array:
        return np.asarray(SimpleNamespace(__array_interface__={**interface, "version": 3}))

    return _mapped(tree, shadow)


def _mapped(tree: Any, change: Callable[[Any, Interface], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(item, change) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_mapped(item, change) for item in tree]
        return (type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)) if isinstance(tree, tuple) else items
    interface = kernels.interface_of(tree)
    return tree if interface is None else change(tree, interface)
