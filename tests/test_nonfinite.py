"""Gradients with an inf or NaN: used, refused or skipped, and in the latter two cases nothing has changed."""

import pickle

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, everything

from fastrms import NonfiniteError, OptionError, OptionTypeError, RMSProp

SHAPES = [(40, 5), (), (0,), (65,), (7, 3)]
DTYPES = [np.float32, np.float64, np.float64, np.float32, np.float64]
KERNELS = ["numpy", "serial", "parallel", "auto"]
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def arrays(rng):
    return [np.asarray(rng.standard_normal(s)).astype(d) for s, d in zip(SHAPES, DTYPES, strict=True)]


def give(opt, gradients, way):
    """Take a step with gradients as a list, as arrays that need a cast, or in the buffer."""
    if way == "list":
        return opt.step(gradients)
    if way == "cast":
        return opt.step([np.asfortranarray(g) if g.ndim > 1 else g.astype(np.float64) for g in gradients])
    for own, gradient in zip(opt.grads, gradients, strict=True):
        own[...] = gradient
    return opt.step()


@pytest.mark.parametrize("way", ["list", "cast", "buffer"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"clip_value": 0.5, "global_clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_changes_nothing(bad, options, kernel, way, rng):
    params = arrays(rng)
    options |= {"momentum": 0.9, "bias_correction": True, "kernel": kernel}
    clean = RMSProp(params, **options)
    raising, skipping = (RMSProp(params, nonfinite=name, **options) for name in ("raise", "skip"))
    for t in range(5):
        gradients = arrays(rng)
        spoilt = [g.copy() for g in gradients]
        spoilt[0][3, 2] = spoilt[0][17, 4] = spoilt[3][64] = BAD[bad]
        before = everything(raising), everything(skipping)
        with pytest.raises(
            NonfiniteError, match=r"gradients\[0\]: . NaN and . inf among 200 values; gr.*changed"
        ) as caught:
            give(raising, spoilt, way)
        assert caught.value.counts == {"[0]": 2, "[3]": 1}
        assert give(skipping, spoilt, way) is skipping.params
        assert (everything(raising), everything(skipping)) == before
        assert (raising.skipped_steps, skipping.skipped_steps) == (0, t + 1)
        for opt in (clean, raising, skipping):
            give(opt, gradients, way)
    for opt in (raising, skipping):
        assert everything(opt) == everything(clean)


def test_by_default_they_are_used_and_stay_in_their_element(rng):
    opt = RMSProp(arrays(rng))
    gradients = arrays(rng)
    gradients[3][7] = np.nan
    opt.step(gradients)
    assert opt.steps == 1
    assert np.flatnonzero(np.isnan(opt.params[3])).tolist() == [7]


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_gradients_that_are_there_count(kernel, rng):
    opt = RMSProp(arrays(rng), nonfinite="raise", kernel=kernel)
    opt.grads[0][...] = np.nan  # left over from something else
    gradients = [None, *arrays(rng)[1:]]
    opt.step(gradients)
    assert opt.steps == 1
    with pytest.raises(NonfiniteError) as caught:
        opt.step([None, np.array(np.inf), *gradients[2:]])
    assert caught.value.counts == {"[1]": 1}
    assert opt.backend.state.counts.absent.tolist() == [
        1,
        0,
        0,
        0,
        0,
    ]  # the step that raised is not one that the first sat out


@pytest.mark.parametrize("kernel", KERNELS)
def test_finite_values_whose_norm_is_infinite_are_finite(kernel):
    opt = RMSProp([np.zeros(8)], nonfinite="raise", clip_norm=1.0, kernel=kernel)
    opt.step([np.full(8, np.finfo(np.float64).max)])
    assert opt.steps == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_from_the_buffer_does_not_look_where_a_list_was(kernel, rng):
    opt = RMSProp([np.zeros(5000), np.zeros(5000)], nonfinite="raise", kernel=kernel)
    opt.step()
    gradients = [rng.standard_normal(5000) for _ in range(2)]
    opt.step(gradients)
    for gradient in gradients:
        gradient[...] = np.nan
    opt.grads[0][...] = opt.grads[1][...] = 0.5
    opt.step()
    assert opt.steps == 3


def test_it_can_be_set_later_and_is_checked(rng):
    opt = RMSProp(arrays(rng))
    gradients = arrays(rng)
    opt.step(gradients)
    opt.nonfinite = "skip"
    gradients[1][...] = np.nan
    opt.step(gradients)
    assert (opt.steps, opt.skipped_steps) == (1, 1)
    opt.nonfinite = "propagate"
    opt.step(gradients)
    assert np.isnan(opt.params[1])
    with pytest.raises(OptionError, match="nonfinite: expected one of"):
        opt.nonfinite = "ignore"
    with pytest.raises(OptionTypeError, match="nonfinite: expected one of"):
        RMSProp(arrays(rng), nonfinite=True)
    assert opt.nonfinite == "propagate"


def test_the_message_names_ten_parameters_at_most(rng):
    opt = RMSProp({f"w{k}": np.zeros(3) for k in range(12)}, nonfinite="raise")
    with pytest.raises(
        NonfiniteError, match=r"gradients\['w0'\]: 3 NaN and 0 inf among 3 .* and 2 more para"
    ) as caught:
        opt.step({f"w{k}": np.full(3, np.nan) for k in range(12)})
    assert len(caught.value.counts) == 12
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.counts) == (str(caught.value), caught.value.counts)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0, "global_clip_norm": 0.5, "momentum": 0.9}], ids=str)
def test_settings_of_numpy_for_its_own_arithmetic_do_not_interrupt_a_step(options, kernel, rng):
    if not JIT and kernel != "numpy":
        pytest.skip("the interpreter runs the other kernels on NumPy's scalars, which have these settings")
    options = {"lr": 1e-40, "epsilon": 1e-40, "weight_decay": 1e-30, "kernel": kernel} | options
    opt, other = (RMSProp(arrays(rng), **options) for _ in range(2))
    other.load_state_dict(opt.state_dict())
    for bad in (0.0, 1e-38, 3e38, np.inf, np.nan):
        gradients = [np.asarray(g * 1e-30, g.dtype) for g in arrays(rng)]
        gradients[0][0, 0] = bad
        opt.step(gradients)
        with np.errstate(all="raise"):
            other.step(gradients)
    assert everything(opt) == everything(other)


@pytest.mark.skipif(not JIT, reason="a million elements take the interpreter minutes")
@pytest.mark.parametrize("kernel", ["serial", "parallel"])
@pytest.mark.parametrize("place", [0, 4095, 4096, 999_999, 1_000_002])
def test_one_bad_value_among_a_million_is_seen(place, kernel):
    gradient = np.ones(1_000_003, np.float32)
    gradient[place] = np.inf
    opt = RMSProp([np.zeros_like(gradient)], nonfinite="skip", kernel=kernel)
    opt.step([gradient])
    assert opt.skipped_steps == 1
    assert_same_bits(opt.params[0], np.zeros_like(gradient))
