"""Trajectories: the points through which RMSProp and other methods go on a test function of two variables."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, SupportsFloat

import numpy as np

from fastrms._types import Options
from fastrms.errors import DeviceError, OptionError, OptionTypeError
from fastrms.optimizer import RMSProp
from fastrms.plots.functions import LARGEST, Array, Landscape, Point, Region, find_function
from fastrms.plots.methods import DEFAULT_METHODS, METHODS, GradientDescent, rmsprop_rate

__all__ = ["Descent", "Trajectory", "descend"]

# More lines cannot be told apart in one figure.
MAX_TRAJECTORIES = 8

# Arguments of an optimizer that influence no trajectory: the parameters, and memory and threads.
_NO_OPTIONS = ("params", "cache_dtype", "num_threads", "storage")

# Points in x and in y at which figures evaluate a function.
_GRID = 101


@dataclass(frozen=True)
class Trajectory:
    """The points of one method, up to the step at which it diverged, if any.

    Attributes
    ----------
    label : str
        The method and its options.
    points : ndarray of float64, shape (steps + 1, 2)
        x and y, from the start.
    values : ndarray of float64, shape (steps + 1,)
        The function at the points.
    rates : ndarray of float64, shape (steps, 2)
        The factors of the derivatives in x and y at each step: lr for gradient descent and momentum, lr over the root
        of the sum of squares for AdaGrad, and lr over the root of their running mean for RMSProp and Adam, whose
        gradients are running means too.
    lost_at : int or None
        The number of the step that led beyond 1e150 or to a point without a value, or that had no gradient. The
        trajectory ends before it. None without such a step.
    """

    label: str
    points: Array
    values: Array
    rates: Array
    lost_at: int | None

    @property
    def caption(self) -> str:
        """The label, with the step at which the trajectory diverged."""
        return self.label if self.lost_at is None else f"{self.label} (diverged at step {self.lost_at})"


@dataclass(frozen=True)
class Descent:
    """Trajectories of several methods on one test function from one start, as `descend` returns them.

    Attributes
    ----------
    landscape : Landscape
        The test function, with the start and the number of steps of the trajectories.
    region : ((float, float), (float, float))
        The limits of x and of y in figures.
    traces : tuple of Trajectory
        First those of RMSProp, then those of the other methods.
    note : str
        For captions, how the learning rates were chosen; empty if all of them were given.
    """

    landscape: Landscape
    region: Region
    traces: tuple[Trajectory, ...]
    note: str = ""

    @cached_property
    def grid(self) -> tuple[Array, Array, Array]:
        """The function over the region: x and y, shape (101,) each, and values[row of y, column of x], NaN for none."""
        x, y = (np.linspace(low, high, _GRID) for low, high in self.region)
        values = np.array([[self.landscape.value_at(at, row) for at in x] for row in y])
        if np.isnan(values).all():
            raise OptionError(f"region: {self.landscape.name} has no finite value in {self.region}")
        return x, y, values


def descend(
    function: str | Callable[[float, float], SupportsFloat] | Landscape = "ellipse",
    settings: Sequence[Options] | Mapping[str, Options] | None = None,
    beside: Sequence[str | tuple[str, Options]] | None = None,
    *,
    start: Point | None = None,
    steps: int | None = None,
    region: Region | None = None,
) -> Descent:
    """Compute trajectories of RMSProp and other methods on a function of two variables.

    Parameters
    ----------
    function : str, callable or Landscape, default "ellipse"
        The name of a test function: ``"bowl"``, ``"ellipse"``, ``"rosenbrock"``, ``"beale"``, ``"saddle"`` or
        ``"ravine"``; a function that is called with two floats and returns a number; or a `Landscape`, which can have a
        gradient, a start and more.
    settings : sequence of mappings, or mapping of str to mapping, optional
        Options of `fastrms.RMSProp` for one trajectory each: ``[{"decay_rate": 0.99}, {"momentum": 0.9}]``. The keys of
        a mapping are labels. By default one trajectory with default options. The default of lr is the test function's.
    beside : sequence of str or (str, mapping), optional
        Other methods: ``"gradient-descent"``, ``"momentum"``, ``"adagrad"`` or ``"adam"``, alone or with options, such
        as ``("adagrad", {"lr": 0.5})``. By default the first three, or none if there are settings.
    start : (float, float), optional
        The first point. By default, the start of the test function.
    steps : int, optional
        The number of steps of each trajectory, >= 0. By default, that of the test function.
    region : ((float, float), (float, float)), optional
        The limits of x and of y in figures. By default, those of the test function, extended to include `start`.

    Returns
    -------
    descent : Descent
        The test function, and a `Trajectory` for each method: its points, values and rates.

    Raises
    ------
    OptionError, OptionTypeError
        An argument is out of range, unknown or of the wrong kind, or the function has no value at the start.

    Notes
    -----
    RMSProp runs as ``fastrms.RMSProp(np.array(start), kernel="numpy", ...)``, with one parameter of two float64
    elements. This kernel has the same bits as all others, and needs no compilation.

    Examples
    --------
    >>> from fastrms.plots.trajectories import descend
    >>> descent = descend("bowl", [{"lr": 0.1}], ["adagrad"], steps=50)
    >>> [trace.label for trace in descent.traces]
    ['RMSProp, lr 0.1', 'AdaGrad, lr 1']
    >>> descent.traces[0].points.shape
    (51, 2)
    """
    given: dict[str, Any] = {"start": start, "steps": steps, "region": region}
    landscape = replace(find_function(function), **{k: value for k, value in given.items() if value is not None})
    first, limits = landscape.start, landscape.region
    if math.isnan(landscape.value_at(*first)):
        raise OptionError(
            f"start: expected a point at which {landscape.name} has a value of at most {LARGEST:g}, got {first}"
        )
    if region is None:
        limits = _extended(limits, first)
    elif not all(low <= at <= high for at, (low, high) in zip(first, limits, strict=True)):
        raise OptionError(f"start: expected a point in the region {limits}, got {first}")
    methods = _list_methods(settings, beside)
    optimizers = [_make_optimizer(landscape, *each) for each in methods]  # all of them, before one runs
    note = landscape.rates_note if any("lr" not in options for *_, options in methods) else ""
    return Descent(landscape, limits, tuple(_follow(landscape, *each) for each in optimizers), note)


def _extended(region: Region, point: Point) -> Region:
    """Return the region with a margin around a point that is outside of it or on its edge."""
    limits = []
    for at, (low, high) in zip(point, region, strict=True):
        margin = 0.1 * (max(high, at) - min(low, at))
        limits.append((at - margin if at <= low else low, at + margin if at >= high else high))
    return limits[0], limits[1]


def _list_methods(settings: Any, beside: Any) -> list[tuple[str, str | None, str, Any]]:
    """Return for each trajectory the place of its options for errors, its label if given, its method and options."""
    if beside is None:
        beside = DEFAULT_METHODS if settings is None else ()
    settings = [{}] if settings is None else settings
    if not isinstance(settings, Sequence | Mapping) or isinstance(settings, str):
        raise OptionTypeError(f"settings: expected a list of dicts of options, got {settings!r}")
    if not isinstance(beside, Sequence) or isinstance(beside, str):
        raise OptionTypeError(f"beside: expected a list of names such as ['adagrad'], got {beside!r}")
    if not 1 <= (count := len(settings) + len(beside)) <= MAX_TRAJECTORIES:
        raise OptionError(f"settings and beside: expected 1 to {MAX_TRAJECTORIES} paths in one picture, got {count}")
    methods: list[tuple[str, str | None, str, Any]] = []
    if isinstance(settings, Mapping):
        methods += [(f"settings[{name!r}]", str(name), "RMSProp", options) for name, options in settings.items()]
    else:
        methods += [(f"settings[{k}]", None, "RMSProp", options) for k, options in enumerate(settings)]
    for k, item in enumerate(beside):
        method, options = item if isinstance(item, tuple) and len(item) == 2 else (item, {})
        if not isinstance(method, str) or method not in METHODS:
            raise OptionError(f"beside[{k}]: expected one of {tuple(METHODS)}, or (name, options), got {item!r}")
        methods.append((f"beside[{k}]", None, method, options))
    return methods


def _make_optimizer(
    landscape: Landscape, place: str, label: str | None, method: str, options: Any
) -> tuple[str, RMSProp | GradientDescent]:
    """Return a label and an optimizer; errors about options begin with their place."""
    if not isinstance(options, Mapping):
        raise OptionTypeError(f"{place}: expected a dict of options of {method}, got {options!r}")
    title, make = METHODS.get(method, (method, RMSProp))
    known = [name for name in inspect.signature(make).parameters if name not in _NO_OPTIONS]
    for name in options:
        if name not in known:
            hint = f"the options are {', '.join(known)}"
            raise OptionError(f"{place}: {name!r} is not an option of {method} on a path; {hint}")
    options = {"lr": landscape.rates[method.lower()], **options}
    try:
        optimizer = make(np.array(landscape.start), **(({"kernel": "numpy"} if make is RMSProp else {}) | options))
    except (OptionError, OptionTypeError, DeviceError) as error:
        raise type(error)(f"{place}: {error}") from None
    return _label(title, options) if label is None else label, optimizer


def _label(title: str, options: Options) -> str:
    """Return a label of a method and its options: "RMSProp, lr 0.1, centered"."""
    parts = [title]
    for name, value in options.items():
        if isinstance(value, bool):
            parts.append(name if value else f"{name} off")
        elif isinstance(value, Real):
            parts.append(f"{name} {value:g}")
        else:
            parts.append(f"{name} {getattr(value, '__name__', value)}")
    return ", ".join(parts)


def _follow(landscape: Landscape, label: str, optimizer: RMSProp | GradientDescent) -> Trajectory:
    """Return the trajectory of an optimizer, which ends before a step that diverges."""
    point = np.array(landscape.start)
    points, values, rates = [point], [landscape.value_at(*landscape.start)], []
    lost_at = None
    with np.errstate(all="ignore"):  # divergence is looked for below
        for number in range(1, landscape.steps + 1):
            gradient = landscape.gradient_at(*point)
            value = math.nan
            if np.isfinite(gradient).all():
                point = np.array(optimizer.step(gradient))
                if (np.abs(point) <= LARGEST).all():
                    value = landscape.value_at(*point)
            if math.isnan(value):
                lost_at = number
                break
            points.append(point)
            values.append(value)
            rates.append(rmsprop_rate(optimizer) if isinstance(optimizer, RMSProp) else optimizer.rate)
    # reshape: without steps, an empty list has no two columns.
    return Trajectory(label, np.array(points), np.array(values), np.reshape(rates, (-1, 2)), lost_at)
