"""Arrays packed into one block of memory, shown as views of it."""

from fastrms.buffers.flat import FlatBuffer
from fastrms.buffers.layout import Layout, Leaf, Segment

__all__ = ["FlatBuffer", "Layout", "Leaf", "Segment"]
