"""Colours, dashes and new figures that all plots share. Matplotlib is imported when a figure is made."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, whose colours colour-blind people can tell apart.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
WHITE, GREY = "#FFFFFF", "#BBBBBB"

# Lines differ in dashes and markers too, for print in grey.
Dashes = str | tuple[int, tuple[float, ...]]
SOLID: Dashes = "solid"
DASHED: Dashes = (0, (4, 1.5))
DOTTED: Dashes = (0, (1, 1))
DASH_DOTTED: Dashes = (0, (4, 1, 1, 1))


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches, which can be drawn and which pyplot does not know."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
