"""Arrays packed into one block of memory, shown as views of it."""

from fastrms.buffers.flat import Array, FlatBuffer
from fastrms.buffers.layout import Layout, Leaf, Segment

__all__ = ["Array", "FlatBuffer", "Layout", "Leaf", "Segment"]
