"""`fastrms.scipy`: what goes in, what is refused, and what is warned about."""

import warnings

import ml_dtypes
import numpy as np
import pytest
import scipy_runs
from helpers import assert_same_bits, case_id
from scipy.optimize import (
    Bounds,
    LinearConstraint,
    OptimizeWarning,
    rosen,
    rosen_der,
)
from scipy_runs import START, run, square, square_der

from fastrms import DtypeError, OptionError, OptionTypeError, StructureError
from fastrms.scipy import rmsprop

# What goes in.


def test_x0_of_any_kind_and_args():
    for x0 in (3, 3.0, [3], np.array(3.0), np.array([3], "f")):
        result = run(square, x0, square_der, args=(5.0,), maxiter=500, options={"lr": 0.1})
        assert (result.x.shape, result.x.dtype) == ((1,), np.float64)
        np.testing.assert_allclose(result.x, 5, atol=0.06)
    assert_same_bits(run(square, START, square_der, args=5.0).x, run(square, START, square_der, args=(5.0,)).x)


def test_x0_is_not_written_and_functions_may_do_with_x_what_they_like():
    def fun(x):
        value = rosen(x)
        x[...] = np.nan
        return value

    gradient = np.empty(3)

    def jac(x):
        gradient[...] = rosen_der(x)
        x[...] = np.nan
        return gradient

    def spoil(x):
        x[...] = np.nan

    start = START.copy()
    result = run(fun, start, jac, callback=spoil)
    assert_same_bits(result.x, run().x)
    assert_same_bits(start, START)
    assert not np.shares_memory(result.jac, gradient)


@pytest.mark.parametrize("value", [np.float32(2), [2.0], np.array([[2.0]]), 2], ids=repr)
def test_functions_may_return_any_single_number(value):
    assert run(lambda x: value, jac=lambda x: [0, 0, 0]).fun == 2.0


def test_gradients_may_be_of_any_float_dtype():
    for kind in (np.longdouble, np.float16, ml_dtypes.bfloat16):
        small = START.astype(np.float32).astype(kind)
        same = run(square, jac=lambda x: small, options={"maxiter": 3}).x  # noqa: B023
        assert_same_bits(same, run(square, jac=lambda x: small.astype(np.float64), options={"maxiter": 3}).x)  # noqa: B023
    if np.finfo(np.longdouble).max > np.finfo(np.float64).max:
        with np.errstate(all="raise"):
            assert run(square, jac=lambda x: np.full(3, "1e4000", np.longdouble)).status == 3


@pytest.mark.parametrize(
    ("fun", "jac", "error", "message"),
    [
        (lambda x: x, rosen_der, StructureError, r"fun: expected to return one number, got shape \(3,\)"),
        (lambda x: None, rosen_der, DtypeError, "fun: expected real numbers, got ndarray: dtype object"),
        (lambda x: 1j, rosen_der, DtypeError, "fun: expected real numbers, got ndarray: dtype complex128"),
        (rosen, lambda x: x[:2], StructureError, r"jac: expected to return shape \(3,\), got \(2,\)"),
        (rosen, lambda x: [x, x], StructureError, r"jac: expected to return shape \(3,\), got \(2, 3\)"),
        (rosen, lambda x: 1.0, StructureError, r"jac: expected to return shape \(3,\), got \(\)"),
        (rosen, True, StructureError, "fun: expected to return value and gradient, because of jac=True; got float"),
        (lambda x: (x, x), True, StructureError, r"fun: expected to return one number, got shape \(3,\)"),
        (lambda x: (1.0, x[:2]), True, StructureError, r"jac: expected to return shape \(3,\), got \(2,\)"),
        (rosen, lambda x: x * 1j, DtypeError, "jac: expected real numbers, got ndarray: dtype complex128"),
        (rosen, lambda x: "none", DtypeError, "jac: expected real numbers, got str: dtype <U4"),
    ],
)
def test_functions_that_return_something_else(fun, jac, error, message):
    with pytest.raises(error, match=message):
        run(fun, jac=jac)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x0": START * 1j}, DtypeError, "x0: expected real numbers, got ndarray: dtype complex128"),
        ({"x0": None}, DtypeError, "x0: expected real numbers, got ndarray: dtype object"),
        ({"constraints": {"type": "eq", "fun": square}}, OptionError, "constraints: expected none"),
        ({"constraints": [LinearConstraint(np.eye(3))]}, OptionError, "constraints: expected none"),
        ({"options": {"maximize": True}}, OptionError, "maximize: expected False for minimize"),
        ({"options": {"maxiter": -1}}, OptionError, "maxiter: expected a number >= 0, got -1"),
        ({"options": {"maxiter": np.nan}}, OptionError, "maxiter: expected a number >= 0, got nan"),
        ({"options": {"maxiter": "many"}}, OptionTypeError, r"maxiter: expected a number, got 'many' \(str\)"),
        ({"options": {"maxiter": True}}, OptionTypeError, r"maxiter: expected a number, got True \(bool\)"),
        ({"options": {"maxiter": np.ones(2)}}, OptionTypeError, "maxiter: expected a number, got array"),
        ({"options": {"gtol": "small"}}, OptionTypeError, r"gtol: expected a number, got 'small' \(str\)"),
        ({"tol": np.nan}, OptionError, "gtol: expected a number >= 0, got nan"),
        ({"options": {"lr": -1}}, OptionError, "lr: expected a number or a function"),
        ({"options": {"cache_dtype": "bfloat16"}}, OptionError, "cache_dtype: bfloat16 requires float32"),
        ({"jac": None, "options": {"finite_diff": "4-point"}}, OptionError, "finite_diff: expected one of"),
        ({"jac": None, "options": {"finite_diff_rel_step": [1, 2]}}, StructureError, "finite_diff_rel_step: .* or 3"),
        ({"bounds": [(0, 1)]}, StructureError, r"bounds: expected .* for each of 3 .*; got \[\(0, 1\)\]"),
        ({"bounds": Bounds([0, 0], [1, 1])}, StructureError, "bounds: expected .* for each of 3 variables"),
        ({"bounds": 5}, StructureError, "bounds: expected .*; got 5"),
        ({"bounds": [(0, 1), (2, 1), (0, 1)]}, OptionError, r"low <= high, got 2.0 and 1.0 for x\[1\]"),
        ({"bounds": [(0, 1), (0, 1), (np.nan, 1)]}, OptionError, r"low <= high, got nan and 1.0 for x\[2\]"),
    ],
    ids=case_id,
)
def test_wrong_input_is_refused_before_anything_is_called(given, error, message):
    def fun(x):
        raise AssertionError

    with pytest.raises(error, match=message):
        run(**{"fun": fun, "jac": fun} | given)


def test_called_without_minimize():
    assert_same_bits(rmsprop(rosen, START, jac=rosen_der, maxiter=20).x, run().x)
    ours, theirs = rmsprop(rosen, START, jac="3-point", maxiter=5), run(jac=None, maxiter=5, options={})
    assert ours.nfev == 6 * 7
    np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-6)
    both = rmsprop(lambda x: (rosen(x), rosen_der(x)), START, jac=True, maxiter=20)
    assert_same_bits(both.x, run().x)
    with pytest.raises(OptionTypeError, match="jac: expected one of"):
        rmsprop(rosen, START, jac=1)
    with pytest.raises(StructureError, match=r"x0: expected one dimension, got shape \(1, 3\)"):
        rmsprop(rosen, START[None])


# Warnings.


def warned(**given):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = run(**given)
    return result, [(w.category, str(w.message), w.filename) for w in found]


def test_unknown_options_are_warned_about_as_scipy_does():
    unknown = {"eps": 1e-8, "alpha": 0.9}
    ours, theirs = (warned(method=m, options=unknown) for m in (rmsprop, "Nelder-Mead"))
    assert ours[1] == [(OptimizeWarning, "Unknown solver options: eps, alpha", scipy_runs.__file__)]
    assert (OptimizeWarning, "Unknown solver options: eps, alpha") in [w[:2] for w in theirs[1]]
    assert_same_bits(ours[0].x, run().x)


@pytest.mark.parametrize("name", ["hess", "hessp"])
def test_second_derivatives_are_warned_about(name):
    _, found = warned(**{name: lambda x, p=None: np.eye(3)})
    assert found == [(RuntimeWarning, f"Method rmsprop does not use {name}.", scipy_runs.__file__)]


def test_disp(capsys):
    result, found = warned(options={"disp": True})
    assert found == [(OptimizeWarning, result.message, scipy_runs.__file__)]
    assert capsys.readouterr().out == f"fun {result.fun:g}, nit 20, nfev 21, njev 21\n"
    assert warned(x0=[1.0, 1.0], options={"disp": True})[1] == []
    assert capsys.readouterr().out == "Optimization terminated successfully.\nfun 0, nit 0, nfev 1, njev 1\n"
