"""`Landscape`: a function of two variables, what a picture of it needs, and those that are built in."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms.errors import OptionError, OptionTypeError

__all__ = [
    "LANDSCAPES",
    "LARGEST",
    "Landscape",
    "Point",
    "Region",
    "check_point",
    "check_region",
    "check_steps",
    "find",
]

Array = NDArray[np.float64]
Point = tuple[float, float]
Region = tuple[Point, Point]

# Values and places beyond it are taken for infinite: differences and squares of others stay in the range of float64.
LARGEST = 1e150

# For central differences.
_CBRT_EPS = float(np.cbrt(np.finfo(np.float64).eps))


# For a function of which nothing is known: small, since too large a step diverges and a small one only takes longer.
_RATES = MappingProxyType({"rmsprop": 0.05, "gradient-descent": 0.01, "momentum": 0.002, "adagrad": 0.05})


@dataclass(frozen=True)
class Landscape:
    """A function of two variables, and what a picture of it needs.

    Parameters
    ----------
    function : callable
        Called with two floats x and y, returns a number. Where it has no value it may return NaN or inf, or raise an
        ArithmeticError or a ValueError, as ``math.log(-1.0)`` does.
    gradient : callable, optional
        Called likewise, returns the two derivatives df/dx and df/dy. Without it they are central differences (see
        `gradient_at`).
    name : str, optional
        In titles; by default the name of the function.
    formula : str, optional
        In titles, in Matplotlib's notation for mathematics: ``"x^2 + 10 y^2"``.
    start : (float, float), default (-1.5, 1.0)
        Where paths begin.
    region : ((float, float), (float, float)), default ((-2, 2), (-2, 2))
        What is drawn: the limits of x and those of y.
    minima : sequence of (float, float), default ()
        Where the function is lowest, as far as known: shown, and used to say how far a path came.
    steps : int, default 100
        Of each path.
    rates : mapping of str to float, optional
        Learning rates of ``"rmsprop"``, ``"gradient-descent"``, ``"momentum"`` and ``"adagrad"``, where they are to
        differ from 0.05, 0.01, 0.002 and 0.05.
    azimuth : float, default -60.0
        From where the surface is seen, in degrees around the vertical axis; at 0 from where x is high, at -90 from
        where y is low.

    Raises
    ------
    OptionError, OptionTypeError
        One of these is out of range or of the wrong kind.

    Examples
    --------
    >>> from fastrms.plots.functions import Landscape
    >>> tilted = Landscape(lambda x, y: (x + y) ** 2 + y**2, name="tilted", minima=[(0, 0)])
    >>> tilted.value_at(1.0, 2.0)
    13.0
    >>> tilted.gradient_at(1.0, 2.0).round(6)
    array([ 6., 10.])
    """

    function: Callable[[float, float], Any]
    gradient: Callable[[float, float], Any] | None = None
    name: str = ""
    formula: str = ""
    start: Point = (-1.5, 1.0)
    region: Region = ((-2.0, 2.0), (-2.0, 2.0))
    minima: Sequence[Point] = ()
    steps: int = 100
    rates: Mapping[str, float] = field(default_factory=dict)
    azimuth: float = -60.0

    def __post_init__(self) -> None:
        for what in ("function", "gradient"):
            value = getattr(self, what)
            if not callable(value) and (what == "function" or value is not None):
                raise OptionTypeError(f"{what}: expected a function of x and y, got {value!r}")
        if unknown := sorted(set(self.rates) - set(_RATES)):
            raise OptionError(f"rates: expected some of {tuple(_RATES)}, got {unknown[0]!r}")
        if _numbers(self.azimuth, ()) is None:
            raise OptionTypeError(f"azimuth: expected a number of degrees, got {self.azimuth!r}")
        clean = {
            "name": self.name or getattr(self.function, "__name__", type(self.function).__name__),
            "start": check_point("start", self.start),
            "region": check_region(self.region),
            "minima": tuple(check_point("minima", minimum) for minimum in self.minima),
            "steps": check_steps(self.steps),
            "rates": {**_RATES, **self.rates},
        }
        for what, value in clean.items():
            object.__setattr__(self, what, value)  # the dataclass is frozen

    def value_at(self, x: float, y: float) -> float:
        """The function's value at a point.

        Parameters
        ----------
        x, y : float
            The point.

        Returns
        -------
        value : float
            NaN where it has none, or one beyond 1e150.
        """
        value = float(self._call(self.function, x, y, math.nan))
        return value if abs(value) <= LARGEST else math.nan

    def gradient_at(self, x: float, y: float) -> Array:
        """The derivatives in x and y at a point, NaN where there are none: those given, or central differences.

        The difference in x is ``(f(x + h, y) - f(x - h, y)) / 2h`` with ``h = cbrt(2**-52) * max(1, abs(x))``, about
        6e-6, and likewise in y. This h balances rounding, which grows as 1/h, with the error of the formula, which
        grows as h**2 (W. Press and others, Numerical Recipes, 3rd edition, 2007, section 5.7): about 10 digits hold.

        Parameters
        ----------
        x, y : float
            The point.

        Returns
        -------
        gradient : ndarray, shape (2,), float64
            NaN where there is none.
        """
        if self.gradient is not None:
            return self._call(self.gradient, x, y, (math.nan, math.nan))
        found = []
        for k, at in enumerate((x, y)):
            h = _CBRT_EPS * max(1.0, abs(at))
            low, high = ((at - h, y), (at + h, y)) if k == 0 else ((x, at - h), (x, at + h))
            # What lies between the two as they were rounded is not quite 2h.
            found.append((self.value_at(*high) - self.value_at(*low)) / (high[k] - low[k]))
        return np.array(found)

    def _call(self, function: Callable[[float, float], Any], x: float, y: float, nothing: Any) -> Array:
        """What the user's function returns, which has to be of the shape of `nothing`."""
        with np.errstate(all="ignore"):
            try:
                value = function(np.float64(x), np.float64(y))
            except (ArithmeticError, ValueError):  # as of math.log(-1.0)
                value = nothing
        numbers = _numbers(value, np.shape(nothing))
        if numbers is None:
            what, kind = ("gradient", "two numbers") if np.shape(nothing) else ("function", "a number")
            raise OptionTypeError(f"{what}: expected {kind} at x={x:g}, y={y:g}, got {value!r} ({_kind(value)})")
        return numbers


def _numbers(value: Any, shape: tuple[int, ...]) -> Array | None:
    """`value` as an array of float64, or None where it is not real numbers in this shape."""
    try:
        array = np.asarray(value)
    except Exception:  # lists of different lengths, or whatever an object does when it is asked for an array
        return None
    return array.astype(np.float64) if array.shape == shape and array.dtype.kind in "iuf" else None


def _kind(value: Any) -> str:
    return f"array of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def check_point(name: str, value: Any) -> Point:
    """Return `value` as two finite floats."""
    numbers = _numbers(value, (2,))
    if numbers is None or not np.isfinite(numbers).all():
        raise OptionError(f"{name}: expected two finite numbers, x and y, got {value!r}")
    return float(numbers[0]), float(numbers[1])


def check_region(value: Any) -> Region:
    """Return `value` as limits of x and of y, each finite and the first below the second."""
    numbers = _numbers(value, (2, 2))
    if numbers is None or not np.isfinite(numbers).all() or not (numbers[:, 0] < numbers[:, 1]).all():
        raise OptionError(f"region: expected ((x_low, x_high), (y_low, y_high)), finite, got {value!r}")
    (x_low, x_high), (y_low, y_high) = numbers.tolist()
    return (x_low, x_high), (y_low, y_high)


def check_steps(value: Any) -> int:
    """Return `value` if it is a number of steps."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise OptionError(f"steps: expected a whole number of at least 0, got {value!r}")
    return int(value)


LANDSCAPES: Mapping[str, Landscape] = MappingProxyType(
    {
        "bowl": Landscape(
            lambda x, y: 5 * x**2 + 7 * y**2,
            lambda x, y: (10 * x, 14 * y),
            name="bowl",
            formula="5 x^2 + 7 y^2",
            start=(-1.6, 1.3),
            minima=[(0, 0)],
            steps=40,
            rates={"rmsprop": 0.1, "gradient-descent": 0.03, "momentum": 0.01, "adagrad": 0.1},
            azimuth=-30,
        ),
        "ellipse": Landscape(
            lambda x, y: x**2 + 10 * y**2,
            lambda x, y: (2 * x, 20 * y),
            name="ellipse",
            formula="x^2 + 10 y^2",
            start=(-1.7, 1.2),
            minima=[(0, 0)],
            steps=40,
            rates={"rmsprop": 0.1, "gradient-descent": 0.09, "momentum": 0.01, "adagrad": 0.1},
            azimuth=-30,
        ),
        "rosenbrock": Landscape(
            lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
            lambda x, y: (-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)),
            name="Rosenbrock",
            formula="(1 - x)^2 + 100 (y - x^2)^2",
            start=(-1.2, 1.0),
            region=((-2, 2), (-1, 3)),
            minima=[(1, 1)],
            steps=400,
            rates={"rmsprop": 0.02, "gradient-descent": 0.001, "momentum": 0.0005, "adagrad": 0.02},
            azimuth=-120,
        ),
        "beale": Landscape(
            lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
            lambda x, y: (
                2 * (1.5 - x + x * y) * (y - 1)
                + 2 * (2.25 - x + x * y**2) * (y**2 - 1)
                + 2 * (2.625 - x + x * y**3) * (y**3 - 1),
                2 * x * (1.5 - x + x * y) + 4 * x * y * (2.25 - x + x * y**2) + 6 * x * y**2 * (2.625 - x + x * y**3),
            ),
            name="Beale",
            formula="(1.5 - x + xy)^2 + (2.25 - x + xy^2)^2 + (2.625 - x + xy^3)^2",
            start=(1.0, 1.5),
            region=((-0.5, 4), (-2, 2)),
            minima=[(3, 0.5)],
            steps=200,
            rates={"rmsprop": 0.05, "gradient-descent": 0.01, "momentum": 0.004, "adagrad": 0.05},
            azimuth=-120,
        ),
        "saddle": Landscape(
            lambda x, y: x**2 - y**2,
            lambda x, y: (2 * x, -2 * y),
            name="saddle",
            formula="x^2 - y^2",
            start=(-1.5, 0.01),
            steps=60,
            rates={"rmsprop": 0.05, "gradient-descent": 0.05, "momentum": 0.01, "adagrad": 0.05},
        ),
        # It runs along the diagonal, where a rate for each variable gains nothing.
        "ravine": Landscape(
            lambda x, y: (x + y) ** 2 / 20 + 5 * (x - y) ** 2,
            lambda x, y: ((x + y) / 10 + 10 * (x - y), (x + y) / 10 - 10 * (x - y)),
            name="ravine",
            formula="(x + y)^2 / 20 + 5 (x - y)^2",
            start=(-1.7, -1.0),
            minima=[(0, 0)],
            steps=100,
            rates={"rmsprop": 0.05, "gradient-descent": 0.04, "momentum": 0.01, "adagrad": 0.05},
            azimuth=-120,
        ),
    }
)


def find(function: Any) -> Landscape:
    """The landscape of this name, or of this function, or the one that it is already."""
    if isinstance(function, Landscape):
        return function
    if isinstance(function, str):
        if function not in LANDSCAPES:
            raise OptionError(f"function: expected one of {tuple(LANDSCAPES)}, or a callable, got {function!r}")
        return LANDSCAPES[function]
    return Landscape(function)
