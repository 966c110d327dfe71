"""Figures of trajectories on a function of two variables. Matplotlib is imported when one is drawn."""

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsFloat

import numpy as np

from fastrms.errors import OptionError, OptionTypeError
from fastrms.plots.functions import Landscape
from fastrms.plots.style import new_figure
from fastrms.plots.trajectories import Descent, descend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from fastrms.plots.panels import Line

__all__ = ["PANELS", "animate", "overview", "path", "rates", "surface", "values"]

# The panels of a figure: two of the function, and two of curves over steps.
PANELS = ("path", "surface", "values", "rates")

# The functions of this module draw trajectories that are computed already, too.
Function = str | Callable[[float, float], SupportsFloat] | Landscape | Descent

# An animation has at most so many pictures after the start. Durations are in milliseconds.
_FRAMES, _DURATION, _LAST_DURATION, _DPI = 50, 80, 1500, 80


def path(function: Function = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw contours of a function of two variables, and trajectories of RMSProp and other methods.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        The first argument of `fastrms.plots.descend`: ``"bowl"``, ``"ellipse"``, ``"rosenbrock"``, ``"beale"``,
        ``"saddle"``, ``"ravine"``, a function that is called with two floats and returns a number, or a
        `fastrms.plots.Landscape`. Or the result of `descend`, for several figures of the same trajectories.
    ax : matplotlib.axes.Axes, optional
        By default axes of a new figure of pyplot.
    **options
        Options of `descend`: ``settings``, ``beside``, ``start``, ``steps``, ``region``. Without the first two: RMSProp
        with default options, gradient descent, momentum and AdaGrad.

    Returns
    -------
    ax : matplotlib.axes.Axes
        Its lines are the trajectories, each followed by a line that marks the end.

    Raises
    ------
    OptionError, OptionTypeError
        As for `descend`; or `ax` is of the wrong kind, or options are given in addition to a Descent.
    ImportError
        Matplotlib is not installed.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> ax = plots.path("bowl", settings=[{}, {"momentum": 0.9}], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['RMSProp, lr 0.2', 'RMSProp, lr 0.2, momentum 0.9', 'start', 'minimum']
    """
    return _draw_alone("path", function, ax, options)


def surface(function: Function = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw a function of two variables as a surface in three dimensions, and trajectories of several methods.

    Heights are logarithmic if values differ much in size.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    ax : mpl_toolkits.mplot3d.axes3d.Axes3D, optional
        Axes made with ``projection="3d"``. By default, axes of a new figure of pyplot.
    **options
        As for `path`.

    Returns
    -------
    ax : mpl_toolkits.mplot3d.axes3d.Axes3D
        Trajectories are drawn over the surface from every angle, and only inside the region.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> plots.surface("saddle", ax=Figure().add_subplot(projection="3d")).get_xlabel()
    'x'
    """
    return _draw_alone("surface", function, ax, options)


def values(function: Function = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw the function's value after each step of several methods.

    If minima are known, the figure shows the height above the lowest minimum on a logarithmic axis.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    ax : matplotlib.axes.Axes, optional
        By default axes of a new figure of pyplot.
    **options
        As for `path`.

    Returns
    -------
    ax : matplotlib.axes.Axes
        With a line for each trajectory.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> ax = plots.values("bowl", beside=["adagrad"], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['RMSProp, lr 0.2', 'AdaGrad, lr 1']
    """
    return _draw_alone("values", function, ax, options)


def rates(function: Function = "ellipse", *, ax: "Axes | None" = None, **options: Any) -> "Axes":
    """Draw the rate of each step, which is the factor of the gradient.

    The rates in x and y differ for RMSProp, AdaGrad and Adam; the figure shows their geometric mean. Gradient descent
    has a constant rate. The rate of AdaGrad only falls. The rate of RMSProp rises again when gradients become small.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    ax : matplotlib.axes.Axes, optional
        By default axes of a new figure of pyplot.
    **options
        As for `path`.

    Returns
    -------
    ax : matplotlib.axes.Axes
        With a line for each trajectory.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> from fastrms import plots
    >>> ax = plots.rates("bowl", beside=["adagrad"], ax=Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['RMSProp, lr 0.2', 'AdaGrad, lr 1']
    """
    return _draw_alone("rates", function, ax, options)


def overview(
    function: Function = "ellipse", *, panels: Sequence[str] = PANELS, **options: Any
) -> "tuple[Figure, dict[str, Axes]]":
    """Draw several of `path`, `surface`, `values` and `rates` in one figure with one legend.

    Parameters
    ----------
    function : str, callable, Landscape or Descent, default "ellipse"
        As for `path`.
    panels : sequence of str
        The names of the panels. By default, all four.
    **options
        As for `path`.

    Returns
    -------
    figure : matplotlib.figure.Figure
        A figure that pyplot does not manage; ``figure.savefig(path)`` writes it.
    axes : dict of str to matplotlib.axes.Axes
        The axes by the name of the panel.

    Raises
    ------
    OptionError, OptionTypeError, ImportError
        As for `path`. Or a panel is unknown, or listed twice.

    Examples
    --------
    >>> from fastrms import plots
    >>> figure, axes = plots.overview("rosenbrock", panels=["path", "rates"], steps=10)
    >>> sorted(axes)
    ['path', 'rates']
    """
    figure, axes, _ = _draw_together(_descent(function, options), panels)
    return figure, axes


def animate(
    function: Function,
    file: "str | Path | BinaryIO",
    *,
    panels: Sequence[str] = PANELS,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> None:
    """Write the figure of `overview` as an animated GIF, in which the trajectories grow step by step.

    Parameters
    ----------
    function : str, callable, Landscape or Descent
        As for `path`.
    file : str, Path or binary file
        The file to write.
    panels : sequence of str
        As for `overview`.
    on_picture : callable
        Called after each picture with the number of finished pictures and of all. There are at most 51. Of more than 50
        steps, pictures are close together at first and further apart later.
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
        file = Path(file).absolute()  # the user's function may change the working directory
    descent = _descent(function, options)
    figure, _, lines = _draw_together(descent, panels)
    from PIL import Image  # a dependency of Matplotlib

    canvas: Any = figure.canvas
    title = figure.get_suptitle()
    heading = figure.suptitle(title, fontsize=12)
    figure.set_dpi(_DPI)
    canvas.draw()
    figure.set_layout_engine("none")  # freezes the layout of the whole trajectories
    steps = max(len(trace.rates) for trace in descent.traces)
    shown = _shown_steps(steps)
    pictures = []
    for step in shown:
        for line, data in lines:
            (line.set_data_3d if data.shape[1] == 3 else line.set_data)(*data[: step + 1].T)
        heading.set_text(f"{title}, step {step} of {steps}")
        canvas.draw()
        pictures.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
        on_picture(len(pictures), len(shown))
    _save_gif(pictures, file)


def _shown_steps(steps: int) -> list[int]:
    """Return the steps that have a picture, close together at first, because the first steps are the longest."""
    power = 1 if steps <= _FRAMES else 2
    shown: list[int] = np.unique(
        (steps * np.linspace(0, 1, min(steps, _FRAMES) + 1) ** power).round().astype(int)
    ).tolist()
    return shown


def _save_gif(pictures: "Sequence[Image.Image]", file: "Path | BinaryIO") -> None:
    from PIL import Image

    # One palette for all, from the last picture. A dither would flicker.
    palette = pictures[-1].quantize(256, method=Image.Quantize.FASTOCTREE)
    first, *others = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [_DURATION] * len(others) + [_LAST_DURATION]
    first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = 'matplotlib is not installed; install with: python -m pip install "fastrms[plot]"'
        raise ImportError(message) from None


def _descent(function: Function, options: dict[str, Any]) -> Descent:
    if not isinstance(function, Descent):
        return descend(function, **options)
    if options:
        raise OptionError(f"{next(iter(options))}: cannot be combined with a Descent, whose paths are already computed")
    return function


def _title(descent: Descent) -> str:
    landscape = descent.landscape
    name = landscape.name.replace("$", r"\$")  # not the beginning of a formula
    return f"{name}: ${landscape.formula}$" if landscape.formula else name


def _draw_alone(panel: str, function: Function, ax: "Axes | None", options: dict[str, Any]) -> "Axes":
    """Draw one panel into the user's axes or new ones, with a title and a legend."""
    _require_matplotlib()
    from matplotlib.axes import Axes

    from fastrms.plots.panels import DRAW

    kind = "3d" if panel == "surface" else "rectilinear"
    if ax is not None and (not isinstance(ax, Axes) or ax.name != kind):
        wanted = 'axes made with projection="3d"' if kind == "3d" else "two-dimensional axes"
        raise OptionTypeError(f"ax: expected {wanted} of Matplotlib, got {ax!r}")
    descent = _descent(function, options)
    if ax is None:
        import matplotlib.pyplot as plt

        size = (6.4, 6.4) if panel in PANELS[:2] else (6.4, 4.8)
        ax = plt.figure(figsize=size, layout="constrained").add_subplot(projection=kind)
    DRAW[panel](ax, descent)
    ax.set_title(_title(descent), fontsize=11)
    # Below the axes, the legend covers no line.
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=9,
        title=textwrap.fill(descent.note, 64), title_fontsize=9,
    )  # fmt: skip
    return ax


def _draw_together(descent: Descent, panels: Sequence[str]) -> "tuple[Figure, dict[str, Axes], list[Line]]":
    """Draw several panels into a new figure; return it, its axes and its lines."""
    _require_matplotlib()
    from fastrms.plots.panels import DRAW

    if not panels or len(set(panels)) < len(panels) or not set(panels) <= set(PANELS):
        raise OptionError(f"panels: expected names out of {PANELS}, each once, got {panels!r}")
    # The function is above, the curves are below. A panel alone in its row fills the row.
    rows = [row for names in (PANELS[:2], PANELS[2:]) if (row := [name for name in panels if name in names])]
    columns = max(map(len, rows))
    heights = [5.0 if row[0] in PANELS[:2] else 3.4 for row in rows]
    figure = new_figure(6 * columns, sum(heights) + 1)
    mosaic: Any = [row if len(row) == columns else row * columns for row in rows]
    axes = figure.subplot_mosaic(
        mosaic,
        height_ratios=heights,
        per_subplot_kw={"surface": {"projection": "3d"}} if "surface" in panels else {},
    )
    figure.suptitle(_title(descent), fontsize=12)
    lines: list[Line] = []
    labelled: dict[str, Any] = {}
    for name in panels:
        lines += DRAW[name](axes[name], descent)
        handles, labels = axes[name].get_legend_handles_labels()
        labelled = dict(zip(labels, handles, strict=True)) | labelled
    figure.legend(
        list(labelled.values()), list(labelled), loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        title=textwrap.fill(descent.note, 64 * columns), title_fontsize=9,
    )  # fmt: skip
    # The layout uses sizes from the previous drawing, and needs a first one.
    figure.draw_without_rendering()
    return figure, {name: axes[name] for name in panels}, lines
