"""How tests/test_mpi.py has one rank end the others: ``mpiexec -n P python tests/mpi_ending.py CASE``."""

import sys

import numpy as np
from mpi4py import MPI

from fastrms.mpi import ShardedRMSProp

LAST = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1


def outside():
    """One rank ends with an exception outside of the optimizer, while the others are in a step."""
    before = sys.excepthook

    def hook(*arguments):
        print("the hook that was there", file=sys.stderr)
        before(*arguments)

    sys.excepthook = hook
    opt = ShardedRMSProp([np.ones(50)], kernel="numpy")
    opt.step([np.ones(50)])
    if LAST:
        raise ValueError("no data on this rank")
    opt.step([np.ones(50)])
    raise AssertionError("unreachable")


def inside():
    """One rank's gradient is wrong, and nobody catches the error."""
    opt = ShardedRMSProp([np.ones(50)], kernel="numpy")
    opt.step([np.ones(51 if LAST else 50)])


def with_exit():
    """One rank ends by itself, which mpi4py's runner is there for."""
    opt = ShardedRMSProp([np.ones(50)], kernel="numpy")
    if LAST:
        sys.exit("no data on this rank")
    opt.step([np.ones(50)])
    raise AssertionError("unreachable")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("ok", sys.argv[1])
