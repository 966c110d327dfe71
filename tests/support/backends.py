"""Every backend as the conformance tests see it: how an optimizer is made, and what is refused there and why."""

import operator
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
from cases import OPTIONS, drawn, of_gradients
from helpers import JIT

import fastrms.backends.pages
from fastrms import OptionError, RMSProp, StorageError

# The backend that this process was started for, or "".
STARTED_FOR = os.environ.get("FASTRMS_TEST_BACKEND", "")


NOT_ONE_BY_ONE = (OptionError, "step_(parameter|rows): expected an optimizer of one process, got one on several ranks")


def mpiexec(ranks):
    """Return the command that runs a program on so many ranks, or None where there is no mpiexec."""
    program = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return program and [program, "-n", str(ranks)]


class Backend:
    """Memory of this process, and one kernel."""

    kind = RMSProp
    refuses: ClassVar = {}  # what it cannot do: the class and the message of the error
    large = 9001  # elements of an array that is worked on in several parts
    environment: ClassVar = None  # of processes that it needs for itself
    processes = 1
    arguments = ()  # of pytest in them

    def __init__(self, **options):
        self.options = options

    def start(self, folder, monkeypatch):
        """Begin a test, which may write to a folder."""
        self.folder = folder

    def given(self, params):
        """Return parameters in the form in which an optimizer of this backend gets them."""
        return params

    def make(self, params, **options):
        return self.kind(self.given(params), **self.options, **options)

    def from_checkpoint(self, path, **options):
        return self.kind.from_checkpoint(path, **self.options, **options)

    def pair(self, params, **options):
        """Return an optimizer of this backend, and the oracle, whose bits it is to have."""
        return self.make(params, **options), RMSProp(params, kernel="numpy", **options)

    def gradients(self, layout, rng, options=(), low=-3):
        """Draw gradients for parameters in a layout."""
        return drawn(of_gradients(layout), rng, low, large=self.large, whole=self.whole(options))

    def whole(self, options):
        """Return whether gradients have to be whole numbers for a backend with options to have the oracle's bits."""
        return False

    def fill(self, view, gradient):
        """Write a gradient to its view of the gradient buffer."""
        view[...] = gradient


class InPlace(Backend):
    """Parameters in arrays of the program, which are updated where they lie."""

    def given(self, params):
        return copied(params)

    def make(self, params, **options):
        return super().make(params, in_place=True, **options)


def copied(params, copy=np.array):
    """Return parameters, which may have groups, with a copy of each array."""
    if isinstance(params, dict):
        return {name: item if name in OPTIONS or name == "lr" else copied(item, copy) for name, item in params.items()}
    return type(params)(copied(item, copy) for item in params) if isinstance(params, list | tuple) else copy(params)


class Mapped(Backend):
    """Files that are mapped to memory, each optimizer in a folder of its own; steps go through them page by page."""

    refuses: ClassVar = {"copies": (StorageError, "cannot be copied or pickled; use save")}

    def start(self, folder, monkeypatch):
        super().start(folder, monkeypatch)
        monkeypatch.setattr(fastrms.backends.pages, "PART_BYTES", 4096)
        self.runs = (folder / f"run-{number}" for number in range(1000))

    def make(self, params, **options):
        return super().make(params, storage=next(self.runs), **options)

    def from_checkpoint(self, path, **options):
        return super().from_checkpoint(path, storage=next(self.runs), **options)


class Cuda(Backend):
    """A GPU, for which Numba's simulator stands. It has to be chosen before Numba is imported."""

    refuses: ClassVar = {
        "bfloat16": (OptionError, "cache_dtype: expected None"),
    }
    large = 2 * 64 + 3  # the simulator has smaller chunks, and is slow
    environment: ClassVar = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "0", "NUMBA_NUM_THREADS": "2"}
    arguments = ("-W", "ignore::RuntimeWarning")  # of NumPy's scalars, which kernels compute with there

    def start(self, folder, monkeypatch):
        super().start(folder, monkeypatch)
        import simulator  # noqa: F401 - it is made fast enough

    def fill(self, view, gradient):
        if gradient.size:
            view.copy_to_device(gradient)


class OnGpu:
    """An array of the program on a GPU, for which ordinary memory stands. Its place is asked for, not remembered."""

    def __init__(self, values):
        self.array = np.array(values)
        self.stream, self.read_only = None, False

    @property
    def __cuda_array_interface__(self):
        found = self.array.__array_interface__
        data = found["data"][0], self.read_only or found["data"][1]
        kept = {name: found[name] for name in ("shape", "typestr", "strides")}
        return {**kept, "data": data, "version": 3, "stream": self.stream}

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)

    shape, dtype = (property(operator.attrgetter(f"array.{name}")) for name in ("shape", "dtype"))


class CudaInPlace(Cuda, InPlace):
    """Parameters in arrays of the program on a GPU."""

    def given(self, params):
        return copied(params, OnGpu)


class Ranks(Backend):
    """Two ranks that have the same gradients, whose mean is exactly the gradient of one process."""

    refuses: ClassVar = {
        "copies": (TypeError, "cannot be copied or pickled"),
        "one by one": NOT_ONE_BY_ONE,
    }
    environment: ClassVar = {"FASTRMS_MPI_TIMEOUT": "20"}  # so long a rank waits for one whose test has failed
    processes = 2

    @property
    def kind(self):
        from fastrms.mpi import ShardedRMSProp

        return ShardedRMSProp

    def whole(self, options):
        """Each rank sums the squares of its shard. The sum over ranks has other roundings, unless it is exact."""
        return any("norm" in name for name in options)

    def start(self, folder, monkeypatch):
        from mpi4py import MPI

        super().start(MPI.COMM_WORLD.bcast(folder), monkeypatch)
        monkeypatch.setattr(sys, "ps1", "", raising=False)  # an error ends this test only, as in an interactive session


class RanksInPlace(Ranks, InPlace):
    """Two ranks, each with parameters in arrays of the program."""


COMPILED = ["serial", "parallel"] if JIT else []  # the interpreter would take minutes for them
BACKENDS = {
    **{kernel: Backend(kernel=kernel) for kernel in ["numpy", *COMPILED]},
    **{f"in-place-{kernel}": InPlace(kernel=kernel) for kernel in ["numpy", *COMPILED]},
    **{f"mapped-{kernel}": Mapped(kernel=kernel) for kernel in ["numpy", *COMPILED]},
    "cuda": Cuda(kernel="cuda"),
    "in-place-cuda": CudaInPlace(kernel="cuda"),
    "ranks": Ranks(kernel="serial" if JIT else "numpy"),
    "in-place-ranks": RanksInPlace(kernel="serial" if JIT else "numpy"),
}
