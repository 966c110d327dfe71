"""The network that the demo trains."""

import numpy as np
import pytest
from helpers import bits

from fastrms import RMSProp
from fastrms.demo import mlp

DTYPES = ("float32", "float64")


def batch(rng, rows, sizes, dtype="float64"):
    return rng.normal(size=(rows, sizes[0])).astype(dtype), rng.integers(0, sizes[-1], rows)


def test_gradients_are_those_of_the_loss(rng):
    sizes = [5, 7, 6, 3]
    params = mlp.init_params(sizes, "float64", rng)
    for bias in params[1::2]:
        bias[...] = rng.normal(size=bias.shape)
    x, y = batch(rng, 9, sizes)
    _, gradients = mlp.loss_and_gradients(params, x, y)
    for param, gradient in zip(params, gradients, strict=True):
        assert param.shape == gradient.shape
        for index in np.ndindex(param.shape):
            value, sides = param[index], []
            for shift in (-1e-6, 1e-6):
                param[index] = value + shift
                sides.append(mlp.loss_and_gradients(params, x, y)[0])
            param[index] = value
            assert (sides[1] - sides[0]) / 2e-6 == pytest.approx(gradient[index], abs=1e-7)


def test_loss_of_known_scores():
    # One layer that hands its input on: softmax of (0, ln 3) is (1/4, 3/4).
    params = [np.eye(2), np.zeros(2)]
    x = np.array([[0, np.log(3)], [0, np.log(3)]])
    loss, _ = mlp.loss_and_gradients(params, x, np.array([0, 1]))
    assert loss == pytest.approx((np.log(4) + np.log(4 / 3)) / 2)
    assert mlp.evaluate(params, x, np.array([0, 1])) == (pytest.approx(loss), 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[4, 3], [6, 32, 10], [8, *[5] * 50, 4]])
def test_gradients_written_to_given_arrays_have_the_same_bits(rng, dtype, sizes):
    params = mlp.init_params(sizes, dtype, rng)
    before = [bits(param) for param in params]
    x, y = batch(rng, 17, sizes, dtype)
    loss, gradients = mlp.loss_and_gradients(params, x, y)
    out = RMSProp(params).grads
    same_loss, written = mlp.loss_and_gradients(params, x, y, out)
    assert loss.dtype == dtype
    assert bits(loss) == bits(same_loss)
    for gradient, mine, target, param in zip(gradients, written, out, params, strict=True):
        assert mine is target
        assert gradient.dtype == param.dtype == dtype
        assert bits(gradient) == bits(mine)
    assert [bits(param) for param in params] == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype):
    params = [np.eye(2, dtype=dtype), np.zeros(2, dtype)]
    x = np.array([[1e30, -1e30]], dtype)
    assert mlp.loss_and_gradients(params, x, np.array([0]))[0] == 0
    assert mlp.loss_and_gradients(params, x, np.array([1]))[0] == pytest.approx(2e30)


def test_start_is_he_initialisation(rng):
    sizes = [300, 200, 10]
    params = mlp.init_params(sizes, "float32", rng)
    assert [param.shape for param in params] == [(300, 200), (200,), (200, 10), (10,)]
    assert params[0].std() == pytest.approx((2 / 300) ** 0.5, rel=0.02)
    assert params[2].std() == pytest.approx((2 / 200) ** 0.5, rel=0.06)
    assert not params[1].any()
    assert mlp.count_params(sizes) == sum(param.size for param in params)


def test_evaluate_in_parts(rng, monkeypatch):
    sizes = [5, 4, 3]
    params = mlp.init_params(sizes, "float64", rng)
    x, y = batch(rng, 23, sizes)
    whole = mlp.evaluate(params, x, y)
    monkeypatch.setattr(mlp, "EVALUATE_ROWS", 5)
    assert mlp.evaluate(params, x, y) == (pytest.approx(whole[0]), whole[1])
    assert whole[0] == pytest.approx(mlp.loss_and_gradients(params, x, y)[0])
