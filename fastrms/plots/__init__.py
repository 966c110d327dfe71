"""Figures of measurements, and of trajectories on functions of two variables.

Matplotlib (extras ``plot``, ``demo`` and ``bench``) is imported when a figure is made.
"""

from fastrms.plots.figures import PANELS, animate, overview, path, rates, surface, values
from fastrms.plots.functions import Landscape
from fastrms.plots.measurements import format_seconds, plot_throughput, plot_training
from fastrms.plots.trajectories import descend

__all__ = [
    "PANELS",
    "Landscape",
    "animate",
    "descend",
    "format_seconds",
    "overview",
    "path",
    "plot_throughput",
    "plot_training",
    "rates",
    "surface",
    "values",
]
