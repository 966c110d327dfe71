"""Pictures of paths: what is drawn, that it can be told apart, and that nothing is cut off."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fastrms import OptionError, OptionTypeError, plots
from fastrms.plots.functions import TEST_FUNCTIONS, Landscape
from fastrms.plots.trajectories import descend

EIGHT = {
    "settings": [{"lr": 0.01 * k} for k in range(1, 6)],
    "beside": ["gradient-descent", "momentum", "adagrad"],
}


def flat_axes():
    return Figure(layout="constrained").subplots()


def solid_axes():
    return Figure(layout="constrained").add_subplot(projection="3d")


def draw(figure):
    figure.savefig(io.BytesIO())  # warnings, such as for text that does not fit, come when it is drawn


def paths_and_ends(ax, descent):
    """The lines of the traces, and those of their ends."""
    lines = ax.get_lines()[: 2 * len(descent.traces)]
    return lines[::2], lines[1::2]


def marks(ax):
    return {line.get_label(): line for line in ax.get_lines() if line.get_label() in ("start", "minimum")}


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("name", TEST_FUNCTIONS)
def test_path_draws_the_points(name):
    descent = descend(name)
    ax = flat_axes()
    assert plots.path(descent, ax=ax) is ax
    draw(ax.figure)
    lines, ends = paths_and_ends(ax, descent)
    for line, end, trace in zip(lines, ends, descent.traces, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), trace.points)
        np.testing.assert_array_equal(end.get_xydata(), trace.points)
        assert end.get_markevery() == [-1]
    found = marks(ax)
    assert found["start"].get_xydata().tolist() == [list(descent.landscape.start)]
    minima = found["minimum"].get_xydata() if "minimum" in found else []
    assert np.array(minima).tolist() == [list(point) for point in descent.landscape.minima]
    assert legend_texts(ax) == [trace.label for trace in descent.traces] + list(found)
    assert (ax.get_xlim(), ax.get_ylim()) == descent.region
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "y")
    assert ax.get_title() == f"{descent.landscape.name}: ${descent.landscape.formula}$"
    assert ax.get_aspect() == 1


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("ellipse", [0, 0.5, 1, 2, 5, 10, 20, 50]),
        ("rosenbrock", [0, 3, 10, 30, 100, 300, 1000, 3000]),
        ("saddle", [-4, -3, -2, -1, 0, 1, 2, 3, 4]),
        # Round numbers, though the lowest value is none.
        (lambda x, y: x**2 + 10 * y**2 - 0.93, [-1, -0.5, 0, 1, 4, 9, 19, 49]),
    ],
)
def test_levels_of_contours_suit_the_function(name, levels):
    ax = plots.path(name, ax=flat_axes())
    draw(ax.figure)
    filled, lines = ax.collections
    np.testing.assert_allclose(filled.levels, levels, atol=1e-12)
    np.testing.assert_allclose(lines.levels, levels, atol=1e-12)
    bar = ax.child_axes[0]
    np.testing.assert_allclose(bar.get_yticks(), levels, atol=1e-12)
    ticks = [text.get_text().replace("\N{MINUS SIGN}", "-") for text in bar.get_yticklabels()]
    np.testing.assert_allclose([float(tick) for tick in ticks], levels)
    assert bar.get_ylabel() == "f(x, y)"


def test_the_highest_and_lowest_value_are_among_the_levels():
    for name in TEST_FUNCTIONS:
        _, _, values = descend(name, steps=0).grid
        levels = plots.path(name, ax=flat_axes(), steps=0).collections[0].levels
        # Above the last there is less than a tenth of the height; more would be a hole in the picture.
        assert levels[0] <= values.min()
        assert values.max() <= levels[-1]
        assert 7 <= len(levels) <= 16


def test_eight_paths_differ_in_more_than_colour():
    descent = descend("bowl", **EIGHT)
    ax = plots.path(descent, ax=flat_axes())
    lines, ends = paths_and_ends(ax, descent)
    markers = [line.get_marker() for line in lines]
    assert len(set(markers)) == 8
    assert [end.get_marker() for end in ends] == markers
    neighbours = [(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern)) for line in lines]
    assert len(set(neighbours)) == 8
    # The first on top, and what is below is wider.
    order = [line.get_zorder() for line in lines]
    assert order == sorted(order, reverse=True)
    widths = [line.get_linewidth() for line in lines]
    assert widths == sorted(widths)
    assert min(end.get_zorder() for end in ends) > max(order)


def luminance(colour):
    return float(np.dot([0.2126, 0.7152, 0.0722], to_rgb(colour)))


def test_the_four_of_the_default_are_darker_than_what_they_lie_on_in_grey():
    ax = plots.path(ax=flat_axes())
    lines, _ = paths_and_ends(ax, descend())
    fills = [luminance(colour[:3]) for colour in ax.collections[0].get_facecolors()]
    assert min(fills) > 0.6
    # From the lowest, which is lightest, to the highest.
    assert fills == sorted(fills, reverse=True)
    assert max(luminance(line.get_color()) for line in lines) < 0.5


def test_markers_are_not_all_at_the_same_steps():
    descent = descend()
    lines, _ = paths_and_ends(plots.path(descent, ax=flat_axes()), descent)
    firsts = [line.get_markevery()[0] for line in lines]
    assert len(set(firsts)) > 1


def test_directions_are_true_unless_that_leaves_a_sliver():
    assert plots.path("bowl", ax=flat_axes(), region=((-4, 4), (-2, 2))).get_aspect() == 1
    assert plots.path("bowl", ax=flat_axes(), region=((-9, 9), (-2, 2))).get_aspect() == "auto"


def test_surface_is_the_function_and_paths_lie_over_it(monkeypatch):
    descent = descend("bowl")
    ax = solid_axes()
    drawn = []
    real = ax.plot_surface
    monkeypatch.setattr(ax, "plot_surface", lambda *args, **kwargs: drawn.append((args, real(*args, **kwargs))))
    assert plots.surface(descent, ax=ax) is ax
    draw(ax.figure)
    lines, ends = paths_and_ends(ax, descent)
    for line, trace in zip(lines, descent.traces, strict=True):
        np.testing.assert_array_equal(np.transpose(line.get_data_3d()), np.column_stack([trace.points, trace.values]))
    (((x, y, z), mesh),) = drawn
    np.testing.assert_allclose(z, 5 * x**2 + 7 * y**2)
    assert (x.min(), x.max(), y.min(), y.max()) == (-2, 2, -2, 2)
    assert not ax.computed_zorder
    assert mesh.get_zorder() < min(line.get_zorder() for line in [*lines, *ends])
    assert [float(each[0]) for each in marks(ax)["minimum"].get_data_3d()] == [0, 0, 0]
    assert [ax.get_xlabel(), ax.get_ylabel(), ax.get_zlabel()] == ["x", "y", "f(x, y)"]


def test_surface_of_very_different_values_has_logarithmic_heights():
    descent = descend("rosenbrock", [{}])
    ax = plots.surface(descent, ax=solid_axes())
    lines, _ = paths_and_ends(ax, descent)
    ticks = [float(text.get_text()) for text in ax.get_zticklabels()]
    unit = plots.path(descent, ax=flat_axes()).collections[0].levels[1]
    np.testing.assert_allclose(ax.get_zticks(), np.log10(np.array(ticks) + unit))
    np.testing.assert_allclose(lines[0].get_data_3d()[2], np.log10(descent.traces[0].values + unit))
    assert max(ticks) >= 1000


def test_paths_on_the_surface_end_at_its_edge():
    descent = descend("saddle", [{}])
    (line,), _ = paths_and_ends(plots.surface(descent, ax=solid_axes()), descent)
    drawn = np.column_stack(line.get_data_3d())
    inside = (abs(descent.traces[0].points) <= 2).all(axis=1)
    assert 10 < inside.sum() < len(inside)
    np.testing.assert_array_equal(drawn[inside, :2], descent.traces[0].points[inside])
    assert np.isnan(drawn[~inside]).all()


def test_values_and_rates_over_steps():
    descent = descend("ellipse")
    values, rates = plots.values(descent, ax=flat_axes()), plots.rates(descent, ax=flat_axes())
    for line, trace in zip(paths_and_ends(values, descent)[0], descent.traces, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(301))
        np.testing.assert_array_equal(line.get_ydata(), trace.values)
    for line, trace in zip(paths_and_ends(rates, descent)[0], descent.traces, strict=True):
        assert np.isnan(line.get_ydata()[0])
        np.testing.assert_allclose(line.get_ydata()[1:], np.exp(np.log(trace.rates).mean(axis=1)))
    assert values.get_yscale() == rates.get_yscale() == "log"
    assert values.get_ylabel() == "f(x, y) above the minimum"
    assert rates.get_ylabel() == "factor of the gradient"


def test_the_picture_shows_that_rmsprop_goes_on_and_that_values_have_a_floor():
    descent = descend()
    rmsprop, *_, adagrad = paths_and_ends(plots.values(descent, ax=flat_axes()), descent)[0]
    assert adagrad.get_label() == "AdaGrad, lr 1"
    bottom, top = rmsprop.axes.get_ylim()
    assert adagrad.get_ydata()[-1] < 1e-100 < 1e-13 < bottom
    assert bottom < rmsprop.get_ydata()[-100:].min() < rmsprop.get_ydata()[-100:].max() < top < 100


@pytest.mark.parametrize("panels", [["path"], plots.PANELS])
def test_captions_say_how_default_rates_were_chosen(panels):
    figure, _ = plots.overview("bowl", panels=panels, steps=2)
    assert figure.legends[0].get_title().get_text().replace("\n", " ") == descend("bowl", steps=2).note
    alone = plots.values("bowl", ax=flat_axes(), steps=2).get_legend()
    assert alone.get_title().get_text().replace("\n", " ") == descend("bowl", steps=2).note


def test_values_where_no_minimum_is_known():
    descent = descend("saddle", [{}])
    ax = plots.values(descent, ax=flat_axes())
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), descent.traces[0].values)
    assert (ax.get_yscale(), ax.get_ylabel()) == ("linear", "f(x, y)")
    assert ax.get_ylim()[0] == pytest.approx(-4.4)  # though the path goes on to -18.9


def test_height_is_above_the_minimum():
    raised = Landscape(lambda x, y: x**2 + y**2 + 100, lambda x, y: (2 * x, 2 * y), minima=[(0, 0)])
    descent = descend(raised, [{}], steps=20)
    ax = plots.values(descent, ax=flat_axes())
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), descent.traces[0].values - 100)


@pytest.mark.parametrize("name", [*TEST_FUNCTIONS, "eight", "wide", "one step", "two panels"])
def test_nothing_is_cut_off_and_the_legend_covers_nothing(name):
    options = {
        "eight": ("rosenbrock", EIGHT | {"steps": 50}),
        "wide": ("bowl", {"start": (9, -4)}),
        "one step": ("bowl", {"steps": 1}),
        "two panels": (lambda x, y: math.sin(3 * x) + y**2 / 4 - 500, {"settings": [{}], "panels": ["path", "rates"]}),
    }
    function, more = options.get(name, (name, {}))
    figure, axes = plots.overview(function, **more)
    draw(figure)
    renderer = figure.canvas.get_renderer()
    edge = figure.bbox
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    boxes = [box, figure._suptitle.get_window_extent(renderer)]
    for ax in axes.values():
        boxes.append(ax.get_tightbbox(renderer))  # with labels, ticks and colour bar
        assert not box.overlaps(boxes[-1])
    labels = [ax.zaxis.label if ax.name == "3d" else ax.xaxis.label for ax in axes.values()]
    labels += [bar.yaxis.label for bar in axes["path"].child_axes]
    boxes += [label.get_window_extent(renderer) for label in labels]
    for each in boxes:
        assert -0.5 <= each.x0 < each.x1 <= edge.x1 + 0.5
        assert -0.5 <= each.y0 < each.y1 <= edge.y1 + 0.5


@pytest.mark.parametrize(
    "panels",
    [["path"], ["surface"], ["values", "rates"], ["surface", "path"], ["path", "values", "rates"], plots.PANELS],
    ids=",".join,
)
def test_overview_has_the_panels_and_one_legend(panels):
    figure, axes = plots.overview("bowl", panels=panels)
    draw(figure)
    assert list(axes) == list(panels)
    assert all(ax.get_legend() is None for ax in axes.values())
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:4] == ["RMSProp, lr 0.2", "gradient descent, lr 0.1", "momentum, lr 0.02", "AdaGrad, lr 1"]
    assert texts[4:] == (["start", "minimum"] if {"path", "surface"} & set(panels) else [])
    assert figure.get_suptitle() == "bowl: $5 x^2 + 7 y^2$"


def test_pyplot_is_used_only_where_no_axes_are_given():
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    with mpl.rc_context():
        plt.switch_backend("agg")
        draw(plots.overview("bowl", steps=2)[0])
        plots.path("bowl", ax=flat_axes(), steps=2)
        plots.animate("bowl", io.BytesIO(), panels=["path"], steps=1)
        assert plt.get_fignums() == []
        found = [function("bowl", steps=2) for function in (plots.path, plots.surface, plots.values, plots.rates)]
        assert [plt.figure(number).axes[0] for number in plt.get_fignums()] == found
        assert [ax.name for ax in found] == ["rectilinear", "3d", "rectilinear", "rectilinear"]
        for ax in found:
            draw(ax.figure)
        plt.close("all")


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("bowl", {"steps": 0}),
        ("bowl", {"start": (0, 0), "steps": 0}),
        ("bowl", {"start": (0, 0)}),
        ("bowl", {"settings": [{"lr": 1e200}], "beside": [("gradient-descent", {"lr": 5})], "steps": 100}),
        ("saddle", {"settings": [{"lr": 1e200}]}),
        ("rosenbrock", {"beside": [("momentum", {"lr": 1})]}),
        (lambda x, y: 3.0, {}),
        (lambda x, y: 1e6 + 1e-3 * x, {}),
        (lambda x, y: 1e149 * (x + y), {}),
        (lambda x, y: 1e-300 * (x**2 + y**2), {}),
        (lambda x, y: math.exp(50 * x) + y**2, {}),
        (lambda x, y: float(x == y), {}),
        (lambda x, y: math.log(x) ** 2 + y**2, {"start": (1, 1)}),
        (lambda x, y: math.sqrt(1 - x * x - y * y), {"start": (0.5, 0.2)}),
        (lambda x, y: 1 / (x - 0.5), {}),
        (lambda x, y: math.floor(3 * x) + abs(y), {}),
    ],
    ids=[
        "no steps", "no steps at the minimum", "at the minimum", "bowl diverges", "saddle diverges", "one diverges",
        "flat", "nearly flat", "huge", "tiny", "steep", "spikes", "half a plane", "a disc", "a pole", "stairs",
    ],
)  # fmt: skip
def test_unusual_functions_and_paths(function, options):
    figure, _ = plots.overview(function, **options)
    draw(figure)
    few = options | {"steps": min(options.get("steps", 1), 1)}
    plots.animate(function, io.BytesIO(), panels=["path", "values"], **few)


def test_a_path_that_diverges_does_not_flatten_the_others():
    descent = descend("bowl", [{}], [("gradient-descent", {"lr": 5})], steps=10)
    ax = plots.values(descent, ax=flat_axes())
    bottom, top = ax.get_ylim()
    assert 48 < top < 1000
    assert bottom < descent.traces[0].values.min()
    assert "diverged" not in legend_texts(ax)[0]
    beyond = plots.values(descend("bowl", [{}], [("gradient-descent", {"lr": 5})], steps=100), ax=flat_axes())
    assert legend_texts(beyond)[1] == "gradient descent, lr 5 (diverged at step 41)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plots.path(ax=3), OptionTypeError, "ax: expected two-dimensional axes of Matplotlib, got 3"),
        (lambda: plots.path(ax=solid_axes()), OptionTypeError, "ax: expected two-dimensional axes"),
        (lambda: plots.surface(ax=flat_axes()), OptionTypeError, 'ax: expected axes made with projection="3d"'),
        (lambda: plots.path(descend(), steps=3), OptionError, "steps: cannot be combined with a Descent"),
        (lambda: plots.overview(panels=[]), OptionError, "panels: expected names out of ('path', 'surface', 'values',"),
        (lambda: plots.overview(panels=["path", "path"]), OptionError, "panels: expected names out of"),
        (lambda: plots.overview(panels=["map"]), OptionError, "panels: expected names out of"),
        (lambda: plots.path("hill"), OptionError, "function: expected one of ('bowl',"),
        (lambda: plots.animate("bowl", io.BytesIO(), panels="path"), OptionError, "panels: expected names out of"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("function", [plots.path, plots.surface, plots.values, plots.rates, plots.overview])
def test_without_matplotlib(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'install with: python -m pip install "fastrms\[plot\]"'):
        function("bowl")


def test_trajectories_can_be_computed_without_matplotlib():
    program = """if True:
        import sys
        sys.modules["matplotlib"] = None
        from fastrms import plots
        from fastrms.plots import figures, functions, measurements, methods, trajectories
        print(plots.descend("bowl", steps=3).traces[0].points.shape, plots.format_seconds(1.0))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "(4, 2) 1.00 s\n"


def test_a_dollar_sign_in_a_name_begins_no_formula():
    ax = plots.path(Landscape(max, name="5$ and 6$"), ax=flat_axes(), steps=1)
    draw(ax.figure)
    assert ax.get_title() == r"5\$ and 6\$"


def test_svg_has_text_outlines_and_a_picture_of_the_surface():
    figure, _ = plots.overview("bowl", steps=5)
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    text = file.getvalue().decode()
    assert text.count("<image") == 1  # thousands of patches as paths would make a file of megabytes
    assert len(text) < 1_500_000
