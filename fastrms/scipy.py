"""RMSProp as a method of `scipy.optimize.minimize`; needs scipy."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
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
# The public `approx_fprime` has forward differences only, and no bounds.
from scipy.optimize._numdiff import approx_derivative

# The wrapper of `minimize` for a function that returns value and gradient.
from scipy.optimize._optimize import MemoizeJac

__all__ = ["rmsprop"]

Array = NDArray[np.float64]
Box = tuple[Array, Array]  # lower and upper bounds
Jac = Callable[..., ArrayLike] | bool | str | None

_OPTIONS = set(inspect.signature(RMSProp).parameters) - {"params"}
_SCHEMES = ("2-point", "3-point", "cs")

# SciPy's numbers and messages of the same outcomes.
_CONVERGED, _MAXITER, _NOT_FINITE, _STOPPED = 0, 1, 3, 99
_MESSAGES = {
    _CONVERGED: "Optimization terminated successfully.",
    _MAXITER: "Maximum number of iterations has been exceeded.",
    _NOT_FINITE: "The objective function or its gradient is inf or NaN.",
    _STOPPED: "`callback` raised `StopIteration`.",
}
_FIXED = "All independent variables were fixed by bounds."


def rmsprop(
    fun: Callable[..., object],
    x0: ArrayLike,
    args: tuple[object, ...] = (),
    *,
    jac: Jac = None,
    hess: object = None,
    hessp: object = None,
    bounds: Bounds | Sequence[tuple[float | None, float | None]] | None = None,
    constraints: object = (),
    callback: Callable[..., object] | None = None,
    tol: float | None = None,
    gtol: float | None = None,
    maxiter: float | None = None,
    disp: bool = False,
    return_all: bool = False,
    finite_diff: str = "2-point",
    finite_diff_rel_step: ArrayLike | None = None,
    **options: Any,
) -> OptimizeResult:
    """Minimize a function with RMSProp: ``scipy.optimize.minimize(fun, x0, method=fastrms.scipy.rmsprop)``.

    Each iteration is one step of `fastrms.RMSProp`. There is no line search, so values of `fun` do not influence the
    steps. At a constant rate, RMSProp wanders around a minimum at a distance of about `lr`. To end with success, let
    `lr` be a decreasing function of the step.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)`` returns a number.
    x0 : array_like, shape (n,)
        The start, which is converted to float64.
    args : tuple, default ()
        Additional arguments for `fun` and `jac`.
    jac : callable, True or None
        The gradient, as for `minimize`. A callable returns n numbers, of shape (n,), (1, n) or (n, 1). With True, `fun`
        returns value and gradient, and is called once in each iteration, even if x has not changed. With None,
        gradients are finite differences, which `finite_diff` chooses. `minimize` replaces "2-point", "3-point" and "cs"
        by None.
    hess, hessp : callable, optional
        Ignored, with a warning.
    bounds : scipy.optimize.Bounds or sequence of (low, high), optional
        `x0` and the result of each step are clipped to the bounds. `fun` is never called outside of them, not even for
        finite differences. Clipping does not change the momentum buffer.
    constraints : tuple or list, default ()
        Must be empty.
    callback : callable, optional
        Function that is called after each iteration with x, or with an OptimizeResult of x and fun if its only
        parameter is named ``intermediate_result``. StopIteration ends the run.
    tol : float, optional
        The value of `gtol` if `gtol` is None.
    gtol : float, default 1e-5
        The run ends with success if no component of the gradient is larger. With bounds, the projected gradient counts.
        >= 0.
    maxiter : float, default 15000
        The largest number of iterations, >= 0, not necessarily whole. The default is that of L-BFGS-B.
    disp : bool, default False
        Print the outcome, and warn if the run had no success.
    return_all : bool, default False
        Add ``allvecs`` to the result: `x0` and x after each iteration.
    finite_diff : {"2-point", "3-point", "cs"}, default "2-point"
        Forward differences, central differences or a complex step, if `jac` is None. For n variables, they need n, 2 n
        or n evaluations of `fun`.
    finite_diff_rel_step : float or array of n, optional
        The step of the differences, relative to ``max(1, abs(x))``. By default, SciPy chooses it.
    **options
        Options of `fastrms.RMSProp`, except ``maximize``. Others are ignored with a warning. This includes ``eps`` of
        SciPy, a step of finite differences.

    Returns
    -------
    result : scipy.optimize.OptimizeResult
        x, fun, jac, nit, nfev, njev, success, message, and status: 0 for success, 1 after `maxiter` iterations, 3 if
        `fun` or the gradient at x is inf or NaN, 99 after StopIteration. x is the last point of the run, which is not
        necessarily the lowest. With finite differences, jac is NaN for variables that the bounds fix.

    Raises
    ------
    OptionError, OptionTypeError
        There are constraints, or an option is out of range or of the wrong kind.
    StructureError, DtypeError
        `x0`, `bounds`, or a result of `fun` or `jac` has a wrong shape or kind.
    NonfiniteError
        With ``nonfinite="raise"``, a gradient contains an inf or NaN. By default, the run ends with status 3 instead.
        With "skip", such an iteration changes nothing, which is useful for a function that draws new data at each call.

    Examples
    --------
    >>> from scipy.optimize import minimize, rosen, rosen_der
    >>> from fastrms.scipy import rmsprop
    >>> result = minimize(rosen, [1.3, 0.7], jac=rosen_der, method=rmsprop, options={"lr": lambda k: 0.01 * 0.999**k})
    >>> result.success, result.x.round(3)
    (True, array([1., 1.]))
    """
    # Three levels up is the caller of `minimize`.
    if unknown := [name for name in options if name not in _OPTIONS]:
        warnings.warn(f"Unknown solver options: {', '.join(unknown)}", OptimizeWarning, stacklevel=3)
    for name, given in (("hess", hess), ("hessp", hessp)):
        if given is not None:
            warnings.warn(f"Method rmsprop does not use {name}.", RuntimeWarning, stacklevel=3)
    if not (constraints is None or (isinstance(constraints, list | tuple) and not constraints)):
        raise OptionError("constraints: expected none, because RMSProp supports only bounds")
    if options.get("maximize"):
        raise OptionError("maximize: expected False for minimize(), got True; pass the negative of fun and jac")
    tolerance: float = _at_least_0("gtol", next((value for value in (gtol, tol) if value is not None), 1e-5))
    most: float = _at_least_0("maxiter", 15_000 if maxiter is None else maxiter)

    start = np.atleast_1d(_real("x0", x0))
    if start.ndim != 1:
        raise StructureError(f"x0: expected one dimension, got shape {start.shape}")
    box = _box(bounds, len(start))
    objective = _Objective(fun, jac, args, box, finite_diff, finite_diff_rel_step)
    opt = RMSProp(np.clip(start, *box), **{name: options[name] for name in options if name in _OPTIONS})
    report = None if callback is None else _with_result_or_x(callback)
    result = _iterate(opt, objective, box, tolerance, most, report, return_all)
    if disp:
        if result.success:
            print(result.message)
        else:
            warnings.warn(result.message, OptimizeWarning, stacklevel=3)
        print(f"fun {result.fun:g}, nit {result.nit}, nfev {result.nfev}, njev {result.njev}")
    return result


def _iterate(
    opt: RMSProp, objective: "_Objective", box: Box, gtol: float, maxiter: float,
    report: Callable[[OptimizeResult], object] | None, return_all: bool,
) -> OptimizeResult:  # fmt: skip
    """Take steps until the gradient is small enough or the run has to end, and return the result."""
    lower, upper = box
    x: Array = opt.params
    value, gradient = objective(x)
    visited = [x.copy()]
    nit, status = 0, None
    while status is None:
        if opt.nonfinite == "propagate" and not (np.isfinite(value) and np.isfinite(gradient).all()):
            status = _NOT_FINITE
        # The projected gradient: a component is at most the distance to the bound in its way.
        elif np.max(np.abs(np.clip(gradient, x - upper, x - lower)), initial=0.0) <= gtol:
            status = _CONVERGED
        elif nit >= maxiter:
            status = _MAXITER
        else:
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

    if objective.differences:
        gradient[lower == upper] = np.nan
    all_fixed = status == _CONVERGED and len(x) > 0 and (lower == upper).all()
    message = _FIXED if all_fixed else _MESSAGES[status]
    result = OptimizeResult(
        x=x.copy(), fun=value, jac=gradient, nit=nit, nfev=objective.nfev, njev=objective.njev, status=status,
        success=status == _CONVERGED, message=message,
    )  # fmt: skip
    if return_all:
        result["allvecs"] = visited
    return result


class _Objective:
    """The function and its gradient. Calls are counted, and get a copy of x, as users may change their argument."""

    def __init__(self, fun: Any, jac: Jac, args: Any, box: Box, finite_diff: str, rel_step: ArrayLike | None) -> None:
        self.nfev = self.njev = 0
        # SciPy's memo would not call a function that draws new data again for the same x, as after a skipped step.
        memoized = isinstance(fun, MemoizeJac) and getattr(jac, "__self__", None) is fun
        self._both: Callable[..., Any] | None = fun.fun if memoized else fun if jac is True else None
        self._fun = fun
        self._jac = jac if callable(jac) else None
        self._args = args if isinstance(args, tuple) else (args,)
        self.differences = self._jac is None
        if self._jac is None and self._both is None:
            # `minimize` passes no names of schemes; a call without it, or a later SciPy, may.
            name, scheme = ("finite_diff", finite_diff) if jac is None or jac is False else ("jac", jac)
            self._scheme = check_one_of(name, scheme, _SCHEMES)
            lower, upper = box
            self._free = lower < upper  # other variables have no room for differences
            self._bounds = lower[self._free], upper[self._free]
            self._rel_step = None if rel_step is None else _of_length("finite_diff_rel_step", rel_step, self._free)

    def __call__(self, x: Array) -> tuple[float, Array]:
        if self._both is not None:
            return self._value_and_gradient(self._both, x)
        value = float(self._value(x))
        self.njev += 1
        if self._jac is None:
            return value, self._differences(x, value)
        return value, _gradient(self._jac(np.copy(x), *self._args), x)

    def _value_and_gradient(self, both: Callable[..., Any], x: Array) -> tuple[float, Array]:
        self.nfev, self.njev = self.nfev + 1, self.njev + 1
        found = both(np.copy(x), *self._args)
        try:
            value, gradient = found[0], found[1]
        except (IndexError, KeyError, TypeError):
            raise StructureError(
                f"fun: expected to return value and gradient, because of jac=True; got {type(found).__name__}"
            ) from None
        return float(_number(value, x)), _gradient(gradient, x)

    def _value(self, x: NDArray[Any]) -> Any:
        self.nfev += 1
        return _number(self._fun(np.copy(x), *self._args), x)

    def _differences(self, x: Array, value: float) -> Array:
        def of_free(part: NDArray[Any]) -> Any:
            point = x.astype(part.dtype)  # complex in a complex step
            point[self._free] = part
            return self._value(point)

        gradient = np.zeros_like(x)
        if self._free.any():
            found: Any = approx_derivative(
                of_free, x[self._free], self._scheme, rel_step=self._rel_step, f0=value, bounds=self._bounds
            )
            gradient[self._free] = found
        return gradient


def _number(value: object, x: NDArray[Any]) -> Any:
    """Return the value of `fun` at x as a number."""
    value = np.asarray(value)
    if value.size != 1:
        raise StructureError(f"fun: expected to return one number, got shape {value.shape}")
    return (value if np.iscomplexobj(x) else _real("fun", value)).item()


def _gradient(value: ArrayLike, x: Array) -> Array:
    """Return the value of `jac` at x as a copy: the user's function may reuse its array."""
    gradient = _real("jac", value)
    if gradient.size != x.size or max(gradient.shape, default=1) != x.size:  # (1, n) of a Jacobian is fine
        raise StructureError(f"jac: expected to return shape {x.shape}, got {gradient.shape}")
    return gradient.reshape(x.shape)


def _real(name: str, value: object) -> Array:
    """Return real numbers as a new array of float64."""
    try:
        array = np.asarray(value)
        # Floats of ml_dtypes have none of these kinds.
        if array.dtype.kind not in "biuf" and not np.can_cast(array.dtype, np.float64):
            raise TypeError(f"dtype {array.dtype}")
        with np.errstate(all="ignore"):  # a longdouble that is too large becomes inf
            return np.array(array, np.float64)
    except Exception as error:  # methods of `value` may raise anything
        raise DtypeError(f"{name}: expected real numbers, got {type(value).__name__}: {error}") from None


def _of_length(name: str, value: ArrayLike, where: NDArray[np.bool_]) -> Array:
    """Return a number for each variable selected by `where`, from one number for all or one for each."""
    try:
        return np.broadcast_to(_real(name, value), where.shape)[where]
    except ValueError:
        raise StructureError(f"{name}: expected a number or {len(where)}, got shape {np.shape(value)}") from None


def _box(bounds: Any, size: int) -> Box:
    """Return the lower and the upper bound of each variable; infinite without a bound."""
    if bounds is None:
        bounds = Bounds()
    try:
        if isinstance(bounds, Bounds):
            ends: Iterable[ArrayLike] = bounds.lb, bounds.ub
        else:
            pairs = [(-np.inf if low is None else low, np.inf if high is None else high) for low, high in bounds]
            ends = np.array(pairs, float).reshape(size, 2).T
        lower, upper = (np.broadcast_to(end, (size,)).astype(float) for end in ends)
    except (TypeError, ValueError):
        raise StructureError(
            f"bounds: expected scipy.optimize.Bounds or a pair (low, high) for each of {size} variables, with None for "
            f"an open end; got {bounds!r}"
        ) from None
    if len(wrong := np.flatnonzero(~(lower <= upper))):
        k = wrong[0]
        raise OptionError(f"bounds: expected low <= high, got {lower[k]} and {upper[k]} for x[{k}]")
    return lower, upper


def _with_result_or_x(callback: Callable[..., object]) -> Callable[[OptimizeResult], object]:
    """Return a function that calls `callback` with a result or with x. As in SciPy, its parameter's name decides."""
    if set(inspect.signature(callback).parameters) == {"intermediate_result"}:
        return lambda result: callback(intermediate_result=result)
    return lambda result: callback(result.x)


def _at_least_0(name: str, value: object) -> Any:
    number = value[()] if isinstance(value, np.ndarray) else value  # an array of 0 dimensions becomes a scalar
    if isinstance(number, bool | np.bool_) or not isinstance(number, Real):
        raise OptionTypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if not number >= 0:  # type: ignore[operator] # pyright: ignore[reportOperatorIssue] # the type is for all numbers
        raise OptionError(f"{name}: expected a number >= 0, got {value!r}")
    return number
