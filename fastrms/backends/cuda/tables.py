"""The data on the device that a step uses beside the buffers: runs, and tables with a row for each parameter."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastrms.backends.cuda.arrays import DeviceArray, Stream, cuda
from fastrms.backends.cuda.buffer import Staged
from fastrms.backends.cuda.held import HeldDeviceArrays
from fastrms.backends.plan import Run
from fastrms.buffers import FlatBuffer, Layout
from fastrms.kernels import cuda as kernels
from fastrms.kernels.hyper import hyper_values
from fastrms.options import ParamGroup

__all__ = ["NO_BOUND", "DeviceRun", "Tables"]

NO_BOUND = math.inf


class DeviceRun(Run):
    """A run on the device. One launch updates it."""

    def __init__(self, group_number: int, group: ParamGroup, layout: Layout, numbers: NDArray[np.int64]) -> None:
        super().__init__(group_number, group, layout, numbers)
        sizes = self.bounds[:, 1] - self.bounds[:, 0]
        first_chunk = np.concatenate([[0], np.cumsum(-(-sizes // kernels.CHUNK))])
        self.chunks = int(first_chunk[-1])
        whole_chunks = -(-self.size // kernels.CHUNK)
        # Bounds and first chunks of each parameter; and the run as one span, with its gradient in the buffer.
        self.each = tuple(map(cuda.to_device, (self.bounds, first_chunk)))
        whole = np.array([[0, self.size]]), np.array([0, whole_chunks]), np.array([kernels.IN_BUFFER])
        self.whole = (whole_chunks, *map(cuda.to_device, whole))
        self.slots = slice(0, 0)  # its rows in the tables
        self.tables: tuple[DeviceArray, ...] = ()  # its rows of `sources`, `sums`, `norms`, `finite` and `factors`
        self.hyper: tuple[DeviceArray, ...] = ()
        self.arrays: tuple[DeviceArray, ...] = ()
        self.held = False  # whether `arrays` begins with addresses of parameters, instead of their elements

    def use_buffers(self, buffers: Mapping[str, FlatBuffer]) -> None:
        """Update the parts of these buffers from now on, with the state that the options of the run need."""
        held = buffers["params"]
        if isinstance(held, HeldDeviceArrays):
            buffers = {**buffers, "params": buffers["grads"]}
        params, grads, *state = self.parts_of(buffers)
        if isinstance(held, HeldDeviceArrays):
            self.held = len(self.numbers) > 1  # one parameter is a vector by itself
            params = held.table(self.numbers) if self.held else held.part(int(self.numbers[0]))
        # A kernel that lacks a kind of state still needs an array as argument.
        self.arrays = (params, grads, *(grads if array is None else array for array in state))

    def part_of(self, buffer: FlatBuffer) -> DeviceArray:
        """Return the elements of this run in `buffer`, 1-D. An empty run gets any array: it cannot be cut out."""
        return super().part_of(buffer) if self.size else buffer.segments[self._segment]

    def set_hyper(self, lr: float) -> None:
        """Compute the numbers that the kernel takes for options and learning rate."""
        with np.errstate(all="ignore"):
            self.hyper = tuple(np.array(hyper_values(self.group, lr, self.dtype), self.dtype))


class Tables:
    """Arrays on the device with a row for each parameter, in the order of the runs. Each run gets its rows."""

    def __init__(self, runs: Sequence[DeviceRun], stream: Stream) -> None:
        self.runs = runs
        self.order = np.concatenate([run.numbers for run in runs])
        count = 0
        for run in runs:
            run.slots = slice(count, count + len(run.numbers))
            count = run.slots.stop
        self.sources = Staged(np.zeros(count, np.int64), stream)
        self.sums, self.norms, self.partials = (
            cuda.to_device(np.zeros(size))
            for size in (count, count, max(1, *(run.chunks for run in runs)))
        )  # fmt: skip
        self.finite, self.absent = (cuda.to_device(np.zeros(count, np.int64)) for _ in range(2))
        self.missed, self.go = (cuda.to_device(np.zeros(1, np.int64)) for _ in range(2))
        self.factors = cuda.to_device(np.zeros((count, 2)))
        self.limits, self.signs = (Staged(np.zeros(count), stream) for _ in range(2))
        self.rows = Staged(np.full(count, -1), stream)
        for run in runs:  # now, since slicing takes Numba longer than a launch
            run.tables = tuple(
                array[run.slots]
                for array in (self.sources.array, self.sums, self.norms, self.finite, self.factors)
            )  # fmt: skip
        # Factors of bias correction: a row for each decay rate, a column for each number of steps.
        self.decay_rates: list[float] = []
        self.corrections = np.ones((1, 1))
        self.corrections_there = cuda.to_device(self.corrections)

    def set_options(self, runs: Sequence[DeviceRun], stream: Stream) -> None:
        """Write the numbers that depend on options, for each parameter."""
        limits, signs, rows = np.zeros(len(self.order)), np.zeros(len(self.order)), np.full(len(self.order), -1)
        rates = sorted({run.group["decay_rate"] for run in runs if run.group["bias_correction"]})
        for run in runs:
            options = run.group
            limits[run.slots] = NO_BOUND if options["clip_norm"] is None else options["clip_norm"]
            signs[run.slots] = -1.0 if options["maximize"] else 1.0
            if options["bias_correction"]:
                rows[run.slots] = rates.index(options["decay_rate"])
        self.limits.write(limits, stream)
        self.signs.write(signs, stream)
        self.rows.write(rows, stream)
        if rates != self.decay_rates:
            self.decay_rates = rates
            self.corrections = np.zeros((max(1, len(rates)), 0))

    def correct_up_to(self, steps: int, stream: Stream) -> None:
        """Extend the factors of bias correction to this number of steps, unless the last factors are all 1."""
        known = self.corrections.shape[1]
        if known >= steps or (known and bool((self.corrections[:, -1] == 1).all())):
            return
        number = np.arange(1, max(1024, 2 * steps) + 1)
        with np.errstate(all="ignore"):  # a power may underflow
            self.corrections = np.array([1.0 / (1.0 - rate**number) for rate in self.decay_rates])
        self.corrections_there = cuda.to_device(self.corrections, stream=stream)
