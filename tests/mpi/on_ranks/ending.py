"""Programs in which one rank ends the others: ``mpiexec -n P python -m on_ranks.ending CASE``."""

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from fastrms.mpi import ShardedRMSProp

FIRST = MPI.COMM_WORLD.rank == 0
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
    """One rank calls `sys.exit`, which only mpi4py's runner sees."""
    opt = ShardedRMSProp([np.ones(50)], kernel="numpy")
    if LAST:
        sys.exit("no data on this rank")
    opt.step([np.ones(50)])
    raise AssertionError("unreachable")


# Ranks that wait for others, which do not join: `timeout` ends them.


def optimizer(**options):
    return ShardedRMSProp([np.ones(50)], kernel="numpy", **options)


def saves_alone():
    """Only rank 0 saves, and the others are through."""
    opt = optimizer(timeout=2)
    opt.step([np.ones(50)])
    if FIRST:
        opt.save("run.npz")


def saves_alone_while_others_step():
    opt = optimizer(timeout=60)
    opt.step([np.ones(50)])
    if FIRST:
        opt.save("run.npz")
    opt.step([np.ones(50)])


def fewer_steps():
    """The last rank has fewer batches, and ends its program."""
    opt = optimizer(timeout=2)
    for _ in range(2 if LAST else 3):
        opt.step([np.ones(50)])


def fewer_steps_and_busy():
    """The last rank has fewer batches, and is in a call of MPI of the user's own. The time is that of a variable."""
    os.environ["FASTRMS_MPI_TIMEOUT"] = "0.5"
    opt = optimizer()
    assert opt.timeout == 0.5
    for _ in range(2 if LAST else 3):
        opt.step([np.ones(50)])
    MPI.COMM_WORLD.Barrier()


def raised_and_caught():
    """One rank leaves out a step after an error of its own program."""
    opt = optimizer(timeout=2)
    for k in range(3):
        try:
            if LAST and k == 1:
                raise ValueError("no data on this rank")
            opt.step([np.ones(50)])
        except ValueError:
            pass


def handed_over():
    """One rank is through when the others have handed gradients over, whose reductions have begun."""
    opt = optimizer(timeout=2)
    if not LAST:
        opt.ready(0, np.ones(50))
        opt.step()


def made_alone():
    if FIRST:
        optimizer(timeout=2)


def loaded_alone():
    """One rank makes the optimizer, and the others load it."""
    if FIRST:
        optimizer()
    else:
        ShardedRMSProp.from_checkpoint("run.npz")


def crossed():
    """Two optimizers, which step in another order on one rank."""
    pair = [optimizer(timeout=2), optimizer(timeout=2)]
    for opt in reversed(pair) if LAST else pair:
        opt.step([np.ones(50)])


def interrupted():
    """An exception takes a rank out of a step in the middle, and is caught."""

    def handler(number, frame):
        raise TimeoutError("this rank is late")

    opt = optimizer(timeout=60)
    if FIRST:
        signal.signal(signal.SIGALRM, handler)
        signal.alarm(1)
    if LAST:
        time.sleep(1.5)
    try:
        opt.step([np.ones(50)])
    except TimeoutError:
        opt.save("run.npz")


def killed():
    opt = optimizer(timeout=60)
    if LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    opt.step([np.ones(50)])


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("ok", sys.argv[1])
