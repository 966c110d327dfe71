"""Test functions of two variables, with start, region, minima and learning rates for figures of trajectories."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastrms.errors import OptionError, OptionTypeError

__all__ = ["LARGEST", "TEST_FUNCTIONS", "Landscape", "Point", "Region", "find_function"]

Array = NDArray[np.float64]
Point = tuple[float, float]
Region = tuple[Point, Point]

# Larger values and coordinates count as infinite: differences and squares of the others stay in the range of float64.
LARGEST = 1e150

_CBRT_EPS = float(np.cbrt(np.finfo(np.float64).eps))

# For an unknown function. Small, since a rate that is too large diverges, and one that is too small only takes longer.
_RATES = MappingProxyType({"rmsprop": 0.05, "gradient-descent": 0.01, "momentum": 0.002, "adagrad": 0.05, "adam": 0.05})
_NOT_TUNED = "Default lr: small, not tuned for this function"


@dataclass(frozen=True)
class Landscape:
    """A test function of two variables, with settings for figures of trajectories on it.

    Parameters
    ----------
    function : callable
        Called with two floats x and y, returns a number. At points without a value it may return NaN or inf, or raise
        an ArithmeticError or a ValueError, as ``math.log(-1.0)`` does.
    gradient : callable, optional
        Function of x and y that returns the derivatives df/dx and df/dy. By default, central differences (see
        `gradient_at`).
    name : str, optional
        The name in titles. By default, the name of the function.
    formula : str, optional
        The formula in titles, in Matplotlib's notation for mathematics: ``"x^2 + 10 y^2"``.
    start : (float, float), default (-1.5, 1.0)
        The first point of trajectories.
    region : ((float, float), (float, float)), default ((-2, 2), (-2, 2))
        The limits of x and of y in figures.
    minima : sequence of (float, float), default ()
        The known minima. Figures mark them, and measure values from them.
    steps : int, default 300
        The number of steps of each trajectory.
    rates : mapping of str to float, optional
        Learning rates of ``"rmsprop"``, ``"gradient-descent"``, ``"momentum"``, ``"adagrad"`` and ``"adam"``; by
        default 0.05, 0.01, 0.002, 0.05 and 0.05.
    rates_note : str, optional
        For captions, how the learning rates were chosen.
    azimuth : float, default -60.0
        The side from which a surface is seen, in degrees around the vertical axis: at 0 from high x, at -90 from low y.

    Raises
    ------
    OptionError, OptionTypeError
        An argument is out of range or of the wrong kind.

    Examples
    --------
    >>> from fastrms.plots.functions import Landscape
    >>> tilted = Landscape(lambda x, y: (x + y) ** 2 + y**2, name="tilted", minima=[(0, 0)])
    >>> tilted.value_at(1.0, 2.0)
    13.0
    >>> tilted.gradient_at(1.0, 2.0).round(6)
    array([ 6., 10.])
    """

    function: Callable[[float, float], SupportsFloat]
    gradient: Callable[[float, float], ArrayLike] | None = None
    name: str = ""
    formula: str = ""
    start: Point = (-1.5, 1.0)
    region: Region = ((-2.0, 2.0), (-2.0, 2.0))
    minima: Sequence[Point] = ()
    steps: int = 300
    rates: Mapping[str, float] = field(default_factory=dict)
    rates_note: str = ""
    azimuth: float = -60.0

    def __post_init__(self) -> None:
        for name, value in (("function", self.function), ("gradient", self.gradient)):
            if not callable(value) and (name == "function" or value is not None):
                raise OptionTypeError(f"{name}: expected a function of x and y, got {value!r}")
        if unknown := sorted(set(self.rates) - set(_RATES)):
            raise OptionError(f"rates: expected names out of {tuple(_RATES)}, got {unknown[0]!r}")
        if _numbers(self.azimuth, ()) is None:
            raise OptionTypeError(f"azimuth: expected a number of degrees, got {self.azimuth!r}")
        clean = {
            "name": self.name or getattr(self.function, "__name__", type(self.function).__name__),
            "start": _check_point("start", self.start),
            "region": _check_region(self.region),
            "minima": tuple(_check_point("minima", minimum) for minimum in self.minima),
            "steps": _check_steps(self.steps),
            "rates": {**_RATES, **self.rates},
            "rates_note": self.rates_note or ("" if self.rates else _NOT_TUNED),
        }
        for attribute, checked in clean.items():
            object.__setattr__(self, attribute, checked)  # the dataclass is frozen

    def value_at(self, x: float, y: float) -> float:
        """Return the value of the function at a point.

        Parameters
        ----------
        x, y : float
            The point.

        Returns
        -------
        value : float
            NaN if the function has no value there, or a value beyond 1e150.
        """
        value = float(self._call(self.function, x, y, math.nan))
        return value if abs(value) <= LARGEST else math.nan

    def gradient_at(self, x: float, y: float) -> Array:
        """Return the derivatives in x and y at a point, from `gradient` or from central differences.

        The difference in x is ``(f(x + h, y) - f(x - h, y)) / 2h`` with ``h = cbrt(2**-52) * max(1, abs(x))``, about
        6e-6, and likewise in y. This h balances rounding, which grows as 1/h, with the error of the formula, which
        grows as h**2 (W. Press et al., Numerical Recipes, 3rd edition, 2007, section 5.7). About 10 digits are correct.

        Parameters
        ----------
        x, y : float
            The point.

        Returns
        -------
        gradient : ndarray, shape (2,), float64
            NaN if there is no derivative.
        """
        if self.gradient is not None:
            return self._call(self.gradient, x, y, (math.nan, math.nan))
        found = []
        for k, at in enumerate((x, y)):
            h = _CBRT_EPS * max(1.0, abs(at))
            low, high = ((at - h, y), (at + h, y)) if k == 0 else ((x, at - h), (x, at + h))
            # The distance after rounding is not exactly 2h.
            found.append((self.value_at(*high) - self.value_at(*low)) / (high[k] - low[k]))
        return np.array(found)

    def _call(
        self, function: Callable[[float, float], object], x: float, y: float, missing: float | tuple[float, float]
    ) -> Array:
        """Return the result of a user's function, which must have the shape of `missing`."""
        value: object
        with np.errstate(all="ignore"):
            try:
                value = function(np.float64(x), np.float64(y))
            except (ArithmeticError, ValueError):  # as of math.log(-1.0)
                value = missing
        numbers = _numbers(value, np.shape(missing))
        if numbers is None:
            name, expected = ("gradient", "two numbers") if np.shape(missing) else ("function", "a number")
            kind = f"array of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            raise OptionTypeError(f"{name}: expected {expected} at x={x:g}, y={y:g}, got {value!r} ({kind})")
        return numbers


def _numbers(value: object, shape: tuple[int, ...]) -> Array | None:
    """Return real numbers of this shape as an array of float64, and None for anything else."""
    try:
        array = np.asarray(value)
    except Exception:  # lists of different lengths; conversions of the user's own may raise anything
        return None
    return array.astype(np.float64) if array.shape == shape and array.dtype.kind in "iuf" else None


def _check_point(name: str, value: object) -> Point:
    """Return `value` as two finite floats, or raise OptionError."""
    numbers = _numbers(value, (2,))
    if numbers is None or not np.isfinite(numbers).all():
        raise OptionError(f"{name}: expected two finite numbers, x and y, got {value!r}")
    return float(numbers[0]), float(numbers[1])


def _check_region(value: object) -> Region:
    """Return `value` as limits of x and of y, or raise OptionError unless they are finite and ascending."""
    numbers = _numbers(value, (2, 2))
    if numbers is None or not np.isfinite(numbers).all() or not (numbers[:, 0] < numbers[:, 1]).all():
        raise OptionError(f"region: expected ((x_low, x_high), (y_low, y_high)), finite, got {value!r}")
    (x_low, x_high), (y_low, y_high) = numbers.tolist()
    return (x_low, x_high), (y_low, y_high)


def _check_steps(value: object) -> int:
    """Return `value` as a number of steps, or raise OptionError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise OptionError(f"steps: expected a whole number of at least 0, got {value!r}")
    return int(value)


# The rates of functions with a minimum are each method's best of 1, 2 and 5 times powers of 10: the one with the lowest
# mean of the function over the steps (docs/path.md). A test computes them.
_TUNED = "Default lr: each method's best of 0.001, 0.002, 0.005, ..., 5 (lowest mean of f over {} steps)"


# fmt: off
TEST_FUNCTIONS: Mapping[str, Landscape] = MappingProxyType({
    "bowl": Landscape(
        lambda x, y: 5 * x**2 + 7 * y**2,
        lambda x, y: (10 * x, 14 * y),
        name="bowl", formula="5 x^2 + 7 y^2", start=(-1.6, 1.3), minima=[(0, 0)], azimuth=-30,
        rates={"rmsprop": 0.2, "gradient-descent": 0.1, "momentum": 0.02, "adagrad": 1, "adam": 0.5},
        rates_note=_TUNED.format(300),
    ),
    "ellipse": Landscape(
        lambda x, y: x**2 + 10 * y**2,
        lambda x, y: (2 * x, 20 * y),
        name="ellipse", formula="x^2 + 10 y^2", start=(-1.7, 1.2), minima=[(0, 0)], azimuth=-30,
        rates={"rmsprop": 0.2, "gradient-descent": 0.05, "momentum": 0.02, "adagrad": 1, "adam": 0.5},
        rates_note=_TUNED.format(300),
    ),
    "rosenbrock": Landscape(
        lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        lambda x, y: (-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)),
        name="Rosenbrock", formula="(1 - x)^2 + 100 (y - x^2)^2", start=(-1.2, 1.0), region=((-2, 2), (-1, 3)),
        minima=[(1, 1)], steps=1000, azimuth=-120,
        rates={"rmsprop": 0.02, "gradient-descent": 0.005, "momentum": 0.002, "adagrad": 1, "adam": 0.2},
        rates_note=_TUNED.format(1000),
    ),
    "beale": Landscape(
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        lambda x, y: (
            2 * (1.5 - x + x * y) * (y - 1)
            + 2 * (2.25 - x + x * y**2) * (y**2 - 1)
            + 2 * (2.625 - x + x * y**3) * (y**3 - 1),
            2 * x * (1.5 - x + x * y) + 4 * x * y * (2.25 - x + x * y**2) + 6 * x * y**2 * (2.625 - x + x * y**3),
        ),
        name="Beale", formula="(1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2", start=(1.0, 1.5),
        region=((-0.5, 4), (-2, 2)), minima=[(3, 0.5)], azimuth=-120,
        rates={"rmsprop": 0.2, "gradient-descent": 0.02, "momentum": 0.005, "adagrad": 2, "adam": 0.5},
        rates_note=_TUNED.format(300),
    ),
    "saddle": Landscape(
        lambda x, y: x**2 - y**2,
        lambda x, y: (2 * x, -2 * y),
        name="saddle", formula="x^2 - y^2", start=(-1.5, 0.01), steps=60,
        rates={"rmsprop": 0.05, "gradient-descent": 0.05, "momentum": 0.05, "adagrad": 0.15, "adam": 0.15},
        rates_note="Default lr: equally far in x in the first step, for all methods (without a minimum no lr is best)",
    ),
    # The valley runs along the diagonal, where a rate for each variable gains nothing.
    "ravine": Landscape(
        lambda x, y: (x + y) ** 2 / 20 + 5 * (x - y) ** 2,
        lambda x, y: ((x + y) / 10 + 10 * (x - y), (x + y) / 10 - 10 * (x - y)),
        name="ravine", formula="(x + y)^2 / 20 + 5 (x - y)^2", start=(-1.7, -1.0), minima=[(0, 0)], azimuth=-120,
        rates={"rmsprop": 0.05, "gradient-descent": 0.05, "momentum": 0.05, "adagrad": 0.5, "adam": 0.5},
        rates_note=_TUNED.format(300),
    ),
})
# fmt: on


def find_function(function: str | Callable[[float, float], SupportsFloat] | Landscape) -> Landscape:
    """Return the test function of this name, or a Landscape of a user's function."""
    if isinstance(function, Landscape):
        return function
    if isinstance(function, str):
        if function not in TEST_FUNCTIONS:
            raise OptionError(f"function: expected one of {tuple(TEST_FUNCTIONS)}, or a callable, got {function!r}")
        return TEST_FUNCTIONS[function]
    return Landscape(function)
