"""With every backend an error changes nothing, and the next step is as if it had not been."""

import numpy as np
import pytest
from cases import LAYOUTS, WRONG_GRADIENTS, drawn
from helpers import assert_same_state, whole

from fastrms import NonfiniteError, OptionError, OptionTypeError, StepInProgressError, StructureError

MIXED = LAYOUTS["list"]


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
def test_wrong_gradients_raise_the_same_error_and_change_nothing(wrong, backend):
    optimizers = ours, oracle = backend.pair([np.ones(2), np.ones(3)], momentum=0.9)
    gradients, error, message = WRONG_GRADIENTS[wrong]
    ours.step([np.ones(2), np.ones(3)])
    before = whole(ours)
    with pytest.raises(error, match=message):
        ours.step(gradients)
    assert whole(ours) == before
    ours.step([np.ones(2), np.ones(3)])
    for _ in range(2):
        oracle.step([np.ones(2), np.ones(3)])
    assert_same_state(*optimizers)


def test_keys_of_gradients_that_are_missing_or_unknown_are_named(backend):
    opt = backend.make({"W": np.ones(2), "b": np.ones(1)})
    before = whole(opt)
    with pytest.raises(StructureError, match="gradients: missing 'b'"):
        opt.step({"W": np.ones(2)})
    with pytest.raises(StructureError, match="gradients: unknown 'extra'"):
        opt.step({"W": np.ones(2), "b": np.ones(1), "extra": np.ones(1)})
    assert whole(opt) == before


@pytest.mark.parametrize("bad", [float("nan"), -1.0, "fast", None, 1e39])
def test_a_function_given_as_lr_that_returns_no_rate_changes_nothing(bad, backend):
    opt = backend.make([np.ones(3, np.float32)], lr=lambda step: 0.1 if step < 1 else bad)
    opt.step([np.ones(3)])
    before = whole(opt)
    with pytest.raises((OptionError, OptionTypeError), match="the function given as lr returned, at step 1: lr: "):
        opt.step([np.ones(3)])
    assert whole(opt) == before


def test_a_function_given_as_lr_that_raises_or_steps_changes_nothing(backend, rng):
    optimizers = ours, _ = backend.pair(drawn(MIXED, rng))
    gradients = drawn(MIXED, rng)
    for error, rate in (
        (ZeroDivisionError, lambda step: 1 / 0),
        (StepInProgressError, lambda step: ours.step() and 0.1),
        (StepInProgressError, lambda step: ours.load_state_dict({}) or 0.1),
    ):
        ours.lr = rate
        with pytest.raises(error):
            ours.step(gradients)
    ours.lr = 1e-3
    assert_same_state(*optimizers)
    for opt in optimizers:
        opt.step(gradients)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", ["list", "cast", "buffer"])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 1.0}, {"clip_value": 0.5, "global_clip_norm": 1.0}, {"bias_correction": True, "momentum": 0.5}],
    ids=str,
)
def test_gradients_that_are_not_finite_are_refused_or_skipped(options, way, bad, backend, rng):
    layout = [LAYOUTS["array"], *MIXED[1:], LAYOUTS["one large"]]
    params = drawn(layout, rng, large=backend.large)
    raising = backend.make(params, nonfinite="raise", **options)
    skipping, oracle = backend.pair(params, nonfinite="skip", **options)

    def give(opt, gradients):
        if way == "buffer":
            for view, gradient in zip(opt.grads, gradients, strict=True):
                backend.fill(view, gradient) if opt is not oracle else view.__setitem__(..., gradient)
            return opt.step()
        return opt.step([np.asarray(g, np.float64, order="F") if way == "cast" else g for g in gradients])

    for t in range(2):
        gradients = backend.gradients(layout, rng, options)
        spoilt = [gradient.copy() for gradient in gradients]
        spoilt[0][3, 2] = spoilt[0][1, 1] = spoilt[4][-1] = bad
        before = whole(raising), whole(skipping) | {"skipped_steps": t + 1}
        with pytest.raises(NonfiniteError, match=r"gradients\[0\]: . NaN and . inf among 12 values; gr") as caught:
            give(raising, spoilt)
        assert caught.value.counts == {"[0]": 2, "[4]": 1}
        assert give(skipping, spoilt) is skipping.params
        give(oracle, spoilt)
        assert (whole(raising), whole(skipping)) == before
        for opt in (raising, skipping, oracle):
            give(opt, gradients)
    assert_same_state(skipping, oracle)
    assert (raising.steps, raising.skipped_steps) == (2, 0)


def test_a_gradient_that_is_absent_is_not_asked_whether_it_is_finite(backend):
    for nonfinite in ("raise", "skip"):
        optimizers = ours, _ = backend.pair([np.ones(2), np.ones(3)], nonfinite=nonfinite)
        backend.fill(ours.grads[0], np.full(2, np.nan))
        for opt in optimizers:
            opt.step([None, np.ones(3)])
        assert_same_state(*optimizers)
    raising = backend.make([np.ones(2), np.ones(3)], nonfinite="raise")
    with pytest.raises(NonfiniteError) as caught:
        raising.step([None, np.full(3, np.inf)])
    assert caught.value.counts == {"[1]": 3}


def test_what_is_not_finite_is_used_by_default_and_stays_in_its_element(backend, rng):
    optimizers = ours, _ = backend.pair(drawn(MIXED, rng))
    for t in range(3):
        gradients = drawn(MIXED, rng)
        if t == 1:
            gradients[3][2:5] = np.nan, np.inf, -np.inf
        for opt in optimizers:
            opt.step(gradients)
    assert_same_state(*optimizers)
    assert np.flatnonzero(~np.isfinite(ours.state_dict()["arrays"]["params/float32"])).tolist() == [14, 15, 16]


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_what_is_cast_to_inf_follows_nonfinite_and_not_numpys_settings(nonfinite, backend, rng):
    optimizers = backend.pair([np.ones((2, 3), np.float32)], nonfinite=nonfinite)
    gradient = 1e300 * rng.standard_normal((2, 3))
    for opt in optimizers:
        with np.errstate(all="raise", invalid="ignore"):
            try:
                opt.step([gradient])
                assert nonfinite != "raise"
            except NonfiniteError:
                assert nonfinite == "raise"
    assert_same_state(*optimizers)
    assert optimizers[0].skipped_steps == (nonfinite == "skip")


def test_attributes_that_nothing_reads_are_refused(backend):
    opt = backend.make([np.ones(3)])
    with pytest.raises(AttributeError, match="expected 'lr'"):
        opt.learning_rate = 0.1
    with pytest.raises(OptionError, match="lr: expected"):
        opt.lr = -1
    assert opt.lr == 1e-3
    with pytest.raises(TypeError, match=r"alpha: .* has no such argument; expected 'decay_rate'"):
        backend.make([np.ones(3)], alpha=0.9)
