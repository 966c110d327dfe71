"""The demo on MPI ranks: one process and all ranks train in turns, and their losses are compared."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastrms._types import HostKernel
from fastrms.demo.mlp import Array, Labels, loss_and_gradients
from fastrms.demo.training import Batch, Batches, Training, train_in_turns
from fastrms.mpi import MPI, ShardedRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["OneProcessTraining", "RankTraining", "comm", "compare", "train_one_and_all", "use_of_ranks"]

comm = MPI.COMM_WORLD

# Steps whose losses have to be close. Ranks add gradients in another order, and rounding differences grow: with the
# demo's defaults from 1e-6 of the loss in the first epoch to a quarter of a loss of 3e-6 in the last.
COMPARED = 10


@dataclass
class OneProcessTraining(Training):
    """The training run of rank 0 alone."""

    def turn(self, batches: Sequence[Batch], on_step: Callable[[Training], None]) -> None:
        """Train on rank 0, while the other ranks sleep until its end."""
        if comm.rank == 0:
            super().turn(batches, on_step)
        request = comm.Ibarrier()
        while not request.Test():  # a blocking barrier would spin and take a core from rank 0
            time.sleep(0.001)


@dataclass
class RankTraining(Training):
    """One rank's part of a training run on all ranks: its rows of each batch."""

    def compute(self, x: Array, y: Labels) -> tuple[np.floating[Any], Sequence[Array | None]]:
        """Return this rank's shares of the loss and gradients of a batch: their sums over ranks are the batch's own."""
        rows = slice(len(y) * comm.rank // comm.size, len(y) * (comm.rank + 1) // comm.size)
        share = (rows.stop - rows.start) / len(y)
        if not share:  # ranks outnumber rows
            return np.float64(0), [None] * len(self.optimizer.params)
        loss, gradients = loss_and_gradients(self.optimizer.params, x[rows], y[rows], self.out)
        for array in gradients:  # means over this rank's rows
            array *= share
        return np.float64(share * float(loss)), gradients

    def step(self, x: Array, y: Labels) -> None:
        """Train on this rank's rows of a batch, and record the loss of the whole batch."""
        comm.Barrier()  # the measured time begins with all ranks ready
        super().step(x, y)
        self.losses[-1] = np.float64(comm.allreduce(float(self.losses[-1])))

    def turn(self, batches: Sequence[Batch], on_step: Callable[[Training], None]) -> None:
        """Train on all ranks, with the cores divided among them."""
        from threadpoolctl import threadpool_limits

        assert isinstance(self.optimizer, ShardedRMSProp)
        # By default the matrix products of each rank use all cores.
        with threadpool_limits(self.optimizer.num_threads, user_api="blas"):
            super().turn(batches, on_step)


def train_one_and_all(
    start: Sequence[Array],
    batches: Batches,
    *,
    lr: float,
    kernel: HostKernel,
    into_buffer: bool,
    on_step: Callable[[Training], None] = lambda training: None,
) -> tuple[Training, Training]:
    """Train on rank 0 alone and on all ranks, and return both training runs; the first has steps on rank 0 only.

    The arguments, which are the same on all ranks, are those of `fastrms.demo.training.train_both`.
    """

    def new_pair() -> tuple[Training, Training]:
        one = RMSProp(list(start), lr=lr, kernel=kernel)
        # "sum" because the ranks' rows of a batch differ in number.
        all_ = ShardedRMSProp(list(start), lr=lr, kernel=kernel, reduction="sum")
        return (
            OneProcessTraining(one, one.grads if into_buffer else None),
            RankTraining(all_, all_.grads if into_buffer else None),
        )

    return train_in_turns(new_pair, batches, on_step, comm.bcast)


def compare(one: Training, all_: Training) -> tuple[bool, str]:
    """Return whether the losses of two training runs differ by rounding alone, and a text about the outcome."""
    a, b = np.array(one.losses, np.float64), np.array(all_.losses, np.float64)
    if not np.isfinite(a).all() and not np.isfinite(b).all():
        return True, "both training runs diverged"
    compared = min(COMPARED, len(a))
    first = float(np.max(np.abs(a - b)[:compared] / np.abs(a[:compared])))
    text = (
        f"The losses of {comm.size} ranks and of one process differ by at most {first:.1e} of the loss in the first "
        f"{compared} steps, and by at most {np.max(np.abs(a - b)):.1e} in all {len(a)} steps"
    )
    limit = float(np.sqrt(np.finfo(one.optimizer.params[0].dtype).eps))
    same = first <= limit
    return (
        same,
        f"{text} (rounding errors, which grow in training)"
        if same
        else f"{text}; expected at most {limit:.1e} of the loss in the first {compared} steps",
    )


def use_of_ranks(optimizer: RMSProp) -> str:
    """Return sentences about what ranks are good for, and about the bytes that each rank sends in a step."""
    whole = optimizer.buffers["params"].nbytes
    own = sum(buffer.nbytes for name, buffer in optimizer.buffers.items() if name not in ("params", "grads"))
    sent = 2 * (comm.size - 1) / comm.size * whole
    return (
        f"Ranks divide the optimizer's state (here {format_bytes(own)} of {format_bytes(whole)} on rank 0) and can run "
        f"on several machines. On one machine they share its cores and memory, so more ranks are often no faster. Each "
        f"rank sends {format_bytes(sent)} a step; the optimizer's part includes messages and waits for other ranks. "
        "docs/mpi.md says when more ranks are faster."
    )


def format_bytes(number: float) -> str:
    """Return a number of bytes with its unit and three digits, such as "4.53 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
