"""Checkpoints: a run that is resumed goes on as if nothing had happened; files of older versions too."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import OPTIONS
from checkpoint_files import KINDS, params_of, transfer
from helpers import case_id, everything, same_structure, steps

from fastrms import RMSProp


def draw(rng, dtypes=(np.float32, np.float64)):
    return params_of(rng, dtypes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        *({name: value} | ({"momentum": 0.9} if name == "nesterov" else {}) for name, value in OPTIONS.items()),
        {},
        OPTIONS,
        {"cache_dtype": "bfloat16", "momentum": 0.9, "centered": True},
        {"nonfinite": "skip"},
        {"lr": lambda step: 0.01 / (1 + step)},
    ],
    ids=case_id,
)
def test_resuming_gives_the_bits_of_never_stopping(options, kind, tmp_path):
    dtypes = (np.float32, np.float32) if "cache_dtype" in options else (np.float32, np.float64)
    rng, count = np.random.default_rng(1), steps(200)
    params = params_of(rng, dtypes)
    gradients = [draw(rng, dtypes) for _ in range(count)]
    for t in range(0, count, 3):
        gradients[t]["W"] = None  # sat out: counts for the correction of the bias
    options = {"lr": 0.01} | options
    whole = RMSProp(params, **options)
    for gradient in gradients:
        whole.step(gradient)
    for stop in (0, 1, count // 2, count - 1):
        first = RMSProp(params, **options)
        for gradient in gradients[:stop]:
            first.step(gradient)
        second = RMSProp(draw(np.random.default_rng(2), dtypes), **options)
        second.step(gradients[0])
        transfer(first, second, kind, tmp_path)
        for gradient in gradients[stop:]:
            second.step(gradient)
        assert everything(second) == everything(whole)


def test_a_state_is_a_copy_of_plain_things(rng):
    opt = RMSProp(params_of(rng), momentum=0.9)
    opt.step(draw(rng))
    state = opt.state_dict()
    before = {name: array.tobytes() for name, array in state["arrays"].items()}
    opt.step(draw(rng))
    assert {name: array.tobytes() for name, array in state["arrays"].items()} == before
    arrays = state.pop("arrays")
    assert all(type(array) is np.ndarray for array in arrays.values())
    assert json.loads(json.dumps(state)) == state
    assert state["parameters"][1] == {"path": "['layers'][0]", "shape": [3, 2], "dtype": "float64", "group": 0}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_an_optimizer_from_a_file_alone(kind, rng, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"state.{kind}"
    trees = [
        np.ones((2, 3)),
        [np.ones(3, np.float32), (np.zeros(()), {"a": np.ones((0, 2)), 3: [np.ones(2)]})],
        params_of(rng),
        [{"params": [np.ones(3)], "momentum": 0.5}, {"params": {"b": np.ones(2)}, "lr": 0.25}],
    ]
    for tree in trees:
        opt = RMSProp(tree, centered=True, nonfinite="skip", global_clip_norm=3.0)
        opt.step()
        opt.save(path)
        found = RMSProp.from_checkpoint(path)
        assert same_structure(opt.params, found.params)
        assert everything(found) == everything(opt)
        assert found.nonfinite == "skip"
        assert found.global_clip_norm == 3.0
        assert [dict(g) | {"params": 0} for g in found.param_groups] == [
            dict(g) | {"params": 0} for g in opt.param_groups
        ]
    assert RMSProp.from_checkpoint(path, lr=0.125, kernel="serial").param_groups[1]["lr"] == 0.125


@pytest.mark.parametrize("kind", ["npz", "storage"])
def test_only_groups_whose_rate_was_not_saved_get_the_one_that_is_given(kind, tmp_path):
    schedule, other = (lambda step: 0.5), (lambda step: 0.25)
    path = tmp_path / f"state.{kind}"
    storage = {"storage": path} if kind == "storage" else {}

    def resumed(opt, **options):
        if kind == "storage":
            opt.close()
            return RMSProp.reopen(path, **options)
        opt.save(path)
        return RMSProp.from_checkpoint(path, **options)

    groups = [{"params": [np.ones(2)], "lr": schedule}, {"params": [np.ones(2)], "lr": 0.125}]
    opt = RMSProp(groups, **storage)
    for given in (other, 0.75, other):
        opt = resumed(opt, lr=given)
        assert [group["lr"] for group in opt.param_groups] == [given, 0.125]
        opt.param_groups[0]["lr"] = schedule
    opt.param_groups[0]["lr"] = 0.5
    opt = resumed(opt)
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.125]
    opt = resumed(opt, lr=0.0625)  # nothing is missing: instead of what was saved
    assert [group["lr"] for group in opt.param_groups] == [0.0625, 0.0625]
    opt.step([[np.ones(2)], [np.ones(2)]])
    opt.close()


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("version*.*")), ids=lambda p: p.name)
def test_files_of_older_versions(path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp.from_checkpoint(path)
    assert (opt.steps, opt.skipped_steps) == (3, 0)
    assert opt.params["W"].shape == (2, 3)
    np.testing.assert_allclose(opt.cache["b"], [0.271, 0.271])  # three steps with a gradient of 1
    np.testing.assert_allclose(opt.momentum_buffer["b"], opt.momentum_buffer["b"][0])
    assert opt.param_groups[0]["momentum"] == 0.5
