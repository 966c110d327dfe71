"""`CudaRMSProp` in Numba's CUDA simulator, which runs kernels in the interpreter; `test_cuda.py` starts this.

The simulator has to be chosen before Numba is imported, so that this is no file that pytest collects by itself. Its
device memory is ordinary memory and its streams are one; what it has no notion of is tested on a GPU, by `test_gpu.py`.
"""

import copy
import math
import os
import pickle
import sys

import numpy as np
import pytest
from helpers import assert_same_bits, leaves, wide
from test_contract import OPTIONS

import fastrms
from fastrms import (
    CheckpointError,
    DeviceError,
    DtypeError,
    NonfiniteError,
    OptionError,
    OptionTypeError,
    RMSProp,
    StructureError,
)
from fastrms import cuda as ours
from fastrms.cli import device
from fastrms.cli.cases import Case
from fastrms.cli.common import CommandError
from fastrms.kernels import cuda as kernels
from fastrms.kernels import dlpack, norms
from fastrms.kernels.reference import ReferenceRMSProp

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

# NumPy's scalars, which kernels compute with here, warn of what arrays and compiled code leave to the result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

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


def arrays(rng, shapes=SHAPES, dtypes=MIXED, low=-3, high=1):
    return [np.asarray(wide(rng, s, np.float64, low, high)).astype(d) for s, d in zip(shapes, dtypes, strict=True)]


def pair(params, **options):
    """The oracle, and what is to have its bits."""
    return RMSProp(params, kernel="numpy", **options), RMSProp(params, kernel="cuda", **options)


def numbers(optimizer):
    """All arrays that a checkpoint has, by name."""
    return optimizer.state_dict()["arrays"]


def assert_same_state(optimizer, oracle, what=""):
    theirs = numbers(oracle)
    found = numbers(optimizer)
    assert found.keys() == theirs.keys()
    for name, array in theirs.items():
        assert_same_bits(found[name], array, f"{name} {what}")
    assert (optimizer.steps, optimizer.skipped_steps) == (oracle.steps, oracle.skipped_steps)


def on_host(tree):
    return [np.asarray(leaf.copy_to_host()) for leaf in tree]


# Bits.


def combinations():
    """Each option alone, and 18 random sets of them."""
    generator = np.random.default_rng(1)
    chosen = [{name} for name in OPTIONS] + [{n for n in OPTIONS if generator.random() < 0.5} for _ in range(18)]
    return [sorted(names) for names in [set(), *chosen] if "nesterov" not in names or "momentum" in names]


@pytest.mark.parametrize("part", range(4))
def test_every_option_has_the_bits_of_the_host(part, rng):
    tried = combinations()[part::4]
    assert tried
    for names in tried:
        options = {name: OPTIONS[name] for name in names}
        oracle, optimizer = pair(arrays(rng), lr=0.01, **options)
        for t in range(3):
            # From far below where squares are subnormal to moderate, so that floors and bounds are crossed.
            gradients = arrays(rng, low=-30 if t % 2 else -3)
            if t == 1:
                gradients[0] = None
            for opt in (oracle, optimizer):
                opt.step(gradients)
        assert_same_state(optimizer, oracle, str(options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [1, 31, 33, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 1, 2 * kernels.CHUNK + 3]
)
def test_every_size_has_the_bits_of_the_host(size, dtype, rng):
    start = wide(rng, size, dtype, -3, 3)
    for options in ({}, {"momentum": 0.9, "clip_norm": 3.0}):
        oracle, optimizer = pair([start], **options)
        gradient = wide(rng, size, dtype, -2, 2)
        oracle.step([gradient])
        optimizer.step([Theirs(gradient)])
        assert_same_state(optimizer, oracle, str(options))


def test_chunks_and_lanes_as_released(rng, monkeypatch):
    for module in (kernels, norms):
        for name, value in AS_RELEASED.items():
            monkeypatch.setattr(module, name, value)
    for dtype in DTYPES:
        test_every_size_has_the_bits_of_the_host(AS_RELEASED["CHUNK"] + 33, dtype, rng)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_bits_do_not_depend_on_threads_or_blocks(threads, rng, monkeypatch):
    monkeypatch.setattr(kernels, "THREADS", threads)
    monkeypatch.setattr(kernels, "BLOCKS", 2)
    shapes = [(3, 5), (kernels.CHUNK + 5,), (2,), (kernels.CHUNK,), (40,)]
    oracle, optimizer = pair(arrays(rng, shapes, [np.float32] * 5), global_clip_norm=1.0, bias_correction=True)
    for _ in range(2):
        gradients = arrays(rng, shapes, [np.float32] * 5)
        for opt in (oracle, optimizer):
            opt.step(gradients)
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_nan_and_subnormals_have_the_bits_of_the_host(dtype, rng):
    lowest = {np.float32: -45, np.float64: -320}[dtype]
    start = wide(rng, 60, dtype, lowest, 1)
    start[:3] = np.inf, -np.inf, np.nan
    for options in ({}, {"flush_subnormals": False}, {"flush_subnormals": False, "centered": True, "momentum": 0.9}):
        oracle, optimizer = pair([start], **options)
        for t in range(20):
            gradient = wide(rng, 60, dtype, lowest, -lowest // 2)
            gradient[10:13] = (np.inf, -np.inf, np.nan) if t == 5 else 0.0
            gradient[30 if t > 2 else 60 :] = 0
            for opt in (oracle, optimizer):
                opt.step([gradient])
        assert_same_state(optimizer, oracle, str(options))


# Norms.

TOO_LARGE, TOO_SMALL = 1e200, 1e-200


@pytest.mark.parametrize(
    "gradients",
    [
        [TOO_LARGE, 3.0],
        [TOO_SMALL, TOO_SMALL],
        [TOO_SMALL, 0.0],
        [0.0, 0.0],
        [1.7e308, 1.7e308],
        [5e-324, 1e-320],
        [np.inf, 1.0],
        [np.nan, 1.0],
        [np.nan, np.inf],
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [1e-3, 1e-250])
@pytest.mark.parametrize("option", ["clip_norm", "global_clip_norm"])
def test_norms_at_the_ends_of_the_range_have_the_bits_of_the_host(option, limit, gradients):
    oracle, optimizer = pair([np.zeros(3), np.zeros(2)], **{option: limit})
    for opt in (oracle, optimizer):
        opt.step([np.full(3, gradients[0]), np.full(2, gradients[1])])
    assert_same_state(optimizer, oracle)


def exact_sum(values):
    """The sum as the kernel `decide` forms it."""

    @cuda.jit
    def add(values, result):
        digits = cuda.shared.array(kernels._DIGITS, kernels.numba.int64)
        for i in range(kernels._DIGITS):
            digits[i] = 0
        for i in range(values.size):
            kernels._add_exactly(digits, values[i])
        result[0] = kernels._rounded(digits)

    result = cuda.to_device(np.zeros(1))
    add[1, 1](cuda.to_device(np.array(values)), result)
    return float(result.copy_to_host()[0])


HALF = 2.0**-53  # of the last place of 1


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.0, HALF],
        [1.0, HALF, 5e-324],
        [1.0, 2 * HALF, HALF],
        [1.0, 2 * HALF, HALF, 2.0**-1074],
        [1.0, 1 - HALF],
        [1.0] * 7,
        [1.0, *[HALF / 4] * 3, HALF / 4],
        [1.0, 1 - HALF, HALF],
        [1.0, 2.0**-1022, 3 * 2.0**-1074],
    ],
    ids=str,
)
def test_the_sum_over_parameters_is_exact_and_rounded_once(values):
    assert exact_sum(values) == math.fsum(values)


def test_the_sum_over_parameters_of_random_numbers(rng):
    for low in (-1, -17, -40, -300):
        values = np.minimum(1.0, np.abs(wide(rng, 200, np.float64, low, 0)))
        values[17] = 1.0
        assert exact_sum(values) == math.fsum(values)


def test_many_norms_are_combined_as_on_the_host(rng):
    shapes = [(int(n),) for n in rng.integers(1, 4, 25)]
    start = arrays(rng, shapes, [np.float64] * 25)
    oracle, optimizer = pair(start, global_clip_norm=1e-3)
    gradients = arrays(rng, shapes, [np.float64] * 25, -9, 2)
    gradients[7] = None
    for opt in (oracle, optimizer):
        opt.step(gradients)
    assert_same_state(optimizer, oracle)


# Gradients of all kinds.

KINDS = {
    "numpy": lambda g: g,
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


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(kind, options, rng):
    shapes, dtypes = [(4, 3), (), (5,), (2, 1, 3)], [np.float32] * 4
    oracle, optimizer = pair(arrays(rng, shapes, dtypes), **options)
    for t in range(3):
        gradients = arrays(rng, shapes, dtypes)
        given = [KINDS[kind](g) for g in gradients]
        before = [np.array(getattr(g, "array", gradients[k])) for k, g in enumerate(given)]
        if t == 1:
            gradients[2] = given[2] = None
        oracle.step(gradients)
        assert optimizer.step(given) is optimizer.params
        for g, value in zip(given, before, strict=True):
            if isinstance(g, Theirs):
                assert_same_bits(g.array, value, "a gradient was written")
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float16, np.float64])
def test_gradients_of_other_dtypes_are_cast_as_numpy_casts(dtype, rng):
    oracle, optimizer = pair([np.ones((2, 3), np.float32)])
    gradient = (100 * rng.random((2, 3))).astype(dtype)
    oracle.step([gradient])
    optimizer.step([Theirs(gradient)])
    assert_same_state(optimizer, oracle)


def test_gradients_here_there_and_in_the_buffer_in_one_step(rng):
    shapes, dtypes = [(3, 2), (4,), (5,), (2, 2), (3,)], [np.float32, np.float64, np.float32, np.float32, np.float64]
    oracle, optimizer = pair(arrays(rng, shapes, dtypes))
    for _ in range(20):  # more than there are copies of tables on their way
        gradients = arrays(rng, shapes, dtypes)
        oracle.step(gradients)
        optimizer.grads[2].copy_to_device(gradients[2])
        optimizer.step([gradients[0], Theirs(gradients[1]), optimizer.grads[2], Theirs(gradients[3].T.copy().T),
                        gradients[4]])  # fmt: skip
    assert_same_state(optimizer, oracle)


def test_gradients_in_the_buffer(rng):
    oracle, optimizer = pair(arrays(rng), momentum=0.9, global_clip_norm=0.5)
    for t in range(3):
        gradients = arrays(rng)
        oracle.step(gradients)
        for view, gradient in zip(optimizer.grads, gradients, strict=True):
            if gradient.size:
                view.copy_to_device(gradient)
        optimizer.step(*[() if t else (optimizer.grads,)][0])
    assert_same_state(optimizer, oracle)


def test_gradients_that_are_the_optimizers_own_memory_are_copied_first(rng):
    start = arrays(rng, [(3,)] * 4, [np.float32] * 4)
    oracle, optimizer = pair(start)
    gradients = arrays(rng, [(3,)] * 4, [np.float32] * 4)
    for view, gradient in zip(optimizer.grads, gradients, strict=True):
        view.copy_to_device(gradient)
    # Two are swapped, one is the parameter itself, one another parameter.
    oracle.step([gradients[1], gradients[0], oracle.params[2].copy(), oracle.params[0].copy()])
    optimizer.step([optimizer.grads[1], optimizer.grads[0], optimizer.params[2], optimizer.params[0]])
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("tree", ["array", "dict", "nested", "groups"])
def test_structures(tree, rng):
    made = {
        "array": lambda a: a[0],
        "dict": lambda a: {"W": a[0], 7: a[1]},
        "nested": lambda a: [{"W": a[0]}, (a[1], [a[2]])],
        "groups": lambda a: [{"params": {"W": a[0]}, "lr": 0.5}, {"params": [a[1], a[2]], "momentum": 0.5}],
    }[tree]
    oracle, optimizer = pair(made(arrays(rng, [(3, 2), (4,), ()], [*DTYPES, np.float64])))
    for _ in range(2):
        given = made(arrays(rng, [(3, 2), (4,), ()], [*DTYPES, np.float64]))
        if tree == "groups":
            given = [group["params"] for group in given]
        assert optimizer.step(given) is optimizer.params
        oracle.step(given)
    assert_same_state(optimizer, oracle)
    for name in ("params", "grads", "cache", "momentum_buffer"):
        assert repr(type(getattr(optimizer, name))) == repr(type(getattr(oracle, name))) or tree == "array"


def test_the_same_options_come_from_lists_and_from_groups_that_change(rng):
    groups = [{"params": arrays(rng, [(3,)], [np.float32])}, {"params": arrays(rng, [(4,)], [np.float32])}]
    oracle, optimizer = pair(groups, lr=lambda step: 0.1 / (1 + step))
    changes = [
        lambda opt: None,
        lambda opt: opt.param_groups[1].update(lr=0.5, momentum=0.9),
        lambda opt: opt.param_groups[0].update(centered=True, maximize=True),
        lambda opt: setattr(opt, "nonfinite", "skip"),
        lambda opt: opt.param_groups[0].update(bias_correction=True, decay_rate=0.5),
        lambda opt: setattr(opt, "global_clip_norm", 0.1),
        lambda opt: setattr(opt, "nonfinite", "propagate"),
        lambda opt: opt.param_groups[1].update(bias_correction=True),
        lambda opt: opt.param_groups[0].update(bias_correction=False),
        lambda opt: opt.param_groups[1].update(bias_correction=False),
        lambda opt: setattr(opt, "global_clip_norm", None),
    ]
    for t, change in enumerate(changes):
        gradients = [arrays(rng, [(3,)], [np.float32]), arrays(rng, [(4,)], [np.float32])]
        if t % 3 == 1:
            gradients[1][0] = None
        for opt in (oracle, optimizer):
            change(opt)
            opt.step(gradients)
        assert_same_state(optimizer, oracle, f"after change {t}")


# Waiting for the device.


@pytest.fixture
def no_waiting(monkeypatch):
    """Make everything that waits for the device raise; a list, to which the name of what was called is added."""
    called = []

    def refuse(name):
        def refused(*args, **kwargs):
            called.append(name)
            raise AssertionError(f"{name} waits for the device")

        return refused

    array, stream, event = type(cuda.to_device(np.zeros(1))), type(cuda.stream()), type(cuda.event())
    for kind, name in ((array, "copy_to_host"), (stream, "synchronize"), (event, "synchronize")):
        monkeypatch.setattr(kind, name, refuse(f"{kind.__name__}.{name}"))
    return called


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {"clip_norm": 1.0, "global_clip_norm": 1.0},
        {"bias_correction": True},
        {"nonfinite": "skip", "bias_correction": True, "clip_value": 1.0},
        {"lr": lambda step: 0.1, "bias_correction": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("kind", ["device", "buffer", "other addresses"])
def test_a_steady_step_does_not_wait_for_the_device(kind, options, rng, no_waiting):
    optimizer = RMSProp(arrays(rng), kernel="cuda", **options)
    gradients = [Theirs(g) for g in arrays(rng)]
    for _ in range(6):
        if kind == "other addresses":
            gradients = [Theirs(g) for g in arrays(rng)]
        optimizer.step(None if kind == "buffer" else gradients)
    assert no_waiting == []


def test_what_asks_the_device_waits_for_it(rng, no_waiting):
    optimizer = RMSProp(arrays(rng), kernel="cuda", nonfinite="skip")
    optimizer.step(arrays(rng))
    with pytest.raises(AssertionError, match="waits"):
        optimizer.steps  # noqa: B018
    with pytest.raises(AssertionError, match="waits"):
        optimizer.state_dict()
    with pytest.raises(AssertionError, match="waits"):
        optimizer.synchronize()
    optimizer = RMSProp(arrays(rng), kernel="cuda", nonfinite="raise")
    with pytest.raises(AssertionError, match="waits"):
        optimizer.step(arrays(rng))


def test_another_stream_is_asked_for_by_its_number(rng):
    """The simulator has no other streams, and says so where a GPU would wait."""
    optimizer = RMSProp([np.ones(3)], kernel="cuda")
    with pytest.raises(RuntimeError, match="External streams"):
        optimizer.step([Theirs(np.ones(3), stream=77)])
    optimizer.step([Theirs(np.ones(3), stream=1)])
    for stream in (77, type("CuPy", (), {"ptr": 77})(), type("PyTorch", (), {"cuda_stream": 77})(),
                   type("Other", (), {"__cuda_stream__": lambda self: (0, 77)})()):  # fmt: skip
        with pytest.raises(RuntimeError, match="External streams"):
            optimizer.stream = stream
    for stream in (None, 0, 1, cuda.stream(), type("CuPy", (), {"ptr": 0})()):
        optimizer.stream = stream
        optimizer.step([np.ones(3)])
        assert optimizer.params[0].stream is optimizer.stream
    assert optimizer.steps == 6


# Gradients that are not finite.


@pytest.mark.parametrize(("kind", "bad"), [("numpy", np.nan), ("device", np.inf), ("float64", -np.inf)])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 1.0}, {"clip_value": 0.5, "global_clip_norm": 1.0}, {"bias_correction": True, "momentum": 0.5}],
    ids=str,
)
def test_a_gradient_that_is_not_finite_changes_nothing(options, bad, kind, rng):
    params = arrays(rng)
    _, raising = pair(params, nonfinite="raise", **options)
    oracle, skipping = pair(params, nonfinite="skip", **options)
    for t in range(4):
        gradients = arrays(rng)
        spoilt = [g.copy() for g in gradients]
        spoilt[0][3, 2] = spoilt[3][6] = bad
        if t == 2:
            gradients[1] = spoilt[1] = None
        before = numbers(raising), raising.steps
        with pytest.raises(NonfiniteError, match=r"gradients\[0\]: . NaN and . inf among 12 values; gr") as caught:
            raising.step([None if g is None else KINDS[kind](g) for g in spoilt])
        assert caught.value.counts == {"[0]": 1, "[3]": 1}
        after = numbers(raising), raising.steps
        assert before[1] == after[1]
        assert all(before[0][name].tobytes() == after[0][name].tobytes() for name in before[0])
        raising.step(gradients)
        for given in (spoilt, gradients):
            oracle.step(given)
            skipping.step([None if g is None else KINDS[kind](g) for g in given])
    assert_same_state(skipping, oracle)
    assert skipping.skipped_steps == raising.steps == 4


def test_one_that_is_absent_is_not_asked_whether_it_is_finite():
    for nonfinite in ("raise", "skip"):
        oracle, optimizer = pair([np.ones(2), np.ones(3)], nonfinite=nonfinite)
        optimizer.grads[0].copy_to_device(np.full(2, np.nan))
        for opt in (oracle, optimizer):
            opt.step([None, np.ones(3)])
        assert_same_state(optimizer, oracle)


# Bias correction, whose factors the device looks up.


@pytest.mark.parametrize("decay_rate", [0.0, 0.5, 0.9, 0.9999])
def test_bias_is_corrected_as_on_the_host_from_any_number_of_steps(decay_rate, rng):
    groups = [{"params": [np.ones(3)]}, {"params": [np.ones(2)], "decay_rate": 0.7}]
    oracle, optimizer = pair(groups, bias_correction=True, decay_rate=decay_rate)
    state = oracle.state_dict()
    for steps in (0, 3, 1022, 5000):
        for opt in (oracle, optimizer):
            sat_out = {"skipped": np.array([min(1, steps), 0])}
            opt.load_state_dict(state | {"steps": steps, "arrays": state["arrays"] | sat_out})
            for t in range(4):
                opt.step([[None if t == 1 else np.full(3, 0.5)], [np.full(2, -3.0)]])
        assert_same_state(optimizer, oracle, f"from {steps} on")
    optimizer.steps = 7
    assert optimizer.steps == 7


# Parameters, checkpoints, copies.


def test_parameters_on_the_device(rng):
    values = arrays(rng, [(3, 4), (), (0, 2), (5,)], [np.float32, np.float64, np.float32, np.float64])
    there = [Theirs(np.asfortranarray(values[0])), Theirs(values[1]), Theirs(values[2]), Theirs(values[3][::-1])]
    oracle = RMSProp([values[0], values[1], values[2], values[3][::-1]])
    for tree in (there, tuple(there), {k: v for k, v in enumerate(there)}, [{"params": there}]):  # noqa: C416
        assert_same_bits(numbers(RMSProp(tree, kernel="cuda"))["params/float32"], numbers(oracle)["params/float32"])
        assert_same_bits(numbers(RMSProp(tree, kernel="cuda"))["params/float64"], numbers(oracle)["params/float64"])
    memory = np.ones(10)
    with pytest.raises(StructureError, match=r"params\[0\] and params\[1\] share memory"):
        RMSProp([Theirs(memory[:6]), Theirs(memory[4:])], kernel="cuda")
    with pytest.raises(StructureError, match=r"params\[0\]\[0\] and params\[1\]\[0\] share memory"):
        RMSProp([{"params": [Theirs(memory[:6])]}, {"params": [Theirs(memory[:2])]}], kernel="cuda")
    RMSProp([Theirs(memory[::2]), Theirs(memory[1::2]), memory.copy()], kernel="cuda")
    with pytest.raises(DtypeError, match=r"params\[0\]: expected float32 or float64, got int64"):
        RMSProp([Theirs(np.arange(3))], kernel="cuda")


OF_A_RUN = {"momentum": 0.9, "centered": True, "bias_correction": True, "nonfinite": "skip", "clip_norm": 1.0}


@pytest.mark.parametrize("ending", ["npz", "safetensors", None])
def test_a_run_goes_on_elsewhere_with_the_same_bits(ending, rng, tmp_path):
    params = arrays(rng)
    oracle, device = pair(params, **OF_A_RUN)
    host = RMSProp(params, kernel="numpy", **OF_A_RUN)
    for t in range(6):
        gradients = arrays(rng)
        if t % 2:
            gradients[3] = None
        if t == 2:
            gradients[0][0, 0] = np.nan
        for opt in (oracle, host, device):
            opt.step(gradients)
        if ending is None:
            states = host.state_dict(), device.state_dict()
            device.load_state_dict(states[0])
            host.load_state_dict(states[1])
        else:
            for opt, name in ((host, "host"), (device, "device")):
                opt.save(tmp_path / f"{name}.{ending}")
            device.load(tmp_path / f"host.{ending}")
            host = RMSProp.from_checkpoint(tmp_path / f"device.{ending}", kernel="numpy")
        assert_same_state(device, oracle)
        assert_same_state(host, oracle)
    if ending:
        for kind, options in ((RMSProp, {"kernel": "cuda"}), (ours.CudaRMSProp, {})):
            again = kind.from_checkpoint(tmp_path / f"host.{ending}", **options)
            assert type(again) is ours.CudaRMSProp
            assert_same_state(again, oracle)


def test_a_state_that_does_not_fit_changes_nothing(rng):
    optimizer, other = RMSProp([np.ones(3)], kernel="cuda"), RMSProp([np.ones(4)])
    optimizer.step([np.ones(3)])
    before = numbers(optimizer)
    with pytest.raises(CheckpointError, match="shape"):
        optimizer.load_state_dict(other.state_dict())
    assert all(before[name].tobytes() == array.tobytes() for name, array in numbers(optimizer).items())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on_by_itself(copied, rng):
    oracle, optimizer = pair(arrays(rng), **OF_A_RUN)
    first = arrays(rng)
    first[0] = None
    for opt in (oracle, optimizer):
        opt.step(first)
    optimizer.stream = cuda.stream()
    other = copied(optimizer)
    assert type(other) is ours.CudaRMSProp
    second = arrays(rng)
    for opt in (oracle, other):
        opt.step(second)
    assert_same_state(other, oracle)
    assert optimizer.steps == 1


def test_the_views_are_the_same_for_life(rng):
    optimizer = RMSProp(arrays(rng), kernel="cuda", momentum=0.9)
    views = {name: list(getattr(optimizer, name)) for name in ("params", "grads", "cache", "momentum_buffer")}
    state = optimizer.state_dict()
    optimizer.step(arrays(rng))
    optimizer.load_state_dict(state)
    optimizer.stream = cuda.stream()
    optimizer.step(arrays(rng))
    for name, items in views.items():
        assert all(a is b for a, b in zip(items, getattr(optimizer, name), strict=True))
        for view, leaf in zip(items, optimizer.buffers[name].layout.leaves, strict=True):
            assert tuple(view.shape) == leaf.shape
    assert optimizer.check() == []
    assert all(np.array_equal(a, b) for a, b in zip(on_host(optimizer.params), leaves(optimizer.params), strict=True))


# What is said.


def test_gradients_that_do_not_fit(rng):
    optimizer = RMSProp({"W": np.ones((3, 2), np.float32), "b": np.ones(2)}, kernel="cuda")
    good = Theirs(np.ones((3, 2), np.float32))
    wrong = {
        "shape": (
            Theirs(np.ones((2, 3), np.float32)),
            StructureError,
            r"gradients\['W'\]: expected shape \(3, 2\), got",
        ),
        "complex": (
            Theirs(np.ones((3, 2), complex)),
            DtypeError,
            r"gradients\['W'\]: expected a dtype that can be cast",
        ),
        "bool": (Theirs(np.ones((3, 2), bool)), DtypeError, "got bool"),
        "byte order": (Theirs(np.ones((3, 2), ">f4")), DtypeError, "got >f4"),
        "mask": (Theirs(np.ones((3, 2)), mask=good), DtypeError, "mask"),
        "text": ("W", DtypeError, "expected an array, got str"),
        "host, shape": (np.ones(6), StructureError, r"expected shape \(3, 2\), got \(6,\)"),
    }
    before = numbers(optimizer)
    for item, error, message in wrong.values():
        with pytest.raises(error, match=message):
            optimizer.step({"W": item, "b": np.ones(2)})
    with pytest.raises(StructureError, match="missing 'b'"):
        optimizer.step({"W": good})
    optimizer.param_groups[0]["lr"] = lambda step: -1.0
    with pytest.raises(OptionError, match="at step 0"):
        optimizer.step({"W": good, "b": np.ones(2)})
    assert all(before[name].tobytes() == array.tobytes() for name, array in numbers(optimizer).items())
    optimizer.lr = 0.1
    oracle = RMSProp({"W": np.ones((3, 2), np.float32), "b": np.ones(2)}, lr=0.1)
    for opt in (oracle, optimizer):
        opt.step({"W": good.array if opt is oracle else good, "b": np.ones(2)})
    assert_same_state(optimizer, oracle)


def test_a_view_in_whose_place_something_else_was_put():
    optimizer = RMSProp([np.ones(3), np.ones(2)], kernel="cuda")
    optimizer.params[0] = np.ones(3)
    assert len(optimizer.check()) == 1
    with pytest.raises(StructureError, match=r"params\[0\]: expected the view that was there, got a ndarray"):
        optimizer.step([np.ones(3), np.ones(2)])


def test_what_cannot_be_had():
    with pytest.raises(OptionError, match="cache_dtype: expected None"):
        RMSProp([np.ones(3, np.float32)], kernel="cuda", cache_dtype="bfloat16")
    for stream in (True, -1, "default", 1.5, object()):
        with pytest.raises(OptionTypeError, match="stream: expected None"):
            RMSProp([np.ones(3)], kernel="cuda", stream=stream)
    optimizer = RMSProp([np.ones(3)], kernel="cuda")
    optimizer.kernel = "cuda"
    for kernel in ("serial", "auto ", None):
        with pytest.raises(OptionError, match='kernel: expected "cuda"'):
            optimizer.kernel = kernel
    with pytest.raises(OptionError, match='kernel: expected "cuda"'):
        ours.CudaRMSProp([np.ones(3)], kernel="parallel")
    host = RMSProp([np.ones(3)])
    with pytest.raises(OptionError, match="kernel: expected a kernel that runs on the host"):
        host.kernel = "cuda"

    class Mine(RMSProp):
        pass

    with pytest.raises(OptionError, match=r"derived from fastrms\.cuda\.CudaRMSProp"):
        Mine([np.ones(3)], kernel="cuda")

    class MineThere(ours.CudaRMSProp):
        pass

    assert MineThere([np.ones(3)]).kernel == "cuda"
    circular = []
    circular.append(circular)
    with pytest.raises(StructureError, match="contains itself"):
        RMSProp(circular, kernel="cuda")


def test_what_it_says_of_itself():
    optimizer = RMSProp([np.ones((3, 2), np.float32)], kernel="cuda", momentum=0.9)
    assert isinstance(optimizer, RMSProp)
    assert optimizer.explain() == ["group 0, 6 float32 in 1 arrays: cuda, as asked for"]
    assert repr(optimizer.buffers["params"]) == "DeviceBuffer(1 arrays, 6 float32)"
    assert optimizer.kernel == "cuda"
    assert fastrms.cuda.why_not() is None
    fastrms.warmup(["float32"], ["cuda"], momentum=0.9)
    buffer = optimizer.buffers["params"]
    assert type(pickle.loads(pickle.dumps(buffer))) is fastrms.FlatBuffer
    buffer.gather([np.full((3, 2), 5.0)])
    assert np.array_equal(optimizer.params[0].copy_to_host(), np.full((3, 2), 5.0, np.float32))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_of_fork_is_told():
    optimizer = RMSProp([np.ones(3)], kernel="cuda")
    child = os.fork()
    if child == 0:
        try:
            optimizer.step([np.ones(3)])
        except DeviceError as error:
            os._exit(0 if "spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_chunks_and_lanes_are_those_of_the_host():
    assert AS_RELEASED == {"CHUNK": 4096, "LANES": 32}


# The command line.


def test_a_step_is_measured_beside_a_copy():
    rows = []
    device.measure_device(Case(2, (3, 2), "float32"), 0.01, rows)
    assert [row.kernel for row in rows] == ["device copy", "cuda"]
    assert rows[0].percent_of_limit == 100
    assert rows[1].percent_of_limit == 100 * rows[0].seconds / rows[1].seconds
    assert [row.check for row in rows] == ["", "equal"]
    assert not device.can_measure()
    assert dict(device.facts()) == {"GPU": "Numba's simulator (NUMBA_ENABLE_CUDASIM=1)"}


def test_other_bits_than_the_references_are_noticed(monkeypatch):
    rows = []
    monkeypatch.setattr(device, "ReferenceRMSProp", lambda params, *options: ReferenceRMSProp(params, 0.5))
    with pytest.raises(CommandError, match="expected the bits of the reference"):
        device.measure_device(Case(1, (3,), "float64"), 0.01, rows)
    assert rows == []


# PyTorch's tensors, found by compiled code. Those of the processor stand for those of a device, as the simulator's
# memory is theirs.


def test_tensors_of_torch_are_read_where_they_lie(rng):
    torch = pytest.importorskip("torch")
    shapes = [(3, 2), (4,), (), (0,), (5,)]
    oracle, optimizer = pair(arrays(rng, shapes, [np.float32] * 5))
    optimizer._finder._device = dlpack.CPU
    for t in range(3):
        gradients = arrays(rng, shapes, [np.float32] * 5)
        given = [torch.from_numpy(g.copy()) for g in gradients]
        if t == 1:
            gradients[1] = given[1] = None
            given[4] = Theirs(gradients[4])
        oracle.step(gradients)
        found = optimizer._finder.find(tuple(given), optimizer._written)
        assert found.sources[0] == given[0].data_ptr()
        assert (found.sources[1] == kernels.ABSENT) == (t == 1)
        assert found.others == found.arrays == []
        assert kernels.LEGACY_STREAM in found.streams
        optimizer.step(given)
    assert_same_state(optimizer, oracle)


def test_a_view_of_torch_whose_memory_has_the_positive_numbers(rng):
    class Negative(Theirs):
        def is_neg(self):
            return True

        def resolve_neg(self):
            return Theirs(-self.array)

    oracle, optimizer = pair([np.ones(3)])
    gradient = rng.standard_normal(3)
    oracle.step([-gradient])
    optimizer.step([Negative(gradient)])
    assert_same_state(optimizer, oracle)
