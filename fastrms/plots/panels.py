"""The four panels of figures of trajectories, each drawn into axes: path, surface, values and rates.

Imports Matplotlib. A panel returns its lines with all their data; an animation shows more and more of the data.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator

from fastrms.plots import style
from fastrms.plots.functions import Array
from fastrms.plots.levels import make_scale
from fastrms.plots.trajectories import Descent, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DRAW", "Line"]

# A Line2D or Line3D and its data, with a column for each axis.
Line = tuple[Any, Array]

_STYLES: tuple[tuple[str, str, style.Dashes], ...] = (
    (style.BLACK, "o", style.SOLID),
    (style.VERMILION, "s", style.DASHED),
    (style.BLUE, "^", style.DASH_DOTTED),
    (style.GREEN, "D", style.DOTTED),
    (style.PURPLE, "v", style.SOLID),
    (style.ORANGE, "P", style.DASHED),
    (style.SKY_BLUE, "X", style.DASH_DOTTED),
    (style.BLACK, "*", style.DOTTED),
)
# From low to high values: light, so that lines stand out, and lightest where trajectories end.
_COLOURS = LinearSegmentedColormap.from_list("fastrms", ["#F6F9FB", "#9FB3C4"])
_CONTOUR: dict[str, Any] = {"colors": "#7A8B99", "linestyles": "solid", "linewidths": 0.5, "zorder": 1}

# The smallest height above the minimum that a figure shows, as a part of the largest.
_SMALLEST = 1e-14

# Markers on each line.
_MARKERS = 12


def _draw_path(ax: "Axes", descent: Descent) -> list[Line]:
    """Draw contours of the function, and the trajectories from above."""
    x, y, grid = descent.grid
    scale = make_scale(descent)
    levels = scale.levels
    filled = ax.contourf(x, y, grid, levels, cmap=_COLOURS, norm=BoundaryNorm(levels, 256), zorder=0)
    ax.contour(x, y, grid, levels, **_CONTOUR)
    # In inset axes, the bar is as high as the panel, whatever the panel's aspect.
    bar = ax.figure.colorbar(
        filled, cax=ax.inset_axes((1.03, 0, 0.04, 1)), ticks=levels, spacing="uniform",
        format=None if scale.even else "%.4g",
    )  # fmt: skip
    bar.ax.tick_params(labelsize=8)
    bar.set_label("f(x, y)", fontsize=9)
    lines = _draw_lines(ax, descent.traces, [trace.points for trace in descent.traces])
    _mark(ax, descent.traces[0].points[0], descent.landscape.minima)
    (x_low, x_high), (y_low, y_high) = descent.region
    ax.set(xlim=(x_low, x_high), ylim=(y_low, y_high), xlabel="x", ylabel="y")
    # An equal aspect shows true directions, unless the panel would become a sliver.
    if 1 / 3 < (x_high - x_low) / (y_high - y_low) < 3:
        ax.set_aspect("equal")
    return lines


def _draw_surface(ax: Any, descent: Descent) -> list[Line]:
    """Draw the function as a surface, and the trajectories over it."""
    x, y, grid = descent.grid
    scale = make_scale(descent)
    levels, height = scale.levels, scale.height
    # Matplotlib would order whole objects by their distance, and hide trajectories behind the surface.
    ax.computed_zorder = False
    mesh = np.meshgrid(x, y)
    # Continuous colours: the edges of steps would be as ragged as the mesh is coarse.
    colours = _COLOURS(np.interp(grid, levels, np.linspace(0, 1, len(levels))))
    ax.plot_surface(
        *mesh, height(grid), facecolors=colours, rcount=80, ccount=80, linewidth=0, antialiased=False, shade=False,
        rasterized=True, zorder=0,
    )  # fmt: skip
    ax.contour(*mesh, height(grid), height(levels), **_CONTOUR)
    (x_low, x_high), (y_low, y_high) = descent.region
    data = []
    for trace in descent.traces:
        inside = (trace.points >= (x_low, y_low)) & (trace.points <= (x_high, y_high))
        # Matplotlib clips nothing in three dimensions; NaN makes gaps in lines.
        columns = np.column_stack([trace.points, height(trace.values)])
        data.append(np.where(inside.all(axis=1, keepdims=True), columns, np.nan))
    lines = _draw_lines(ax, descent.traces, data)
    start = descent.traces[0]
    lowest = [(*point, float(height(np.array(scale.lowest)))) for point in descent.landscape.minima]
    _mark(ax, (*start.points[0], float(height(start.values[0]))), lowest)
    ax.set(xlim=(x_low, x_high), ylim=(y_low, y_high), xlabel="x", ylabel="y", zlabel="f(x, y)")
    if scale.unit is not None:
        some = levels[:: math.ceil(len(levels) / 6)]
        ax.set_zticks(height(some), [f"{level:.4g}" for level in some])
    ax.tick_params(labelsize=8)
    ax.view_init(elev=50, azim=descent.landscape.azimuth)
    ax.set_box_aspect(None, zoom=0.85)  # leaves room for the labels
    return lines


def _draw_values(ax: "Axes", descent: Descent) -> list[Line]:
    """Draw values over steps: above a known minimum on a logarithmic axis, or as they are."""
    lowest = min((descent.landscape.value_at(*point) for point in descent.landscape.minima), default=None)
    data = []
    for trace in descent.traces:
        value = trace.values if lowest is None else trace.values - lowest
        # A logarithmic axis has no place for 0.
        data.append(_over_steps(value if lowest is None else np.where(value > 0, value, np.nan)))
    lines = _draw_curves(ax, descent, data)
    ax.set_ylabel("f(x, y)" if lowest is None else "f(x, y) above the minimum")
    ax.set_title("Value", fontsize=11)
    grid = descent.grid[2]
    low, high = ax.get_ylim()
    # A trajectory that leaves the region, or that converges to 1e-300, must not flatten the others.
    if lowest is None:
        bottom, top = np.nanmin(grid), np.nanmax(grid)
        margin = 0.05 * (top - bottom) or 1.0
        ax.set_ylim(max(low, bottom - margin), min(high, top + margin))
    else:
        _make_logarithmic(ax, data)
        top = 10 * (np.nanmax(grid) - lowest)
        positive = np.concatenate(data)[:, 1]
        positive = positive[positive > 0]
        if len(positive) and (positive.max() > top or positive.min() < _SMALLEST * top):
            bottom = max(positive.min() / 2, _SMALLEST * top)
            ax.set_ylim(bottom, min(2 * max(positive.max(), bottom), top))
    return lines


def _draw_rates(ax: "Axes", descent: Descent) -> list[Line]:
    """Draw the geometric mean of the rates in x and y over steps."""
    # The start, step 0, has no rate.
    data = [_over_steps(np.array([np.nan, *np.sqrt(trace.rates.prod(axis=1))])) for trace in descent.traces]
    lines = _draw_curves(ax, descent, data)
    _make_logarithmic(ax, data)
    ax.set_ylabel("factor of the gradient")
    ax.set_title("Rate", fontsize=11)
    return lines


# The functions by the names of the panels.
DRAW: dict[str, Callable[[Any, Descent], list[Line]]] = {
    "path": _draw_path,
    "surface": _draw_surface,
    "values": _draw_values,
    "rates": _draw_rates,
}


def _over_steps(y: Array) -> Array:
    return np.column_stack([np.arange(len(y), dtype=np.float64), y])


def _make_logarithmic(ax: "Axes", data: list[Array]) -> None:
    # Without steps there may be nothing that has a logarithm.
    if any((each[:, 1] > 0).any() for each in data):
        ax.set_yscale("log")


def _draw_curves(ax: "Axes", descent: Descent, data: list[Array]) -> list[Line]:
    lines = _draw_lines(ax, descent.traces, data)
    steps = max(1, *(len(each) - 1 for each in data))
    ax.set_xlim(-0.02 * steps, 1.02 * steps)  # leaves room for markers
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return lines


def _draw_lines(ax: "Axes", traces: Sequence[Trajectory], data: list[Array]) -> list[Line]:
    """Draw a line for each trajectory, with a larger marker at its end."""
    lines: list[Line] = []
    for k, (trace, columns, (colour, marker, dashes)) in enumerate(zip(traces, data, _STYLES, strict=False)):
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "markeredgecolor": style.WHITE,
            "markeredgewidth": 0.6,
        }
        # The first is on top, and lower lines are wider, so that they show where trajectories coincide.
        width = 1.5 + 2.5 * k / max(3, len(data) - 1)
        # Markers of different lines are at different steps, so that they do not cover one another.
        every = max(1, len(columns) // _MARKERS)
        (line,) = ax.plot(
            *columns.T, label=trace.caption, linestyle=dashes, linewidth=width, markersize=5 + k / 2, zorder=10 - k,
            markevery=(k * every // len(data), every), **look,
        )  # fmt: skip
        line.set_path_effects([Stroke(linewidth=width + 1, foreground=style.WHITE), Normal()])
        # The last point of the line, also while an animation lets the line grow.
        (end,) = ax.plot(*columns.T, linestyle="none", markersize=9, zorder=20 - k, markevery=[-1], **look)
        lines += [(line, columns), (end, columns)]
    return lines


def _mark(ax: "Axes", start: Sequence[float], minima: Sequence[Sequence[float]]) -> None:
    """Mark the start and the minima, given by two or three coordinates."""
    look: dict[str, Any] = {"linestyle": "none", "markerfacecolor": style.WHITE, "markeredgecolor": style.BLACK}
    ax.plot(*([at] for at in start), marker="o", markersize=9, zorder=21, label="start", **look)
    if minima:
        # Below the ends of trajectories and larger, so that both show.
        ax.plot(*zip(*minima, strict=True), marker="*", markersize=18, zorder=11, label="minimum", **look)
