"""Plots of what fastrms measures. Needs Matplotlib (the extra ``demo``), which is imported when a plot is made."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["format_seconds", "plot_training"]

# Of the Okabe-Ito palette, which colour-blind people can tell apart; light against dark, so that grey print works too.
_WIDE, _THIN = "#E69F00", "#000000"
_REST, _OPTIMIZER = "#BBBBBB", "#0072B2"
_BAND = "#DDDDDD"

_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def format_seconds(seconds: float, *, plain: bool = False) -> str:
    """A time with its unit and three digits, such as "1.28 ms"; `plain` for "us" in place of a micro sign.

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
