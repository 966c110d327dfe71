"""Every Python block of README and docs/ runs, block after block of a page in one namespace."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import fastrms

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Names that a page may take for granted, because it shows a formula and not a program.
FORMULA = {"d": 0.9, "lr": 0.1, "eps": 1e-8, "cache": np.ones(2), "grad": np.ones(2), "param": np.ones(2)}
GIVEN = {"kernels.md": {"np": np, **FORMULA}}
# Pages of adapters, and what they adapt to.
NEEDS = {"torch.md": "torch", "interop.md": "torch"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, tmp_path, monkeypatch):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)  # for what a page saves
    names = dict(GIVEN.get(page.name, {}))
    for code in BLOCK.findall(page.read_text(encoding="utf-8")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # From within Keras, where it makes an array of one of its variables.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning, module="keras")
            exec(compile(code, str(page), "exec"), names)


def test_there_are_blocks_to_run():
    assert sum(len(BLOCK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page):
    for name, target in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (page.parent / target).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("name", fastrms.__all__)
def test_every_public_name_is_documented(name):
    assert getattr(fastrms, name).__doc__
