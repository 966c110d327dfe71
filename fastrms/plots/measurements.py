"""Figures of measured losses, times and throughput."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastrms.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["format_seconds", "plot_throughput", "plot_training"]

# Colour, marker and dashes by the name of an implementation in `fastrms bench`. Those of one family share a colour.
_LINES: dict[str, tuple[str, str, style.Dashes]] = {
    "auto": (style.BLACK, "o", style.SOLID),
    "auto-list": (style.BLACK, "D", style.DASHED),
    "serial": (style.BLUE, "v", style.SOLID),
    "serial-list": (style.BLUE, "<", style.DASHED),
    "parallel": (style.BLUE, "^", style.DASHED),
    "parallel-list": (style.BLUE, ">", style.DOTTED),
    "parallel-bfloat16": (style.BLUE, "H", style.DOTTED),
    "numpy": (style.SKY_BLUE, "s", style.SOLID),
    "naive": (style.YELLOW, "p", style.SOLID),
    "naive-parallel": (style.YELLOW, "P", style.DASHED),
    "numpy-in-place": (style.SKY_BLUE, "P", style.DASHED),
    "reference": (style.ORANGE, "X", style.SOLID),
    "torch": (style.VERMILION, "<", style.SOLID),
    "torch-foreach": (style.VERMILION, ">", style.DASHED),
    "torch-compile": (style.VERMILION, "d", style.DOTTED),
    "torch-adagrad": (style.PURPLE, "s", style.DASHED),
    "tensorplay": (style.GREEN, "X", style.DASHED),
    "bitsandbytes": (style.GREEN, "v", style.DOTTED),
    "optax": (style.GREEN, "h", style.SOLID),
    "numexpr": (style.PURPLE, "*", style.SOLID),
}
_OTHER_LINE = (style.YELLOW, "p", style.SOLID)

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def format_seconds(seconds: float, *, plain: bool = False) -> str:
    """Return a time as text with its unit and three digits, such as "1.28 ms".

    Parameters
    ----------
    seconds : float
        The time, > 0.
    plain : bool, default False
        Write "us" instead of a micro sign.

    Returns
    -------
    text : str
        The unit is the largest of s, ms and us in which the time is at least 1, or us if there is none.

    Examples
    --------
    >>> from fastrms.plots import format_seconds
    >>> format_seconds(0.00128)
    '1.28 ms'
    >>> format_seconds(0.00099996, plain=True)
    '1.00 ms'
    """
    unit, scale = _unit_of(seconds)
    value = seconds / scale
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit if plain else unit.replace('u', chr(0xB5))}"


def _unit_of(seconds: float) -> tuple[str, float]:
    """Return the name and the seconds of the unit for a time; 0.9995 ms would be rounded to 1000 us."""
    return next((item for item in _UNITS if seconds >= 0.9995 * item[1]), _UNITS[-1])


def plot_training(
    losses: Mapping[str, ArrayLike], times: Mapping[str, tuple[float, float]], *, title: str = ""
) -> "tuple[Figure, tuple[Axes, Axes]]":
    """Draw the losses of two training runs, which should coincide, and the time of their steps.

    Parameters
    ----------
    losses : mapping of str to array-like, shape (steps,)
        The loss of each step, by the name of the run. The first of two is a wide line under the second.
    times : mapping of str to (float, float)
        Seconds of a whole training step and of its optimizer part, by the same names.
    title : str
        The title above both panels.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Not known to pyplot; ``figure.savefig(path)`` writes it.
    axes : tuple of two matplotlib.axes.Axes
        Losses on the left, times on the right.

    Examples
    --------
    >>> from fastrms.plots import plot_training
    >>> losses = {"NumPy": [2.3, 1.1, 0.4], "fastrms": [2.3, 1.1, 0.4]}
    >>> times = {"NumPy": (0.004, 0.002), "fastrms": (0.0025, 0.0005)}
    >>> figure, axes = plot_training(losses, times)
    """
    figure = style.new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title, fontsize=11)
    _draw_losses(left, {name: np.asarray(values, np.float64) for name, values in losses.items()})
    _draw_times(right, times)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    return figure, (left, right)


def _draw_losses(axes: "Axes", losses: Mapping[str, NDArray[np.float64]]) -> None:
    looks: list[dict[str, Any]] = [
        {"color": style.ORANGE, "linewidth": 5, "solid_capstyle": "round"},
        {"color": style.BLACK, "linewidth": 1.2, "linestyle": (0, (4, 3))},
    ]
    for k, ((name, values), look) in enumerate(zip(losses.items(), looks, strict=False)):
        # About a hundred points: more would hide the dashes, and a long training has millions.
        block = -(-len(values) // 100)
        blocks = values[: len(values) // block * block].reshape(-1, block)
        steps = np.arange(len(blocks)) * block + (block + 1) / 2
        if block > 1 and k == 0:
            label = f"range of {block} steps (lines: median)"
            axes.fill_between(steps, blocks.min(axis=1), blocks.max(axis=1), color="#DDDDDD", linewidth=0, label=label)
        # A few points make no curve, and a single one no line.
        marker: dict[str, Any] = {"marker": "o", "markersize": 10 - 6 * k} if len(blocks) <= 10 else {}
        axes.plot(steps, np.median(blocks, axis=1), label=name, **look, **marker)
    positive = np.concatenate([values[values > 0] for values in losses.values()])
    # Within a power of ten, a logarithmic axis has no round numbers to show.
    if len(positive) and positive.max() > 10 * positive.min():
        axes.set_yscale("log")
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.legend(frameon=False, fontsize=9)


def _draw_times(axes: "Axes", times: Mapping[str, tuple[float, float]]) -> None:
    unit, scale = _unit_of(max(step for step, _ in times.values()))
    for row, (name, (step, optimizer)) in enumerate(times.items()):
        rest = step - optimizer
        labels = ("forward and backward", "optimizer") if row == 0 else (None, None)
        axes.barh(row, rest / scale, 0.42, color=style.GREY, label=labels[0])
        axes.barh(row, optimizer / scale, 0.42, left=rest / scale, color=style.BLUE, label=labels[1])
        # Above the bar: inside, the part of a fast optimizer has no room.
        text = f"{name}: {format_seconds(rest)} + {format_seconds(optimizer)} optimizer = {format_seconds(step)}"
        axes.text(0, row - 0.26, text, fontsize=9, verticalalignment="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(times) - 0.6, -0.6)  # the first on top
    axes.spines["left"].set_visible(False)
    axes.set_title("Median time of a training step")
    axes.set_xlabel(unit.replace("u", chr(0xB5)))
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_throughput(records: Sequence[Mapping[str, Any]], *, title: str = "") -> "tuple[Figure, list[Axes]]":
    """Draw parameters per second over size, both logarithmic, in one panel per dtype, under the machine's roofline.

    Parameters
    ----------
    records : sequence of mapping
        The list ``results`` in the JSON file of ``fastrms bench``. Records with the kernel "limit" are the bounds of
        the roofline. For each number of threads ("threads"), the lowest bound is drawn.
    title : str
        The title above all panels.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Not known to pyplot; ``figure.savefig(path)`` writes it.
    axes : list of matplotlib.axes.Axes
        One panel for each dtype, in the order of the records.

    Examples
    --------
    >>> from fastrms.plots import plot_throughput
    >>> small = {"dtype": "float32", "kernel": "serial", "label": "serial"}
    >>> small |= {"params": 1000, "gparam_per_s": 0.5}
    >>> figure, panels = plot_throughput([small, small | {"params": 9000, "gparam_per_s": 1}])
    """
    dtypes = list(dict.fromkeys(record["dtype"] for record in records))
    figure = style.new_figure(3.4 + 4.4 * len(dtypes), 5)
    panels: list[Axes] = list(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0])
    lines: dict[str, tuple[float, Line2D]] = {}
    for axes, dtype in zip(panels, dtypes, strict=True):
        for label, line in _draw_throughput(axes, [r for r in records if r["dtype"] == dtype]).items():
            lines.setdefault(label, line)
        axes.set_title(f"One RMSProp step, {dtype}", fontsize=11)
        axes.set_xlabel("parameters")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("billion parameters per second")
    if title:
        figure.suptitle(title, fontsize=11)
    # In the order of the lines at their right ends, so that the eye finds one from the other.
    ordered = sorted(lines.items(), key=lambda item: -item[1][0])
    labels = [label for label, _ in ordered]
    figure.legend([line for _, (_, line) in ordered], labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure, panels


def _draw_throughput(axes: "Axes", records: Sequence[Mapping[str, Any]]) -> "dict[str, tuple[float, Line2D]]":
    """Draw one panel; return for each label the last value and the line."""
    lines: dict[str, tuple[float, Line2D]] = {}
    axes.set_xscale("log")
    axes.set_yscale("log")
    bounds: dict[tuple[int, int], float] = {}
    for record in records:
        if record["kernel"] == "limit":
            key = record["params"], record["threads"]
            bounds[key] = min(bounds.get(key, np.inf), record["gparam_per_s"])
    best: dict[int, float] = {}
    for (params, _), speed in bounds.items():
        best[params] = max(best.get(params, 0.0), speed)
    if best:
        x, y = np.array(sorted(best.items())).T
        # At a single size the line has no length.
        marker: dict[str, Any] = {"marker": "_", "markersize": 24} if len(x) == 1 else {}
        (line,) = axes.plot(x, y, color=style.GREY, linewidth=7, solid_capstyle="butt", zorder=1, **marker)
        lines["limit of this machine"] = np.inf, line
    names = dict.fromkeys((record["kernel"], record["label"]) for record in records if record["kernel"] != "limit")
    for kernel, label in names:
        x, y = np.array(sorted((r["params"], r["gparam_per_s"]) for r in records if r["kernel"] == kernel)).T
        colour, marker_of, dashes = _LINES.get(kernel, _OTHER_LINE)
        wide = kernel == "auto"
        (line,) = axes.plot(
            x, y, color=colour, marker=marker_of, linestyle=dashes, linewidth=2.2 if wide else 1.3,
            markersize=7 if wide else 6, markeredgecolor=style.BLACK if colour == _OTHER_LINE[0] else style.WHITE,
            markeredgewidth=0.5, zorder=3 if wide else 2, label=label,
        )  # fmt: skip
        lines.setdefault(label, (float(y[-1]), line))
    axes.grid(which="major", color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    return lines
