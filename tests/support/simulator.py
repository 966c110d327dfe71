"""What tests in Numba's CUDA simulator share; importing it makes the simulator fast enough for them.

The simulator, which runs kernels in the interpreter, has to be chosen before Numba is imported, so pytest does not
collect `backends/cuda_simulator` by itself: `backends/test_cuda.py` starts it. Device memory is ordinary memory here,
and streams are one; what the simulator has no notion of is tested on a GPU, by `test_gpu.py`.
"""

import sys
import threading

import numpy as np
from helpers import wide
from numba.cuda.simulator import kernelapi

from fastrms import RMSProp
from fastrms.kernels import cuda as kernels
from fastrms.kernels import norms

cuda = kernels.cuda
assert kernels.SIMULATED

# The simulator starts a thread of Python for each; results may not depend on how many there are. Sums of squares do
# depend on chunks and lanes, here as on the host: fewer for both, but in one test.
AS_RELEASED = {"CHUNK": kernels.CHUNK, "LANES": kernels.LANES}
kernels.THREADS = 4
for module in (kernels, norms):
    module.CHUNK, module.LANES = 64, 4
norms._serial = norms._parallel = None  # or they would be compiled with these, and kept on disk for others
# They wait for one another, and so for the interpreter's lock: five times faster than with 5 ms.
sys.setswitchinterval(1e-4)


class _Allocations(dict):
    """The shared arrays of a block, by where they are asked for, which one thread at a time may do.

    The simulator looks whether an array is there, and then makes one: two threads that look at the same time would
    each have their own, and the sums of the block be wrong (in one of some ten runs on a busy machine).
    """

    def __init__(self):
        self._lock = threading.Lock()

    def get(self, key):
        self._lock.acquire()
        found = super().get(key)
        if found is not None:
            self._lock.release()
        return found

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self._lock.release()


_make_shared = kernelapi.FakeCUDAShared.__init__


def _make_shared_in_turns(self, *arguments):
    _make_shared(self, *arguments)
    self._allocations = _Allocations()


kernelapi.FakeCUDAShared.__init__ = _make_shared_in_turns

DTYPES = [np.float32, np.float64]
SHAPES = [(4, 3), (), (0,), (7,)]
MIXED = [np.float32, np.float64, np.float64, np.float32]


class Theirs:
    """An array of another library on the device."""

    def __init__(self, array, stream=None, **other):
        self.array = array  # which has to live
        found = array.__array_interface__
        self.__cuda_array_interface__ = {
            "shape": found["shape"],
            "typestr": found["typestr"],
            "data": found["data"],
            "strides": found["strides"],
            "version": 3,
            "stream": stream,
        } | other


# How a gradient on the device may be given, but for its values.
KINDS = {
    "device": lambda g: Theirs(g.copy()),
    "numba": lambda g: cuda.to_device(g) if g.ndim else Theirs(g),
    "strides given": lambda g: Theirs(g.copy(), strides=tuple(g.strides)),
    "Fortran order": lambda g: Theirs(g.copy(order="F")),
    "every second": lambda g: Theirs(np.repeat(g, 2, axis=-1)[..., ::2] if g.ndim else g),
    "backwards": lambda g: Theirs(np.ascontiguousarray(g[::-1])[::-1] if g.ndim else g),
    "float64": lambda g: Theirs(g.astype(np.float64)),
    "the default stream": lambda g: Theirs(g.copy(), stream=1),
    "no stream, an older version": lambda g: Theirs(g.copy(), version=2),
}


def arrays(rng, shapes=SHAPES, dtypes=MIXED, low=-3, high=1):
    return [np.asarray(wide(rng, s, np.float64, low, high)).astype(d) for s, d in zip(shapes, dtypes, strict=True)]


def pair(params, **options):
    """The oracle, and what is to have its bits."""
    return RMSProp(params, kernel="numpy", **options), RMSProp(params, kernel="cuda", **options)


def numbers(optimizer):
    """All arrays that a checkpoint has, by name."""
    return optimizer.state_dict()["arrays"]


def on_host(tree):
    return [np.asarray(leaf.copy_to_host()) for leaf in tree]
