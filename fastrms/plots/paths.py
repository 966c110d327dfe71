"""Paths on functions of two variables: from above, in three dimensions, and what values and rates they have."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastrms.errors import OptionError, OptionTypeError
from fastrms.plots.trajectories import Descent, Trajectory, descend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PANELS", "animate", "overview", "path", "rates", "surface", "values"]

Array = NDArray[Any]

# What a figure can have: two of the landscape, two of curves over steps.
PANELS = ("path", "surface", "values", "rates")

# A line and all its data, one column for each axis; an animation shows more and more of it.
_Line = tuple[Any, Array]

# Colours of the Okabe-Ito palette, which colour-blind people can tell apart, and in grey by markers and dashes.
_SOLID, _DASHED, _DOTTED, _MIXED = "solid", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1))
_STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#000000", "o", _SOLID),
    ("#D55E00", "s", _DASHED),
    ("#0072B2", "^", _MIXED),
    ("#009E73", "D", _DOTTED),
    ("#CC79A7", "v", _SOLID),
    ("#E69F00", "P", _DASHED),
    ("#56B4E9", "X", _MIXED),
    ("#000000", "*", _DOTTED),
)
# From low to high. Light, so that lines stand out, and paths end in the lightest part.
_LOW, _HIGH, _CONTOUR = "#F6F9FB", "#9FB3C4", "#7A8B99"
_HALO = "#FFFFFF"

# Markers on each line.
_MARKERS = 12

# Of an animation: pictures at most (and the start), how long each is shown, and dots per inch.
_FRAMES, _MILLISECONDS, _LAST_MILLISECONDS, _DPI = 50, 80, 1500, 80


def path(function: Any = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw contours of a function of two variables, and the paths of RMSProp and other methods on it.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        What `fastrms.plots.trajectories.descend` takes: ``"bowl"``, ``"ellipse"``, ``"rosenbrock"``, ``"beale"``,
        ``"saddle"``, ``"ravine"``, a function that is called with two floats and returns a number, or a
        `fastrms.plots.functions.Landscape`. Or what `descend` returned, for several pictures of the same paths.
    ax : matplotlib.axes.Axes, optional
        Where to draw. By default axes of a new figure of pyplot.
    **options
        Of `descend`: ``settings``, ``beside``, ``start``, ``steps``, ``region``. Without any of the first two: RMSProp
        with default options beside gradient descent, momentum and AdaGrad.

    Returns
    -------
    ax : matplotlib.axes.Axes
        Its lines are the paths, from `descend`'s points, each followed by one that marks its end.

    Raises
    ------
    OptionError, OptionTypeError
        As `descend` raises them; or `ax` is of the wrong kind, or there are options beside a Descent.
    ImportError
        Matplotlib is not installed.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> ax = plots.path("bowl", settings=[{}, {"momentum": 0.9}], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['RMSProp, lr 0.1', 'RMSProp, lr 0.1, momentum 0.9', 'start', 'minimum']
    """
    return _draw_alone(_draw_path, function, ax, options)


def surface(function: Any = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw a function of two variables as a surface in three dimensions, and the paths of several methods on it.

    Where the function's values are of very different size, the height is their logarithm.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    ax : mpl_toolkits.mplot3d.axes3d.Axes3D, optional
        Where to draw: axes made with ``projection="3d"``. By default those of a new figure of pyplot.
    **options
        As for `path`.

    Returns
    -------
    ax : mpl_toolkits.mplot3d.axes3d.Axes3D
        Paths lie over the surface wherever one looks from, and are drawn as far as they are in the region.

    Raises
    ------
    OptionError, OptionTypeError, ImportError
        As for `path`.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> plots.surface("saddle", ax=Figure().add_subplot(projection="3d")).get_xlabel()
    'x'
    """
    return _draw_alone(_draw_surface, function, ax, options)


def values(function: Any = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw the function's value after each step of several methods.

    Where the minimum is known it is the height above it, on a logarithmic axis.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    ax : matplotlib.axes.Axes, optional
        Where to draw. By default axes of a new figure of pyplot.
    **options
        As for `path`.

    Returns
    -------
    ax : matplotlib.axes.Axes
        With a line for each path.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> ax = plots.values("bowl", beside=["adagrad"], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['RMSProp, lr 0.1', 'AdaGrad, lr 0.1']
    """
    return _draw_alone(_draw_values, function, ax, options)


def rates(function: Any = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw the rate of each step, what it multiplied the gradient by.

    Of the rates in x and y, which RMSProp and AdaGrad have, it is the geometric mean. Gradient descent has a constant
    rate, AdaGrad one that only falls, and RMSProp one that rises again where gradients become small.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    ax : matplotlib.axes.Axes, optional
        Where to draw. By default axes of a new figure of pyplot.
    **options
        As for `path`.

    Returns
    -------
    ax : matplotlib.axes.Axes
        With a line for each path.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> ax = plots.rates("bowl", beside=["adagrad"], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['RMSProp, lr 0.1', 'AdaGrad, lr 0.1']
    """
    return _draw_alone(_draw_rates, function, ax, options)


def overview(
    function: Any = "ellipse", *, panels: Sequence[str] = PANELS, **options: Any
) -> "tuple[Figure, dict[str, Axes]]":
    """Draw several of `path`, `surface`, `values` and `rates` in one figure, with one legend.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    panels : sequence of str
        Which; all four by default.
    **options
        As for `path`.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Not known to pyplot; ``figure.savefig(path)`` writes it.
    axes : dict of str to matplotlib.axes.Axes
        By the name of the panel.

    Raises
    ------
    OptionError, OptionTypeError, ImportError
        As for `path`; or a panel is unknown, or given twice.

    Examples
    --------
    >>> from fastrms import plots
    >>> figure, axes = plots.overview("rosenbrock", panels=["path", "rates"], steps=10)
    >>> sorted(axes)
    ['path', 'rates']
    """
    figure, axes, _ = _overview(_descent(function, options), panels)
    return figure, axes


def animate(
    function: Any,
    file: "str | Path | BinaryIO",
    *,
    panels: Sequence[str] = PANELS,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> None:
    """Write an animated GIF of `overview`'s figure, in which the paths grow step by step.

    Parameters
    ----------
    function : str, callable, Landscape or Descent
        As for `path`.
    file : str, Path or binary file
        Where to write it.
    panels : sequence of str
        As for `overview`.
    on_picture : callable
        Called with the number of pictures that are drawn and that of all, after each; there are 51 at most, evenly
        spaced over the steps.
    **options
        As for `path`.

    Raises
    ------
    OptionError, OptionTypeError, ImportError
        As for `overview`.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> import io
    >>> from fastrms import plots
    >>> plots.animate("bowl", io.BytesIO(), panels=["path"], steps=2)
    """
    if isinstance(file, str | os.PathLike):
        file = Path(file).absolute()  # what draws may call functions of the user's, which may change the folder
    descent = _descent(function, options)
    figure, _, lines = _overview(descent, panels)
    from PIL import Image  # a dependency of Matplotlib

    canvas: Any = figure.canvas
    heading = figure.suptitle(figure.get_suptitle(), fontsize=12)
    title = heading.get_text()
    figure.set_dpi(_DPI)
    canvas.draw()
    figure.set_layout_engine("none")  # as it is with all of the paths: nothing is to move but they
    steps = max(len(trace.rates) for trace in descent.traces)
    shown = np.unique(np.linspace(0, steps, min(steps, _FRAMES) + 1).round().astype(int)).tolist()
    pictures = []
    for step in shown:
        for line, data in lines:
            (line.set_data_3d if data.shape[1] == 3 else line.set_data)(*data[: step + 1].T)
        heading.set_text(f"{title}, step {step} of {steps}")
        canvas.draw()
        pictures.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
        on_picture(len(pictures), len(shown))
    # One set of colours for all, that of the whole paths, and no dither, which would flicker.
    palette = pictures[-1].quantize(256, method=Image.Quantize.FASTOCTREE)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [_MILLISECONDS] * len(others) + [_LAST_MILLISECONDS]
    first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = 'matplotlib is not installed; install with: python -m pip install "fastrms[plot]"'
        raise ImportError(message) from None


def _descent(function: Any, options: dict[str, Any]) -> Descent:
    if not isinstance(function, Descent):
        return descend(function, **options)
    if options:
        raise OptionError(f"{next(iter(options))}: not beside a Descent, whose paths are there already")
    return function


def _title(descent: Descent) -> str:
    landscape = descent.landscape
    # A dollar sign in a name begins no formula.
    name = landscape.name.replace("$", r"\$")
    return f"{name}: ${landscape.formula}$" if landscape.formula else name


def _draw_alone(
    draw: "Callable[[Axes, Descent], list[_Line]]", function: Any, ax: "Axes | None", options: dict[str, Any]
) -> "Axes":
    """Draw into the user's axes, or new ones, with a title and a legend."""
    _require_matplotlib()
    from matplotlib.axes import Axes

    kind = "3d" if draw is _draw_surface else "rectilinear"
    if ax is not None and (not isinstance(ax, Axes) or ax.name != kind):
        wanted = 'axes made with projection="3d"' if kind == "3d" else "two-dimensional axes"
        raise OptionTypeError(f"ax: expected {wanted} of Matplotlib, got {ax!r}")
    descent = _descent(function, options)
    if ax is None:
        import matplotlib.pyplot as plt

        size = (6.4, 6.4) if draw in (_draw_path, _draw_surface) else (6.4, 4.8)
        ax = plt.figure(figsize=size, layout="constrained").add_subplot(projection=kind)
    draw(ax, descent)
    ax.set_title(_title(descent), fontsize=11)
    # Below, where it covers no path.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9)
    return ax


def _overview(descent: Descent, panels: Sequence[str]) -> "tuple[Figure, dict[str, Axes], list[_Line]]":
    _require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels or len(set(panels)) < len(panels) or not set(panels) <= set(PANELS):
        raise OptionError(f"panels: expected some of {PANELS}, each once, got {panels!r}")
    # Landscapes above, curves below; one alone in its row has all of it.
    rows = [row for names in (PANELS[:2], PANELS[2:]) if (row := [n for n in panels if n in names])]
    columns = max(map(len, rows))
    heights = [5.0 if row[0] in PANELS[:2] else 3.4 for row in rows]
    figure = Figure(figsize=(6 * columns, sum(heights) + 1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    mosaic: Any = [row if len(row) == columns else row * columns for row in rows]
    axes = figure.subplot_mosaic(
        mosaic,
        height_ratios=heights,
        per_subplot_kw={"surface": {"projection": "3d"}} if "surface" in panels else {},
    )
    figure.suptitle(_title(descent), fontsize=12)
    lines: list[_Line] = []
    labelled: dict[str, Any] = {}
    for name in panels:
        lines += _DRAW[name](axes[name], descent)
        handles, labels = axes[name].get_legend_handles_labels()
        labelled = dict(zip(labels, handles, strict=True)) | labelled
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    # The layout takes what things measure in the last drawing, and is not right in the first.
    figure.draw_without_rendering()
    return figure, {name: axes[name] for name in panels}, lines


def _draw_path(ax: "Axes", descent: Descent) -> list[_Line]:
    from matplotlib.colors import BoundaryNorm

    x, y, grid = descent.grid
    scale = _Scale(descent)
    levels = scale.levels
    filled = ax.contourf(x, y, grid, levels, cmap=_light(), norm=BoundaryNorm(levels, 256), zorder=0)
    ax.contour(x, y, grid, levels, colors=_CONTOUR, linestyles="solid", linewidths=0.5, zorder=1)
    # In axes of its own inside of these, it is as high as they are, whatever their shape.
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
    # Directions are true where lengths of x and y are the same; not where that would leave a sliver.
    if 1 / 3 < (x_high - x_low) / (y_high - y_low) < 3:
        ax.set_aspect("equal")
    return lines


def _draw_surface(ax: Any, descent: Descent) -> list[_Line]:
    x, y, grid = descent.grid
    scale = _Scale(descent)
    levels, height = scale.levels, scale.height
    # Otherwise Matplotlib sorts whole objects by their distance, and hides paths behind the surface they lie on.
    ax.computed_zorder = False
    mesh = np.meshgrid(x, y)
    # Without steps, whose edges would be as ragged as the mesh is coarse.
    colours = _light()(np.interp(grid, levels, np.linspace(0, 1, len(levels))))
    ax.plot_surface(
        *mesh, height(grid), facecolors=colours, rcount=80, ccount=80, linewidth=0, antialiased=False, shade=False,
        rasterized=True, zorder=0,
    )  # fmt: skip
    ax.contour(*mesh, height(grid), height(levels), colors=_CONTOUR, linestyles="solid", linewidths=0.5, zorder=1)
    (x_low, x_high), (y_low, y_high) = descent.region
    data = []
    for trace in descent.traces:
        inside = (trace.points >= (x_low, y_low)) & (trace.points <= (x_high, y_high))
        # Nothing is clipped in three dimensions, and lines with NaN have gaps.
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
    ax.set_box_aspect(None, zoom=0.85)  # room for the labels
    return lines


def _draw_values(ax: "Axes", descent: Descent) -> list[_Line]:
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
    # What runs away, far out of the region, is not to flatten what does not.
    if lowest is None:
        bottom, top = np.nanmin(grid), np.nanmax(grid)
        margin = 0.05 * (top - bottom) or 1.0
        ax.set_ylim(max(low, bottom - margin), min(high, top + margin))
    else:
        _make_logarithmic(ax, data)
        top = 10 * (np.nanmax(grid) - lowest)
        if high > top:
            ax.set_ylim(0.5 * np.nanmin(np.concatenate(data)[:, 1]), top)
    return lines


def _draw_rates(ax: "Axes", descent: Descent) -> list[_Line]:
    # Step 0, the start, has none.
    data = [_over_steps(np.array([np.nan, *np.sqrt(trace.rates.prod(axis=1))])) for trace in descent.traces]
    lines = _draw_curves(ax, descent, data)
    _make_logarithmic(ax, data)
    ax.set_ylabel("factor of the gradient")
    ax.set_title("Rate", fontsize=11)
    return lines


_DRAW: "dict[str, Callable[[Any, Descent], list[_Line]]]" = {
    "path": _draw_path,
    "surface": _draw_surface,
    "values": _draw_values,
    "rates": _draw_rates,
}


def _over_steps(y: Array) -> Array:
    return np.column_stack([np.arange(len(y)), y])


def _make_logarithmic(ax: "Axes", data: list[Array]) -> None:
    # Without steps there is nothing that has a logarithm.
    if any((each[:, 1] > 0).any() for each in data):
        ax.set_yscale("log")


def _draw_curves(ax: "Axes", descent: Descent, data: list[Array]) -> list[_Line]:
    from matplotlib.ticker import MaxNLocator

    lines = _draw_lines(ax, descent.traces, data)
    steps = max(1, *(len(each) - 1 for each in data))
    ax.set_xlim(-0.02 * steps, 1.02 * steps)  # room for markers
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return lines


def _draw_lines(ax: "Axes", traces: Sequence[Trajectory], data: list[Array]) -> list[_Line]:
    """Draw a line for each trace, and a larger marker at its end."""
    from matplotlib.patheffects import Normal, Stroke

    lines: list[_Line] = []
    for k, (trace, columns, (colour, marker, dashes)) in enumerate(zip(traces, data, _STYLES, strict=False)):
        style: dict[str, Any] = {"color": colour, "marker": marker, "markeredgecolor": _HALO, "markeredgewidth": 0.6}
        # The first on top, and wider what is below, so that it can be seen where paths are the same.
        width = 1.5 + 2.5 * k / max(3, len(data) - 1)
        # Markers not all at the same steps, where they would cover one another.
        every = max(1, len(columns) // _MARKERS)
        (line,) = ax.plot(
            *columns.T, label=trace.caption, linestyle=dashes, linewidth=width, markersize=5 + k / 2, zorder=10 - k,
            markevery=(k * every // len(data), every), **style,
        )  # fmt: skip
        line.set_path_effects([Stroke(linewidth=width + 1, foreground=_HALO), Normal()])
        # The last of what the line has, also while it grows.
        (end,) = ax.plot(*columns.T, linestyle="none", markersize=9, zorder=20 - k, markevery=[-1], **style)
        lines += [(line, columns), (end, columns)]
    return lines


def _mark(ax: "Axes", start: Sequence[float], minima: Sequence[Sequence[float]]) -> None:
    """Mark where the paths begin, and the minima; of two or three coordinates."""
    style: dict[str, Any] = {"linestyle": "none", "markerfacecolor": "#FFFFFF", "markeredgecolor": "#000000"}
    ax.plot(*([at] for at in start), marker="o", markersize=9, zorder=21, label="start", **style)
    if minima:
        # Below the ends of paths, and larger, so that both can be seen.
        ax.plot(*zip(*minima, strict=True), marker="*", markersize=18, zorder=11, label="minimum", **style)


def _light() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("fastrms", [_LOW, _HIGH])


class _Scale:
    """Levels for contours, and heights for the surface, from the values of a function in its region.

    Values of a plane or a saddle spread evenly, and levels do. Those of a bowl crowd near the minimum, those of
    Rosenbrock's function much more: there levels are 1, 2, 5, 10, 20 and so on above the lowest value.
    """

    def __init__(self, descent: Descent) -> None:
        from matplotlib.ticker import MaxNLocator

        values = descent.grid[2]
        values = values[np.isfinite(values)]
        known = [descent.landscape.value_at(*point) for point in descent.landscape.minima]
        self.lowest = min([values.min(), *known])
        highest = values.max()
        above = np.median(values) - self.lowest
        # 2 for a plane and a saddle, 3 to 4 for bowls, 10 and more where a logarithm is needed to see anything.
        spread = (highest - self.lowest) / above if above > 0 else math.inf
        self.unit = None
        self.even = spread < 2.5 or highest == self.lowest
        if self.even:
            self.levels = np.array(MaxNLocator(10, steps=[1, 2, 5, 10]).tick_values(self.lowest, highest))
            return
        range_ = values[values > self.lowest] - self.lowest
        largest = range_.max()
        smallest = max(np.quantile(range_, 0.02), 1e-12 * largest)
        decades = math.log10(largest / smallest)
        mantissas = (1, 2, 5) if decades < 3 else (1, 3) if decades < 5 else (1,)
        powers = 10.0 ** np.arange(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
        series = np.outer(powers, mantissas).ravel()
        # The first of them above the smallest, and the last to be above the largest.
        series = series[max(0, np.searchsorted(series, smallest)) : np.searchsorted(series, largest) + 1]
        # Round numbers above a round number, which for a known minimum of 0 is that.
        self.lowest = math.floor(self.lowest / series[0]) * series[0]
        self.levels = np.unique([self.lowest, *(self.lowest + series)])
        if spread > 8:
            self.unit = series[0]

    def height(self, values: Array) -> Array:
        """Where a value is on the vertical axis."""
        if self.unit is None:
            return values
        heights: Array = np.log10(np.maximum(values - self.lowest, 0) + self.unit)
        return heights
