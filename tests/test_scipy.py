"""`fastrms.scipy.rmsprop` as a method of `scipy.optimize.minimize`, beside SciPy's own methods."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import assert_same_bits, case_id
from scipy.optimize import (
    Bounds,
    OptimizeResult,
    basinhopping,
    rosen,
    rosen_der,
)
from scipy_runs import START, run, square, square_der

import fastrms
from fastrms import NonfiniteError, RMSProp
from fastrms._checks import GROUP_DEFAULTS
from fastrms.scipy import rmsprop

# Every option, each with a value that is not its default, in sets that go together.
OPTIONS = {
    "defaults": {},
    "base": {"lr": 0.01, "decay_rate": 0.95, "epsilon": 1e-3, "eps_in_sqrt": True, "kernel": "numpy"},
    "schedule": {"lr": lambda k: 0.1 * 0.9**k, "initial_scale": 1.0, "num_threads": 1, "nonfinite": "skip"},
    "momentum": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": True, "flush_subnormals": False},
    "centered": {"centered": True, "bias_correction": True, "epsilon": 0.1, "clip_norm": 1.0, "clip_value": 0.5},
    "decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "global_clip_norm": 1.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_same_bits_as_a_loop(name):
    opt = RMSProp(START, **OPTIONS[name])
    for _ in range(20):
        opt.step(rosen_der(opt.params))
    result = run(options=OPTIONS[name])
    assert_same_bits(result.x, opt.params)
    assert_same_bits(result.jac, rosen_der(opt.params))
    assert result.fun == rosen(opt.params)


def test_all_options_are_tried():
    tried = {option for options in OPTIONS.values() for option in options}
    assert tried == {*GROUP_DEFAULTS, "kernel", "num_threads", "nonfinite", "global_clip_norm"} - {"maximize"}


def test_a_decreasing_rate_converges():
    result = run(maxiter=None, options={"lr": lambda k: 0.01 * 0.999**k})
    assert (result.success, result.status) == (True, 0)
    assert np.abs(result.jac).max() <= 1e-5
    np.testing.assert_allclose(result.x, 1, atol=1e-4)


# The result, its fields and what is in them.


@pytest.mark.parametrize("jac", [rosen_der, None], ids=["jac", "differences"])
@pytest.mark.parametrize("x0", [START, START.astype("f"), [2, 0]], ids=["float64", "float32", "integers"])
def test_result_is_like_that_of_bfgs(x0, jac):
    # SciPy's differences in float32 divide 0 by 0 from 1.18 on; all else is float64 there anyway.
    starts = {rmsprop: x0, "BFGS": np.asarray(x0, float)}
    ours, theirs = (run(x0=x, jac=jac, method=m, options={"return_all": True}) for m, x in starts.items())
    assert type(ours) is OptimizeResult
    assert {*ours} == {*theirs} - {"hess_inv"}
    for name in ("nit", "nfev", "njev", "status", "success", "message"):
        assert type(ours[name]) is type(theirs[name])
    for name in ("x", "jac"):
        assert (ours[name].shape, ours[name].dtype) == (theirs[name].shape, np.float64)
    assert isinstance(ours.fun, float)
    assert len(ours.allvecs) == ours.nit + 1
    assert_same_bits(ours.allvecs[0], np.asarray(x0, float))
    assert_same_bits(ours.allvecs[-1], ours.x)
    assert len({id(x) for x in ours.allvecs}) == len({x.tobytes() for x in ours.allvecs}) == ours.nit + 1
    assert "allvecs" not in run(x0=x0, jac=jac)


@pytest.mark.parametrize("method", [rmsprop, "BFGS"], ids=["ours", "BFGS"])
def test_outcomes_have_scipys_numbers_and_words(method):
    def stop(x):
        raise StopIteration

    outcomes = [
        run(square, jac=square_der, method=method, maxiter=3000, options={"lr": 0.1} if method is rmsprop else {}),
        run(method=method, maxiter=1),
        run(method=method, callback=stop),
    ]
    assert [(r.status, r.success, r.message) for r in outcomes] == [
        (0, True, "Optimization terminated successfully."),
        (1, False, "Maximum number of iterations has been exceeded."),
        (99, False, "`callback` raised `StopIteration`."),
    ]
    assert [r.nit for r in outcomes[1:]] == [1, 1]


def test_calls_are_counted():
    calls = {"fun": 0, "jac": 0}

    def fun(x):
        calls["fun"] += 1
        return rosen(x)

    def jac(x):
        calls["jac"] += 1
        return rosen_der(x)

    result = run(fun, jac=jac)
    assert (result.nfev, result.njev, result.nit) == (calls["fun"], calls["jac"], 20) == (21, 21, 20)
    calls["fun"] = 0
    result = run(fun, jac=None)
    assert (result.nfev, result.njev) == (calls["fun"], 21) == (21 * 4, 21)


def test_function_that_returns_both_is_called_once_for_each_point():
    points = []

    def both(x):
        points.append(x)
        return rosen(x), list(rosen_der(x))

    result = run(both, jac=True)
    assert len(points) == result.nfev == result.njev == 21
    assert_same_bits(result.x, run().x)


def test_a_skipped_step_calls_the_function_anew():
    calls = 0

    def both(x):
        nonlocal calls
        calls += 1
        return (np.nan, x * np.nan) if calls == 3 else (square(x), square_der(x))

    options = {"nonfinite": "skip", "lr": lambda k: 0.1 * 0.98**k}
    result = run(both, jac=True, maxiter=600, options=options)
    assert result.success
    assert calls == result.nfev == result.njev == result.nit + 1
    np.testing.assert_allclose(result.x, 0, atol=1e-5)


@pytest.mark.parametrize("jac", [True, rosen_der, None], ids=["both", "jac", "differences"])
def test_every_iteration_calls_the_function_also_where_x_stays(jac):
    points = []

    def fun(x):
        points.append(x)
        return (rosen(x), rosen_der(x)) if jac is True else rosen(x)

    result = run(fun, jac=jac, options={"lr": 0.0})
    assert result.nit == 20
    assert len(points) == result.nfev == 21 * (4 if jac is None else 1)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1), (1, 1, 3)], ids=str)
def test_gradients_may_be_rows_and_columns(shape):
    result = run(jac=lambda x: rosen_der(x).reshape(shape))
    assert result.jac.shape == (3,)
    assert_same_bits(result.x, run().x)
    both = run(lambda x: (rosen(x), rosen_der(x).reshape(shape)), jac=True)
    assert_same_bits(both.x, run().x)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_gradients_of_one_variable(shape):
    assert run(square, 2.0, lambda x: square_der(x).reshape(shape), maxiter=3).jac.shape == (1,)


@pytest.mark.parametrize("maxiter", [20.0, 19.5, np.float32(20), np.int64(20), np.array(20.0)], ids=repr)
def test_maxiter_of_any_kind_of_number(maxiter):
    result = run(maxiter=maxiter)
    assert (result.nit, result.status) == (20, 1)
    assert_same_bits(result.x, run().x)


def test_maxiter_without_end():
    options = {"lr": lambda k: 0.1 * 0.98**k}
    assert run(square, jac=square_der, maxiter=np.inf, options=options).success


def test_maxiter_0_and_a_start_in_the_minimum():
    assert run(maxiter=0).status == 1
    result = run(x0=[1.0, 1.0], maxiter=0)
    assert (result.success, result.nit, result.nfev) == (True, 0, 1)


def test_default_maxiter():
    assert run(square, [1e6], square_der, maxiter=None, options={"lr": 1e-9}).nit == 15_000


@pytest.mark.parametrize(("given", "norm"), [({}, 1e-5), ({"tol": 0.1}, 0.1), ({"tol": 9.0, "gtol": 0.5}, 0.5)])
def test_gtol_and_tol(given, norm):
    options = {"lr": lambda k: 0.1 * 0.99**k, "return_all": True} | {k: v for k, v in given.items() if k == "gtol"}
    result = run(square, jac=square_der, maxiter=5000, tol=given.get("tol"), options=options)
    assert result.success
    norms = [np.abs(square_der(x)).max() for x in result.allvecs]
    assert norms[-1] <= norm < min(norms[:-1])


# Callbacks.


def test_callback_of_either_kind():
    results, points = [], []

    def with_result(intermediate_result):
        results.append(intermediate_result)

    expected = run(options={"return_all": True}).allvecs[1:]
    run(callback=with_result)
    run(callback=points.append)
    assert all(type(result) is OptimizeResult for result in results)
    for result, x, want in zip(results, points, expected, strict=True):
        assert_same_bits(result.x, want)
        assert_same_bits(x, want)
        assert result.fun == rosen(want)


def test_stop_iteration():
    def stop(intermediate_result):
        if intermediate_result.fun < 70:
            raise StopIteration

    result = run(callback=stop, options={"lr": 0.01, "return_all": True})
    assert rosen(result.allvecs[-2]) >= 70 > result.fun
    assert (result.status, result.success, result.nit) == (99, False, len(result.allvecs) - 1)


# Finite differences.


@pytest.mark.parametrize("scheme", ["2-point", "3-point", "cs"])
def test_finite_differences_are_those_of_scipy(scheme):
    ours = run(jac=None, maxiter=1, options={"finite_diff": scheme, "return_all": True})
    theirs = [run(x0=x, jac=scheme, method="BFGS", maxiter=0).jac for x in ours.allvecs]
    assert_same_bits(ours.jac, theirs[-1])
    assert ours.nfev == 2 * {"2-point": 4, "3-point": 7, "cs": 4}[scheme]


def test_finite_differences_with_a_step_for_each_variable():
    steps = np.array([1e-3, 1e-4, 1e-5])
    ours, theirs = (
        run(jac=None if method is rmsprop else "2-point", method=method, maxiter=0, options=o)
        for method, o in [(rmsprop, {"finite_diff_rel_step": steps}), ("BFGS", {"finite_diff_rel_step": steps})]
    )
    assert_same_bits(ours.jac, theirs.jac)


# Bounds.


@pytest.mark.parametrize("jac", [rosen_der, "2-point", "3-point", "cs"], ids=case_id)
@pytest.mark.parametrize(
    "bounds", [[(1.1, 2), (None, 1.0), (-5, None)], Bounds([1.1, -np.inf, -5], [2, 1, np.inf])], ids=["pairs", "Bounds"]
)
def test_bounds_hold_at_every_call_and_the_minimum_is_found(bounds, jac):
    points = []

    def fun(x):
        points.append(x.real)
        return rosen(x)

    options = {"lr": lambda k: 0.1 * 0.995**k}
    options |= {} if callable(jac) else {"finite_diff": jac}
    ours = run(fun, jac=jac if callable(jac) else None, bounds=bounds, maxiter=3000, options=options)
    theirs = run(method="L-BFGS-B", bounds=bounds, maxiter=3000)
    assert np.all((np.array(points) >= [1.1, -np.inf, -5]) & (np.array(points) <= [2, 1, np.inf]))
    assert ours.success
    np.testing.assert_allclose(ours.x, theirs.x, atol=1e-5)
    assert ours.x[0] == 1.1  # at the bound itself, where the gradient is far from 0
    assert abs(ours.jac[0]) > 1


def test_x0_outside_is_clipped_and_bounds_may_fix_variables():
    bounds = Bounds([0.0, 2.0, 0.0], [1.0, 2.0, np.inf])
    result = run(square, [5.0, 5.0, 5.0], None, bounds=bounds, maxiter=5000, options={"lr": lambda k: 0.1 * 0.995**k})
    assert result.success
    np.testing.assert_allclose(result.x, [0, 2, 0], atol=1e-5)
    assert result.x[1] == 2
    assert np.isnan(result.jac).tolist() == [False, True, False]
    everything = run(square, [5.0], None, bounds=[(2, 2)])
    assert (everything.success, everything.x, everything.nfev) == (True, 2.0, 1)
    assert everything.message == "All independent variables were fixed by bounds."


# Values that are not finite.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["fun", "jac"])
def test_what_is_not_finite_ends_the_run(where, bad):
    def spoilt(function):
        return lambda x: function(x) * bad if x[0] < 1.295 else function(x)

    functions = {"fun": rosen, "jac": rosen_der}
    functions[where] = spoilt(functions[where])
    result = run(**functions)
    assert (result.status, result.success) == (3, False)
    assert result.message == "The objective function or its gradient is inf or NaN."
    assert 0 < result.nit < 20
    assert result.x[0] < 1.295
    assert np.isfinite(result.x).all()


def test_other_ways_with_what_is_not_finite():
    def jac(x):
        return np.full(3, np.nan)

    with pytest.raises(NonfiniteError, match="3 NaN"):
        run(jac=jac, options={"nonfinite": "raise"})
    result = run(jac=jac, options={"nonfinite": "skip"})
    assert (result.status, result.nit) == (1, 20)
    assert_same_bits(result.x, START)


# Elsewhere in SciPy, and without it.


def test_as_the_local_method_of_a_global_search():
    def wavy(x):
        return np.sum(x**2 - 10 * np.cos(2 * np.pi * x) + 10), 2 * x + 20 * np.pi * np.sin(2 * np.pi * x)

    local = {"method": rmsprop, "jac": True, "options": {"lr": lambda k: 0.05 * 0.97**k, "maxiter": 400}}
    rng = np.random.default_rng(0)
    result = basinhopping(wavy, [2.2, -1.8], niter=40, stepsize=1.5, minimizer_kwargs=local, rng=rng)
    np.testing.assert_allclose(result.x, 0, atol=1e-4)


def test_without_scipy_the_error_says_what_to_install():
    program = "import sys; sys.modules['scipy'] = None; import fastrms.scipy"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert 'ImportError: scipy is not installed; install with: python -m pip install "fastrms[scipy]"' in done.stderr
    assert "scipy" not in fastrms.__all__
