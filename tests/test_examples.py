"""The programs of docs/examples, each in a process of its own, and what they say they reached.

The documentation shows all of them in its gallery, and its build runs those that need no more than the extra `docs`.
"""

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers import JIT, UNDEFINE_GRADIENTS

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"

SAME = r"the same bits: True"

# What each needs, and what it prints, with its numbers and the bounds on each.
PRINTS = {
    "autograd_nested": (
        ["autograd", "matplotlib", "sklearn"],
        rf"675 steps, {SAME}, test accuracy ([\d.]+)",
        [(0.95, 1)],
    ),
    "neuralnetlib_digits": (
        ["neuralnetlib", "matplotlib", "sklearn"],
        rf"560 steps, {SAME}, test accuracy ([\d.]+)",
        [(0.88, 1)],
    ),
    "pydynet_digits": (
        ["pydynet", "matplotlib", "sklearn"],
        rf"560 steps, {SAME}, test accuracy ([\d.]+)",
        [(0.88, 1)],
    ),
    "thinc_digits": (
        ["sklearn"],
        rf"560 steps, {SAME}, test accuracy ([\d.]+)",
        [(0.88, 1)],
    ),
    "pennylane_circuit": (
        ["sklearn"],
        r"60 steps, at most ([\d.e+-]+) apart, accuracy ([\d.]+)",
        [(0, 1e-9), (0.9, 1)],
    ),
    "sklearn_mlp": (
        ["matplotlib", "sklearn"],
        r"\d+ epochs, test accuracy ([\d.]+)\n"
        r"the same bits as the textbook: True\none more epoch after pickle: True, joblib: True",
        [(0.95, 1)],
    ),
    "word2vec": (
        ["matplotlib"],
        r"\d+ words, (\d+) different, \d+ steps\n(?s:.*)except: .*\b(?:finally|try|clause)\b(?s:.*)"
        r"the rule above: True, other rows moved: False\n"
        r"(\d+) of 100000 rows: ([\d.]+) ms, ([\d.]+) MB; a dense step: ([\d.]+) ms, ([\d.]+) MB",
        [(500, 2000), (100, 1536), (0, 1000), (0, 2), (0, 1000), (12, 30)],
    ),
    "logistic_regression": (
        ["matplotlib", "sklearn"],
        r"300 steps, test loss ([\d.]+), test accuracy ([\d.]+)",
        [(0, 0.15), (0.94, 1)],
    ),
    "recurrent": (["matplotlib", "sklearn"], r"1125 steps, .* test accuracy ([\d.]+)", [(0.95, 1)]),
    "data_and_grad": (
        ["matplotlib", "sklearn"],
        r"x after each step: 4\.0000 3\.3734 .* 1\.1959\n1500 steps, variance explained ([\d.]+), at best [\d.]+",
        [(0.51, 0.52)],
    ),
    "pytorch_model": (["sklearn"], r"440 steps, test accuracy ([\d.]+)", [(0.95, 1)]),
}
MARKS = {
    "pytorch_model": [pytest.mark.torch],
    "thinc_digits": [pytest.mark.frameworks("thinc")],
    "pennylane_circuit": [pytest.mark.frameworks("pennylane")],
}
WARNINGS = [
    "-W", "error",
    "-W", "ignore:Cupy is not installed:UserWarning",  # pydynet says so when it is imported
    "-W", "ignore:FigureCanvasAgg is non-interactive:UserWarning",  # figures are drawn, and no window is opened
]  # fmt: skip


@pytest.mark.skipif(not JIT, reason="a whole training takes the interpreter minutes")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in PRINTS])
def test_example(name, tmp_path):
    needs, pattern, bounds = PRINTS[name]
    for module in needs:
        pytest.importorskip(module)
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = (
        f"import runpy; {UNDEFINE_GRADIENTS}; runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, *WARNINGS, "-c", program],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    _check(run.stdout.strip(), pattern, bounds)
    assert list(tmp_path.iterdir()) == []


def _check(output, pattern, bounds):
    found = re.fullmatch(pattern, output)
    assert found, output
    for number, (low, high) in zip(found.groups(), bounds, strict=True):
        assert low <= float(number) <= high


def test_every_example_is_run_and_shown():
    there = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    page = (EXAMPLES.parent / "examples.md").read_text(encoding="utf-8")
    assert there == sorted(PRINTS)
    assert there == sorted(re.findall(r"\]\(examples/(\w+)\.py\)", page))
    assert there == sorted(re.findall(r"^   examples/(\w+)\.py$", page, re.MULTILINE))  # with a picture


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_says_what_it_needs(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    python -m pip install (.*)$", text, re.MULTILINE)
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    others = imported - set(sys.stdlib_module_names) - {"fastrms", "numpy", "joblib"}
    assert sorted(line.replace("scikit-learn", "sklearn").split()) == sorted(others)


def test_examples_that_the_build_does_not_run_say_what_they_print():
    settings = ast.parse((EXAMPLES.parent / "conf.py").read_text(encoding="utf-8"))
    (run,) = (
        ast.literal_eval(node.value)
        for node in settings.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RUN"
    )
    assert set(run) < PRINTS.keys()
    for name in PRINTS.keys() - set(run):
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        (output,) = re.findall(r"prints::\n\n((?:    .*\n)+)", text)
        _check(textwrap.dedent(output).strip(), *PRINTS[name][1:])
