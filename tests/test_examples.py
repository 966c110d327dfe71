"""The programs of docs/examples, each in a process of its own, and what they say they reached."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import JIT, UNDEFINE_GRADIENTS

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"

SAME = r"the same bits: True"

# What each needs, and what it prints, with its numbers and the bounds on each.
PRINTS = {
    "autograd_nested": (
        ["autograd", "sklearn"],
        rf"675 steps, {SAME}, test accuracy ([\d.]+)",
        [(0.95, 1)],
    ),
    "neuralnetlib_digits": (
        ["neuralnetlib", "sklearn"],
        rf"560 steps, {SAME}, test accuracy ([\d.]+)",
        [(0.88, 1)],
    ),
    "pydynet_digits": (
        ["pydynet", "sklearn"],
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
        ["sklearn"],
        r"\d+ epochs, test accuracy ([\d.]+)\n"
        r"the same bits as the textbook: True\none more epoch after pickle: True, joblib: True",
        [(0.95, 1)],
    ),
    "word2vec": (
        [],
        r"\d+ words, (\d+) different, \d+ steps\n(?s:.*)except: .*\b(?:finally|try|clause)\b(?s:.*)"
        r"the rule above: True, other rows moved: False\n"
        r"(\d+) of 100000 rows: ([\d.]+) ms, ([\d.]+) MB; a dense step: ([\d.]+) ms, ([\d.]+) MB",
        [(500, 2000), (100, 1536), (0, 1000), (0, 2), (0, 1000), (12, 30)],
    ),
    "logistic_regression": (
        ["sklearn"],
        r"300 steps, test loss ([\d.]+), test accuracy ([\d.]+)",
        [(0, 0.15), (0.94, 1)],
    ),
    "recurrent": (["sklearn"], r"1125 steps, .* test accuracy ([\d.]+)", [(0.95, 1)]),
    "data_and_grad": (
        ["sklearn"],
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
# pydynet says so when it is imported.
WARNINGS = ["-W", "error", "-W", "ignore:Cupy is not installed:UserWarning"]


@pytest.mark.skipif(not JIT, reason="a whole training takes the interpreter minutes")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in PRINTS])
def test_example(name, tmp_path):
    needs, pattern, bounds = PRINTS[name]
    for module in needs:
        pytest.importorskip(module)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = (
        f"import runpy; {UNDEFINE_GRADIENTS}; runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, *WARNINGS, "-c", program],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    found = re.fullmatch(pattern, run.stdout.strip())
    assert found, run.stdout
    for number, (low, high) in zip(found.groups(), bounds, strict=True):
        assert low <= float(number) <= high
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_run_and_shown():
    there = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    page = (EXAMPLES.parent / "examples.md").read_text(encoding="utf-8")
    assert there == sorted(PRINTS)
    assert there == sorted(re.findall(r"^```\{literalinclude\} examples/(\w+)\.py$", page, re.MULTILINE))
    assert there == sorted(re.findall(r"\]\(examples/(\w+)\.py\)", page))
