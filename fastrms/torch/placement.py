"""Where tensors lie in memory, whether their memory can be moved, and why not."""

import ctypes
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from fastrms.kernels import dlpack, pointers

__all__ = [
    "Array", "Located", "Locator", "fits", "held_in_cpp", "identities", "is_viewed", "kind_of", "lies_at", "move",
    "take_values", "unalias", "version_of", "view_of", "why_not_movable",
]  # fmt: skip

Array = NDArray[Any]

_TYPES = (torch.Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64)

# The parts of buffers that have tensors as views, by address, as long as their memory exists, even if their optimizer
# does not. PyTorch can resize neither such memory nor memory from outside; this table tells the two apart.
_viewed: "weakref.WeakValueDictionary[int, Array]" = weakref.WeakValueDictionary()

# Counts the references to a storage in C++. Builds of PyTorch 2.6 and 2.7 for the CPU do not have it.
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def view_of(part: Array) -> torch.Tensor:
    """Return a tensor that is a view of `part` of a buffer."""
    view = torch.from_numpy(part)
    if part.size:
        _viewed[view.data_ptr()] = part  # which lives as long as the tensor's memory
    return view


def is_viewed(address: int) -> bool:
    """Return whether a tensor is a view of the part of a buffer at this address."""
    return address in _viewed


def move(tensor: torch.Tensor, part: Array) -> None:
    """Make a tensor a view of `part` of a buffer, whose values it takes."""
    tensor.data = view_of(part)


def take_values(tensor: torch.Tensor, part: Array) -> None:
    """Copy the values of a tensor to `part` of a buffer, and make the tensor a view of it."""
    part[...] = tensor.detach().numpy()
    move(tensor, part)


def unalias(tensor: Any, part: Array, ranges: NDArray[np.int64]) -> None:
    """Give a tensor its own memory if it can be moved and aliases a part of the buffers that is not `part`.

    `ranges` has the memory [low, high) of each buffer, shape (m, 2).
    """
    if not lies_at(tensor, part) and why_not_movable(tensor) is None:
        low, high = ranges.T
        if ((low <= tensor.data_ptr()) & (tensor.data_ptr() < high)).any():
            tensor.data = tensor.detach().clone()


def version_of(p: torch.Tensor) -> torch.Tensor:
    """Return a tensor without elements that shares the version counter of `p`."""
    version = p.detach()
    version.data = p.new_empty(0)
    return version


def held_in_cpp(tensors: list[torch.Tensor]) -> object:
    """Return a C++ list of tensors; while it exists, a step reads the tensors faster.

    If only Python holds a tensor, C++ secures the Python object each time that it takes a reference. In PyTorch 2.13,
    locating such a tensor takes 50 ns instead of 25, and raising its version 45 ns instead of 12.

    Do not hold parameters or their autograd nodes: `torch.utils.swap_tensors` refuses parameters with other references
    in C++, and parameters whose nodes are held cannot grow.
    """
    return getattr(torch._C, "ScriptList", list)(tensors)


def identities(objects: tuple[Any, ...]) -> object:
    """Return a value that is equal for tuples of the same objects."""
    if pointers.available():
        return ctypes.string_at(pointers.items_of(objects), ctypes.sizeof(ctypes.c_void_p) * len(objects))
    return tuple(map(id, objects))


def lies_at(tensor: Any, part: Array) -> bool:
    """Return whether a tensor has exactly the elements of `part` of a buffer."""
    if _why_not_dense(tensor) or tensor.numel() != part.size or tensor.element_size() != part.itemsize:
        return False
    return tensor.data_ptr() == part.ctypes.data or (part.size == 0 and tuple(tensor.shape) == part.shape)


def fits(tensor: Any, part: Array) -> TypeGuard[torch.Tensor]:
    """Return whether a tensor is dense and has the dtype and shape of `part` of a buffer."""
    return (
        _why_not_dense(tensor) is None
        and tuple(tensor.shape) == part.shape
        and bool(tensor.element_size() == part.itemsize)
    )


def kind_of(tensor: Any, part: Array, ranges: NDArray[np.int64]) -> int:
    """Return what `Locator.locate` finds for one tensor: `dlpack.ORDINARY`, `dlpack.ABSENT` or `dlpack.UNUSUAL`."""
    if tensor is None:
        return dlpack.ABSENT
    if not fits(tensor, part):
        return dlpack.UNUSUAL
    address = tensor.data_ptr()
    aliases = any(address < high and address + tensor.nbytes > low for low, high in ranges.tolist())
    return dlpack.UNUSUAL if aliases else dlpack.ORDINARY


def _why_not_dense(tensor: Any) -> str | None:
    """Return why this is no dense tensor of float32 or float64 on the CPU, or None if it is one."""
    if type(tensor) not in _TYPES:
        return f"it is of type {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"it is on the device {tensor.device}"
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
        return f"its dtype is {tensor.dtype}" if tensor.layout is torch.strided else f"its layout is {tensor.layout}"
    if not tensor.is_contiguous() or tensor.is_neg():
        return "it is not contiguous"
    return None


def _references(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the number of references to the storage of a tensor, in Python (one object for all of them) and in C++."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), _use_count(storage._cdata)


_UNSHARED = (0, 0) if _use_count is None else _references(torch.empty(1, device="cpu"))


def why_not_movable(tensor: Any) -> str | None:
    """Return why the elements of a tensor have to stay where they are, or None if no other object would notice."""
    if (reason := _why_not_dense(tensor)) is not None:
        return reason
    if tensor.is_inference():
        return "it was made in inference mode"
    if tensor.is_shared():
        return "its memory is shared between processes"
    if _use_count is None:
        return "this version of PyTorch cannot tell whether other objects share its memory (2.8 can)"
    if _references(tensor) != _UNSHARED or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return "other objects share its memory"
    # Memory that cannot be resized came from outside, as by torch.from_numpy, or is part of one of our buffers.
    if tensor.numel() > 0 and not tensor.untyped_storage().resizable() and not is_viewed(tensor.data_ptr()):
        return "its memory came from outside PyTorch or from torch.load of a whole model (copy.deepcopy of it helps)"
    return None


class Located(NamedTuple):
    """Where tensors lie: row 0 of `places` has the address of each ordinary tensor, and 0 for others.

    Row 1 has `dlpack.ORDINARY`, `dlpack.ABSENT` or `dlpack.UNUSUAL`.
    """

    places: NDArray[np.int64]
    all_ordinary: bool


class Locator:
    """A finder of tensors of the dtypes and shapes of `parts`.

    With `compiled`, compiled code finds them, if PyTorch has DLPack's table of C functions.
    """

    def __init__(self, parts: Sequence[Array], compiled: bool) -> None:
        self._parts = parts
        self._function = dlpack.exchange_function(torch.Tensor) if compiled else 0
        self.compiled = self._function != 0
        self._types = np.array([id(kind) for kind in _TYPES], np.int64)
        self._expected = dlpack.expected_of(parts)
        self._words = np.zeros(dlpack.WORDS, np.int64)
        self._nothing = np.zeros((0, 2), np.int64)

    def locate(self, tensors: tuple[Any, ...], excluded: NDArray[np.int64] | None = None) -> Located:
        """Find tensors, one for each part. None is absent; other objects are unusual.

        A tensor with a byte in the ranges of memory [low, high) of `excluded`, shape (m, 2), is unusual too.
        """
        places = np.zeros((2, len(self._parts)), np.int64)
        all_ordinary, _ = self._locate(tensors, excluded, places)
        return Located(places, all_ordinary)

    def have_moved(self, tensors: tuple[Any, ...], places: NDArray[np.int64]) -> bool:
        """Find tensors, write the places (see `Located`) to `places`, and return whether any has changed."""
        _, unchanged = self._locate(tensors, None, places)
        return not unchanged

    def _locate(
        self, tensors: tuple[Any, ...], excluded: NDArray[np.int64] | None, places: NDArray[np.int64]
    ) -> tuple[bool, bool]:
        """Write `places`; return whether all tensors are ordinary, and whether nothing has changed."""
        addresses, kinds = places
        ranges = self._nothing if excluded is None else excluded
        if self.compiled:
            all_ordinary, unchanged = dlpack.locate(
                self._function, pointers.items_of(tensors), self._types, id(None), self._expected, ranges, self._words,
                addresses, kinds, dlpack.CPU,
            )  # fmt: skip
            return all_ordinary, unchanged
        before = places.tobytes()
        for k, (tensor, part) in enumerate(zip(tensors, self._parts, strict=True)):
            kinds[k] = kind_of(tensor, part, ranges)
            addresses[k] = tensor.data_ptr() if kinds[k] == dlpack.ORDINARY else 0
        return not kinds.any(), places.tobytes() == before
