"""With every backend the state goes on elsewhere: in checkpoints, in copies; and views are the same for life."""

import copy
import pickle

import numpy as np
import pytest
from cases import LAYOUTS, OPTIONS, drawn
from checkpoint_files import KINDS, transfer
from helpers import assert_same_state, items, whole

from fastrms import CheckpointError, RMSProp, StructureError

MIXED = LAYOUTS["list"]
OF_A_RUN = {"momentum": 0.9, "centered": True, "bias_correction": True, "nonfinite": "skip", "clip_norm": 1.0}


def steps_of_a_run(backend, rng, count):
    """Gradients, of which some are absent and some not finite."""
    for t in range(count):
        gradients = backend.gradients(MIXED, rng, OF_A_RUN)
        if t % 2:
            gradients[3] = None
        if t == 2:
            gradients[0][0, 0] = np.nan
        yield gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [OF_A_RUN, OPTIONS, {}], ids=["run", "all options", "defaults"])
def test_a_run_goes_on_with_another_backend_with_the_same_bits(options, kind, backend, rng):
    params = drawn(MIXED, rng)
    never_moved, host = (RMSProp(params, kernel="numpy", **options) for _ in range(2))
    ours = backend.make(params, **options)
    for t, gradients in enumerate(steps_of_a_run(backend, rng, 6)):
        for opt in (never_moved, host, ours):
            opt.step(gradients)
        if t in (1, 3):
            on_host, here = host, ours
            host, ours = RMSProp(drawn(MIXED, rng), kernel="numpy"), backend.make(drawn(MIXED, rng), lr=0.5)
            ours.step(gradients)
            transfer(on_host, ours, kind, backend.folder)
            transfer(here, host, kind, backend.folder)
        for opt in (host, ours):
            assert_same_state(opt, never_moved, f"step {t}")
    assert ours.skipped_steps == ("nonfinite" in options)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_optimizer_is_made_from_a_file_alone(kind, backend, rng):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    layout = LAYOUTS["groups"]
    params = drawn(layout, rng)
    ours, oracle = backend.pair(params, **OF_A_RUN)
    gradients = backend.gradients(layout, rng, OF_A_RUN)
    for opt in (ours, oracle):
        opt.step(gradients)
    path = backend.folder / f"ours.{kind}"
    ours.save(path)
    again = backend.from_checkpoint(path)
    assert (type(again), again.kernel) == (type(ours), ours.kernel)
    for opt in (again, RMSProp.from_checkpoint(path)):
        assert_same_state(opt, oracle)
    again.step(gradients)
    oracle.step(gradients)
    assert_same_state(again, oracle)
    again = backend.from_checkpoint(path, lr=0.125)
    assert [group["lr"] for group in again.param_groups] == [0.125] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_was_added_goes_on_with_another_backend(kind, backend, rng):
    body, head = LAYOUTS["nested"], LAYOUTS["list"]
    params = [drawn(body, rng), drawn(head, rng)]
    ours, host = backend.make(params[0], **OF_A_RUN), RMSProp(params[0], kernel="numpy", **OF_A_RUN)
    never_moved = RMSProp([{"params": group} for group in params], kernel="numpy", **OF_A_RUN)
    ours.add_param_group({"params": backend.given(params[1])})
    host.add_param_group({"params": params[1]})
    for t in range(3):
        gradients = [backend.gradients(body, rng, OF_A_RUN), backend.gradients(head, rng, OF_A_RUN)]
        if t == 1:
            gradients[1][0] = None
        for opt in (ours, host, never_moved):
            opt.step(gradients)
        on_host, here = (host, ours) if t else (never_moved, never_moved)
        transfer(on_host, ours, kind, backend.folder)
        transfer(here, host, kind, backend.folder)
        for opt in (ours, host):
            assert_same_state(opt, never_moved, f"step {t}")
    if kind != "dict":
        path = backend.folder / f"last.{kind}"
        ours.save(path)
        for opt in (backend.from_checkpoint(path), RMSProp.from_checkpoint(path)):
            assert_same_state(opt, never_moved)


def test_options_are_those_of_the_state_that_is_loaded(backend):
    opt = backend.make([{"params": [np.ones(3)]}, {"params": np.ones(2), "momentum": 0.9}])
    opt.step([[np.ones(3)], np.ones(2)])
    groups = [{"params": [np.ones(3)], "lr": 0.5}, {"params": np.ones(2), "centered": True}]
    other = RMSProp(groups, global_clip_norm=2.0, kernel="numpy")
    opt.load_state_dict(other.state_dict())
    assert [group["lr"] for group in opt.param_groups] == [0.5, 1e-3]
    assert [group["centered"] for group in opt.param_groups] == [False, True]
    assert (opt.global_clip_norm, opt.steps) == (2.0, 0)
    for each in (opt, other):
        each.step([[np.ones(3)], np.ones(2)])
    ours, theirs = opt.state_dict()["arrays"], other.state_dict()["arrays"]
    assert all(ours[name].tobytes() == array.tobytes() for name, array in theirs.items())
    # The momentum that was there before is as new.
    assert not any(array.any() for name, array in ours.items() if name.startswith("momentum_buffer"))


def test_a_state_that_does_not_fit_changes_nothing(backend):
    opt = backend.make([np.ones(3)], momentum=0.9)
    opt.step([np.ones(3)])
    before = whole(opt)
    for other, message in (
        (RMSProp([np.ones(4)]), r"params\[0\]: expected shape \[3\], got \[4\]"),
        (RMSProp([np.ones(3, np.float32)]), "dtype"),
        (RMSProp([np.ones(3), np.ones(1)]), "parameters"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opt.load_state_dict(other.state_dict())
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        opt.load(backend.folder / "none.npz")
    assert whole(opt) == before


@pytest.mark.parametrize("count", [0, 3, 1022, 5000])
def test_the_count_of_steps_goes_on_from_any_number(count, backend):
    ours, oracle = backend.pair([np.ones(3)], bias_correction=True, decay_rate=0.9999)
    state = oracle.state_dict() | {"steps": count}
    for opt in (oracle, ours):
        opt.load_state_dict(state)
        for value in (0.5, -3.0):
            opt.step([np.full(3, value)])
    assert_same_state(ours, oracle)
    ours.steps = 7
    assert ours.steps == 7


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))],
                         ids=["copy", "deepcopy", "pickle"])  # fmt: skip
def test_copies_go_on_alone_or_are_refused(again, backend, rng):
    opt = backend.make([{"params": drawn(MIXED, rng), "lr": 0.1}], **OF_A_RUN)
    first, second = ([gradients] for gradients in steps_of_a_run(backend, rng, 2))
    opt.step(first)
    before = whole(opt)
    if "copies" in backend.refuses:
        error, message = backend.refuses["copies"]
        with pytest.raises(error, match=message):
            again(opt)
        return
    other = again(opt)
    assert (type(other), other.kernel) == (type(opt), opt.kernel)
    other.step(second)
    assert whole(opt) == before
    opt.step(second)
    assert_same_state(opt, other)
    other.param_groups[0]["lr"] = 0.7
    assert opt.lr == 0.1


NAMES = ("params", "grads", "cache", "momentum_buffer", "grad_avg")


def test_views_are_the_same_for_life(backend, rng):
    opt = backend.make(drawn(MIXED, rng), momentum=0.9, centered=True)
    views = {name: items(getattr(opt, name)) for name in NAMES}
    state = opt.state_dict()
    opt.step(drawn(MIXED, rng))
    opt.load_state_dict(state)
    opt.param_groups[0]["bias_correction"] = True
    opt.step()
    for name in NAMES:
        assert all(view is now for view, now in zip(views[name], items(getattr(opt, name)), strict=True)), name
        with pytest.raises(AttributeError, match=f"{name}: these views cannot be replaced"):
            setattr(opt, name, [])
    assert opt.check() == []


def test_what_is_put_in_the_place_of_a_view_is_noticed(backend):
    opt = backend.make([np.ones(3), np.ones(2)])
    view, before = opt.params[0], whole(opt)
    opt.params[0] = np.ones(3)
    assert len(opt.check()) == 1
    with pytest.raises(StructureError, match=r"params\[0\]: expected the original view"):
        opt.step([np.ones(3), np.ones(2)])
    opt.params[0] = view
    assert whole(opt) == before
    assert opt.step([np.ones(3), np.ones(2)])[0] is view
