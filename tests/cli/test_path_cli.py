"""``fastrms path``: what it writes and prints, and what it says of mistakes."""

import importlib
import re
import sys

import numpy as np
import pytest
from PIL import Image

from fastrms.cli import main, path
from fastrms.plots.trajectories import descend

MODULE = """
import math
from fastrms.plots.functions import Landscape
def f(x, y): return math.cosh(x) + y**2
def gradient(x, y): return math.sinh(x), 2 * y
def none(x, y): return None
def boom(x, y): raise KeyError("on purpose")
def one(x, y): return 1.0
def half(x, y): return math.log(x) ** 2 + y * y
def corner(x, y): return 1.0 if (x, y) == (1.2345, 1.5) else math.nan
number = 3
hill = Landscape(lambda x, y: -x * x - y * y, name="hill", start=(0.1, 0.2), steps=7)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A module of the user's own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "wrong_syntax.py").write_text("def f(x, y)")
    yield
    for name in ("mine", "wrong_syntax"):
        sys.modules.pop(name, None)


@pytest.fixture
def seen(monkeypatch):
    """The descents that are drawn."""
    found = []
    real = path.overview

    def overview(descent, **options):
        found.append(descent)
        return real(descent, **options)

    monkeypatch.setattr(path, "overview", overview)
    return found


def test_pictures_go_where_the_program_was_started(capsys, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine.py").write_text(f"{MODULE}\nimport os\nos.chdir('elsewhere')\n")
    assert main(["path", "--function", "mine:f", "--start", "1", "1", "--x", "-2", "2", "--y", "-2", "2"]) == 0
    assert capsys.readouterr().out.endswith("Picture: fastrms-path.png\n")
    assert (tmp_path / "fastrms-path.png").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_alone_it_draws_the_four_methods(seen, capsys, tmp_path):
    assert main(["path"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Function: ellipse, f(x, y) = x^2 + 10 y^2\nStart: x = -1.7, y = 1.2, f = 17.29\n" in out
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if ", lr " in line]
    assert [row[0] for row in rows] == [trace.label for trace in descend().traces]
    for row, trace in zip(rows, descend().traces, strict=True):
        x, y, value, distance, first, last = map(float, row[2:])
        assert row[1] == "300"
        assert [x, y] == pytest.approx(trace.points[-1], rel=0.01)
        assert value == pytest.approx(trace.values[-1], rel=0.01)
        assert distance == pytest.approx(np.hypot(*trace.points[-1]), rel=0.01)
        assert [first, last] == pytest.approx(np.sqrt(trace.rates.prod(axis=1))[[0, -1]], rel=0.01)
    assert "\nDefault lr: each method's best of 0.001, 0.002, 0.005, ..., 5 (lowest mean of f over 300 steps)\n" in out
    assert out.endswith("Picture: fastrms-path.png\n")
    assert list(seen[0].traces) != []
    with Image.open(tmp_path / "fastrms-path.png") as image:
        assert image.size == (1800, 1410)


def test_settings_and_methods_from_the_command_line(seen):
    arguments = ["--with", "decay_rate=0.99, momentum=0.9", "--with", "centered,epsilon=1e-3,nonfinite=skip"]
    arguments += ["--with", "", "--with", "lr=0.4", "--beside", "adagrad,lr=0.5", "momentum", "--lr", "0.2"]
    arguments += ["--start", "-1", "0.5", "--steps", "5", "--x", "-3", "1", "--panels", "path"]
    assert main(["path", *arguments, "--quiet"]) == 0
    (descent,) = seen
    assert [trace.label for trace in descent.traces] == [
        "RMSProp, lr 0.2, decay_rate 0.99, momentum 0.9",
        "RMSProp, lr 0.2, centered, epsilon 0.001, nonfinite skip",
        "RMSProp, lr 0.2",
        "RMSProp, lr 0.4",
        "AdaGrad, lr 0.5",
        "momentum, lr 0.02",
    ]
    assert descent.region == ((-3, 1), (-2, 2))
    assert {len(trace.rates) for trace in descent.traces} == {5}
    assert descent.traces[0].points[0].tolist() == [-1, 0.5]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("centered", {"centered": True}),
        ("lr=1,momentum=.5", {"lr": 1, "momentum": 0.5}),
        ("centered=False,clip_norm=none,nesterov=true", {"centered": False, "clip_norm": None, "nesterov": True}),
        ("kernel=serial,lr=1e-3", {"kernel": "serial", "lr": 1e-3}),
    ],
)
def test_options_as_text(text, options):
    found = path._options(text)
    assert found == options
    assert [type(value) for value in found.values()] == [type(value) for value in options.values()]


@pytest.mark.parametrize(
    ("arguments", "methods"),
    [
        ("", 4),
        ("--lr 0.3", 4),
        ("--beside", 1),
        ("--beside momentum", 2),
        ("--beside adam", 2),
        ("--with centered", 1),
        ("--with centered --beside adagrad", 2),
    ],
)
def test_what_is_drawn_beside(seen, arguments, methods):
    assert main(["path", "--steps", "1", "--panels", "values", "--quiet", *arguments.split()]) == 0
    assert len(seen[0].traces) == methods


def test_quiet_prints_nothing_and_makes_the_folder(capsys, tmp_path):
    arguments = ["--format", "svg", "png", "pdf", "svg", "--animate", "--panels", "path", "--steps", "2"]
    assert main(["path", "--quiet", "--output", "a/b", *arguments]) == 0
    assert capsys.readouterr() == ("", "")
    kinds = {"gif": b"GIF89a", "pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}
    folder = tmp_path / "a" / "b"
    assert sorted(file.name for file in folder.iterdir()) == [f"fastrms-path.{kind}" for kind in kinds]
    for kind, start in kinds.items():
        assert (folder / f"fastrms-path.{kind}").read_bytes().startswith(start)


def test_names_the_files_that_it_wrote(capsys):
    assert main(["path", "--format", "svg", "--animate", "--panels", "values", "--steps", "1"]) == 0
    assert capsys.readouterr().out.endswith("Picture: fastrms-path.svg\nAnimation: fastrms-path.gif\n")


def test_a_function_of_the_users_own(seen, capsys):
    assert main(["path", "--function", "mine:f", "--steps", "3", "--panels", "path"]) == 0
    assert main(["path", "--function", "mine:f", "--gradient", "mine:gradient", "--steps", "3"]) == 0
    numerical, analytic = seen
    np.testing.assert_allclose(numerical.traces[0].points, analytic.traces[0].points, rtol=1e-8)
    assert analytic.landscape.gradient_at(1, 2).tolist() == [np.sinh(1), 4]
    assert "Function: mine:f\n" in capsys.readouterr().out


def test_a_landscape_of_the_users_own(seen, capsys):
    assert main(["path", "--function", "mine:hill", "--panels", "path"]) == 0
    assert "Function: hill\nStart: x = 0.1, y = 0.2, f = -0.05\n" in capsys.readouterr().out
    assert len(seen[0].traces[0].rates) == 7


def test_a_path_that_diverges_is_told(capsys):
    assert main(["path", "--beside", "gradient-descent,lr=5", "--steps", "100", "--panels", "values"]) == 0
    assert re.search(r"gradient descent, lr 5 +\d+, diverged ", capsys.readouterr().out)


def test_no_steps(capsys):
    assert main(["path", "--steps", "0"]) == 0
    assert re.search(r"^RMSProp, lr 0.2 +0 +-1.7 +1.2 +17.3 +2.08 *$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--function hill", "--function: expected one of bowl, ellipse, rosenbrock, beale, saddle, ravine, or"),
        ("--function mine:", "--function: expected module:function, got 'mine:'"),
        ("--function nowhere:f", "--function: nowhere:f: the module cannot be imported: No module named 'nowhere'"),
        ("--function wrong_syntax:f", "--function: wrong_syntax:f: the module cannot be imported: SyntaxError: "),
        ("--function mine:g", "--function: mine:g: expected a function of this name in mine, found none"),
        ("--function mine:number", "--function: mine:number: expected a function, got int"),
        ("--function mine:boom", "--function: mine:boom: at x=-1.5, y=1 it raised KeyError: 'on purpose'"),
        ("--function mine:none", "--function: expected a number at x=-1.5, y=1, got None (NoneType)"),
        (
            "--function mine:half",
            "--start: expected a point at which mine:half has a value of at most 1e+150, got (-1.5, 1.0)",
        ),
        ("--gradient mine:one", "--gradient: ellipse has a gradient; the option is for functions of your own"),
        (
            "--function mine:hill --gradient mine:one",
            "--gradient: mine:hill is a Landscape, which can have a gradient itself",
        ),
        ("--function mine:f --gradient mine:one", "--gradient: expected two numbers at x=-1.5, y=1, got 1.0 (float)"),
        (
            "--function mine:f --gradient mine:boom",
            "--gradient: mine:boom: at x=-1.5, y=1 it raised KeyError: 'on purpose'",
        ),
        (
            "--with decay=0.9",
            "--with: 'decay' is not an option of RMSProp on a path; the options are lr, decay_rate, epsilon,",
        ),
        ("--with decay_rate=2", "--with: decay_rate: expected a number with decay_rate >= 0 and < 1, finite; got 2"),
        ("--with momentum=0.9 --with momentum=2", "--with, number 2: momentum: expected a number"),
        (
            "--with storage=x",
            "--with: 'storage' is not an option of RMSProp on a path; the options are lr, decay_rate,",
        ),
        ("--with num_threads=1", "--with: 'num_threads' is not an option of RMSProp on a path"),
        ("--with cache_dtype=bfloat16", "--with: 'cache_dtype' is not an option of RMSProp on a path"),
        ("--with params=1", "--with: 'params' is not an option of RMSProp on a path"),
        ("--beside momentum adagrad,epsilon=0", "--beside adagrad: epsilon: expected a number"),
        ("--with lr=fast", "--with: lr: expected a number or a function of the step, got 'fast' (str)"),
        (
            "--beside adagrad,rate=2",
            "--beside adagrad: 'rate' is not an option of adagrad on a path; the options are lr, epsilon",
        ),
        ("--start 9 9 --y -1 1", "--start: expected a point in the region ((-2.0, 2.0), (-1.0, 1.0)), got (9.0, 9.0)"),
        ("--x 1 -1", "--x: expected two finite numbers, LOW below HIGH, got 1 -1"),
        ("--start nan 0", "--start: expected two finite numbers, got nan 0"),
        ("--y 0 inf", "--y: expected two finite numbers, LOW below HIGH, got 0 inf"),
        ("--with lr=1 " * 9, "--with and --beside: expected 1 to 8 paths in one picture, got 9"),
        ("--function mine:corner --x 1 2 --y 1 2 --start 1.2345 1.5", "--x and --y: mine:corner has no finite value"),
        ("--output mine.py", "--output: mine.py: expected a folder to write to: "),
    ],
    ids=lambda text: "" if ": " in text else text,
)
def test_errors_are_one_line_and_nothing_is_written(capsys, tmp_path, arguments, message):
    before = sorted(file for file in tmp_path.iterdir() if file.is_file())
    assert main(["path", *arguments.split()]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"fastrms path: error: {message}")
    assert err.count("\n") == 1
    assert out == ""
    assert sorted(file for file in tmp_path.iterdir() if file.is_file()) == before
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--with =3", "argument --with: expected options such as decay_rate=0.99,centered, each once, got '=3'"),
        ("--with lr=", "argument --with: expected options such as decay_rate=0.99,centered, each once, got 'lr='"),
        ("--with lr=1,lr=2", "argument --with: expected options such as decay_rate=0.99,centered, each once, got"),
        ("--beside lion", "argument --beside: expected one of gradient-descent, momentum, adagrad, adam, got 'lion'"),
        ("--steps -1", "argument --steps: expected a whole number of at least 0, got '-1'"),
        ("--lr 0", "argument --lr: expected a finite number above 0, got '0'"),
        ("--start 1", "argument --start: expected 2 arguments"),
        ("--panels map", "argument --panels: invalid choice: 'map'"),
        ("--format bmp", "argument --format: invalid choice: 'bmp'"),
    ],
    ids=lambda text: "" if ": " in text else text,
)
def test_bad_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["path", *arguments.split()])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_picture_that_cannot_be_written(capsys, tmp_path, kind):
    (tmp_path / f"fastrms-path.{kind}").mkdir()
    assert main(["path", "--animate", "--steps", "1", "--panels", "values"]) == 1
    out, err = capsys.readouterr()
    assert f"fastrms path: error: --output: fastrms-path.{kind}: cannot be written: " in err
    assert out == ""  # found ahead of the work


def test_missing_packages(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["path", "--output", "new"]) == 1
    hint = 'matplotlib is not installed; install with: python -m pip install "fastrms[plot]"\n'
    assert capsys.readouterr().err == f"fastrms path: error: {hint}"
    assert not (tmp_path / "new").exists()


def test_help_shows_examples_that_run(capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        main(["path", "--help"])
    text = capsys.readouterr().out
    mine = importlib.import_module("mine")
    examples = [line.split()[1:] for line in text.splitlines() if line.startswith("  fastrms path")]
    assert len(examples) == 6
    monkeypatch.setitem(sys.modules, "my_module", mine)
    for arguments in examples:
        assert main([*arguments, "--quiet", "--steps", "2"]) == 0
