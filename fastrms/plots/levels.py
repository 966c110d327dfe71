"""Contour levels of a function, and its heights on a surface, linear or logarithmic. Imports Matplotlib."""

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from fastrms.plots.functions import Array
from fastrms.plots.trajectories import Descent

__all__ = ["Scale", "make_scale"]


@dataclass(frozen=True)
class Scale:
    """Levels for contours, and heights for a surface."""

    levels: Array  # the values of contour lines, ascending
    lowest: float  # a lower bound of the values
    even: bool = False  # whether the levels are evenly spaced
    unit: float | None = None  # the offset of logarithmic heights; None for linear heights

    def height(self, values: Array) -> Array:
        """Return the position of values on the vertical axis."""
        if self.unit is None:
            return values
        heights: Array = np.log10(np.maximum(values - self.lowest, 0) + self.unit)
        return heights


def make_scale(descent: Descent) -> Scale:
    """Return a scale for the values of a function in its region.

    Values of a plane or a saddle spread evenly; their levels are even. Values of a bowl crowd near the minimum, and
    those of Rosenbrock's function crowd much more; their levels are 1, 2, 5, 10, 20 and so on above the lowest value.
    """
    values = descent.grid[2]
    values = values[np.isfinite(values)]
    lowest = min([values.min(), *(descent.landscape.value_at(*point) for point in descent.landscape.minima)])
    highest = values.max()
    above = np.median(values) - lowest
    # 2 for a plane and a saddle, 3 to 4 for bowls, and 10 and more where only a logarithm shows anything.
    spread = (highest - lowest) / above if above > 0 else math.inf
    if spread < 2.5 or highest == lowest:
        return Scale(np.array(MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(lowest, highest)), lowest, even=True)
    heights = values[values > lowest] - lowest
    largest = heights.max()
    smallest = max(np.quantile(heights, 0.02), 1e-12 * largest)
    decades = math.log10(largest / smallest)
    mantissas = (1, 2, 5) if decades < 3 else (1, 3) if decades < 5 else (1,)
    powers = 10.0 ** np.arange(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
    series = np.outer(powers, mantissas).ravel()
    # From the first above the smallest height to the first above the largest.
    series = series[max(0, np.searchsorted(series, smallest)) : np.searchsorted(series, largest) + 1]
    # Round numbers above a round number; a known minimum of 0 is one.
    lowest = math.floor(lowest / series[0]) * series[0]
    return Scale(np.unique([lowest, *(lowest + series)]), lowest, unit=series[0] if spread > 8 else None)
