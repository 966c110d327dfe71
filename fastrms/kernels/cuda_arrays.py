"""CUDA kernels that fill and copy arrays, and add up their rows."""

from functools import cache

from fastrms.kernels.cuda_target import cuda, number_at

__all__ = ["add_up_rows", "convert_kernel", "fill"]


@cuda.jit
def fill(array, value):
    """Set all elements of a 1-D array."""
    for i in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[i] = value


@cache
def convert_kernel(dimensions):
    """Return the kernel that copies an array of any dtype and strides (in bytes), at an address, into a 1-D array."""

    @cuda.jit
    def convert(target, address, like, shape, strides):
        for i in range(cuda.grid(1), target.size, cuda.gridsize(1)):
            rest = i
            place = address
            for d in range(dimensions):
                axis = dimensions - 1 - d
                place += rest % shape[axis] * strides[axis]
                rest //= shape[axis]
            target[i] = number_at(place, like)

    return convert


@cuda.jit
def add_up_rows(gradients, order, first, sums):
    """Write sums of rows of `gradients`, one after another, to `sums`, as `rows.add_up_rows`.

    Both are 1-D, and have rows of equal widths. Sum k adds the rows ``order[first[k]]``, ...,
    ``order[first[k + 1] - 1]``, so `first` has an item more than there are sums.
    """
    width = sums.size // (first.size - 1)
    for i in range(cuda.grid(1), sums.size, cuda.gridsize(1)):
        k, j = i // width, i % width
        total = gradients[order[first[k]] * width + j]
        for r in range(first[k] + 1, first[k + 1]):
            total += gradients[order[r] * width + j]
        sums[i] = total
