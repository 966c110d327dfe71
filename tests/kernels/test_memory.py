"""No compiled function touches memory that is not its own: each array lies between pages that nobody may read or write.

If one did, the process would die (SIGSEGV), and the run of the tests with it.
"""

import ctypes
import mmap

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, wide

from fastrms import RMSProp
from fastrms.backends.plan import IN_PLACE, Located
from fastrms.backends.tuner import VARIANTS
from fastrms.kernels import UPDATES, cpu, norms, pointers, threads

pytestmark = pytest.mark.skipif(not JIT, reason="only compiled code can leave its arrays")

if JIT:
    threads.start_threads()  # the tests call the parallel kernels themselves

PAGE = mmap.PAGESIZE
SIZES = [1, 7, 16, 33, 1000, norms.CHUNK + 1, 50_021]
FORMS = {
    "default": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "centered": {"centered": True, "weight_decay": 0.1},
    "both": {"momentum": 0.9, "centered": True, "clip_value": 3.0},
    "bfloat16": {"momentum": 0.9, "centered": True, "cache_dtype": "bfloat16"},
}


class Guarded:
    """Arrays with a page before and a page behind that may not be touched, which they reach up to at one end."""

    def __init__(self, at_the_end):
        self._at_the_end = at_the_end
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._maps = []

    def copy(self, array):
        """A copy of an array in such a place; None for None."""
        if array is None:
            return None
        inside = -(-max(1, array.nbytes) // PAGE) * PAGE
        memory = mmap.mmap(-1, inside + 2 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (address, address + PAGE + inside):
            self._protect(page, 0)
        self._maps.append((memory, (address, address + PAGE + inside)))
        whole = np.frombuffer(memory, np.uint8)[PAGE : PAGE + inside]
        part = whole[inside - array.nbytes :] if self._at_the_end else whole[: array.nbytes]
        part = part.view(array.dtype).reshape(array.shape)
        part[...] = array
        return part

    def release(self):
        for _, pages in self._maps:
            for page in pages:
                self._protect(page, mmap.PROT_READ | mmap.PROT_WRITE)

    def _protect(self, page, how):
        assert self._libc.mprotect(page, PAGE, how) == 0


@pytest.fixture(params=[False, True], ids=["begin", "end"])
def guarded(request):
    places = Guarded(request.param)
    yield places
    places.release()


def arguments_of(opt, present=None, scales=None):
    """What a kernel gets for the only run of an optimizer, with gradients in the buffer."""
    opt.backend.use_options()
    (run,) = opt.backend._runs
    run.use_options(scales is not None)
    run.point_to_buffer()
    return run.arguments(0.01, Located(False, present), scales, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_updates(size, form, dtype, guarded, rng):
    if form == "bfloat16" and dtype is np.float64:
        dtype = np.float32
    start, gradient = wide(rng, size, dtype, -3, 3), wide(rng, size, dtype, -3, 3)
    cut = size // 3
    opt = RMSProp([start[:cut], start[cut:]], **FORMS[form])
    opt.buffers["grads"].flat[:] = gradient
    for several in (False, True):  # one span, or one for each parameter
        scales = np.array([0.5, 2.0]) if several else None
        plain = arguments_of(opt, scales=scales)
        expected = [None if part is None else part.copy() for part in plain[:5]]
        UPDATES["numpy"](*expected, *plain[5:])
        for kernel, lines_ahead in VARIANTS.values():
            found = [guarded.copy(part) for part in plain[:8]]
            UPDATES[kernel](*found, plain[8], lines_ahead)
            for ours, theirs in zip(found[:5], expected, strict=True):
                assert ours is theirs is None or assert_same_bits(ours, theirs, kernel) is None


@pytest.mark.parametrize("size", SIZES)
def test_finding_gradients_in_a_tuple(size, guarded, rng):
    start = [wide(rng, part, np.float32, -3, 3) for part in (size // 3, size - size // 3)]
    gradients = tuple(guarded.copy(wide(rng, part.size, np.float32, -3, 3)) for part in start)
    opt, other = RMSProp(start, lr=0.01), RMSProp(start, lr=0.01, kernel="numpy")
    other.step(gradients)
    opt.backend.use_options()
    (run,) = opt.backend._runs
    *_, spans, factors, extended, lines_ahead = run.arguments(0.01, IN_PLACE, None, None)
    parts = {name: guarded.copy(run.part_of(opt.buffers[name])) for name in ("params", "grads", "cache")}
    arrays = {
        "params_at": parts["params"], "grads_at": parts["grads"], "factors_at": factors, "shapes_at": run._shapes,
        "sources_at": run._spans, "expected_at": run._expected, "written_at": run._written,
    }  # fmt: skip
    arrays = {name: guarded.copy(array) for name, array in arrays.items()}
    arrays |= {"params_at": parts["params"], "grads_at": parts["grads"]}
    arrays["spans_at"] = arrays["sources_at"]  # the spans of the update are those that are found
    table = run._table.copy()
    for name, array in arrays.items():
        table[name] = array.ctypes.data
    table["span_count"] = len(spans)
    arguments = (guarded.copy(table), guarded.copy(run._hyper), parts["cache"], None, None, extended, lines_ahead)
    assert cpu.serial_from(*arguments, pointers.items_of(gradients)) == cpu.FOUND
    assert_same_bits(parts["params"], other.buffers["params"].flat)
    assert_same_bits(parts["cache"], other.buffers["cache"].flat)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_norms(size, dtype, guarded, rng):
    gradient = wide(rng, size, dtype, -3, 3)
    spans = np.array([(0, size // 3, 0, 0), (size // 3, size, 0, 0)], np.int64)
    expected = norms.SpanNorms(spans)(gradient, np.inf, "numpy")
    for kernel in ("serial", "parallel"):
        own = norms.SpanNorms(guarded.copy(spans))
        own.first_chunk = guarded.copy(own.first_chunk)
        own._partials = guarded.copy(own._partials)
        assert_same_bits(own(guarded.copy(gradient), np.inf, kernel), expected)


def test_threads_are_there():
    """Otherwise the parallel kernels would have run as serial ones."""
    assert threads.threads_work()
    assert threads.max_threads() > 1
