"""Parameters that stay in the arrays of the program. That their bits are right is shown for every backend elsewhere."""

import copy
import pickle
import types

import numpy as np
import pytest
from cases import WAYS
from helpers import assert_same_bits, assert_same_state, count_calls, wide

from fastrms import DtypeError, OptionError, OptionTypeError, RMSProp, StructureError
from fastrms.kernels import pointers


def read_only(array):
    array.flags.writeable = False
    return array


def test_the_parameters_are_the_given_arrays():
    weights, bias = np.ones((3, 2)), np.ones(2, np.float32)
    opt = RMSProp({"W": weights, "layers": [bias]}, lr=0.1, in_place=True)
    assert opt.params["W"] is weights
    assert opt.params["layers"][0] is bias
    opt.step({"W": np.ones((3, 2)), "layers": [np.ones(2)]})
    assert weights[0, 0] == opt.params["W"][0, 0] != 1
    assert bias[0] != 1
    assert opt.check(W=weights, b=bias, part=weights[1:]) == []
    assert opt.check(W=weights * 2) == [
        "W: expected an array that is updated in place, got an array in other memory; take the view from params again"
    ]


def test_check_reports_arrays_that_changed_objects_around_arrays_and_no_gradients():
    array = np.ones((2, 3))
    opt = RMSProp([array], in_place=True)
    assert opt.check(dW=opt.grads[0][1:]) == []
    assert opt.check(W=types.SimpleNamespace(data=array)) == [
        "W: expected an array that is updated in place, got SimpleNamespace object; pass the array that it holds"
    ]
    array.shape = (3, 2)
    (problem,) = opt.check()
    assert "changed to shape (3, 2)" in problem


def test_subclasses_of_arrays_are_kept():
    class Tensor(np.ndarray):
        pass

    tensor = np.ones(3).view(Tensor)
    opt = RMSProp([tensor], lr=0.1, in_place=True)
    opt.step([np.ones(3)])
    assert opt.params[0] is tensor
    assert tensor[0] != 1


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (read_only(np.ones(2)), "got one that is read-only"),
        (np.ones((2, 3)).T, "got one that is not C-contiguous"),
        (np.ones(4)[::2], "got one that is not C-contiguous"),
        (np.ones(2, ">f4"), "got one that is of dtype >f4 in another byte order"),
        (np.frombuffer(bytearray(17), np.uint8)[1:].view(np.float64), "got one that is not aligned"),
        ([1.0, 2.0], "got float object"),
        (np.float64(1.0), "got float64"),
        (np.ones(2, np.float16), r"expected float32 or float64, got float16"),
    ],
    ids=["read-only", "transposed", "strided", "byte order", "not aligned", "list", "number", "float16"],
)
def test_arrays_that_a_step_cannot_update_are_refused_by_name(array, got):
    with pytest.raises((DtypeError, StructureError), match=rf"params\['W'\].*{got}"):
        RMSProp({"b": np.ones(2), "W": array}, in_place=True)


def test_arrays_that_share_memory_are_refused():
    array = np.ones(4)
    with pytest.raises(StructureError, match=r"params\[0\] and params\[1\] share memory"):
        RMSProp([array[:3], array[2:]], in_place=True)


def test_storage_is_refused_because_its_folder_would_lack_the_parameters(tmp_path):
    with pytest.raises(OptionError, match=r"in_place: expected False with storage, .* pass np\.memmap arrays without"):
        RMSProp([np.ones(2)], in_place=True, storage=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionTypeError, match="in_place: expected True or False, got 1"):
        RMSProp([np.ones(2)], in_place=1)


@pytest.mark.parametrize("way", WAYS)
def test_arrays_in_files_are_updated_there(way, rng, tmp_path):
    start = [wide(rng, (6, 2000), np.float32, -1, 1), wide(rng, 5, np.float64, -1, 1)]
    arrays = [np.memmap(tmp_path / f"{k}.bin", array.dtype, "w+", shape=array.shape) for k, array in enumerate(start)]
    for array, values in zip(arrays, start, strict=True):
        array[...] = values
    opt, oracle = RMSProp(arrays, in_place=True, momentum=0.9, **WAYS[way]), RMSProp(start, momentum=0.9)
    for number in range(3):
        gradients = [wide(rng, array.shape, array.dtype, -1, 1) for array in start]
        oracle.step(gradients)
        if number == 1:
            for k, gradient in enumerate(gradients):
                opt.step_parameter(k, gradient)
        else:
            opt.step(gradients)
    opt.step_rows(0, [5, 0], np.ones((2, 2000)))
    oracle.step_rows(0, [5, 0], np.ones((2, 2000)))
    opt.finish_step()
    oracle.finish_step()
    assert_same_state(opt, oracle)
    opt.save(tmp_path / "run.npz")
    for array in arrays:
        array.flush()
    again = [np.memmap(tmp_path / f"{k}.bin", array.dtype, "r+", shape=array.shape) for k, array in enumerate(start)]
    for array, param in zip(again, oracle.params, strict=True):
        assert_same_bits(np.asarray(array), param)
    resumed = RMSProp(again, in_place=True, **WAYS[way])
    resumed.load(tmp_path / "run.npz")
    for optimizer in (resumed, oracle):
        optimizer.step(start)
    assert_same_state(resumed, oracle)
    with pytest.raises(DtypeError, match=r"params\[0\]: .* got one that is read-only"):
        RMSProp([np.memmap(tmp_path / "1.bin", np.float64, "r")], in_place=True)


def test_an_array_of_a_new_group_is_named_with_the_number_of_the_group():
    opt = RMSProp([np.ones(2)], in_place=True)
    with pytest.raises(DtypeError, match=r"^params\[1\]\['W'\]: .* got one that is read-only"):
        opt.add_param_group({"params": {"W": read_only(np.ones(2))}})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("zero_copy", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_an_array_that_becomes_read_only_is_named_and_nothing_is_updated(way, zero_copy, monkeypatch):
    if not zero_copy:
        monkeypatch.setattr(pointers, "available", lambda: False)
    arrays = [np.ones(3), np.ones(2)]
    opt = RMSProp(arrays, in_place=True, **WAYS[way])
    gradients = [np.ones(3), np.ones(2)]
    for call in (lambda: opt.step(gradients), opt.step, lambda: opt.step_parameter(1, gradients[1])):
        opt.step(gradients)
        opt.step()
        before = opt.state_dict()["arrays"]
        arrays[1].flags.writeable = False
        with pytest.raises(StructureError, match=r"params\[1\]: expected an array that a step can write to, .* read-"):
            call()
        for name, array in opt.state_dict()["arrays"].items():
            assert_same_bits(array, before[name])
        arrays[1].flags.writeable = True
    opt.step(gradients)


def test_an_array_that_changes_its_shape_is_named():
    array = np.ones((2, 3))
    opt = RMSProp([array], in_place=True)
    opt.step([np.ones((2, 3))])
    array.shape = (3, 2)
    with pytest.raises(StructureError, match=r"params\[0\]: expected the original array, .* to shape \(3, 2\)"):
        opt.step([np.ones((2, 3))])


def test_a_replaced_item_of_params_is_noticed():
    opt = RMSProp([np.ones(2), np.ones(3)], in_place=True)
    opt.params[0] = opt.params[0] * 2
    with pytest.raises(StructureError, match=r"params\[0\]: expected the original view"):
        opt.step([np.ones(2), np.ones(3)])


@pytest.mark.parametrize("order", [1, -1], ids=["dense", "backwards"])
@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
def test_gradients_that_share_memory_with_parameters_are_read_first(kernel, order, rng):
    start = [wide(rng, 8, np.float64, -1, 1) for _ in range(3)]
    ours, oracle = RMSProp(copy.deepcopy(start), in_place=True, kernel=kernel), RMSProp(start, kernel="numpy")
    ours.step([ours.params[1], ours.params[0], ours.params[2][::order]])
    oracle.step([start[1], start[0], start[2][::order]])
    assert_same_state(ours, oracle)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_of_program_and_optimizer_keeps_them_together(make):
    arrays = [np.ones(2), np.ones(3)]
    opt = RMSProp(arrays, lr=0.1, in_place=True)
    copied, other = make((arrays, opt))
    assert all(ours is theirs for ours, theirs in zip(other.params, copied, strict=True))
    other.step([np.ones(2), np.ones(3)])
    assert copied[0][0] != 1
    assert arrays[0][0] == 1


def test_a_checkpoint_is_loaded_into_the_arrays(rng):
    start = [wide(rng, 5, np.float32, -1, 1), wide(rng, 4, np.float64, -1, 1), wide(rng, 3, np.float32, -1, 1)]
    views = RMSProp(start, momentum=0.9)
    views.step(start)
    arrays = [np.zeros_like(array) for array in start]
    opt = RMSProp(arrays, in_place=True)
    opt.load_state_dict(views.state_dict())
    for array, param in zip(arrays, views.params, strict=True):
        assert_same_bits(array, param)
    views.step(start)
    opt.step(start)
    assert_same_state(opt, views)


def test_there_is_no_vector_behind_the_parameters():
    opt = RMSProp([np.ones(2), np.ones(3)], in_place=True)
    with pytest.raises(StructureError, match="flat: expected parameters in one buffer"):
        opt.buffers["params"].flat  # noqa: B018 - reading raises
    assert opt.buffers["grads"].flat.shape == (5,)
    assert [vector.shape for vector in opt.buffers["params"].unflatten(np.zeros(5))] == [(2,), (3,)]


@pytest.mark.skipif(not pointers.available(), reason="a steady step is one compiled call only with addresses")
def test_a_steady_step_calls_as_few_functions_as_with_views():
    gradients = [np.ones(10) for _ in range(100)]
    counts = []
    for in_place in (False, True):
        opt = RMSProp([np.ones(10) for _ in range(100)], kernel="serial", in_place=in_place)
        for _ in range(3):
            opt.step(gradients)
        counts.append(count_calls(lambda opt=opt: opt.step(gradients)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("way", WAYS)
def test_no_step_reads_a_gradient_of_an_earlier_step(way, rng):
    start = [wide(rng, 5, np.float32, -1, 1), wide(rng, 3, np.float32, -1, 1)]
    ours = RMSProp(copy.deepcopy(start), in_place=True, **WAYS[way])
    oracle = RMSProp(start, kernel="numpy")
    forms = [None, np.float32, np.float64, np.float32, None, np.float64, None]  # the buffer, in place, or copied
    for form in [*forms, *forms]:
        gradients = [wide(rng, array.size, np.float32, -1, 1) for array in start]
        oracle.step(gradients)
        if form is None:
            for view, gradient in zip(ours.grads, gradients, strict=True):
                view[...] = gradient
            ours.step()
        else:
            ours.step([gradient.astype(form) for gradient in gradients])
        assert_same_state(ours, oracle)


def test_an_array_that_was_moved_is_noticed_by_steps_and_by_saving():
    array = np.ones(5)
    opt = RMSProp([array], in_place=True)
    opt.step([np.ones(5)])
    array.resize(100_000, refcheck=False)
    others = [np.ones(5) for _ in range(100)]  # in the memory where the array was
    array.resize(5, refcheck=False)
    for call in (lambda: opt.step([np.ones(5)]), opt.state_dict):
        with pytest.raises(StructureError, match=r"params\[0\]: expected the original array, .* that was moved"):
            call()
    del others


def test_a_checkpoint_is_not_loaded_into_a_read_only_array():
    arrays = [np.ones(2), np.ones(3)]
    opt = RMSProp(arrays, in_place=True)
    state = RMSProp([np.zeros(2), np.zeros(3)]).state_dict()
    arrays[1].flags.writeable = False
    with pytest.raises(StructureError, match=r"params\[1\]: expected an array that a step can write to"):
        opt.load_state_dict(state)
    assert [array.tolist() for array in arrays] == [[1] * 2, [1] * 3]


def test_read_only_arrays_of_a_pickle_are_refused_by_a_step_only():
    opt = RMSProp([np.ones(2)], in_place=True)
    opt.params[0].flags.writeable = False
    buffers = []
    pickled = pickle.dumps(opt, protocol=5, buffer_callback=buffers.append)
    copied = pickle.loads(pickled, buffers=[bytes(buffer) for buffer in buffers])
    assert copied.state_dict()["arrays"]["params/float64"].tolist() == [1, 1]
    with pytest.raises(StructureError, match=r"params\[0\]: expected an array that a step can write to"):
        copied.step([np.ones(2)])
