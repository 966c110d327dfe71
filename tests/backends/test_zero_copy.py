"""Gradients read where they lie: taken when all is ordinary, the same bits or the same error when it is not."""

import ctypes
import mmap
import os
import platform
import resource
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import JIT, Exchanged, count_calls, everything
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrms import NonfiniteError, RMSProp, rmsprop_update
from fastrms.buffers import FlatBuffer
from fastrms.kernels import pointers

needs_jit = pytest.mark.skipif(not JIT, reason="only compiled code reads gradients where they lie")

SHAPES = [(3, 4), (5,), (), (0, 2), (70,)]


def copying(opt):
    """The same optimizer, made to copy gradients."""
    opt._zero_copy = False
    return opt


@needs_jit
def test_it_is_available_where_ci_runs():
    assert pointers.available() == (platform.python_implementation() == "CPython" and sys.maxsize > 2**32)


@needs_jit
@pytest.mark.parametrize("kernel", ["serial", "parallel"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}, {"clip_norm": 0.5, "global_clip_norm": 0.7},
     {"bias_correction": True}, {"lr": lambda step: 0.1 / (1 + step)}],
    ids=["default", "momentum", "norms", "bias", "schedule"],
)  # fmt: skip
@pytest.mark.parametrize("absent", [[], [0, 2]], ids=str)
@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "one", "nested", "mixed", "groups"])
def test_ordinary_gradients_need_no_python_work(kind, absent, options, kernel, rng, monkeypatch):
    def tree(values):
        a, b, c = values
        nested = {"x": [a, {"y": b}], "z": (c,)}
        groups = [{"params": [a, c]}, {"params": b, "lr": 0.3}]
        forms = {"list": [a, b, c], "tuple": (a, b, c), "dict": {"a": a, "b": b, "c": c}, "one": a, "nested": nested}
        mixed = [a, None if b is None else b.astype(np.float32), c]
        return (forms | {"mixed": mixed, "groups": groups})[kind]

    def values():
        return [rng.standard_normal(shape) for shape in ((3, 4), (5,), (2, 1, 300))]

    params = tree(values())
    opt = RMSProp(params, kernel=kernel, **options)
    other = copying(RMSProp(params, kernel=kernel, **options))
    absent = absent if kind != "one" else []  # None is no argument then
    steps = [tree([None if t % 2 and k in absent else v for k, v in enumerate(values())]) for t in range(5)]
    if kind == "groups":
        steps = [[first["params"], second["params"]] for first, second in steps]
    for gradients in steps:
        other.step(gradients)
    monkeypatch.setattr(FlatBuffer, "store", lambda *_: pytest.fail("gradients took the general path"))
    for gradients in steps:
        opt.step(gradients)
    assert everything(opt) == everything(other)


@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
def test_steps_with_and_without_arguments_take_turns(kernel, rng):
    params = [rng.standard_normal((3, 4)), rng.standard_normal(5)]
    opt, other = RMSProp(params, kernel=kernel), copying(RMSProp(params, kernel=kernel))
    for t in range(12):
        gradients = [rng.standard_normal((3, 4)), rng.standard_normal(5)]
        if t % 3 == 0:
            for o in (opt, other):
                o.grads[0][...], o.grads[1][...] = gradients
                o.step()
        elif t % 3 == 1:
            opt.step(gradients)
            other.step(gradients)
        else:
            opt.step([gradients[0], None])
            other.step([gradients[0], None])
        assert everything(opt) == everything(other)


class Shown:
    """An object of another library whose array is `array`."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def tensor(array):
    """A tensor of PyTorch in the memory of an array."""
    import torch

    return torch.from_numpy(array)


OF_OTHERS = [Shown, Exchanged, pytest.param(tensor, marks=pytest.mark.torch)]


@needs_jit
@pytest.mark.parametrize("kind", OF_OTHERS)
@pytest.mark.parametrize("size", [3, 1000], ids=["gathered", "read in place"])
@pytest.mark.parametrize("options", [{}, {"nonfinite": "raise"}, {"clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("way", ["memory", "files"])
def test_gradients_of_other_libraries_are_read_where_they_lie(way, options, size, kind, rng, monkeypatch, tmp_path):
    start = [rng.standard_normal(size) for _ in range(4)]
    folder = {"storage": tmp_path / "run"} if way == "files" else {}
    opt, other = RMSProp(start, **options, **folder), RMSProp(start, **options)
    for absent in (None, 1):
        gradients = [rng.standard_normal(size) for _ in range(4)]
        theirs = [array if k == 2 else kind(array) for k, array in enumerate(gradients)]
        if absent is not None:
            gradients[absent] = theirs[absent] = None
        other.step(gradients)
        with monkeypatch.context() as patch:
            patch.setattr(FlatBuffer, "store", lambda *_: pytest.fail("gradients were copied"))
            opt.step(theirs)
        assert everything(opt) == everything(other)
    if "nonfinite" in options:
        gradients[3][1] = np.nan
        with pytest.raises(NonfiniteError, match=r"got gradients\[3\]: 1 NaN and 0 inf among"):
            opt.step(theirs)
        assert everything(opt) == everything(other)
    if way == "files":
        opt.close()


@pytest.mark.parametrize("kernel", ["numpy", "serial"])
@pytest.mark.parametrize("kind", OF_OTHERS)
def test_gradients_of_other_libraries_may_alias_the_optimizer(kind, kernel, rng):
    start = [rng.standard_normal(900), rng.standard_normal(900)]
    opt, other = RMSProp(start, kernel=kernel), RMSProp(start, kernel=kernel)
    for _ in range(2):
        for buffer in ("params", "cache"):
            other.step([array.copy() for array in other.buffers[buffer].leaves[::-1]])
            opt.step([kind(array) for array in opt.buffers[buffer].leaves[::-1]])
            assert everything(opt) == everything(other)


@needs_jit
def test_an_array_that_sets_options_as_it_is_made_sets_them_for_this_step(rng):
    start, gradient = [rng.standard_normal(5)], rng.standard_normal(5)

    class Setting(Shown):
        def __array__(self, dtype=None, copy=None):
            opt.momentum = 0.9
            return self.array

    opt, other = RMSProp(start), RMSProp(start)
    other.momentum = 0.9
    for each, first in ((opt, Setting(gradient)), (other, gradient)):
        each.step([first])
        each.step([gradient])
    assert everything(opt) == everything(other)


@needs_jit
@pytest.mark.parametrize("size", [3, 1000], ids=["gathered", "read in place"])
def test_a_step_with_none_costs_no_call_for_each_array(size):
    calls = []
    for n in (100, 200):
        opt = RMSProp([np.ones(size) for _ in range(n)], kernel="serial")
        for absent in (0, n // 2, n - 1):
            gradients = [np.ones(size) for _ in range(n)]
            gradients[absent] = None
            opt.step(gradients)
            calls.append(count_calls(lambda: opt.step(gradients)))  # noqa: B023
    assert calls[3:] == calls[:3]


class Derived(np.ndarray):
    """A subclass, which may mean something else by its memory."""


def unusual(kind, array, rng):
    """`array` in a form that is not ordinary; most of them valid, some of them errors."""
    forms = {
        "ordinary": lambda: array,
        "read-only": lambda: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
        "fortran": lambda: np.asfortranarray(array),
        "strided": lambda: np.repeat(array[..., None], 2, -1)[..., 0],
        "swapped": lambda: array.astype(array.dtype.newbyteorder()),
        "misaligned": lambda: (
            np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
        ),
        "other float": lambda: array.astype(np.float32 if array.dtype == np.float64 else np.float64),
        "half": lambda: array.astype(np.float16),
        "int": lambda: array.astype(np.int32),
        "subclass": lambda: array.view(Derived),
        "scalar": lambda: array[()],
        "list": lambda: array.tolist(),
        "none": lambda: None,
        "complex": lambda: array.astype(complex),
        "object": lambda: array.astype(object),
        "text": lambda: "text",
        "shape": lambda: np.zeros((*array.shape, 1), array.dtype),
        "transposed": lambda: np.ascontiguousarray(array.T),
    }
    return forms[kind]()


KINDS = ["ordinary", "read-only", "fortran", "strided", "swapped", "misaligned", "other float", "half", "int",
         "subclass", "scalar", "list", "none", "complex", "object", "text", "shape", "transposed"]  # fmt: skip


@settings(max_examples=400 if JIT else 40, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.sampled_from(KINDS + ["ordinary"] * 30), min_size=len(SHAPES), max_size=len(SHAPES)),
    double=st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)),
    momentum=st.sampled_from([0.0, 0.9]),
    norm=st.sampled_from([None, 0.5]),
    kernel=st.sampled_from(["serial", "parallel"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fuzz_same_bits_or_same_error_and_nothing_else_is_touched(kinds, double, momentum, norm, kernel, seed):
    rng = np.random.default_rng(seed)
    dtypes = [np.float64 if d else np.float32 for d in double]
    params = [np.asarray(rng.standard_normal(s)).astype(d) for s, d in zip(SHAPES, dtypes, strict=True)]
    opt = RMSProp(params, momentum=momentum, clip_norm=norm, kernel=kernel)
    other = copying(RMSProp(params, momentum=momentum, clip_norm=norm, kernel=kernel))
    for _ in range(2):
        # Each gradient lies between canaries.
        spaces = [np.full(64 + p.size, 12345.0, p.dtype) for p in params]
        plain = [space[32 : 32 + p.size].reshape(p.shape) for space, p in zip(spaces, params, strict=True)]
        for array in plain:
            array[...] = rng.standard_normal(array.shape)
        spaces_before = [space.tobytes() for space in spaces]
        gradients = [unusual(kind, array, rng) for kind, array in zip(kinds, plain, strict=True)]
        before, outcomes = everything(opt), []
        for o in (opt, other):
            try:
                o.step(gradients)
                outcomes.append(None)
            except (ValueError, TypeError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]
        assert everything(opt) == everything(other)
        assert outcomes[0] is None or everything(opt) == before
        assert [space.tobytes() for space in spaces] == spaces_before


CASTS = {
    "too large": lambda a: 1e300 * a,
    "longdouble": lambda a: np.array(f"1e{np.finfo(np.longdouble).maxexp // 4}", np.longdouble) * a,
    "half": lambda a: a.astype(np.float16),
    "int64": lambda a: np.full(a.shape, np.iinfo(np.int64).max),
    "uint64": lambda a: np.full(a.shape, np.iinfo(np.uint64).max),
    "big-endian": lambda a: (1e300 * a).astype(">f8"),
    "bfloat16": lambda a: a.astype(ml_dtypes.bfloat16),
    "float8": lambda a: a.astype(ml_dtypes.float8_e5m2),
    "list": lambda a: (1e300 * a).tolist(),
    "list of integers": lambda a: np.full(a.shape, 2**62).tolist(),
}


@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
@pytest.mark.parametrize("way", ["memory", "files", "function"])
@pytest.mark.parametrize("kind", CASTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(
            {"all": "raise"},
            marks=pytest.mark.skipif(not JIT, reason="the interpreter's kernels follow NumPy's settings"),
        ),
    ],
    ids=["warn", "raise"],
)
def test_what_is_cast_to_inf_follows_nonfinite_and_not_numpys_settings(settings, kind, way, kernel, rng, tmp_path):
    gradient = CASTS[kind](rng.standard_normal((3, 5)))
    with np.errstate(all="ignore"):
        cast = np.asarray(gradient).astype(np.float32)
    finite = np.isfinite(cast).all()
    assert finite == (kind not in ("too large", "big-endian", "list", "longdouble"))
    start = [np.ones((3, 5), np.float32), np.ones(2, np.float32)]
    for nonfinite in ("propagate", "raise", "skip"):
        options = {"kernel": kernel, "nonfinite": nonfinite}
        opt, other = None, RMSProp(start, **options)
        if way == "memory":
            opt = RMSProp(start, **options)
        elif way == "files":
            opt = RMSProp(start, storage=tmp_path / nonfinite, **options)
        outcomes = []
        with np.errstate(**settings):
            for step, g in ((opt.step if opt else rmsprop_update, gradient), (other.step, cast)):
                try:
                    outcomes.append(step([g, start[1]]) if step != rmsprop_update else step(start, [g, start[1]], None))
                except NonfiniteError as error:
                    outcomes.append(str(error))
        assert (outcomes[1].__class__ is str) == (nonfinite == "raise" and not finite)
        if opt is None:
            if nonfinite == "propagate":
                assert all(a.tobytes() == b.tobytes() for a, b in zip(outcomes[0][0], outcomes[1], strict=True))
            continue
        assert everything(opt) == everything(other)
        assert opt.skipped_steps == other.skipped_steps == (nonfinite == "skip" and not finite)
        if way == "files":
            opt.close()


@needs_jit
@pytest.mark.parametrize("kernel", ["serial", "parallel"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_is_read_beyond_the_end_of_a_gradient(dtype, kernel):
    """The page behind the gradient may not be read: the process would die."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for guarded in (0, 3):
        assert libc.mprotect(address + guarded * page, page, 0) == 0
    inside = np.frombuffer(memory, np.uint8)[page : 3 * page].view(dtype)
    for size in (1, 7, 16, 31, 33, 100, inside.size):
        for array in (inside[:size], inside[inside.size - size :]):
            array[:] = 1
            opt = RMSProp([np.zeros(size, dtype)], kernel=kernel, clip_norm=10.0)
            opt.step([array])
            assert np.unique(opt.params[0]).size == 1
    for guarded in (0, 3):
        assert libc.mprotect(address + guarded * page, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@needs_jit
def test_small_gradients_are_read_as_one_only_where_all_of_them_are_neighbours(rng):
    """As an adapter hands over their addresses: first and last as in one buffer, and another one between them."""
    start = [rng.standard_normal(3) for _ in range(3)]
    together, apart = FlatBuffer([rng.standard_normal(3) for _ in range(3)]), rng.standard_normal(3)
    opt, other = RMSProp(start), RMSProp(start, kernel="numpy")
    for gradients in (list(together.leaves), [together.leaves[0], apart, together.leaves[2]]):
        opt.backend.step_at(np.array([gradient.ctypes.data for gradient in gradients]), None)
        other.step(gradients)
        assert everything(opt) == everything(other)


@needs_jit
def test_it_can_be_switched_off():
    program = "from fastrms.kernels import pointers; print(pointers.available())"
    for value, expected in (("0", "False"), ("1", "True")):
        environment = os.environ | {"FASTRMS_ZERO_COPY": value}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected


def test_another_layout_of_arrays_turns_it_off(monkeypatch):
    assert pointers.available() or not JIT
    for name in ("DATA", "NDIM", "SHAPE", "DTYPE", "FLAGS", "_ITEMS"):
        with monkeypatch.context() as patch:
            # One field further on: still inside the object, so that the check can look.
            patch.setattr(pointers, name, getattr(pointers, name) - 8 if name != "DATA" else 24)
            pointers.available.cache_clear()
            assert not pointers.available(), name
    pointers.available.cache_clear()


@pytest.mark.skipif(not JIT, reason="the interpreter's own objects come and go")
@pytest.mark.parametrize("way", ["buffer", "list"])
def test_a_steady_step_allocates_nothing_that_grows_with_the_parameters(way):
    peaks = []
    for count in (10, 1000):
        params = [np.ones((10, 100), np.float32) for _ in range(count)]
        opt, gradients = RMSProp(params), [np.ones((10, 100), np.float32) for _ in range(count)]
        step = (lambda: opt.step()) if way == "buffer" else (lambda: opt.step(gradients))  # noqa: B023
        step()
        step()
        tracemalloc.start()
        for _ in range(3):
            step()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # A list costs a tuple of as many pointers; the arrays have 4,000 bytes each.
    assert peaks[1] - peaks[0] <= (9 * 1000 if way == "list" else 0) + 500


@pytest.mark.skipif(not JIT, reason="100,000 steps take the interpreter long")
def test_100_000_steps_do_not_grow_the_process():
    opt = RMSProp([np.ones((10, 10), np.float32), np.ones(10, np.float32)])
    gradients = [np.ones((10, 10), np.float32), np.ones(10, np.float32)]
    for _ in range(1000):
        opt.step(gradients)
        opt.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50_000):
        opt.step(gradients)
        opt.step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024
