"""RMSProp as a method of `scipy.optimize.minimize`. Needs scipy."""

import inspect
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastrms._checks import check_one_of
from fastrms.errors import DtypeError, OptionError, OptionTypeError, StructureError
from fastrms.optimizer import RMSProp

try:
    from scipy.optimize import Bounds, OptimizeResult, OptimizeWarning
except ImportError:
    raise ImportError('scipy is not installed; install with: python -m pip install "fastrms[scipy]"') from None
# What all of SciPy's own methods use. The public `approx_fprime` has forward differences only, and knows no bounds.
from scipy.optimize._numdiff import approx_derivative

# What `minimize` makes of a function that returns value and gradient.
from scipy.optimize._optimize import MemoizeJac

__all__ = ["rmsprop"]

Array = NDArray[Any]

_OPTIONS = set(inspect.signature(RMSProp).parameters) - {"params"}
_SCHEMES = ("2-point", "3-point", "cs")

# SciPy's own numbers, and where it has one for all methods, its message.
_CONVERGED, _MAXITER, _NOT_FINITE, _STOPPED = 0, 1, 3, 99
_MESSAGES = {
    _CONVERGED: "Optimization terminated successfully.",
    _MAXITER: "Maximum number of iterations has been exceeded.",
    _NOT_FINITE: "The objective function or its gradient is inf or NaN.",
    _STOPPED: "`callback` raised `StopIteration`.",
}
_FIXED = "All independent variables were fixed by bounds."


def rmsprop(
    fun: Callable[..., Any],
    x0: ArrayLike,
    args: tuple[Any, ...] = (),
    *,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Callable[..., Any] | None = None,
    tol: float | None = None,
    gtol: float | None = None,
    maxiter: float | None = None,
    disp: bool = False,
    return_all: bool = False,
    finite_diff: str = "2-point",
    finite_diff_rel_step: ArrayLike | None = None,
    **options: Any,
) -> Any:
    """Minimize a function with RMSProp: ``scipy.optimize.minimize(fun, x0, method=fastrms.scipy.rmsprop)``.

    Each iteration is one step of `fastrms.RMSProp`, without a line search: what `fun` returns is reported, and decides
    nothing. At a constant rate RMSProp does not settle in a minimum, but moves around it by about `lr`; to end with
    success, let `lr` be a function that decreases.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)`` returns a number.
    x0 : array_like, shape (n,)
        Where to start; becomes float64.
    args : tuple, default ()
        Further arguments of `fun` and `jac`.
    jac : callable, True or None
        As `minimize` has it. A callable returns n numbers, of shape (n,), (1, n) or (n, 1). With True, `fun` returns
        value and gradient, and is called once in each iteration, also where x has not changed. Without one, gradients
        are finite differences. For methods that are not its own, `minimize` makes None of "2-point", "3-point" and
        "cs": use the option `finite_diff`.
    hess, hessp : callable, optional
        Not used, and warned about.
    bounds : scipy.optimize.Bounds or sequence of (low, high), optional
        `x0` and the result of each step are clipped to them, so that `fun` is never asked outside, not even for finite
        differences. Momentum is not changed by that.
    constraints : tuple or list, default ()
        Refused, if there are any.
    callback : callable, optional
        One whose only parameter is called ``intermediate_result`` gets an OptimizeResult with x and fun, any other one
        gets x; StopIteration ends the run.
    tol : float, optional
        Stands for `gtol` where that is not given.
    gtol : float, default 1e-5
        Success where no component of the gradient is larger; with bounds, of the projected gradient. >= 0.
    maxiter : float, default 15000
        As L-BFGS-B has it: steps are small and many. >= 0, and as with SciPy's methods not necessarily whole.
    disp : bool, default False
        Print the outcome; where it is no success, warn of it, as SciPy does.
    return_all : bool, default False
        Have `x0` and x after each iteration in the result, as ``allvecs``.
    finite_diff : {"2-point", "3-point", "cs"}, default "2-point"
        How gradients are approximated where `jac` is None: forward or central differences, or a complex step. They
        take n, 2 n and n evaluations of `fun` for n variables.
    finite_diff_rel_step : float or array of n, optional
        Step relative to ``max(1, abs(x))``; by default SciPy chooses it.
    **options
        All of `fastrms.RMSProp`, except ``maximize``. SciPy's ``eps``, a step of finite differences, is no option
        here, and not RMSProp's ``epsilon``. Others are warned about and not used.

    Returns
    -------
    result : scipy.optimize.OptimizeResult
        x, fun, jac, nit, nfev, njev, success, message, and status: 0 for success, 1 after `maxiter` iterations, 3 where
        `fun` or the gradient became inf or NaN (x is where), 99 after StopIteration. x is where the run ended, which
        need not be where `fun` was smallest. With finite differences jac is NaN where bounds fix a variable.

    Raises
    ------
    OptionError, OptionTypeError
        Constraints; an option out of range or of the wrong kind.
    StructureError, DtypeError
        `x0`, `bounds`, or what `fun` or `jac` returned, has another shape or kind.
    NonfiniteError
        With the option ``nonfinite="raise"``, instead of status 3. With "skip" such iterations change nothing, which
        makes sense for a function that draws its data anew each time.

    Examples
    --------
    >>> from scipy.optimize import minimize, rosen, rosen_der
    >>> from fastrms.scipy import rmsprop
    >>> result = minimize(rosen, [1.3, 0.7], jac=rosen_der, method=rmsprop, options={"lr": lambda k: 0.01 * 0.999**k})
    >>> result.success, result.x.round(3)
    (True, array([1., 1.]))
    """
    if unknown := [name for name in options if name not in _OPTIONS]:
        # Three levels up: `minimize` is one, and it was called by the user.
        warnings.warn(f"Unknown solver options: {', '.join(unknown)}", OptimizeWarning, stacklevel=3)
    for name, given in (("hess", hess), ("hessp", hessp)):
        if given is not None:
            warnings.warn(f"Method rmsprop does not use {name}.", RuntimeWarning, stacklevel=3)
    if not (constraints is None or (isinstance(constraints, list | tuple) and not constraints)):
        raise OptionError("constraints: expected none, which RMSProp cannot handle; it takes bounds")
    if options.get("maximize"):
        raise OptionError("maximize: expected False for minimize(), got True; give the negative of fun and jac")
    gtol = _at_least_0("gtol", next((value for value in (gtol, tol) if value is not None), 1e-5))
    maxiter = _at_least_0("maxiter", 15_000 if maxiter is None else maxiter)

    start = np.atleast_1d(_real("x0", x0))
    if start.ndim != 1:
        raise StructureError(f"x0: expected one dimension, got shape {start.shape}")
    lower, upper = _box(bounds, len(start))
    objective = _Objective(fun, jac, args, lower, upper, finite_diff, finite_diff_rel_step)
    opt = RMSProp(np.clip(start, lower, upper), **{name: options[name] for name in options if name in _OPTIONS})
    report = None if callback is None else _with_result_or_x(callback)

    x = opt.params
    value, gradient = objective(x)
    visited = [x.copy()]
    nit = 0
    while True:
        if opt.nonfinite == "propagate" and not (np.isfinite(value) and np.isfinite(gradient).all()):
            status = _NOT_FINITE
            break
        # The projected gradient: a component counts for no more than what is left to a bound in its way.
        if np.max(np.abs(np.clip(gradient, x - upper, x - lower)), initial=0.0) <= gtol:
            status = _CONVERGED
            break
        if nit >= maxiter:
            status = _MAXITER
            break
        opt.step(gradient)
        np.clip(x, lower, upper, out=x)
        value, gradient = objective(x)
        nit += 1
        if return_all:
            visited.append(x.copy())
        if report is not None:
            try:
                report(OptimizeResult(x=x.copy(), fun=value))
            except StopIteration:
                status = _STOPPED
                break

    if not callable(jac):
        gradient[lower == upper] = np.nan
    all_fixed = status == _CONVERGED and len(x) > 0 and (lower == upper).all()
    result = OptimizeResult(
        x=x.copy(), fun=value, jac=gradient, nit=nit, nfev=objective.nfev, njev=objective.njev, status=status,
        success=status == _CONVERGED, message=_FIXED if all_fixed else _MESSAGES[status],
    )  # fmt: skip
    if return_all:
        result["allvecs"] = visited
    if disp:
        _show(result)
    return result


class _Objective:
    """The function and its gradient, called as SciPy does: counted, and with a copy of x, which is the user's."""

    def __init__(
        self, fun: Any, jac: Any, args: Any, lower: Array, upper: Array, finite_diff: str, rel_step: Any
    ) -> None:
        self.nfev = self.njev = 0
        # Not through SciPy's memo, which does not call the function again for the same x. After a skipped step x is the
        # same, but a function that draws new data in each call has another value there.
        memoized = isinstance(fun, MemoizeJac) and getattr(jac, "__self__", None) is fun
        self._both = fun.fun if memoized else fun if jac is True else None
        self._fun = fun
        self._jac = jac if callable(jac) else None
        self._args = args if isinstance(args, tuple) else (args,)
        if self._jac is None and self._both is None:
            # `minimize` does not let the names of finite differences through; a call without it, or a later one, may.
            name, scheme = ("finite_diff", finite_diff) if jac is None or jac is False else ("jac", jac)
            self._scheme = check_one_of(name, scheme, _SCHEMES)
            self._free = lower < upper  # for the others there is no room for differences
            self._bounds = lower[self._free], upper[self._free]
            self._rel_step = None if rel_step is None else _of_length("finite_diff_rel_step", rel_step, self._free)

    def __call__(self, x: Array) -> tuple[float, Array]:
        if self._both is not None:
            return self._value_and_gradient(x)
        value = float(self._value(x))
        self.njev += 1
        if self._jac is None:
            return value, self._differences(x, value)
        return value, _gradient(self._jac(np.copy(x), *self._args), x)

    def _value_and_gradient(self, x: Array) -> tuple[float, Array]:
        assert self._both is not None
        self.nfev += 1
        self.njev += 1
        found = self._both(np.copy(x), *self._args)
        try:
            value, gradient = found[0], found[1]
        except (IndexError, KeyError, TypeError):
            raise StructureError(
                f"fun: expected to return value and gradient, because of jac=True; got {type(found).__name__}"
            ) from None
        return float(_number(value, x)), _gradient(gradient, x)

    def _value(self, x: Array) -> Any:
        self.nfev += 1
        return _number(self._fun(np.copy(x), *self._args), x)

    def _differences(self, x: Array, value: float) -> Array:
        def of_free(part: Array) -> Any:
            point = x.astype(part.dtype)
            point[self._free] = part
            return self._value(point)

        gradient = np.zeros_like(x)
        if self._free.any():
            gradient[self._free] = approx_derivative(
                of_free, x[self._free], self._scheme, rel_step=self._rel_step, f0=value, bounds=self._bounds
            )
        return gradient


def _number(value: Any, x: Array) -> Any:
    """What `fun` returned for x, as a number."""
    value = np.asarray(value)
    if value.size != 1:
        raise StructureError(f"fun: expected to return one number, got shape {value.shape}")
    return (value if np.iscomplexobj(x) else _real("fun", value)).item()


def _gradient(value: Any, x: Array) -> Array:
    """What `jac` returned for x, in a copy, because some functions always return the same array."""
    gradient = _real("jac", value)
    if gradient.size != x.size or max(gradient.shape, default=1) != x.size:  # such as (1, n), of a Jacobian
        raise StructureError(f"jac: expected to return shape {x.shape}, got {gradient.shape}")
    return gradient.reshape(x.shape)


def _real(name: str, value: Any) -> Array:
    """A new float64 array of what is real numbers."""
    try:
        array = np.asarray(value)
        # Those of ml_dtypes are not of these kinds.
        if array.dtype.kind not in "biuf" and not np.can_cast(array.dtype, np.float64):
            raise TypeError(f"dtype {array.dtype}")
        with np.errstate(all="ignore"):  # a longdouble that is too large becomes inf
            return np.array(array, np.float64)
    except Exception as error:  # whatever a method of `value` raises
        raise DtypeError(f"{name}: expected real numbers, got {type(value).__name__}: {error}") from None


def _of_length(name: str, value: Any, where: Array) -> Array:
    """The values of one number for each variable, or one for all, of those variables."""
    try:
        return np.broadcast_to(_real(name, value), where.shape)[where]
    except ValueError:
        raise StructureError(f"{name}: expected a number or {len(where)}, got shape {np.shape(value)}") from None


def _box(bounds: Any, size: int) -> tuple[Array, Array]:
    """Lower and upper bounds of each variable, infinite where there is none."""
    if bounds is None:
        bounds = Bounds()
    try:
        if not isinstance(bounds, Bounds):
            pairs = [(-np.inf if low is None else low, np.inf if high is None else high) for low, high in bounds]
            bounds = Bounds(*np.array(pairs, float).reshape(size, 2).T)
        lower, upper = (np.broadcast_to(end, (size,)).astype(float) for end in (bounds.lb, bounds.ub))
    except (TypeError, ValueError):
        raise StructureError(
            f"bounds: expected scipy.optimize.Bounds or a pair (low, high) for each of {size} variables, with None for "
            f"an open end; got {bounds!r}"
        ) from None
    if len(wrong := np.flatnonzero(~(lower <= upper))):
        k = wrong[0]
        raise OptionError(f"bounds: expected low <= high, got {lower[k]} and {upper[k]} for x[{k}]")
    return lower, upper


def _with_result_or_x(callback: Callable[..., Any]) -> Callable[[Any], Any]:
    """Call `callback` with what it takes, by SciPy's rule: the name of its only parameter says."""
    if set(inspect.signature(callback).parameters) == {"intermediate_result"}:
        return lambda result: callback(intermediate_result=result)
    return lambda result: callback(result.x)


def _at_least_0(name: str, value: Any) -> Any:
    number = value[()] if isinstance(value, np.ndarray) else value  # one of 0 dimensions becomes a scalar
    if isinstance(number, bool | np.bool_) or not isinstance(number, Real):
        raise OptionTypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if not number >= 0:  # type: ignore[operator]
        raise OptionError(f"{name}: expected a number >= 0, got {value!r}")
    return number


def _show(result: Any) -> None:
    if result.success:
        print(result.message)
    else:
        warnings.warn(result.message, OptimizeWarning, stacklevel=4)
    print(f"fun {result.fun:g}, nit {result.nit}, nfev {result.nfev}, njev {result.njev}")
