"""``fastrms demo --mpi``: the demo's training on all ranks of an MPI program, beside one process."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.cli.common import CommandError
from fastrms.demo.mlp import loss_and_gradients
from fastrms.demo.training import Training
from fastrms.errors import FastrmsError
from fastrms.mpi import MPI, ShardedRMSProp
from fastrms.mpi.ending import end_all
from fastrms.optimizer import RMSProp

__all__ = ["RankTraining", "apart", "comm", "ending_together", "train_one_and_all", "what_ranks_cost"]

Array = NDArray[Any]

comm = MPI.COMM_WORLD

# Steps whose losses are compared. Sums of ranks are rounded in another order, and what that changes grows from step to
# step: with the demo's defaults from 1e-6 of the loss in the first epoch to a quarter of 3e-6 in the last.
COMPARED = 10


@dataclass
class RankTraining(Training):
    """The part of a rank in a training: its rows of each batch."""

    def step(self, x: Array, y: NDArray[np.intp]) -> None:
        """Train on this rank's rows of one batch; the loss that is kept is that of all rows."""
        optimizer = self.optimizer
        mine = slice(len(y) * comm.rank // comm.size, len(y) * (comm.rank + 1) // comm.size)
        share = (mine.stop - mine.start) / len(y)
        comm.Barrier()  # so that nobody's time has waiting for the start in it
        start = perf_counter()
        loss, gradients = 0.0, [None] * len(optimizer.params)  # of fewer rows than ranks
        if share:
            mean, gradients = loss_and_gradients(optimizer.params, x[mine], y[mine], self.out)  # type: ignore[assignment]
            # Of a mean over its rows, as much as it has of all rows: the sum is that of the whole batch.
            for array in gradients:
                array *= array.dtype.type(share)  # type: ignore[attr-defined]
            loss = share * float(mean)
        computed = perf_counter()
        # What lies in `out` is in the optimizer's own buffer already.
        optimizer.step(gradients) if self.out is None or not share else optimizer.step()  # type: ignore[arg-type, call-arg]
        end = perf_counter()
        self.losses.append(np.float64(comm.allreduce(loss)))
        self.step_seconds.append(end - start)
        self.optimizer_seconds.append(end - computed)


def train_one_and_all(
    start: Sequence[Array],
    x: Array,
    y: NDArray[np.intp],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    kernel: str,
    into_buffer: bool,
    rng: np.random.Generator,
    on_step: Callable[[Training], None] = lambda training: None,
) -> tuple[Training, Training]:
    """Train from the same start, on the same batches, on rank 0 alone and on all ranks; they take turns by epochs.

    Parameters
    ----------
    start, x, y, epochs, batch_size, lr, kernel, into_buffer, rng, on_step
        As for `fastrms.demo.training.train_both`; the same on all ranks.

    Returns
    -------
    one, all_ : Training
        The first has taken steps on rank 0 only.
    """
    from threadpoolctl import threadpool_limits

    def new_pair() -> tuple[Training, Training]:
        alone = RMSProp(list(start), lr=lr, kernel=kernel)
        # The last batch may have fewer rows on some ranks than on others.
        sharded = ShardedRMSProp(list(start), lr=lr, kernel=kernel, reduction="sum")
        return tuple(kind(opt, opt.grads if into_buffer else None)
                     for kind, opt in ((Training, alone), (RankTraining, sharded)))  # type: ignore[return-value]  # fmt: skip

    with np.errstate(all="ignore"):
        for training in new_pair():  # compiles
            if isinstance(training, RankTraining) or comm.rank == 0:
                training.step(x[:batch_size], y[:batch_size])
        pair = new_pair()
        threads = pair[1].optimizer.num_threads  # type: ignore[union-attr]
        for _ in range(epochs):
            order = rng.permutation(len(y))
            batches = [order[first : first + batch_size] for first in range(0, len(y), batch_size)]
            if comm.rank == 0:
                for rows in batches:
                    pair[0].step(x[rows], y[rows])
                    on_step(pair[0])
            _wait_for_first()
            # Matrix products take all cores that a process may use, which here have to do for all ranks.
            with threadpool_limits(threads, user_api="blas"):
                for rows in batches:
                    pair[1].step(x[rows], y[rows])
                    on_step(pair[1])
            finite = all(np.isfinite(training.losses[-len(batches) :]).all() for training in pair)
            if not comm.bcast(finite):
                break
    return pair


def _wait_for_first() -> None:
    """Wait for rank 0 without taking the time of a core, as MPI does when it waits."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


def what_ranks_cost(training: Training) -> str:
    """A sentence for those who expect more ranks to be faster."""
    optimizer = training.optimizer
    assert isinstance(optimizer, ShardedRMSProp)
    sent = 2 * (comm.size - 1) / comm.size * optimizer.buffers["params"].nbytes
    return (
        f"Each rank sends {sent / 1e6:.1f} MB a step, and ranks of one machine share its cores: docs/mpi.md has when "
        "that pays"
    )


def apart(one: Training, all_: Training, dtype: Any) -> tuple[str, str | None]:
    """How far apart the losses of two trainings are: a sentence, and what is wrong if that is more than rounding."""
    a, b = np.array(one.losses, np.float64), np.array(all_.losses, np.float64)
    compared = min(COMPARED, len(a))
    first = float(np.max(np.abs(a - b)[:compared] / np.abs(a[:compared])))
    text = (
        f"Losses of {comm.size} ranks and of one process: the first {compared} at most {first:.1e} of the loss apart, "
        f"all {len(a)} at most {np.max(np.abs(a - b)):.1e} (rounding, which training makes grow)"
    )
    limit = float(np.sqrt(np.finfo(dtype).eps))
    return text, None if first <= limit else f"{text}; expected at most {limit:.1e} of the first {compared}"


@contextmanager
def ending_together() -> Iterator[None]:
    """An error of a command that ends this rank ends all, with one message."""
    try:
        yield
    except (CommandError, FastrmsError, MemoryError) as error:
        if comm.size == 1:
            raise
        time.sleep(comm.rank > 0)  # where all find the same, rank 0 says so
        sys.stderr.write(f"fastrms demo: error: {error}\n")
        end_all()
