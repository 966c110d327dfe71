"""The programs of docs/examples, each in a process of its own, and what they say they reached."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import JIT, UNDEFINE_GRADIENTS

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"

# What each needs, and what it prints, with its numbers and the bounds on each.
PRINTS = {
    "autograd_nested": (["autograd", "sklearn"], r"675 steps, .* test accuracy ([\d.]+)", [(0.95, 1)]),
    "sklearn_mlp": (
        ["sklearn"],
        r"gradients are within ([\d.e+-]+) of finite differences\n660 steps, test accuracy ([\d.]+)",
        [(0, 1e-7), (0.95, 1)],
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


@pytest.mark.skipif(not JIT, reason="a whole training takes the interpreter minutes")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.torch] if name == "pytorch_model" else []) for name in PRINTS]
)
def test_example(name, tmp_path):
    needs, pattern, bounds = PRINTS[name]
    for module in needs:
        pytest.importorskip(module)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = (
        f"import runpy; {UNDEFINE_GRADIENTS}; runpy.run_path({str(EXAMPLES / f'{name}.py')!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
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
