"""Plots of what fastrms measures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["format_seconds", "plot_throughput", "plot_training"]

# Of the Okabe-Ito palette, which colour-blind people can tell apart; light against dark, so that grey print works too.
_WIDE, _THIN = "#E69F00", "#000000"
_REST, _OPTIMIZER = "#BBBBBB", "#0072B2"
_BAND = "#DDDDDD"

# By what `fastrms bench` calls a way: colour, marker, dashes. The same palette; where two are near in grey, markers and
# dashes tell them apart. Ways of one family share a colour.
_SOLID, _DASHED, _DOTTED = "solid", (0, (4, 2)), (0, (1, 1.5))
_LINES: dict[str, tuple[str, str, Any]] = {
    "auto": ("#000000", "o", _SOLID),
    "auto-list": ("#000000", "D", _DASHED),
    "serial": ("#0072B2", "v", _SOLID),
    "parallel": ("#0072B2", "^", _DASHED),
    "parallel-bfloat16": ("#0072B2", "H", _DOTTED),
    "numpy": ("#56B4E9", "s", _SOLID),
    "numpy-in-place": ("#56B4E9", "P", _DASHED),
    "reference": ("#E69F00", "X", _SOLID),
    "torch": ("#D55E00", "<", _SOLID),
    "torch-foreach": ("#D55E00", ">", _DASHED),
    "torch-compile": ("#D55E00", "d", _DOTTED),
    "optax": ("#009E73", "h", _SOLID),
    "numexpr": ("#CC79A7", "*", _SOLID),
}
_OTHER_LINE = ("#F0E442", "p", _SOLID)

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def format_seconds(seconds: float, *, plain: bool = False) -> str:
    """A time with its unit and three digits, such as "1.28 ms".

    Parameters
    ----------
    seconds : float
        The time, > 0.
    plain : bool, default False
        Write "us" in place of a micro sign.

    Returns
    -------
    text : str
        In seconds, milliseconds or microseconds, whichever has one to three digits ahead of the point.

    Examples
    --------
    >>> from fastrms.plots import format_seconds
    >>> format_seconds(0.00128)
    '1.28 ms'
    >>> format_seconds(0.00099996, plain=True)
    '1.00 ms'
    """
    # A value that would round to 1000 goes to the larger unit.
    unit, scale = next((item for item in _UNITS if seconds >= 0.9995 * item[1]), _UNITS[-1])
    value = seconds / scale
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit if plain else unit.replace('u', chr(0xB5))}"


def plot_training(
    losses: Mapping[str, ArrayLike], times: Mapping[str, tuple[float, float]], *, title: str = ""
) -> "tuple[Figure, tuple[Axes, Axes]]":
    """Draw the losses of two trainings, which should coincide, and the time of their steps.

    Parameters
    ----------
    losses : mapping of str to array-like, shape (steps,)
        The loss of each step, by the name of the training. Of two, the first is a wide line under the second.
    times : mapping of str to (float, float)
        By the same names: seconds of a whole step, and of the optimizer in it.
    title : str
        Above both.

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title, fontsize=11)
    _draw_losses(left, {name: np.asarray(values, np.float64) for name, values in losses.items()})
    _draw_times(right, times)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    return figure, (left, right)


def _draw_losses(axes: "Axes", losses: Mapping[str, NDArray[Any]]) -> None:
    styles: list[dict[str, Any]] = [
        {"color": _WIDE, "linewidth": 5, "solid_capstyle": "round"},
        {"color": _THIN, "linewidth": 1.2, "linestyle": (0, (4, 3))},
    ]
    for k, ((name, values), style) in enumerate(zip(losses.items(), styles, strict=False)):
        # About a hundred points: more would hide the dashes, and a long training has millions.
        block = -(-len(values) // 100)
        blocks = values[: len(values) // block * block].reshape(-1, block)
        steps = np.arange(len(blocks)) * block + (block + 1) / 2
        if block > 1 and k == 0:
            label = f"lowest to highest of {block} steps (lines: median)"
            axes.fill_between(steps, blocks.min(axis=1), blocks.max(axis=1), color=_BAND, linewidth=0, label=label)
        # A few points make no curve, and a single one no line.
        marker: dict[str, Any] = {"marker": "o", "markersize": 10 - 6 * k} if len(blocks) <= 10 else {}
        axes.plot(steps, np.median(blocks, axis=1), label=name, **style, **marker)
    positive = np.concatenate([values[values > 0] for values in losses.values()])
    # Over less than a power of ten, a logarithmic axis has no round numbers to show.
    if len(positive) and positive.max() > 10 * positive.min():
        axes.set_yscale("log")
    axes.set_title("Training loss")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.legend(frameon=False, fontsize=9)


def _draw_times(axes: "Axes", times: Mapping[str, tuple[float, float]]) -> None:
    longest = max(step for step, _ in times.values())
    unit, scale = next((item for item in _UNITS if longest >= item[1]), _UNITS[-1])
    for row, (name, (step, optimizer)) in enumerate(times.items()):
        rest = step - optimizer
        first = row == 0
        axes.barh(row, rest / scale, 0.42, color=_REST, label="forward and backward" if first else None)
        axes.barh(
            row, optimizer / scale, 0.42, left=rest / scale, color=_OPTIMIZER, label="optimizer" if first else None
        )
        # Above the bar and not in it, where the part of a fast optimizer has no room.
        text = f"{name}: {format_seconds(rest)} + {format_seconds(optimizer)} optimizer = {format_seconds(step)}"
        axes.text(0, row - 0.26, text, fontsize=9, verticalalignment="bottom")
    axes.set_yticks([])
    axes.set_ylim(len(times) - 0.6, -0.6)  # the first on top
    axes.spines["left"].set_visible(False)
    axes.set_title("Median time of a training step")
    axes.set_xlabel(unit.replace("u", chr(0xB5)))
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def plot_throughput(records: Sequence[Mapping[str, Any]], *, title: str = "") -> "tuple[Figure, list[Axes]]":
    """Draw parameters a second over size, both logarithmic, one panel a dtype, under the limit of the machine.

    Parameters
    ----------
    records : sequence of mapping
        As ``results`` in the JSON file of ``fastrms bench``; those with the kernel "limit" are the roofline.
    title : str
        Above all.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Not known to pyplot; ``figure.savefig(path)`` writes it.
    axes : list of matplotlib.axes.Axes
        One for each dtype, in the order of the records.

    Examples
    --------
    >>> from fastrms.plots import plot_throughput
    >>> small = {"dtype": "float32", "kernel": "serial", "label": "serial"}
    >>> small |= {"params": 1000, "gparam_per_s": 0.5}
    >>> figure, panels = plot_throughput([small, small | {"params": 9000, "gparam_per_s": 1}])
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(record["dtype"] for record in records))
    figure = Figure(figsize=(3.4 + 4.4 * len(dtypes), 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0])
    lines: dict[str, tuple[float, Any]] = {}
    for axes, dtype in zip(panels, dtypes, strict=True):
        _draw_throughput(axes, [record for record in records if record["dtype"] == dtype], lines)
        axes.set_title(f"One RMSProp step, {dtype}", fontsize=11)
        axes.set_xlabel("parameters")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("billion parameters a second")
    if title:
        figure.suptitle(title, fontsize=11)
    # In the order of the lines at their right end, so that the eye finds one from the other.
    ordered = sorted(lines.items(), key=lambda item: -item[1][0])
    labels = [label for label, _ in ordered]
    figure.legend([line for _, (_, line) in ordered], labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure, panels


def _draw_throughput(axes: "Axes", records: Sequence[Mapping[str, Any]], lines: dict[str, tuple[float, Any]]) -> None:
    """Draw one panel; add to `lines` each label with its last value and its line."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    best: dict[int, float] = {}
    for record in records:
        if record["kernel"] == "limit":
            best[record["params"]] = max(best.get(record["params"], 0.0), record["gparam_per_s"])
    if best:
        x = np.array(sorted(best))
        y = np.array([best[size] for size in x])
        # A single size would be a line of no length.
        marker = "_" if len(x) == 1 else None
        (line,) = axes.plot(
            x, y, color=_REST, linewidth=7, solid_capstyle="butt", marker=marker, markersize=24, zorder=1
        )
        lines.setdefault("limit of this machine", (np.inf, line))
    names = dict.fromkeys((record["kernel"], record["label"]) for record in records if record["kernel"] != "limit")
    for kernel, label in names:
        own = sorted((record["params"], record["gparam_per_s"]) for record in records if record["kernel"] == kernel)
        x, y = np.array(own).T
        colour, marker, dashes = _LINES.get(kernel, _OTHER_LINE)
        wide = kernel == "auto"
        (line,) = axes.plot(
            x,
            y,
            color=colour,
            marker=marker,
            linestyle=dashes,
            linewidth=2.2 if wide else 1.3,
            markersize=7 if wide else 6,
            markeredgecolor="#000000" if colour == _OTHER_LINE[0] else "#FFFFFF",
            markeredgewidth=0.5,
            zorder=3 if wide else 2,
            label=label,
        )
        lines.setdefault(label, (float(y[-1]), line))
    axes.grid(which="major", color="#EEEEEE", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
