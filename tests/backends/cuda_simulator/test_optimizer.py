"""`CudaRMSProp` as an object: what it waits for, copies and checkpoints, what it says."""

import copy
import os
import pickle

import numpy as np
import pytest
from helpers import assert_same_bits, assert_same_state
from simulator import Theirs, arrays, cuda, numbers, pair

import fastrms
from fastrms import (
    DeviceError,
    DtypeError,
    OptionError,
    OptionTypeError,
    RMSProp,
    StructureError,
)
from fastrms import cuda as ours
from fastrms.bench import device
from fastrms.bench.cases import Case
from fastrms.bench.errors import BenchmarkError
from fastrms.kernels.reference import ReferenceRMSProp

# Waiting for the device.


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


def test_steps_in_which_a_gradient_is_absent_do_not_wait(rng, no_waiting):
    optimizer = RMSProp(arrays(rng), kernel="cuda", lr=lambda step: 0.1, bias_correction=True)
    gradients = [None, *(Theirs(g) for g in arrays(rng)[1:])]
    for _ in range(4):
        optimizer.step(gradients)
    assert (optimizer.steps, no_waiting) == (4, [])
    with pytest.raises(AssertionError, match="waits"):
        optimizer.state_dict()


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


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on_by_itself(copied, rng):
    oracle, optimizer = pair(arrays(rng), **OF_A_RUN)
    first = arrays(rng)
    first[0] = None
    for opt in (oracle, optimizer):
        opt.step(first)
    optimizer.stream = cuda.stream()
    other = copied(optimizer)
    assert (type(other), other.kernel) == (RMSProp, "cuda")
    second = arrays(rng)
    for opt in (oracle, other):
        opt.step(second)
    assert_same_state(other, oracle)
    assert optimizer.steps == 1


# What is said.


SHAPE, CASTABLE = r"\['W'\]: expected shape \(3, 2\), got", r"\['W'\]: expected a dtype that can be cast"
WRONG = {
    "shape": ({"array": np.ones((2, 3), np.float32)}, StructureError, SHAPE),
    "complex": ({"array": np.ones((3, 2), complex)}, DtypeError, CASTABLE),
    "bool": ({"array": np.ones((3, 2), bool)}, DtypeError, "got bool"),
    "byte order": ({"array": np.ones((3, 2), ">f4")}, DtypeError, "got >f4"),
    "mask": ({"array": np.ones((3, 2)), "mask": Theirs(np.ones((3, 2)))}, DtypeError, "mask"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_gradients_on_the_device_that_do_not_fit(wrong):
    optimizer, other = (RMSProp({"W": np.ones((3, 2), np.float32), "b": np.ones(2)}, kernel="cuda") for _ in range(2))
    given, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        optimizer.step({"W": Theirs(**given), "b": np.ones(2)})
    for opt in (optimizer, other):
        opt.step({"W": Theirs(np.ones((3, 2), np.float32)), "b": np.ones(2)})
    assert_same_state(optimizer, other)


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

    assert Mine([np.ones(3)], kernel="cuda").params[0].shape == (3,)

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
    assert optimizer.explain() == ["group 0, 6 float32 in 1 array: cuda, as requested"]
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
        told = 0
        for call in (optimizer.step, lambda gradients: optimizer.step_parameter(0, *gradients)):
            try:
                call([np.ones(3)])
            except DeviceError as error:
                told += "spawn" in str(error)
        os._exit(0 if told == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# The command line.


def test_a_step_is_measured_beside_a_copy():
    rows = []
    device.measure_device(Case(2, (3, 2), "float32"), 0.01, rows)
    assert [row["kernel"] for row in rows] == ["device copy", "cuda"]
    assert rows[0]["percent_of_limit"] == pytest.approx(100)
    assert rows[1]["percent_of_limit"] == pytest.approx(100 * rows[0]["seconds"] / rows[1]["seconds"])
    assert [row["check"] for row in rows] == ["", "equal"]
    assert [row["threads"] for row in rows] == [0, 0]
    assert not device.can_measure()
    assert dict(device.facts()) == {"GPU": "Numba's simulator (NUMBA_ENABLE_CUDASIM=1)"}


def test_other_bits_than_the_references_are_noticed(monkeypatch):
    rows = []
    monkeypatch.setattr(device, "ReferenceRMSProp", lambda params, *options: ReferenceRMSProp(params, 0.5))
    with pytest.raises(BenchmarkError, match="expected the same bits as the reference"):
        device.measure_device(Case(1, (3,), "float64"), 0.01, rows)
    assert rows == []


def test_a_function_that_an_array_sets_as_lr_gets_the_number_of_steps_taken():
    optimizer, seen = RMSProp([np.ones(3)], kernel="cuda", nonfinite="skip"), []

    class Setting(Theirs):
        def __getattribute__(self, name):
            if name == "__cuda_array_interface__":
                optimizer.lr = lambda step: seen.append(step) or 0.1
            return super().__getattribute__(name)

    for gradient in (np.ones(3), np.full(3, np.nan), np.ones(3), Setting(np.ones(3))):
        optimizer.step([gradient])
    assert (seen, optimizer.steps, optimizer.skipped_steps) == ([2], 3, 1)


def test_threads_of_the_host_and_names_of_other_libraries(rng):
    start = arrays(rng)
    optimizer = RMSProp(start, kernel="cuda", num_threads=1)
    optimizer.step(start)
    assert optimizer.steps == 1
    assert optimizer.check(all=optimizer.params, first=optimizer.params[0]) == []
    assert [line.split(":")[0] for line in optimizer.check(start=start[0])] == ["start"]
    with pytest.raises(AttributeError, match="expected 'lr'"):
        optimizer.learning_rate = 0.1
    with pytest.raises(TypeError, match="alpha: RMSProp has no such argument; expected 'decay_rate'"):
        RMSProp(start, kernel="cuda", alpha=0.9)
    with pytest.raises(TypeError, match="alpha: CudaRMSProp has no such argument"):
        ours.CudaRMSProp(start, alpha=0.9)
