"""Steps that are taken one parameter at a time, and updates of rows. The conformance suite shows their bits."""

import copy
import itertools
import pickle
import sys
import weakref

import numpy as np
import pytest
from helpers import assert_same_state, wide

from fastrms import DtypeError, OptionError, RMSProp, StepInProgressError, StorageError, StructureError
from fastrms.backends.pages import Pages
from fastrms.backends.plan import HostRun
from fastrms.buffers import Layout


def test_steps_of_both_kinds_alternate(rng):
    params = [wide(rng, 5, np.float64, -1, 1), wide(rng, 3, np.float64, -1, 1)]
    ours, oracle = RMSProp(params, kernel="serial"), RMSProp(params, kernel="numpy")
    for t in range(6):
        gradients = [wide(rng, p.size, np.float64, -1, 1) for p in params]
        oracle.step(gradients)
        if t % 3 == 1:
            ours.step_parameter(1, gradients[1])
            ours.step_parameter(0, gradients[0])
        else:
            ours.step(gradients)
        assert_same_state(ours, oracle)


def test_a_parameter_without_a_gradient_is_told_by_none_or_by_the_end_of_the_step(rng):
    options = {"momentum": 0.9, "bias_correction": True}
    params = [np.ones(3), np.ones(4), np.ones(2)]
    ours, oracle = RMSProp(params, **options), RMSProp(params, kernel="numpy", **options)
    gradient = wide(rng, 3, np.float64, -1, 1)
    ours.finish_step()  # no step is in progress
    assert ours.steps == 0
    for _ in range(2):
        ours.step_parameter(0, gradient)
        ours.step_parameter(2, None)
        ours.finish_step()
        oracle.step([gradient, None, None])
    ours.step([gradient, np.ones(4), np.ones(2)])
    oracle.step([gradient, np.ones(4), np.ones(2)])
    assert_same_state(ours, oracle)


def test_a_function_given_as_lr_is_called_once_for_a_step():
    seen = []
    opt = RMSProp([np.ones(2), np.ones(3)], lr=lambda step: seen.append(step) or 0.1)
    for _ in range(2):
        opt.step_parameter(0, np.ones(2))
        opt.step_parameter(1, np.ones(3))
    assert seen == [0, 1]


def test_nothing_else_is_possible_before_the_step_is_whole(tmp_path):
    opt = RMSProp([np.ones(2), np.ones(3)])
    opt.save(tmp_path / "before.npz")
    opt.step_parameter(1, np.ones(3))
    gradients = [np.ones(2), np.ones(3)]
    for call in (
        opt.step,
        lambda: opt.step(gradients),
        opt.state_dict,
        lambda: opt.save(tmp_path / "a.npz"),
        lambda: copy.deepcopy(opt),
        lambda: opt.add_param_group({"params": [np.ones(1)]}),
    ):
        with pytest.raises(StepInProgressError, match=r"with 1 of 2 parameters updated; .* finish_step\(\)"):
            call()
    with pytest.raises(StructureError, match=r"gradients\[1\]: expected one gradient .* 1 of 2 parameters"):
        opt.step_parameter(1, np.ones(3))
    assert opt.steps == 0
    opt.load(tmp_path / "before.npz")  # ends it
    assert opt.params[1].tolist() == [1] * 3
    opt.step(gradients)
    assert opt.steps == 1


@pytest.mark.parametrize("option", [{"global_clip_norm": 1.0}, {"nonfinite": "skip"}, {"nonfinite": "raise"}], ids=str)
def test_options_that_need_all_gradients_are_refused(option):
    opt = RMSProp([np.ones(2)], **option)
    (name,) = option
    with pytest.raises(OptionError, match=f"{name}: expected .* one parameter at a time"):
        opt.step_parameter(0, np.ones(2))
    assert (opt.steps, opt.params[0].tolist()) == (0, [1, 1])


@pytest.mark.parametrize(
    ("key", "gradient", "error", "message"),
    [
        (2, np.ones(2), StructureError, "key: expected one of 0, 1, got 2"),
        ("W", np.ones(2), StructureError, "key: expected one of 0, 1, got 'W'"),
        ([0], np.ones(2), StructureError, r"key: expected one of 0, 1, got \[0\]"),
        (0, np.ones(3), StructureError, r"gradients\[0\]: expected shape \(2,\), got \(3,\)"),
        (1, np.ones(3, complex), DtypeError, r"gradients\[1\]: .* got complex128"),
    ],
)
def test_a_wrong_key_or_gradient_changes_nothing(key, gradient, error, message):
    opt = RMSProp([np.ones(2), np.ones(3)])
    with pytest.raises(error, match=message):
        opt.step_parameter(key, gradient)
    assert [p.tolist() for p in opt.params] == [[1, 1], [1, 1, 1]]
    opt.step([np.ones(2), np.ones(3)])  # no step was begun


def test_a_replaced_view_is_noticed():
    opt = RMSProp([np.ones(2), np.ones(3)])
    opt.params[1] = np.ones(3)
    opt.step_parameter(0, np.ones(2))
    with pytest.raises(StructureError, match=r"params\[1\]: expected the original view"):
        opt.step_parameter(1, np.ones(3))


@pytest.mark.parametrize("kernel", ["numpy", "serial"])
def test_gradients_of_every_kind_are_read_before_memory_is_written(kernel, rng):
    params = [wide(rng, 6, np.float32, -1, 1) for _ in range(5)]
    ours, oracle = RMSProp(params, kernel=kernel), RMSProp(params, kernel="numpy")
    values = [np.array(params[0]), np.arange(6), np.ones(6), params[3], np.float32([1, 2, 3, 4, 5, 6])]
    ours.grads[4][...] = values[4]
    backwards = ours.params[3][::-1]
    given = [ours.params[0], list(range(6)), np.ones(6, np.float64), backwards, ours.grads[4]]
    oracle.step([*values[:3], values[3][::-1].copy(), values[4]])
    for k, gradient in enumerate(given):
        ours.step_parameter(k, gradient)
    assert_same_state(ours, oracle)


@pytest.mark.parametrize("kernel", ["numpy", "serial"])
@pytest.mark.parametrize("name", ["params", "cache"])
def test_a_gradient_that_overlaps_memory_of_the_step_is_read_first(name, kernel, rng):
    params = [wide(rng, 9, np.float64, -1, 1) for _ in range(2)]
    ours, oracle = RMSProp(params, kernel=kernel), RMSProp(params, kernel="numpy")
    for opt in (ours, oracle):
        opt.step(params)
    shifted = ours.buffers[name].flat[8:17]  # each element was written just before it is read
    oracle.step([params[0], shifted.copy()])
    ours.step_parameter(1, shifted)
    ours.step_parameter(0, params[0])
    assert_same_state(ours, oracle)


def test_a_gradient_with_a_dtype_object_of_its_own():
    gradient = pickle.loads(pickle.dumps(np.arange(3.0)))
    assert gradient.dtype is not np.dtype(float)
    opt = RMSProp([np.ones(3)], lr=0.1)
    opt.step_parameter(0, gradient)
    assert opt.params[0].tolist() == RMSProp([np.ones(3)], lr=0.1).step([np.arange(3.0)])[0].tolist()


def test_keys_that_are_tuples():
    params = {("dense", "W"): np.ones(2), ("dense", "b"): np.ones(1)}
    opt = RMSProp(params, lr=0.1)
    opt.step_parameter(("dense", "b"), np.ones(1))
    opt.step_parameter(("dense", "W"), np.ones(2))
    assert opt.steps == 1
    with pytest.raises(StructureError, match=r"key: expected one of \('dense', 'W'\), \('dense', 'b'\), got 'dense'"):
        Layout(params).number_of("dense")


# Rows.


@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
def test_all_rows_in_any_order_are_a_dense_step(kernel, rng):
    table = np.asarray(wide(rng, (200, 16), np.float64, -1, 1))
    options = {"clip_norm": 0.5, "bias_correction": True}
    ours, oracle = RMSProp(table, kernel=kernel, **options), RMSProp(table, kernel="numpy", **options)
    for _ in range(3):
        gradient = np.asarray(wide(rng, table.shape, np.float64, -1, 1))
        order = rng.permutation(len(table))
        ours.step_rows((), order, gradient[order])
        oracle.step(gradient)
    np.testing.assert_allclose(ours.params, oracle.params, rtol=1e-12)  # the norm is added up in another order
    np.testing.assert_allclose(ours.cache, oracle.cache, rtol=1e-12)


@pytest.mark.parametrize(
    ("rows", "gradient", "error", "message"),
    [
        ([4], np.ones((1, 2)), StructureError, "rows: expected row numbers from -4 to 3, got 4"),
        ([-5], np.ones((1, 2)), StructureError, "rows: .* got -5"),
        ([0.5], np.ones((1, 2)), DtypeError, r"rows: expected a 1-D array of integers, got float64 of shape \(1,\)"),
        (np.array([2**64 - 1], np.uint64), np.ones((1, 2)), StructureError, "rows: .* got 18446744073709551615"),
        (None, np.ones((1, 2)), DtypeError, "rows: expected a 1-D array of integers, got None"),
        (np.ma.masked_array([0], [True]), np.ones((1, 2)), DtypeError, "rows: expected an array, got a masked array"),
        ([[0]], np.ones((1, 2)), DtypeError, "rows: expected a 1-D array"),
        ([True], np.ones((1, 2)), DtypeError, "rows: .* got bool"),
        ([0], np.ones((2, 2)), StructureError, r"gradients\[0\]: expected shape \(1, 2\), got \(2, 2\)"),
        ([0], np.ones((1, 2), complex), DtypeError, r"gradients\[0\]: .* got complex128"),
    ],
)
def test_wrong_rows_change_nothing(rows, gradient, error, message):
    opt = RMSProp([np.ones((4, 2)), np.array(1.0)])
    with pytest.raises(error, match=message):
        opt.step_rows(0, rows, gradient)
    with pytest.raises(StructureError, match=r"rows: expected a parameter with rows, params\[1\] has no axis"):
        opt.step_rows(1, [0], np.ones(1))
    assert (opt.params[0] == 1).all()
    opt.step([np.ones((4, 2)), np.array(1.0)])


def test_options_that_change_within_a_step_hold_for_the_parameters_that_follow():
    opt = RMSProp([np.zeros(1), np.zeros(1), np.zeros(1)], lr=lambda step: 0.1)
    opt.step_parameter(0, np.ones(1))
    opt.lr = lambda step: 0.5
    opt.step_parameter(1, np.ones(1))
    opt.lr = 0.25
    opt.step_parameter(2, np.ones(1))
    moved = [-p[0] * np.sqrt(0.1) for p in opt.params]
    assert moved == pytest.approx([0.1, 0.5, 0.25], rel=1e-6)
    opt.step_parameter(0, np.ones(1))
    with pytest.raises(StepInProgressError, match="steps: expected a call between two steps"):
        opt.steps = 7


def test_what_the_last_step_did_is_not_that_of_an_earlier_step():
    opt = RMSProp([np.ones(2)], clip_norm=1.0, nonfinite="skip")
    opt.step([np.full(2, np.nan)])
    assert opt.last_skipped
    opt.nonfinite = "propagate"
    opt.step([np.ones(2)])
    assert opt.last_grad_norm == pytest.approx(np.sqrt(2))
    opt.step_parameter(0, np.ones(2))
    assert (opt.last_grad_norm, opt.last_skipped) == (None, False)


def test_numpys_settings_for_errors_are_for_the_users_arithmetic():
    opt = RMSProp([np.ones(2, np.float32), np.ones((2, 2), np.float32)], clip_norm=1e-30)
    with np.errstate(all="raise"):
        opt.step_parameter(0, np.full(2, 1e20))
        opt.step_rows(1, [0], np.full((1, 2), 1e20))
    assert opt.steps == 1


def test_a_closed_folder_is_left_alone(tmp_path):
    opt = RMSProp([np.ones(2), np.ones(2)], storage=tmp_path / "run")
    opt.step_parameter(0, np.ones(2))
    opt.close()
    for call in (opt.finish_step, lambda: opt.step_parameter(1, np.ones(2))):
        with pytest.raises(StorageError, match="got a closed one"):
            call()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_in_a_folder_only_the_pages_of_the_parameter_are_touched(tmp_path, monkeypatch):
    touched, advise = [], Pages._advise

    def note(pages, array, advice):
        touched.append((array.ctypes.data, array.ctypes.data + array.nbytes))
        advise(pages, array, advice)

    with RMSProp([np.ones(3000), np.ones(5000), np.ones(4000)], momentum=0.9, storage=tmp_path / "run") as opt:
        blocks, own = (
            [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
            for arrays in (
                [buffer.block for buffer in opt.buffers.values()],
                [buffer.leaves[1] for buffer in opt.buffers.values()],
            )
        )
        with monkeypatch.context() as patch:
            patch.setattr(Pages, "_advise", note)
            opt.step_parameter(1, np.ones(5000))
    in_files = [place for place in touched if lies_in_one(place, blocks)]  # not the gradient
    assert in_files
    assert all(lies_in_one(place, own) for place in in_files)


def lies_in_one(place, pieces):
    return any(low <= place[0] and place[1] <= high for low, high in pieces)


def test_a_gradient_is_not_kept_after_its_update():
    opt = RMSProp([np.ones(2), np.ones((3, 2))])
    for call in (lambda g: opt.step_parameter(0, g[0]), lambda g: opt.step_rows(1, [2], g)):
        gradient = np.ones((1, 2))
        seen = weakref.ref(gradient)
        call(gradient)
        del gradient
        assert seen() is None


def test_an_interrupt_while_a_parameter_is_prepared_leaves_nothing_stale(monkeypatch):
    opt, oracle = RMSProp([np.ones(2)]), RMSProp([np.ones(2)], kernel="numpy")
    opt.step_parameter(0, np.ones(2))
    oracle.step([np.ones(2)])
    for each in (opt, oracle):
        each.momentum = 0.9
    with monkeypatch.context() as patch:
        patch.setattr(HostRun, "use_buffers", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.step_parameter(0, np.ones(2))
    for _ in range(2):
        opt.step_parameter(0, np.ones(2))
        oracle.step([np.ones(2)])
    assert_same_state(opt, oracle)


def raise_interrupt(*arguments):
    raise KeyboardInterrupt


def test_an_option_that_a_handler_sets_within_the_call_holds_wholly_or_not_at_all(monkeypatch):
    results = {}
    for name, changes in (("old", {}), ("new", {"momentum": 0.9, "lr": 0.5}), ("mixed", {})):
        opt = RMSProp([np.ones(2)], **{"lr": 0.1} | changes)
        if name == "mixed":
            original, count = HostRun.arguments, itertools.count()

            def arguments(run, *given, opt=opt, original=original, count=count):
                if next(count) == 0:
                    opt.param_groups[0].update(momentum=0.9, lr=0.5)
                return original(run, *given)

            monkeypatch.setattr(HostRun, "arguments", arguments)
        opt.step_parameter(0, np.ones(2))
        results[name] = opt.params[0].tolist()
    assert results["mixed"] in (results["old"], results["new"])
