"""Steps of one parameter at a time, and updates of rows, on the device. The conformance suite shows their bits."""

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, assert_same_state, whole, wide
from simulator import KINDS, Theirs, arrays, cuda, kernels, pair

from fastrms import DtypeError, OptionError, RMSProp, StepInProgressError, StructureError
from fastrms.backends.cuda.parameter import DeviceParameter
from fastrms.kernels import dlpack

SHAPES, DTYPES = [(4, 3), (), (0,), (7,), (2, 1, 3)], [np.float32, np.float64, np.float64, np.float32, np.float64]


@pytest.fixture
def read(monkeypatch):
    """The addresses of the vectors that updates read."""
    addresses, find = [], DeviceParameter.find

    def noted(*arguments):
        found = find(*arguments)
        if found:
            addresses.append(kernels.interface_of(found.vector)["data"][0])
        return found

    monkeypatch.setattr(DeviceParameter, "find", noted)
    return addresses


def take(optimizer, gradients):
    """Take a step one parameter at a time, from the last to the first."""
    for number in reversed(range(len(gradients))):
        assert optimizer.step_parameter(number, gradients[number]) is optimizer.params[number]


# Gradients of all kinds.


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "bias_correction": True, "maximize": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(kind, options, rng):
    oracle, optimizer = pair(arrays(rng, SHAPES, DTYPES), **options)
    for t in range(3):
        gradients = arrays(rng, SHAPES, DTYPES)
        given = [KINDS[kind](g) for g in gradients]
        before = [np.array(g.array) if isinstance(g, Theirs) else None for g in given]
        if t == 1:
            gradients[3] = given[3] = None
        oracle.step(gradients)
        take(optimizer, given)
        for g, value in zip(given, before, strict=True):
            if isinstance(g, Theirs):
                assert_same_bits(g.array, value, "a gradient was written")
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("kind", ["numpy", "list", "bfloat16", *KINDS])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "bias_correction": True, "momentum": 0.9}], ids=str)
def test_gradients_of_rows_of_every_kind(kind, options, rng):
    kinds = {"numpy": lambda g: g, "list": lambda g: g.tolist(), "bfloat16": lambda g: g.astype(ml_dtypes.bfloat16)}
    # More columns than a chunk has elements, and more rows than there are threads.
    table = np.asarray(wide(rng, (9, kernels.CHUNK + 5), np.float32, -1, 1))
    oracle, optimizer = pair([table, np.ones(2)], **options)
    for t, rows in enumerate(([7, 2, -1], [3, 3, 0, 3, 8, 0, 1], [5])):
        gradient = np.asarray(wide(rng, (len(rows), table.shape[1]), np.float32, -2, 0))
        given = (kinds | KINDS)[kind](gradient)
        if kind == "bfloat16":
            gradient = given.astype(np.float32)
        oracle.step_rows(0, rows, gradient)
        optimizer.step_rows(0, Theirs(np.array(rows)) if t else rows, given)
        if isinstance(given, Theirs):
            assert_same_bits(given.array, (kinds | KINDS)[kind](gradient).array, "a gradient was written")
        for opt in (oracle, optimizer):
            opt.step_parameter(1, np.ones(2))
    assert_same_state(optimizer, oracle)


def test_dense_gradients_are_read_where_they_lie(read):
    optimizer = RMSProp([np.ones((4, 3), np.float32), np.ones(4)], kernel="cuda")
    for _ in range(2):
        first, second = Theirs(np.ones((4, 3), np.float32)), Theirs(np.ones(4))
        optimizer.step_rows(0, [2, 0, 1], part := Theirs(np.ones((3, 3), np.float32)))
        optimizer.step_parameter(1, second)
        optimizer.step_parameter(0, first)
        optimizer.step_parameter(1, optimizer.grads[1])
        optimizer.step_parameter(1, optimizer.buffers["grads"].segments[1])  # another array with the same memory
        optimizer.finish_step()
    own = kernels.interface_of(optimizer.grads[1])["data"][0]
    expected = [item.array.ctypes.data for item in (part, second, first)]
    assert read[5:] == [*expected, own, own]


def test_a_copy_of_a_gradient_is_not_written_to_the_gradient_buffer(rng):
    optimizer = RMSProp(arrays(rng, SHAPES, DTYPES), kernel="cuda")
    take(optimizer, arrays(rng, SHAPES, DTYPES))
    take(optimizer, [Theirs(np.asarray(g, np.float64)) for g in arrays(rng, SHAPES, DTYPES)])
    assert not any(view.copy_to_host().any() for view in optimizer.grads)


@pytest.mark.parametrize("name", ["params", "cache"])
def test_a_gradient_that_overlaps_memory_of_the_step_is_read_first(name, rng):
    params = [wide(rng, 9, np.float64, -1, 1) for _ in range(2)]
    oracle, optimizer = pair(params)
    for opt in (oracle, optimizer):
        opt.step(params)
    optimizer.step_parameter(1, optimizer.buffers[name].flat[8:17])  # each element was written just before it is read
    oracle.step_parameter(1, oracle.buffers[name].flat[8:17].copy())
    for opt in (oracle, optimizer):
        opt.step_parameter(0, params[0])
    assert_same_state(optimizer, oracle)


@pytest.mark.torch
def test_tensors_of_torch_are_read_where_they_lie(read, rng, monkeypatch):
    import torch

    monkeypatch.setattr(dlpack, "CUDA", dlpack.CPU)  # tensors of the processor stand for those of a device
    oracle, optimizer = pair(arrays(rng, SHAPES, [np.float32] * 5))
    for _ in range(2):
        gradients = arrays(rng, SHAPES, [np.float32] * 5)
        given = [torch.from_numpy(g.copy()) for g in gradients]
        oracle.step(gradients)
        take(optimizer, given)
        assert read == [tensor.data_ptr() for tensor in reversed(given) if tensor.numel()]
        read.clear()
        rows = [3, 0]
        for opt, gradient in ((oracle, gradients[0][:2]), (optimizer, given[0][:2])):
            opt.step_rows(0, torch.tensor(rows), gradient)
            opt.finish_step()
        assert read == [given[0].data_ptr()]
        read.clear()
    assert_same_state(optimizer, oracle)


# Counts and options.


@pytest.mark.parametrize("name", ["decay_rate", "momentum", "centered", "clip_norm", "clip_value", "lr"])
def test_options_change_from_the_next_update_on(name, rng):
    value = {"decay_rate": 0.5, "momentum": 0.9, "centered": True, "lr": lambda step: 0.1}.get(name, 0.01)
    params = arrays(rng, SHAPES, DTYPES)
    oracle, optimizer = pair([{"params": params[:3]}, {"params": params[3:]}])
    for t in range(4):
        gradients = arrays(rng, SHAPES, DTYPES)
        for opt in (oracle, optimizer):
            if t in (1, 3):
                opt.param_groups[t // 2][name] = value
        oracle.step([gradients[:3], gradients[3:]])
        for number, gradient in enumerate(gradients):
            optimizer.step_parameter((number // 3, number % 3), Theirs(gradient))
    assert_same_state(optimizer, oracle)


def test_steps_of_both_kinds_alternate_with_options_that_the_device_counts_for(rng):
    params = arrays(rng, SHAPES, DTYPES)
    oracle, optimizer = pair(params, bias_correction=True, clip_norm=0.5)
    changes = {3: ("nonfinite", "skip"), 5: ("nonfinite", "propagate"), 8: ("bias_correction", False), 10: ("lr", 0.5)}
    for t in range(12):
        gradients = arrays(rng, SHAPES, DTYPES)
        gradients[t % 5] = None
        if t == 3:
            gradients[(t + 1) % 5][...] = np.nan
        for opt in (oracle, optimizer):
            if t in changes:
                setattr(opt, *changes[t])
        if t % 3 == 2 and oracle.nonfinite == "propagate":
            take(optimizer, [None if g is None else Theirs(g) for g in gradients])
        else:
            optimizer.step(gradients)
        oracle.step(gradients)
        if t % 4 == 3:
            assert_same_state(optimizer, oracle, f"step {t}")
    assert (optimizer.steps, optimizer.skipped_steps) == (11, 1)
    assert_same_state(optimizer, oracle)


def test_a_parameter_without_a_gradient_is_told_by_none_or_by_the_end_of_the_step(rng):
    oracle, optimizer = pair(arrays(rng, SHAPES, DTYPES), momentum=0.9, bias_correction=True)
    for _ in range(2):
        gradient = arrays(rng, SHAPES, DTYPES)[0]
        optimizer.step_parameter(0, Theirs(gradient))
        optimizer.step_parameter(2, None)
        optimizer.finish_step()
        oracle.step([gradient, None, None, None, None])
    gradients = arrays(rng, SHAPES, DTYPES)
    for opt in (oracle, optimizer):
        opt.step(gradients)
    assert_same_state(optimizer, oracle)


def test_what_the_last_step_did_is_not_that_of_an_earlier_step():
    optimizer = RMSProp([np.ones(2)], clip_norm=1.0, nonfinite="skip", kernel="cuda")
    optimizer.step([np.full(2, np.nan)])
    assert optimizer.last_skipped
    optimizer.nonfinite = "propagate"
    optimizer.step([np.ones(2)])
    with pytest.raises(StructureError, match="expected shape"):
        optimizer.step_parameter(0, np.ones(3))
    assert optimizer.last_grad_norm == pytest.approx(np.sqrt(2))
    optimizer.step_parameter(0, np.ones(2))
    assert (optimizer.last_grad_norm, optimizer.last_skipped) == (None, False)


@pytest.mark.parametrize("kind", ["step", "step_parameter", "step_rows"])
def test_numpys_settings_for_errors_are_for_the_users_arithmetic(kind):
    options = {"clip_norm": 1e-30, "bias_correction": True, "decay_rate": 0.5}
    oracle, optimizer = pair([np.ones((3, 2), np.float32)], **options)
    gradient = np.full((3, 2), 1e20)
    for opt in (oracle, optimizer):
        opt.steps = 1060  # from there on the power of the decay rate is subnormal
        with np.errstate(all="raise"):
            if kind == "step_rows":
                opt.step_rows(0, [0, 2, 1], gradient)
            else:
                opt.step([gradient]) if kind == "step" else opt.step_parameter(0, gradient)
    assert_same_state(optimizer, oracle)


def test_nothing_else_is_possible_before_the_step_is_whole(tmp_path):
    optimizer = RMSProp([np.ones(2), np.ones(3)], kernel="cuda", bias_correction=True)
    optimizer.step([None, np.ones(3)])
    optimizer.save(tmp_path / "before.npz")
    before = whole(optimizer)
    optimizer.step_parameter(1, np.ones(3))
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.save(tmp_path / "a.npz")):
        with pytest.raises(StepInProgressError, match=r"with 1 of 2 parameters updated; .* finish_step\(\)"):
            call()
    with pytest.raises(StructureError, match=r"gradients\[1\]: expected one gradient .* 1 of 2 parameters"):
        optimizer.step_parameter(1, np.ones(3))
    optimizer.load(tmp_path / "before.npz")  # ends it
    assert whole(optimizer) == before
    optimizer.step_parameter(1, np.ones(3))
    optimizer.step_parameter(0, np.ones(2))
    assert optimizer.steps == 2


# Waiting for the device.


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}, {"clip_norm": 1.0, "bias_correction": True},
     {"lr": lambda step: 0.1}],
    ids=lambda options: "-".join(options),
)  # fmt: skip
@pytest.mark.parametrize("kind", ["device", "host", "buffer", "rows"])
def test_a_step_does_not_wait_for_the_device(kind, options, rng, no_waiting):
    optimizer = RMSProp(arrays(rng, [(4, 3)], [np.float32]), kernel="cuda", **options)
    for _ in range(10):
        (gradient,) = arrays(rng, [(4, 3)], [np.float32])
        if kind == "rows":
            optimizer.step_rows(0, [1, 3, 3, 0], Theirs(gradient))
        elif kind == "host" and optimizer.steps == 2:
            return  # the third gradient waits until the first one has been copied
        else:
            optimizer.step_parameter(0, {"device": Theirs(gradient), "host": gradient}.get(kind, optimizer.grads[0]))
    assert (optimizer.steps, no_waiting) == (10, [])


def test_another_stream_is_asked_for_by_its_number():
    """The simulator has no other streams, and says so where a GPU would wait."""
    optimizer = RMSProp([np.ones((3, 2))], kernel="cuda")
    with pytest.raises(RuntimeError, match="External streams"):
        optimizer.step_parameter(0, Theirs(np.ones((3, 2)), stream=77))
    with pytest.raises(RuntimeError, match="External streams"):
        optimizer.step_rows(0, [0], Theirs(np.ones((1, 2)), stream=77))
    with pytest.raises(RuntimeError, match="External streams"):
        optimizer.step_rows(0, Theirs(np.array([0]), stream=77), np.ones((1, 2)))
    optimizer.step_parameter(0, Theirs(np.ones((3, 2)), stream=1))
    assert optimizer.steps == 1


# Errors.


MASK = Theirs(np.ones((3, 2)))
WRONG = {
    "key": (("V", np.ones(2)), StructureError, "key: expected one of 'W', 'b', got 'V'"),
    "shape": (
        ("W", Theirs(np.ones((2, 3)))),
        StructureError,
        r"gradients\['W'\]: expected shape \(3, 2\), got \(2, 3\)",
    ),
    "shape on the host": (("W", np.ones((2, 3))), StructureError, r"gradients\['W'\]: expected shape \(3, 2\), got"),
    "complex": (("W", Theirs(np.ones((3, 2), complex))), DtypeError, r"gradients\['W'\]: .* got complex128"),
    "byte order": (("W", Theirs(np.ones((3, 2), ">f4"))), DtypeError, r"gradients\['W'\]: .* got >f4"),
    "mask": (("W", Theirs(np.ones((3, 2)), mask=MASK)), DtypeError, r"gradients\['W'\]: .* a masked array"),
    "text": (("W", "abc"), DtypeError, r"gradients\['W'\]: expected an array, got str"),
}
WRONG_ROWS = {
    "too large": ([3], 1, StructureError, "rows: expected row numbers from -3 to 2, got 3"),
    "too small": (Theirs(np.array([0, -4])), 2, StructureError, "rows: expected row numbers from -3 to 2, got -4"),
    "unsigned": (Theirs(np.array([2**64 - 1], np.uint64)), 1, StructureError, "rows: .* got 18446744073709551615"),
    "float": (Theirs(np.array([0.0])), 1, DtypeError, r"rows: expected a 1-D array of integers, got float64 of shape"),
    "mask of rows": (Theirs(np.ones(3, bool)), 3, DtypeError, "rows: .* got bool .*flatnonzero"),
    "two axes": (Theirs(np.array([[0]])), 1, DtypeError, r"rows: expected a 1-D array of integers, got int64 of shape"),
    "masked": (Theirs(np.array([0]), mask=MASK), 1, DtypeError, "rows: expected an array, got a masked array"),
    "byte order": (Theirs(np.array([0], ">i8")), 1, DtypeError, "rows: expected native byte order .* got >i8"),
    "none": (None, 1, DtypeError, "rows: expected a 1-D array of integers, got None"),
    "fewer gradients": ([0, 1], 1, StructureError, r"gradients\['W'\]: expected shape \(2, 2\), got \(1, 2\)"),
}


def refused(call, optimizer, error, message):
    before = whole(optimizer)
    with pytest.raises(error, match=message):
        call()
    assert whole(optimizer) == before
    optimizer.step({"W": np.ones((3, 2)), "b": np.ones(2)})  # no step was begun


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_key_or_gradient_changes_nothing(wrong):
    optimizer = RMSProp({"W": np.ones((3, 2), np.float32), "b": np.ones(2)}, kernel="cuda")
    arguments, error, message = WRONG[wrong]
    refused(lambda: optimizer.step_parameter(*arguments), optimizer, error, message)


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_wrong_rows_change_nothing(wrong):
    optimizer = RMSProp({"W": np.ones((3, 2), np.float32), "b": np.ones(2)}, kernel="cuda")
    rows, size, error, message = WRONG_ROWS[wrong]
    for gradient in (np.ones((size, 2)), Theirs(np.ones((size, 2)))):
        refused(lambda gradient=gradient: optimizer.step_rows("W", rows, gradient), optimizer, error, message)


@pytest.mark.parametrize("option", [{"global_clip_norm": 1.0}, {"nonfinite": "skip"}, {"nonfinite": "raise"}], ids=str)
def test_options_that_need_all_gradients_are_refused(option):
    optimizer = RMSProp([np.ones(2)], kernel="cuda", **option)
    (name,) = option
    for call in (lambda: optimizer.step_parameter(0, np.ones(2)), lambda: optimizer.step_rows(0, [0], np.ones(1))):
        with pytest.raises(OptionError, match=f"{name}: expected .* one parameter at a time"):
            call()
    assert (optimizer.steps, optimizer.params[0].copy_to_host().tolist()) == (0, [1, 1])


def test_a_replaced_view_is_noticed():
    optimizer = RMSProp([np.ones(2), np.ones(3)], kernel="cuda")
    optimizer.params[1] = cuda.to_device(np.ones(3))
    optimizer.step_parameter(0, np.ones(2))
    with pytest.raises(StructureError, match=r"params\[1\]: expected the original view"):
        optimizer.step_parameter(1, np.ones(3))
