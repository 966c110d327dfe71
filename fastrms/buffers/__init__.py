"""Pack many arrays into one block of memory, and show them as views of it."""

from fastrms.buffers.flat import FlatBuffer, Layout, Leaf, Segment

__all__ = ["FlatBuffer", "Layout", "Leaf", "Segment"]
