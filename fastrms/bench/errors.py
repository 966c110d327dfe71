"""The errors that end a benchmark, or the rows of one library in it; `fastrms.cli` prints their messages."""

from fastrms.errors import FastrmsError

__all__ = ["BenchmarkError", "PeerError"]


class BenchmarkError(FastrmsError):
    """An implementation of fastrms, or the user's own kernel, computes something else than the reference."""


class PeerError(FastrmsError):
    """Another library fails or computes something else: the benchmark goes on without it."""
