"""The paths that RMSProp, gradient descent, momentum and AdaGrad take down a function of two variables."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np

from fastrms._checks import check_option
from fastrms.errors import DeviceError, OptionError, OptionTypeError
from fastrms.optimizer import RMSProp
from fastrms.options import resolve_lr
from fastrms.plots.functions import (
    LARGEST,
    Array,
    Landscape,
    Point,
    Region,
    check_point,
    check_region,
    check_steps,
    find,
)

__all__ = ["METHODS", "AdaGrad", "Descent", "GradientDescent", "Momentum", "Trace", "descend", "rmsprop_rate"]

# More lines than these cannot be told apart in one picture.
MAX_TRACES = 8

# Arguments of an optimizer that change no path: what is updated, and with which memory and threads.
_NO_OPTIONS = ("params", "cache_dtype", "num_threads", "storage")

# Points in x and in y at which a function is drawn.
_GRID = 101


class GradientDescent:
    """Plain gradient descent: ``p = p - lr * g``.

    (A. Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847.)

    Parameters
    ----------
    params : ndarray
        Copied.
    lr : float
        Learning rate, >= 0.
    """

    def __init__(self, params: Array, lr: float) -> None:
        self.params = np.array(params, np.float64)
        self.lr = _rate(lr)

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.params = self.params - self.lr * gradient
        return self.params

    @property
    def rate(self) -> Array:
        """What each element of the last gradient was multiplied by."""
        return np.full_like(self.params, self.lr)


class Momentum:
    """Gradient descent with momentum: ``b = momentum * b + g``, then ``p = p - lr * b``; b starts from 0.

    (B. Polyak, Some methods of speeding up the convergence of iteration methods, 1964, in PyTorch's form.)

    Parameters
    ----------
    params : ndarray
        Copied.
    lr : float
        Learning rate, >= 0.
    momentum : float, default 0.9
        In [0, 1).
    """

    def __init__(self, params: Array, lr: float, momentum: float = 0.9) -> None:
        self.params = np.array(params, np.float64)
        self.lr = _rate(lr)
        self.momentum = check_option("momentum", momentum)
        self.buffer = np.zeros_like(self.params)

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.buffer = self.momentum * self.buffer + gradient
        self.params = self.params - self.lr * self.buffer
        return self.params

    @property
    def rate(self) -> Array:
        """What each element of the last gradient was multiplied by; the buffer then repeats it, momentum times."""
        return np.full_like(self.params, self.lr)


class AdaGrad:
    """AdaGrad: ``s = s + g**2``, then ``p = p - lr * g / (sqrt(s) + epsilon)``; s starts from 0.

    (J. Duchi, E. Hazan and Y. Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization,
    2011.) The sum s never forgets, so that the rate only falls; RMSProp has a running mean in its place.

    Parameters
    ----------
    params : ndarray
        Copied.
    lr : float
        Learning rate, >= 0: the length of the first step in each variable.
    epsilon : float, default 1e-8
        > 0.
    """

    def __init__(self, params: Array, lr: float, epsilon: float = 1e-8) -> None:
        self.params = np.array(params, np.float64)
        self.lr = _rate(lr)
        self.epsilon = check_option("epsilon", epsilon)
        self.sum = np.zeros_like(self.params)

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.sum = self.sum + gradient**2
        self.params = self.params - self.lr * gradient / (np.sqrt(self.sum) + self.epsilon)
        return self.params

    @property
    def rate(self) -> Array:
        """What each element of the last gradient was multiplied by: it can only fall."""
        rate: Array = self.lr / (np.sqrt(self.sum) + self.epsilon)
        return rate


def rmsprop_rate(optimizer: RMSProp) -> Array:
    """What each element of the last gradient was multiplied by, from the optimizer's state and options.

    That is lr/D in the equations of ``docs/options.md``, ahead of the momentum buffer where there is one. A gradient
    that is clipped, or has weight decay added, counts as it was then.

    Parameters
    ----------
    optimizer : RMSProp
        Over one array of float64, after a step.

    Returns
    -------
    rate : ndarray
        In the shape of the array.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp
    >>> from fastrms.plots.trajectories import rmsprop_rate
    >>> opt = RMSProp(np.zeros(2), lr=0.1)
    >>> opt.step(np.array([1.0, 2.0]))
    array([-0.31622776, -0.31622776])
    >>> rmsprop_rate(opt)
    array([0.31622776, 0.15811388])
    """
    group = optimizer.param_groups[0]
    decay, epsilon = group["decay_rate"], group["epsilon"]
    correction = 1 / (1 - decay**optimizer.steps) if group["bias_correction"] else 1.0
    square = optimizer.cache * correction
    if group["centered"]:
        square = np.maximum(square - (optimizer.grad_avg * correction) ** 2, 0)
    root = np.sqrt(square + epsilon) if group["eps_in_sqrt"] else np.sqrt(square) + epsilon
    rate: Array = resolve_lr(group, optimizer.steps - 1) / root
    return rate


def _rate(lr: float) -> Any:
    if callable(lr):
        raise OptionTypeError(f"lr: expected a number, got {lr!r}; a function of the step is for RMSProp only")
    return check_option("lr", lr)


# By the name that `descend` takes: the name in a picture, and the class.
METHODS: Mapping[str, tuple[str, Any]] = MappingProxyType(
    {
        "gradient-descent": ("gradient descent", GradientDescent),
        "momentum": ("momentum", Momentum),
        "adagrad": ("AdaGrad", AdaGrad),
    }
)


@dataclass(frozen=True)
class Trace:
    """The path of one method, as far as it did not diverge.

    Attributes
    ----------
    label : str
        The method and its options.
    points : ndarray of float64, shape (steps + 1, 2)
        x and y, from the start.
    values : ndarray of float64, shape (steps + 1,)
        Of the function there.
    rates : ndarray of float64, shape (steps, 2)
        What each step multiplied the derivatives in x and y by: lr for gradient descent and momentum, lr over the root
        of the sum of squares for AdaGrad, and over that of their running mean for RMSProp.
    lost_at : int or None
        The number of the step that led beyond 1e150 or where the function has no value, or had no gradient to go by:
        there the path ends. None if none did.
    """

    label: str
    points: Array
    values: Array
    rates: Array
    lost_at: int | None

    @property
    def caption(self) -> str:
        """The label, and where the path diverged if it did."""
        return self.label if self.lost_at is None else f"{self.label} (diverged at step {self.lost_at})"


@dataclass(frozen=True)
class Descent:
    """Paths of several methods on one landscape, from one start; `descend` makes it.

    Attributes
    ----------
    landscape : Landscape
    region : ((float, float), (float, float))
        What is drawn: the limits of x and those of y.
    traces : tuple of Trace
        RMSProp's first, then the others'.
    """

    landscape: Landscape
    region: Region
    traces: tuple[Trace, ...]

    @cached_property
    def grid(self) -> tuple[Array, Array, Array]:
        """The function over the region: x and y, shape (101,) each, and values[row of y, column of x].

        NaN where there is no value.
        """
        x, y = (np.linspace(low, high, _GRID) for low, high in self.region)
        values = np.array([[self.landscape.value_at(at, row) for at in x] for row in y])
        if np.isnan(values).all():
            raise OptionError(f"region: {self.landscape.name} has no finite value in {self.region}")
        return x, y, values


def descend(
    function: Any = "ellipse",
    settings: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]] | None = None,
    beside: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    *,
    start: Point | None = None,
    steps: int | None = None,
    region: Region | None = None,
) -> Descent:
    """Let RMSProp and other methods go down a function of two variables.

    Parameters
    ----------
    function : str, callable or Landscape, default "ellipse"
        The name of one in `LANDSCAPES`, a function that is called with two floats and returns a number, or a
        `Landscape`, which can also have a gradient, a start and more.
    settings : sequence of mappings, or mapping of str to mapping, optional
        Options of `fastrms.RMSProp` for one path each: ``[{"decay_rate": 0.99}, {"momentum": 0.9}]``. With a mapping,
        its keys are the labels of the paths. By default one path with default options. Where lr is not among them, it
        is the landscape's.
    beside : sequence of str or (str, mapping), optional
        Other methods, of `METHODS`, each with options if the landscape's lr is not to be taken:
        ``["momentum", ("adagrad", {"lr": 0.5})]``. By default all three, or none where there are settings.
    start : (float, float), optional
        By default the landscape's.
    steps : int, optional
        Of each path, >= 0; by default the landscape's.
    region : ((float, float), (float, float)), optional
        Limits of x and of y to draw. By default the landscape's, extended to where `start` is.

    Returns
    -------
    descent : Descent
        The landscape, and a `Trace` for each path: its points, values and rates.

    Raises
    ------
    OptionError, OptionTypeError
        One of these is out of range, unknown or of the wrong kind, or the function has no value at the start.

    Notes
    -----
    RMSProp runs as ``fastrms.RMSProp(np.array(start), kernel="numpy", ...)``, one parameter of two float64 elements:
    that kernel has the bits of all others and nothing to compile.

    Examples
    --------
    >>> from fastrms.plots.trajectories import descend
    >>> descent = descend("bowl", [{"lr": 0.1}], ["adagrad"], steps=50)
    >>> [trace.label for trace in descent.traces]
    ['RMSProp, lr 0.1', 'AdaGrad, lr 0.1']
    >>> descent.traces[0].points.shape
    (51, 2)
    """
    landscape = find(function)
    runs = _plan(landscape, settings, beside)
    first = landscape.start if start is None else check_point("start", start)
    if math.isnan(landscape.value_at(*first)):
        raise OptionError(f"start: expected a point where {landscape.name} has a value, up to {LARGEST:g}, got {first}")
    if region is None:
        region = _including(landscape.region, first)
    else:
        region = check_region(region)
        if not all(low <= at <= high for at, (low, high) in zip(first, region, strict=True)):
            raise OptionError(f"start: expected a point in the region {region}, got {first}")
    count = landscape.steps if steps is None else check_steps(steps)
    optimizers = [(label, _made(where, make, np.array(first), options)) for where, label, make, options in runs]
    traces = [_follow(landscape, label, optimizer, first, count) for label, optimizer in optimizers]
    return Descent(landscape, region, tuple(traces))


def _including(region: Region, point: Point) -> Region:
    """The region, made larger where the point is outside of it or on its edge, by some more than it takes."""
    limits = []
    for at, (low, high) in zip(point, region, strict=True):
        margin = 0.1 * (max(high, at) - min(low, at))
        limits.append((at - margin if at <= low else low, at + margin if at >= high else high))
    return limits[0], limits[1]


def _plan(landscape: Landscape, settings: Any, beside: Any) -> list[tuple[str, str, Any, dict[str, Any]]]:
    """What to run: where it was given, label, class and options of each path."""
    if beside is None:
        beside = tuple(METHODS) if settings is None else ()
    settings = [{}] if settings is None else settings
    if not isinstance(settings, Sequence | Mapping) or isinstance(settings, str):
        raise OptionTypeError(f"settings: expected a list of dicts of options, got {settings!r}")
    if not isinstance(beside, Sequence) or isinstance(beside, str):
        raise OptionTypeError(f"beside: expected a list of names such as ['adagrad'], got {beside!r}")

    runs: list[tuple[str, str, Any, dict[str, Any]]] = []
    named = settings.items() if isinstance(settings, Mapping) else ((None, own) for own in settings)
    for k, (name, own) in enumerate(named):
        where = f"settings[{k if name is None else repr(name)}]"
        options = {"lr": landscape.rates["rmsprop"], **_checked(where, "RMSProp", RMSProp, own)}
        label = _label("RMSProp", options) if name is None else str(name)
        runs.append((where, label, RMSProp, {"kernel": "numpy", **options}))
    for k, item in enumerate(beside):
        method, own = item if isinstance(item, tuple) and len(item) == 2 else (item, {})
        if not isinstance(method, str) or method not in METHODS:
            raise OptionError(f"beside[{k}]: expected one of {tuple(METHODS)}, or (name, options), got {item!r}")
        title, make = METHODS[method]
        options = {"lr": landscape.rates[method], **_checked(f"beside[{k}]", method, make, own)}
        runs.append((f"beside[{k}]", _label(title, options), make, options))
    if not 1 <= len(runs) <= MAX_TRACES:
        raise OptionError(f"settings and beside: expected 1 to {MAX_TRACES} paths in one picture, got {len(runs)}")
    return runs


def _checked(where: str, method: str, make: Any, options: Any) -> Mapping[str, Any]:
    """The options, if `make` has options of these names; it checks their values itself."""
    if not isinstance(options, Mapping):
        raise OptionTypeError(f"{where}: expected a dict of options of {method}, got {options!r}")
    known = [name for name in inspect.signature(make).parameters if name not in _NO_OPTIONS]
    for name in options:
        if name not in known:
            options_are = f"the options are {', '.join(known)}"
            raise OptionError(f"{where}: {name!r} is no option of {method} on a path; {options_are}")
    return options


def _made(where: str, make: Any, start: Array, options: Mapping[str, Any]) -> Any:
    """The optimizer, whose errors say where its options were given."""
    try:
        return make(start, **options)
    except (OptionError, OptionTypeError, DeviceError) as error:
        raise type(error)(f"{where}: {error}") from None


def _label(title: str, options: Mapping[str, Any]) -> str:
    """The method and its options: "RMSProp, lr 0.1, centered"."""
    parts = [title]
    for name, value in options.items():
        if isinstance(value, bool):
            parts.append(name if value else f"{name} off")
        elif isinstance(value, Real):
            parts.append(f"{name} {value:g}")
        else:
            parts.append(f"{name} {getattr(value, '__name__', value)}")
    return ", ".join(parts)


def _follow(landscape: Landscape, label: str, optimizer: Any, start: Point, steps: int) -> Trace:
    point = np.array(start)
    points, values, rates = [point], [landscape.value_at(*start)], []
    lost_at = None
    with np.errstate(all="ignore"):  # what diverges is found below
        for number in range(1, steps + 1):
            gradient = landscape.gradient_at(*point)
            if np.isfinite(gradient).all():
                point = np.array(optimizer.step(gradient))
                value = landscape.value_at(*point) if (np.abs(point) <= LARGEST).all() else math.nan
            else:
                value = math.nan
            if math.isnan(value):
                lost_at = number
                break
            points.append(point)
            values.append(value)
            rates.append(rmsprop_rate(optimizer) if isinstance(optimizer, RMSProp) else optimizer.rate)
    # reshape: of no steps there are no rates, in two columns.
    return Trace(label, np.array(points), np.array(values), np.reshape(rates, (-1, 2)), lost_at)
