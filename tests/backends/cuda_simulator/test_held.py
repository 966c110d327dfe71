"""Parameters that stay in the arrays of the program on a GPU. The conformance suite shows their bits."""

import copy
import pickle
import types

import numpy as np
import pytest
from backends import OnGpu
from helpers import assert_same_bits, assert_same_state, whole
from simulator import KINDS, Theirs, arrays, cuda, kernels

from fastrms import DtypeError, RMSProp, StructureError
from fastrms.backends.cuda import arrays as on_device
from fastrms.backends.cuda import backend, held
from fastrms.cuda import CudaRMSProp
from fastrms.kernels import dlpack

BODY, HEAD = ([(4, 3), (), (0,)], [np.float32, np.float64, np.float64]), ([(7,), (2, 2)], [np.float32, np.float64])


def pair(start, **options):
    """Return the oracle, arrays on the device, and the optimizer that updates these arrays."""
    given = list(map(OnGpu, start))
    return RMSProp(start, kernel="numpy", **options), given, RMSProp(given, kernel="cuda", in_place=True, **options)


def test_the_parameters_are_the_given_objects():
    weights, bias = OnGpu(np.ones((3, 2))), cuda.to_device(np.ones(2, np.float32))
    opt = CudaRMSProp({"W": weights, "layers": [bias]}, lr=0.1, in_place=True)
    assert opt.params["W"] is weights
    assert opt.params["layers"][0] is bias
    opt.step({"W": np.ones((3, 2)), "layers": [np.ones(2)]})
    assert weights.array[0, 0] == np.asarray(opt.params["W"])[0, 0] != 1
    assert bias.copy_to_host()[0] != 1
    assert opt.check(W=weights, b=bias, part=Theirs(weights.array[1:]), dW=opt.grads["W"]) == []
    assert opt.check(W=OnGpu(np.ones((3, 2))), b=np.ones(2)) == [
        f"{name}: expected an array that is updated in place, got an array in other memory; take the view from params "
        "again" for name in ("W", "b")
    ]  # fmt: skip


def test_strides_of_a_contiguous_array_may_be_given():
    array = np.ones((2, 3))
    opt = RMSProp([Theirs(array, strides=(24, 8)), Theirs(np.ones(1), strides=(8,))], kernel="cuda", in_place=True)
    opt.step([np.ones((2, 3)), np.ones(1)])
    opt.step_parameter(0, np.ones((2, 3)))
    assert (array < 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_of_every_kind(count, kind, rng):
    shapes, dtypes = [(4, 3), (), (5,)][:count], [np.float32] * count
    oracle, given, opt = pair(arrays(rng, shapes, dtypes), momentum=0.9, bias_correction=True)
    for t in range(4):
        gradients = arrays(rng, shapes, dtypes)
        if t == 2:
            for k, gradient in enumerate(gradients):
                opt.step_parameter(k, KINDS[kind](gradient))
        else:
            opt.step([KINDS[kind](gradient) for gradient in gradients])
        oracle.step(gradients)
    assert_same_state(opt, oracle)
    for array, param in zip(given, oracle.params, strict=True):
        assert_same_bits(array.array, param)


def test_a_run_is_one_launch_as_over_a_flat_buffer(rng, monkeypatch):
    launched = []
    launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda kernel, *rest: (launched.append(kernel), launch(kernel, *rest)))
    counts = []
    for in_place in (False, True):
        params = list(map(OnGpu, arrays(rng, [(3,)] * 9, [np.float32] * 9)))
        opt = RMSProp(params, kernel="cuda", in_place=in_place)
        gradients = list(map(OnGpu, arrays(rng, [(3,)] * 9, [np.float32] * 9)))
        opt.step(gradients)
        launched.clear()
        opt.step(gradients)
        counts.append(len(launched))
    assert counts == [1, 1]


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "nonfinite": "skip", "bias_correction": True}], ids=str)
def test_a_steady_step_does_not_wait_for_the_device(options, rng, no_waiting):
    _, _, opt = pair(arrays(rng), **options)
    gradients = list(map(OnGpu, arrays(rng)))
    for _ in range(3):
        opt.step(gradients)
        opt.step()
    assert no_waiting == []


# Arrays that a step cannot update.


def read_only(array):
    array.flags.writeable = False
    return Theirs(array)


def negative(array):
    array = OnGpu(array)
    array.is_neg = lambda: True
    return array


WRONG = {
    "read-only": (read_only(np.ones(2)), "got one that is read-only"),
    "transposed": (Theirs(np.ones((2, 3)).T), "got one that is not C-contiguous"),
    "strided": (Theirs(np.ones(4)[::2]), "got one that is not C-contiguous"),
    "byte order": (Theirs(np.ones(2, ">f4")), "got one that is of dtype >f4 in another byte order"),
    "not aligned": (Theirs(np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float64)), "got one that is not aligned"),
    "on the host": (np.ones(2), "expected an array on the GPU, .* got an array of shape \\(2,\\); copy it to the GPU"),
    "list": ([1.0], r"\[0\]: expected an array on the GPU, .* got float object"),
    "None": (None, "expected an array on the GPU, .* got None"),
    "float16": (Theirs(np.ones(2, np.float16)), "expected float32 or float64, got float16"),
    "masked": (Theirs(np.ones(2), mask=object()), "expected an array, got a masked array on the device"),
    "negative": (negative(np.ones(2)), "expected an array on the GPU, got a negative view of PyTorch"),
    "requires grad": (
        type("Parameter", (), {"requires_grad": True})(),
        r"got Parameter object that requires gradients; pass its \.detach\(\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_arrays_that_a_step_cannot_update_are_refused_by_name(wrong):
    array, message = WRONG[wrong]
    with pytest.raises(DtypeError, match=rf"^params\['W'\].*{message}"):
        RMSProp({"b": OnGpu(np.ones(2)), "W": array}, kernel="cuda", in_place=True)
    opt = RMSProp([{"params": OnGpu(np.ones(2))}], kernel="cuda", in_place=True)
    with pytest.raises(DtypeError, match=rf"^params\[1\]\['W'\].*{message}"):
        opt.add_param_group({"params": {"W": array}})
    assert len(opt.param_groups) == 1
    opt.step([np.ones(2)])


def test_structures_without_arrays_and_structures_that_contain_themselves():
    itself = []
    itself.append(itself)
    for params, message in ((itself, "contains itself"), ([], "at least one array")):
        with pytest.raises(StructureError, match=message):
            RMSProp(params, kernel="cuda", in_place=True)
    opt = RMSProp([OnGpu(np.ones(1))], kernel="cuda", in_place=True)
    with pytest.raises(StructureError, match="contains itself"):
        opt.add_param_group({"params": itself})


def test_arrays_that_share_memory_are_refused():
    array = np.ones(8)
    with pytest.raises(StructureError, match=r"params\[0\] and params\[1\] share memory"):
        RMSProp([Theirs(array[:3]), Theirs(array[2:])], kernel="cuda", in_place=True)
    opt = RMSProp([Theirs(array[2:5])], kernel="cuda", in_place=True)
    for shared in (Theirs(array[:3]), Theirs(array[4:]), opt.grads, opt.cache):
        with pytest.raises(StructureError, match=r"params\[1\]: expected new parameters, got an array that shares"):
            opt.add_param_group({"params": shared})
    with pytest.raises(StructureError, match=r"params\[1\]\[0\] and params\[1\]\[1\] share memory"):
        opt.add_param_group({"params": [Theirs(array[5:]), Theirs(array[6:])]})
    opt.add_param_group({"params": [Theirs(array[:2]), Theirs(array[5:])]})
    opt.step([[np.ones(3)], [np.ones(2), np.ones(3)]])
    assert (array < 1).all()


def moved(array):
    array.array = array.array.copy()


def cast(array):
    array.array = array.array.view(np.int32)


def reshaped(array):
    array.array = array.array.reshape(-1, 1)


def made_read_only(array):
    array.read_only = True


CHANGES = {
    "moved": (moved, "expected the original array, .* that was moved"),
    "dtype": (cast, r"expected the original array, of shape \(3,\) and float32, .* or int32"),
    "shape": (reshaped, r"expected the original array, .* to shape \(3, 1\)"),
    "read-only": (made_read_only, "expected an array that a step can write to, got one that is read-only now"),
    "gone": (lambda array: vars(array).pop("array"), "expected the original array on the GPU, got an object that is"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_array_that_was_changed_is_named_and_nothing_is_written(change, rng, tmp_path):
    work, message = CHANGES[change]
    start = arrays(rng, [(3,), (3,), (2,)], [np.float32] * 3)
    _, given, opt = pair(start, momentum=0.9)
    gradients = arrays(rng, [(3,), (3,), (2,)], [np.float32] * 3)
    opt.step(gradients)
    opt.save(tmp_path / "before.npz")
    state, before = RMSProp(start, momentum=0.9).state_dict(), whole(opt)
    kept = vars(given[1]).copy()
    calls = {
        "step": lambda: opt.step(gradients),
        "step from the buffer": opt.step,
        "step on the device": lambda: opt.step(list(map(OnGpu, gradients))),
        "step_parameter": lambda: opt.step_parameter(1, gradients[1]),
        "step_rows": lambda: opt.step_rows(1, [0], gradients[1][:1]),
        "load_state_dict": lambda: opt.load_state_dict(state),
        "load": lambda: opt.load(tmp_path / "before.npz"),
        "add_param_group": lambda: opt.add_param_group({"params": OnGpu(np.ones(2))}),
        "copy": lambda: copy.copy(opt),
        "gather": lambda: opt.buffers["params"].gather(gradients),
        "save": lambda: opt.save(tmp_path / "run.npz"),
    }
    for name, call in calls.items():
        work(given[1])
        with pytest.raises(StructureError, match=rf"^params\[1\]: {message}"):
            call()
        assert len(opt.check()) == 1, name
        vars(given[1]).update(kept)
        assert whole(opt) == before, name
        assert opt.check() == []
    assert not (tmp_path / "run.npz").exists()
    opt.step(gradients)


def test_an_array_that_becomes_strided_is_named(rng):
    memory = np.ones(6)
    array = OnGpu(memory)
    array.array = memory[:3]  # without a copy
    opt = RMSProp([array, OnGpu(np.ones(1))], kernel="cuda", in_place=True)
    array.array = memory[::2]
    with pytest.raises(StructureError, match=r"^params\[0\]: expected the original array"):
        opt.step([np.ones(3), np.ones(1)])
    assert (memory == 1).all()


# Gradients that alias parameters, states that are loaded, copies.


@pytest.mark.parametrize("count", [3, 30])  # few and many pieces of memory to compare with
def test_gradients_that_share_memory_with_parameters_are_read_first(count, rng):
    start = arrays(rng, [(8,)] * count, [np.float32] * count)
    memory = np.concatenate(start)
    parts = [memory[8 * k : 8 * k + 8] for k in range(count)]
    oracle = RMSProp(start, kernel="numpy")
    opt = RMSProp(list(map(Theirs, parts)), kernel="cuda", in_place=True)
    for _ in range(2):
        flat = np.concatenate(oracle.params)
        shifted = [flat[4:12].copy(), *flat.reshape(count, 8)[:-1].copy()]
        shifted[2] = shifted[2][::-1]
        oracle.step(shifted)
        opt.step([Theirs(memory[4:12]), Theirs(parts[0]), Theirs(parts[1][::-1]), *map(Theirs, parts[2:-1])])
        assert_same_state(opt, oracle)
    for k in range(count):
        gradient = np.concatenate(oracle.params)[8 * k - 3 :][:8].copy() if k else oracle.params[0].copy()
        opt.step_parameter(k, Theirs(memory[8 * k - 3 :][:8]) if k else opt.params[0])
        oracle.step_parameter(k, gradient)
    assert_same_state(opt, oracle)


def test_a_checkpoint_is_loaded_into_the_arrays(rng):
    start = arrays(rng)
    views = RMSProp(start, momentum=0.9)
    views.step(start)
    given = [OnGpu(np.zeros_like(array)) for array in start]
    opt = RMSProp(given, kernel="cuda", in_place=True)
    opt.load_state_dict(views.state_dict())
    for array, param in zip(given, views.params, strict=True):
        assert_same_bits(array.array, param)
    opt.buffers["params"].gather(start)
    views.buffers["params"].gather(start)
    assert_same_state(opt, views)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_of_program_and_optimizer_keeps_them_together(make, rng):
    _, given, opt = pair(arrays(rng, *BODY), momentum=0.9)
    opt.add_param_group({"params": list(map(OnGpu, arrays(rng, *HEAD)))})
    opt.step([arrays(rng, *BODY), arrays(rng, *HEAD)])
    before = whole(opt)
    copied, other = make((given, opt))
    assert_same_state(other, opt)
    assert all(ours is theirs for ours, theirs in zip(other.params[0], copied, strict=True))
    gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
    other.step(gradients)
    assert (copied[0].array != given[0].array).any()
    assert whole(opt) == before
    opt.step(gradients)
    assert_same_state(opt, other)


def test_arrays_of_numba_cannot_be_copied():
    opt = RMSProp({"W": cuda.to_device(np.ones(2))}, kernel="cuda", in_place=True)
    for again in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"params\['W'\]: expected an array that can be copied and pickled, got"):
            again(opt)
    opt.step({"W": np.ones(2)})


def test_there_is_no_vector_behind_the_parameters(rng):
    _, _, opt = pair(arrays(rng))
    with pytest.raises(StructureError, match="flat: expected parameters in one buffer"):
        opt.buffers["params"].flat  # noqa: B018 - reading raises
    assert len(opt.buffers["grads"].flat) == 2
    assert repr(opt.buffers["params"]).startswith("DeviceBuffer(4 arrays")


# Streams, and tensors of PyTorch, which compiled code finds.


def test_the_streams_of_the_arrays_are_waited_for(rng, monkeypatch):
    _, given, opt = pair(arrays(rng))
    given[0].stream = 77
    for call in (lambda: opt.step(arrays(rng)), lambda: opt.step_parameter(0, np.ones((4, 3))), opt.state_dict):
        with pytest.raises(RuntimeError, match="External streams"):  # the simulator has no other streams
            call()
    with monkeypatch.context() as patch:
        order = []
        for module in (on_device, backend, held):
            patch.setattr(module, "let_wait", lambda waiting, other: order.append((waiting, other)))
        patch.setattr(on_device, "as_stream", lambda number: number)
        state = opt.state_dict()
        assert order == [(opt.stream, 77)]
        for call in (lambda: opt.step(arrays(rng)), lambda: opt.load_state_dict(state)):
            order.clear()
            call()
            assert (order[0], order[-1]) == ((opt.stream, 77), (77, opt.stream))
    given[0].stream = 1
    opt.step(arrays(rng))
    opt.stream = cuda.stream()
    opt.step(arrays(rng))


@pytest.mark.torch
@pytest.mark.parametrize("count", [3, 30])
def test_tensors_of_torch_are_updated_where_they_lie(count, rng, monkeypatch):
    """Tensors of the processor stand for tensors of a device, as the simulator's memory is the processor's."""
    import torch

    def interface_of(item):
        if isinstance(item, torch.Tensor):
            item = item.detach().numpy()
            return {**item.__array_interface__, "version": 3}
        return plain(item)

    plain = kernels.interface_of
    monkeypatch.setattr(kernels, "interface_of", interface_of)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    start = arrays(rng, [(3, 2)] * count, [np.float32] * count)
    tensors = [torch.from_numpy(array.copy()) for array in start]
    oracle, opt = RMSProp(start, kernel="numpy"), RMSProp(tensors, kernel="cuda", in_place=True)
    buffer = opt.buffers["params"]
    buffer._finder._device = opt.backend._finder._device = dlpack.CPU
    for _ in range(2):
        gradients = arrays(rng, [(3, 2)] * count, [np.float32] * count)
        given = [torch.from_numpy(gradient) for gradient in gradients]
        given[1] = tensors[0]  # another parameter
        oracle.step([gradients[0], oracle.params[0].copy(), *gradients[2:]])
        opt.step(given)
        assert opt.backend._finder.find(tuple(given), opt.backend.written).sources[1] == kernels.IN_BUFFER
        assert buffer.located() == {kernels.LEGACY_STREAM}
    assert_same_state(opt, oracle)
    for tensor, param in zip(tensors, oracle.params, strict=True):
        assert_same_bits(tensor.numpy(), param)
    before = whole(opt)
    there = tensors[1].data
    tensors[1].data = tensors[1].data.clone()
    with pytest.raises(StructureError, match=r"params\[1\]: expected the original array, .* that was moved"):
        opt.step(given)
    tensors[1].data = there
    assert whole(opt) == before
    opt.step(given)
