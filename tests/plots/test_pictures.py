"""The pictures of the documentation: what is drawn is shown, and is what the pages say of it."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT, assert_same_bits

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        import pictures

    return pictures


@pytest.fixture
def lines(pictures, tmp_path):
    """Draws a picture, and returns for each panel the points of its lines by their labels."""

    def draw(name):
        figure = pictures.PICTURES[name]()
        figure.savefig(tmp_path / f"{name}.svg")  # warnings, such as for text without room, come now
        return [{line.get_label(): line.get_xydata() for line in axes.get_lines()} for axes in figure.axes]

    return draw


def test_pages_show_every_picture_and_no_other(pictures):
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert sorted(re.findall(r"\]\(_pictures/(\w+)\.svg\)", text)) == sorted(pictures.PICTURES)


def test_memory(pictures):
    def ends(name, row):
        bars = pictures.PICTURES[name]().axes[0].patches
        return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars[4 * row : 4 * row + 4]]

    for row in range(3):
        assert all(stop < start for (_, stop), (start, _) in pairwise(ends("separate_arrays", row)))
        assert all(stop == start for (_, stop), (start, _) in pairwise(ends("flat_buffers", row)))


compiled = pytest.mark.skipif(not JIT, reason="thousands of steps, for which the interpreter takes minutes")


@compiled
def test_valley(lines):
    (panel,) = lines("valley")
    descent, ours = (panel[name] for name in ("gradient descent, lr 0.019", "RMSProp, lr 0.05"))
    assert -0.85 < descent[-1][0] < -0.65  # two thirds of the way from -2
    assert abs(ours[-1]).max() < 0.1
    assert (np.diff(np.sign(descent[:20, 1])) != 0).all()  # from wall to wall


@compiled
def test_dialects(lines):
    (panel,) = lines("dialects")
    last = [points[-1][1] for points in panel.values()]  # outside, inside, from 1, corrected
    assert last[0] < last[3] < last[1] < last[2]


@compiled
def test_lr(lines):
    left, right = lines("lr")
    last = {name: points[-3:, 1].mean() for name, points in left.items()}
    assert last["lr 0.01"] < last["lr 0.001"] < last["lr 0.0001"]
    assert last["lr 0.01"] < 0.3 * last["lr 0.1"]
    assert [round(points[0][1], 1) for points in right.values()] == [3.2, 10.0, 1.0]
    assert right["decay_rate 0.9"][40][1] < 1.01


@compiled
def test_window(lines):
    (panel,) = lines("window")
    short, middle, long = (points[:, 1] for name, points in panel.items() if name.startswith("decay_rate"))
    assert 400 < np.argmax(middle[1000:] < 0.12) < 550  # steps until it has come down
    assert np.argmax(short[1000:] < 0.12) < 100
    assert long.max() < 0.75
    assert 0.25 < long[-1] < 0.35


@compiled
def test_batch(lines):
    (panel,) = lines("batch")
    best = [points[np.argmin(points[:, 1]), 0] for name, points in panel.items() if name.startswith("batches")]
    assert (np.abs(np.log(best / np.array([0.00316, 0.01, 0.0316]))) < np.log(2)).all()


@compiled
def test_adagrad(lines, pictures):
    rates, path = lines("adagrad")
    ours, theirs = (points[:, 1] for points in rates.values())
    assert (np.diff(theirs) <= 0).all()
    assert ours[1900] > 2 * ours[1050]
    assert ours[3900] > 2 * ours[3050]
    # The errors that choosing.md compares, and the rates that it and the caption call best.
    error, follow = pictures._error, pictures._follow
    for method, first, all_moves in ("RMSProp", 0.02, 0.05), ("AdaGrad", 0.2, 2):
        errors = {lr: error(follow(method, lr)[0]) for lr in pictures.RATES}
        assert min(errors, key=lambda lr: errors[lr][0]) == first
        assert min(errors, key=lambda lr: errors[lr].mean()) == all_moves
        assert_same_bits(path[f"{method}, lr {first:g}"][:, 1], follow(method, first)[0])
    ours, theirs = error(follow("RMSProp", 0.02)[0]), error(follow("AdaGrad", 0.2)[0])
    assert theirs[0] < ours[0]
    np.testing.assert_allclose(theirs[[1, 3]] / ours[[1, 3]], [2, 5], rtol=0.1)
    ends = error(follow("RMSProp", 0.05)[0]).mean(), error(follow("AdaGrad", 2)[0]).mean()
    assert ends[0] == pytest.approx(ends[1], rel=0.05)


@compiled
def test_epsilon(lines):
    (panel,) = lines("epsilon")
    half = [points[np.argmax(points[:, 1] > 0.5), 0] for points in panel.values()]
    np.testing.assert_allclose(half, [1e-8, 5.8e-5, 1e-3], rtol=0.3)


def test_throughput_and_training_steps_are_of_the_tables(lines, pictures):
    float32, float64 = lines("throughput")
    heading, *rows = pictures._table("float32")
    assert rows[0][0].startswith("limit")
    for name, drawn in ("float32", float32), ("float64", float64):
        times = {row[0]: sum("%" in cell for cell in row[1:]) for row in pictures._table(name)}
        expected = {label: number for label, number in times.items() if number and label in pictures.WAYS}
        assert expected == {label: len(line) for label, line in drawn.items() if not label.startswith("_")}
    (ours,) = (row for row in rows if row[0] == "fastrms serial")
    size, time = int(heading[-1].replace(",", "")), pictures._seconds(ours[-1])
    np.testing.assert_allclose(float32["fastrms serial"][-1], [size, size / time / 1e9])
    networks = {row[0] for row in pictures._table("in-situ") if "float32" in row[0]}
    bars = pictures.PICTURES["training_steps"]().axes[0].patches
    assert len(bars) == len(networks) * 4 > 0  # two ways with two parts each
    assert bars[0].get_width() + bars[1].get_width() == pytest.approx(100)


def test_readmes_picture_is_of_the_table(pictures, tmp_path):
    """`python benchmarks/tables.py --write` draws it again. Text is drawn as paths, each with the text in a comment."""
    pictures.draw_all(tmp_path, ["training_steps"])
    drawn, kept = (
        re.findall(r"<!-- (.+?) -->", (folder / "training_steps.svg").read_text(encoding="utf-8"))
        for folder in (tmp_path, DOCS / "_static")
    )
    assert drawn == kept
    assert [text for text in kept if text.startswith("fastrms auto: ")]
    assert "](docs/_static/training_steps.svg)" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
