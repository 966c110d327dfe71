"""The plots, and the times in words."""

import io

import numpy as np
import pytest

from fastrms.plots import format_seconds, plot_training


def draw(losses, times=(0.002, 0.001)):
    figure, axes = plot_training({"a": losses, "b": losses}, {"a": times, "b": (0.001, 0.0004)}, title="title")
    figure.savefig(io.BytesIO())  # warnings, such as for text that does not fit, come when it is drawn
    return axes


def test_plot_shows_both_curves_and_bars():
    losses = np.geomspace(3, 1e-4, 460).astype(np.float32)
    left, right = draw(losses)
    wide, thin = left.get_lines()
    assert [line.get_label() for line in (wide, thin)] == ["a", "b"]
    np.testing.assert_array_equal(wide.get_xydata(), thin.get_xydata())
    assert wide.get_linewidth() > 3 * thin.get_linewidth()
    assert thin.get_zorder() >= wide.get_zorder()
    assert 80 <= len(wide.get_xdata()) <= 100
    # Each point is the median of the steps around it.
    np.testing.assert_allclose(wide.get_ydata()[:2], [np.median(losses[:5]), np.median(losses[5:10])])
    assert wide.get_xdata()[0] == 3
    assert left.get_yscale() == "log"
    parts = [(bar.get_x(), bar.get_width()) for bar in right.patches]
    np.testing.assert_allclose(parts, [(0, 1), (1, 1), (0, 0.6), (0.6, 0.4)])
    assert right.get_xlabel() == "ms"
    assert "a: 1.00 ms + 1.00 ms optimizer = 2.00 ms" in [text.get_text() for text in right.texts]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.3], "linear"),
        ([2.3, 1.9], "linear"),
        (np.zeros(300), "linear"),
        (np.maximum(np.linspace(2, -2, 900), 0), "log"),
        (np.random.default_rng(0).lognormal(0, 4, 300_000), "log"),
    ],
)
def test_plot_of_unusual_losses(losses, scale):
    left, _ = draw(losses)
    assert left.get_yscale() == scale
    assert 1 <= len(left.get_lines()[0].get_xdata()) <= 100


def test_plot_leaves_pyplot_alone():
    import matplotlib.pyplot as plt

    draw([2.3, 1.9])
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.00 us"),
        (3.21e-6, "3.21 us"),
        (99.96e-6, "100 us"),
        (999.6e-6, "1.00 ms"),
        (0.01, "10.0 ms"),
        (123, "123 s"),
    ],
)
def test_format_seconds(seconds, expected):
    assert format_seconds(seconds, plain=True) == expected
    assert format_seconds(seconds) == expected.replace("us", "\N{MICRO SIGN}s")
