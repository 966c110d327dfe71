"""Gradients with an inf or NaN: used, refused or skipped, and in the latter two cases nothing has changed."""

import pickle

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, everything

from fastrms import NonfiniteError, OptionError, OptionTypeError, RMSProp

SHAPES = [(40, 5), (), (0,), (65,), (7, 3)]
DTYPES = [np.float32, np.float64, np.float64, np.float32, np.float64]
KERNELS = ["numpy", "serial", "parallel", "auto"]


def arrays(rng):
    return [np.asarray(rng.standard_normal(s)).astype(d) for s, d in zip(SHAPES, DTYPES, strict=True)]


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
