"""`HeldArrays`: parameters that stay in the arrays of the caller."""

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import numpy as np

from fastrms.buffers.flat import Array, FlatBuffer, lies_in
from fastrms.buffers.layout import Layout
from fastrms.buffers.pytree import describe
from fastrms.errors import DtypeError, StructureError

__all__ = ["HeldArrays", "moved"]


class HeldArrays(FlatBuffer):
    """A buffer that consists of the caller's arrays. They are its `leaves`, and the items of its `views`.

    The arrays are not parts of one vector or block. `segments` has one vector for each array.

    Parameters
    ----------
    layout : Layout
        The layout of the arrays.
    arrays : sequence of ndarray
        One array for each leaf of the layout: writable, C-contiguous, aligned, and of the dtype of the leaf. Subclasses
        of ndarray are kept.
    views : the structure of the layout, or None
        Existing containers with the arrays; None for new containers.
    check : bool, default True
        Whether to check the arrays.
    name : str, default "params"
        The name of the arrays in the error messages of this check.

    Raises
    ------
    DtypeError
        An item of `arrays` is not such an array.
    """

    def __init__(
        self, layout: Layout, arrays: Sequence[Any], views: Any = None, check: bool = True, name: str = "params"
    ) -> None:
        present = list(map(self.present, arrays))
        for leaf, array in zip(layout.leaves, present, strict=True) if check else ():
            _check(array, layout.dtype_of(leaf), name + leaf.path)
        self.layout, self.leaves = layout, tuple(arrays)
        self.views = layout.structure(arrays) if views is None else views
        # Views with the present shape and memory of each array, to compare the arrays with.
        self._originals = [np.asarray(array).view() for array in present]

    def present(self, array: Any) -> Any:
        """Return an ndarray with the present address, shape, strides and dtype of one of the caller's arrays.

        Parameters
        ----------
        array : object
            One of `leaves`.

        Returns
        -------
        array : ndarray
            The array itself.
        """
        return array

    def joined(self, layout: Layout, more: FlatBuffer, views: Any) -> Self:
        """Return a buffer with the arrays of this buffer and of another one.

        Parameters
        ----------
        layout : Layout
            The layout of all arrays.
        more : FlatBuffer
            The other buffer.
        views : the structure of the layout
            Containers with all arrays.

        Returns
        -------
        buffer : HeldArrays
            A buffer of the same class.
        """
        return type(self)(layout, [*self.leaves, *more.leaves], views)

    @property
    def segments(  # type: ignore[override] # pyright: ignore[reportIncompatibleVariableOverride] # it is read anew
        self,
    ) -> tuple[Array, ...]:
        """A vector for each array, in the memory that the array has now.

        Reading it raises StructureError if an array was moved, or has another shape or dtype than at first.
        """
        for leaf, array, original in zip(self.layout.leaves, self.leaves, self._originals, strict=True):
            if _place(array) != _place(original):
                raise StructureError(moved(f"params{leaf.path}", array, original))
        return tuple(np.asarray(array).reshape(-1) for array in self.leaves)

    @property
    def flat(self) -> Any:
        """Not available: reading or setting it raises StructureError."""
        self._refuse_vector()

    @flat.setter
    def flat(self, value: object) -> None:
        self._refuse_vector()

    def _refuse_vector(self) -> NoReturn:
        raise StructureError(
            "flat: expected parameters in one buffer, got arrays that are updated in place; make the optimizer without "
            "in_place=True"
        )

    def original_views(self) -> Sequence[Array]:
        """Return arrays with the shapes and addresses that `leaves` had at first.

        Returns
        -------
        originals : sequence of ndarray
            One array for each of `leaves`.
        """
        return self._originals

    def aliases(self, arrays: Sequence[Any]) -> list[bool]:
        """Tell for each array whether it may share memory with one of the caller's arrays, by the bounds of memory.

        Parameters
        ----------
        arrays : sequence of ndarray or None
            Any number of arrays, of any shape.

        Returns
        -------
        aliases : list of bool
            One value for each array; False for None.
        """
        return [
            array is not None and any(np.may_share_memory(array, own) for own in self._originals) for array in arrays
        ]

    def contains(self, item: object) -> bool:
        """Tell whether an object is an array within the memory of one of the caller's arrays.

        Parameters
        ----------
        item : object
            Any object.

        Returns
        -------
        inside : bool
            True also for an array without elements.
        """
        return any(lies_in(item, own) for own in self._originals)

    def mappings(self) -> list[Array]:
        """Return all memory at which the arrays can be read.

        Returns
        -------
        mappings : list of ndarray
            One vector for each array.
        """
        return list(self.segments)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process may get the arrays read-only, as from joblib. Then only a step is refused.
        return type(self), (self.layout, self.leaves, None, False)


def moved(path: str, array: Array, original: Array) -> str:
    """Return the error message about an array that no longer has the place or form of `original`."""
    return (
        f"{path}: expected the original array, of shape {original.shape} and {original.dtype}, got one that was moved, "
        f"or changed to shape {array.shape} or {array.dtype}"
    )


def _place(array: Array) -> tuple[Any, ...]:
    """Return address, shape, dtype and strides of an array."""
    about = array.__array_interface__
    return about["data"][0], about["shape"], about["typestr"], about["strides"]


def _check(array: object, dtype: np.dtype[Any], path: str) -> None:
    """Raise DtypeError unless a step can update an array in place."""
    if not isinstance(array, np.ndarray):
        raise DtypeError(
            f"{path}: expected an ndarray, which a step can update in place, got {describe(array)}; pass the array "
            "that this object holds, or a new one: np.array(value)"
        )
    wrong = [
        name
        for name, good in (
            ("read-only", array.flags.writeable),
            ("not C-contiguous", array.flags.c_contiguous),
            ("not aligned", array.flags.aligned),
            (f"of dtype {array.dtype} in another byte order", array.dtype == dtype),
        )
        if not good
    ]
    if wrong:
        raise DtypeError(
            f"{path}: expected a writable, C-contiguous array, which a step can update in place, got one that is "
            f"{wrong[0]}; without in_place=True the values are copied"
        )
