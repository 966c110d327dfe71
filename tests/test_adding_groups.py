"""`RMSProp.add_param_group`, and the attributes that say what the last step did."""

import copy
import pickle

import numpy as np
import pytest
from cases import OPTIONS, WAYS
from helpers import assert_same_bits, assert_same_state

from fastrms import DtypeError, OptionError, RMSProp, StructureError
from fastrms._state import OptimizerState
from fastrms.backends.host import HostBackend

BODY = {"W": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "b": np.linspace(-1, 1, 5)}
HEAD = [np.linspace(-2, 1, 7, dtype=np.float32), np.linspace(0, 1, 3, dtype=np.float32)]


def test_views_containers_and_the_list_of_groups_stay(rng):
    opt = RMSProp(BODY)
    view, container, listed = opt.params["W"], opt.params, opt.param_groups
    opt.add_param_group({"params": HEAD})
    assert opt.params[0] is container
    assert opt.params[0]["W"] is view
    assert opt.param_groups is listed
    assert opt.param_groups[1]["params"] is opt.params[1]
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        copied.step([BODY, HEAD])
        assert (copied.steps, opt.steps) == (1, 0)


@pytest.mark.parametrize("options", [OPTIONS, {"cache_dtype": "bfloat16", "momentum": 0.5}], ids=["all", "bfloat16"])
def test_a_checkpoint_fits_an_optimizer_that_was_made_with_both_groups(options, rng, tmp_path):
    body = {"W": BODY["W"]}
    ours = RMSProp(body, **options)
    ours.add_param_group({"params": HEAD})
    ours.add_param_group({"params": np.ones(4, np.float32), "maximize": False})
    oracle = RMSProp([{"params": body}, {"params": HEAD}, {"params": np.ones(4, np.float32), "maximize": False}],
                     kernel="numpy", **options)  # fmt: skip
    gradients = [{"W": BODY["W"]}, HEAD, np.ones(4, np.float32)]
    for opt in (ours, oracle):
        opt.step(gradients)
    ours.save(tmp_path / "a.npz")
    oracle.save(tmp_path / "b.npz")
    for path in ("a.npz", "b.npz"):
        again = RMSProp.from_checkpoint(tmp_path / path)
        assert_same_state(again, oracle)
        ours.load(tmp_path / path)
        assert_same_state(ours, oracle)
    for opt in (ours, oracle):
        opt.step(gradients)
    assert_same_state(ours, oracle)


@pytest.mark.parametrize("in_place", [False, True])
def test_state_that_a_later_option_needs_is_made_for_all_groups(in_place):
    ours = RMSProp([np.ones(3)], in_place=in_place)
    ours.add_param_group({"params": [np.ones(2)], "momentum": 0.5})
    oracle = RMSProp([{"params": [np.ones(3)]}, {"params": [np.ones(2)], "momentum": 0.5}], kernel="numpy")
    for opt in (ours, oracle):
        opt.step([[np.ones(3)], [np.ones(2)]])
        opt.centered = True
        opt.step([[np.ones(3)], [np.ones(2)]])
    assert_same_state(ours, oracle)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ([np.ones(2)], StructureError, "group: expected a dict with the key 'params', got"),
        ({"lr": 0.1}, StructureError, "group: expected a dict with the key 'params'"),
        ({"params": [np.ones(2, int)]}, DtypeError, r"params\[1\]\[0\]: expected float32 or float64, got int64"),
        ({"params": [np.ones(2)], "lr": -1.0}, OptionError, "lr: expected"),
        ({"params": [np.ones(2)], "rate": 1.0}, OptionError, r"param_groups\[1\]: 'rate' is not an option"),
        ({"params": [{"params": [np.ones(2)]}]}, StructureError, "group: expected one parameter group, got groups"),
        ({"params": []}, StructureError, r"params\[1\]: expected at least one array"),
    ],
)
def test_a_wrong_group_changes_nothing(group, error, message):
    opt = RMSProp([np.ones(2)], lr=0.1)
    with pytest.raises(error, match=message):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    opt.step([np.ones(2)])


def test_a_parameter_of_another_group_is_refused():
    array = np.ones(4)
    held = RMSProp([array], in_place=True)
    with pytest.raises(StructureError, match=r"params\[1\]: expected new parameters, got an array that shares memory"):
        held.add_param_group({"params": [array[1:]]})
    with pytest.raises(StructureError, match=r"shares memory .* or with gradients or state"):
        held.add_param_group({"params": [held.cache[0]]})
    views = RMSProp([array])
    with pytest.raises(StructureError, match=r"params\[1\]: expected new parameters"):
        views.add_param_group({"params": [views.params[0]]})


def test_a_change_of_the_list_of_groups_is_refused():
    opt = RMSProp([np.ones(2)])
    with pytest.raises(StructureError, match=r"add a group with optimizer\.add_param_group\(group\)"):
        opt.param_groups.append({"params": [np.ones(2)]})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"W": np.ones(2), "b": np.ones(2)}, "gradients: expected a list or tuple of 2 items, got a dict of 2 items"),
        ([np.ones(2)], "gradients: expected 2 items, got 1"),
        ([np.ones(2), np.ones(2)], r"gradients\[0\]: expected a list or tuple of 2 items, got an array of"),
        (np.ones(2), "gradients: expected a list or tuple of 2 items, got an array"),
    ],
    ids=["dict", "list", "list of as many items as groups", "array"],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_in_the_structure_before_a_group_was_added(params, message, in_place):
    opt = RMSProp(params, in_place=in_place)
    opt.add_param_group({"params": [np.ones(1)]})
    for each in (opt, pickle.loads(pickle.dumps(opt))):
        with pytest.raises(StructureError, match=f"^{message}.*; since add_param_group was called, there is one item"):
            each.step(params)
    assert opt.steps == 0


def test_an_error_about_memory_leaves_no_buffer_for_the_other_groups(monkeypatch):
    opt = RMSProp([np.ones(2)])
    with monkeypatch.context() as patch:
        patch.setattr(OptimizerState, "take_in", no_memory)
        with pytest.raises(MemoryError):
            opt.add_param_group({"params": [np.ones(1)], "momentum": 0.5})
    assert (len(opt.param_groups), opt.momentum_buffer) == (1, None)
    opt.step([np.ones(2)])


def no_memory(*arguments):
    raise MemoryError


def test_gradients_of_the_buffer_in_another_order_are_read_before_it_is_written():
    ours = RMSProp([np.ones(3)])
    ours.add_param_group({"params": [np.ones(3), np.ones(3)]})
    oracle = RMSProp([{"params": [np.ones(3)]}, {"params": [np.ones(3), np.ones(3)]}], kernel="numpy")
    (a,), (b, c) = ours.grads
    a[...], b[...], c[...] = 1.0, 2.0, 3.0
    ours.step([[b], [c, a]])
    oracle.step([[np.full(3, 2.0)], [np.full(3, 3.0), np.full(3, 1.0)]])
    assert_same_state(ours, oracle)


def test_many_groups_are_copied():
    opt = RMSProp([np.ones(1)])
    for _ in range(200):
        opt.add_param_group({"params": [np.ones(1)]})
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        copied.step([[np.ones(1)]] * 201)
        assert copied.params[200][0] != 1


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("where", ["_use_parameters", "add_state", "new_run", "settle_parameters"])
def test_an_interrupt_while_a_group_is_added_leaves_all_of_it_or_nothing(where, one_by_one, monkeypatch):
    opt = RMSProp([np.ones(2)])
    opt.step([np.ones(2)])
    with monkeypatch.context() as patch:
        patch.setattr(HostBackend, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.add_param_group({"params": [np.ones(3)]})
    if len(opt.param_groups) == 1:
        opt.step([np.ones(2)])
        return
    new = opt.param_groups[1]
    new["lr"] = 0.5
    assert new["params"] is opt.params[1]
    if one_by_one:
        opt.step_parameter((0, 0), np.ones(2))
        opt.step_parameter((1, 0), np.ones(3))
    else:
        opt.step([[np.ones(2)], [np.ones(3)]])
    assert opt.params[1][0][0] == pytest.approx(1 - 0.5 / np.sqrt(0.1))
    assert opt.steps == 2
    opt.load_state_dict(opt.state_dict())


def interrupt(*arguments):
    raise KeyboardInterrupt


# What the last step did.


def test_gradients_are_set_to_zero(tmp_path):
    params = [np.ones(3), np.ones(2, np.float32)]
    for opt in (RMSProp(params), RMSProp(params, storage=tmp_path / "run")):
        for view in opt.grads:
            view[...] = 2.0
        opt.zero_grad()
        assert [view.tolist() for view in opt.grads] == [[0] * 3, [0] * 2]
        opt.close()


@pytest.mark.parametrize("way", WAYS)
def test_the_norm_of_the_last_gradients(way):
    opt = RMSProp([np.ones(2), np.ones(1)], **WAYS[way])
    gradients = [np.array([3.0, 0.0]), np.array([4.0])]
    assert opt.last_grad_norm is None
    opt.step(gradients)
    assert opt.last_grad_norm is None
    opt.global_clip_norm = 1.0
    opt.step(gradients)
    assert opt.last_grad_norm == 5.0
    opt.step([None, gradients[1]])
    assert opt.last_grad_norm == 4.0
    opt.param_groups[0].update(clip_norm=0.5, clip_value=3.0)
    opt.step([g * 10 for g in gradients])
    assert opt.last_grad_norm == pytest.approx(np.sqrt(18))
    opt.param_groups[0].update(clip_norm=None, clip_value=None)
    opt.global_clip_norm = None
    assert opt.last_grad_norm == pytest.approx(np.sqrt(18))  # of the last step
    opt.step(gradients)
    opt.step(gradients)
    assert opt.last_grad_norm is None


def test_the_learning_rate_of_the_next_step():
    opt = RMSProp([{"params": [np.ones(1)], "lr": 0.5}, {"params": [np.ones(1)]}], lr=lambda step: 1 / (1 + step))
    assert opt.current_lr == [0.5, 1.0]
    opt.step([[np.ones(1)], [np.ones(1)]])
    assert opt.current_lr == [0.5, 0.5]


def test_whether_the_last_step_was_skipped():
    opt = RMSProp([np.ones(2)], nonfinite="skip")
    seen = [opt.last_skipped]
    for value in (1.0, np.nan, np.inf, 1.0, 1.0):
        opt.step([np.full(2, value)])
        seen.append(opt.last_skipped)
    assert seen == [False, False, True, True, False, False]
    opt.step([np.full(2, np.nan)])
    opt.nonfinite = "propagate"
    opt.step([np.ones(2)])
    assert not opt.last_skipped


def test_a_norm_with_an_inf_that_clipping_by_value_hides_is_still_an_error():
    opt = RMSProp([np.ones(2)], nonfinite="skip", clip_value=1.0, clip_norm=1.0)
    opt.step([np.array([1.0, np.inf])])
    assert (opt.last_skipped, opt.steps) == (True, 0)
    assert_same_bits(opt.params[0], np.ones(2))
