"""End all ranks when one ends: the others would wait for it for ever in a collective call."""

import os
import sys
import threading
import time
from types import TracebackType

from mpi4py import MPI

__all__ = ["end_all", "install_excepthook", "is_interactive"]

# A launcher loses output that it has not passed on when the ranks are ended. MPICH's mpiexec lost all of it in one of
# ten runs without a pause (seconds).
_PAUSE = 0.5

_lock = threading.Lock()
_installed = False


def is_interactive() -> bool:
    """Return whether this is an interactive session. An uncaught exception does not end its process."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def end_all(message: str = "") -> None:
    """Write a message to stderr, flush stdout and stderr, and end all ranks, this one too (MPI_Abort)."""
    sys.stderr.write(message)  # in one piece, as other ranks write there too
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_PAUSE)
    MPI.COMM_WORLD.Abort(1)
    os._exit(1)  # MPI_Abort of MPICH 5 returns for a moment


def install_excepthook() -> None:
    """Install a `sys.excepthook` that ends all ranks at an uncaught exception of this process. Later calls do nothing.

    The hook calls the previous hook first. In an interactive session it does nothing else. It sees neither `sys.exit()`
    nor exceptions of other threads.
    """
    # The constructor of ShardedRMSProp calls this on more than one rank, because from then on ranks wait for one
    # another. An import must not do it: programs without an optimizer would have a changed process. The runner of
    # mpi4py (`mpiexec -n 4 python -m mpi4py train.py`) has a hook too, and sees sys.exit(). Most programs are started
    # without it, and would hang.
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
        previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        try:
            previous(kind, error, traceback)
        finally:
            if not (is_interactive() or MPI.Is_finalized()):
                world = MPI.COMM_WORLD
                end_all(
                    f"fastrms: rank {world.rank} of {world.size} ends with {kind.__name__}: {error}; it also ends the "
                    "other ranks, which would wait for it (MPI_Abort)\n"
                )

    sys.excepthook = hook
