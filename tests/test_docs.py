"""The pages: every Python block of README and docs/ runs, links lead somewhere, every public name is documented.

The blocks of a page run one after another in one namespace. Building the pages with Sphinx, whose warnings are errors,
finds wrong references and headings.
"""

import ast
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers import BLOCK, UNDEFINE_GRADIENTS, undefine_gradients
from numpydoc.validate import validate

import fastrms

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

# Pages that run other libraries, in a process of their own: what those do to a process (threads, settings) is not for
# other tests to bear.
WITH_OTHERS = {
    "interop.md": ("torch", "keras"), "migrating.md": ("torch", "keras", "optax"), "torch.md": ("torch",),
    "mpi.md": ("mpi4py",),
}  # fmt: skip
# What the text of a page says of its blocks and they do not assert themselves; true after the last block.
CLAIMS = {
    "README.md": [
        "W is opt.params[0] and b is opt.params[1] and dW is opt.grads[0] and db is opt.grads[1]",
        "np.shares_memory(W, opt.buffers['params'].flat) and np.shares_memory(dW, opt.buffers['grads'].flat)",
        "opt.steps == 400 and opt.lr == 1e-3 and np.mean((x @ W + b - y) ** 2) < 1e-4",
    ],
    "checkpoints.md": [
        "opt.steps == 1 and opt.param_groups[0]['momentum'] == 0.9",
        "np.allclose(opt.params['W'], params['W'] - 1e-3 / np.sqrt(0.1), atol=1e-9)",
        "signal.getsignal(signal.SIGTERM) is end",
    ],
    "cuda.md": ["opt.steps == 1 and np.allclose(opt.params['W'], 1 - 1e-3 / np.sqrt(0.1))"],
    "interop.md": [
        "theirs.iterations == 2",
        "all(np.array_equal(v.numpy(), p) for v, p in zip(model.trainable_variables, opt.params))",
    ],
    "kernels.md": ["opt.kernel == 'serial' and opt.num_threads == 1"],
    "mpi.md": ["opt.steps == again.steps == 2 and np.array_equal(opt.params['W'], again.params['W'])"],
    "options.md": ["[group['lr'] for group in opt.param_groups] == [1e-3, 1e-3] and opt.steps == 1"],
    "start.md": [
        "all(np.shares_memory(view, opt.buffers['params'].flat) and opt.params[k] is view for k, view in p.items())",
        "again.steps == 601 and opt.steps == 801",
        "opt.global_clip_norm == 1 and opt.param_groups[0]['momentum'] == 0.9 and callable(opt.lr)",
    ],
    "storage.md": ["opt.steps == 2 and np.all(opt.params['W'] < 1) and np.all(opt.params['b'] < 0)"],
    "torch.md": [
        "all(state['step'] == 4 for state in optimizer.state.values()) and len(optimizer.state) == 4",
        "all(p.grad is None for p in model.parameters())",
    ],
    "zero-copy.md": [
        "opt.steps == 4 and dW is opt.grads['W'] and db is opt.grads['b']",
        "not np.shares_memory(x, opt.buffers['grads'].flat)",
    ],
}
# From within Keras, where it makes an array of one of its variables.
WARNINGS = ["-W", "error", "-W", "ignore:__array__ implementation:DeprecationWarning"]


def _with_torch(value, needs):
    return pytest.param(value, marks=[pytest.mark.torch] if needs else [])


@pytest.mark.parametrize(
    "page", [_with_torch(page, "torch" in WITH_OTHERS.get(page.name, ())) for page in PAGES], ids=lambda page: page.name
)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a page saves
    undefine_gradients(monkeypatch)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    blocks.append("\n".join(f"assert {claim}, {claim!r}" for claim in CLAIMS.get(page.name, [])))
    if page.name in WITH_OTHERS:
        for module in WITH_OTHERS[page.name]:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"needs {module}")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, *WARNINGS, "-c", "\n".join([UNDEFINE_GRADIENTS, *blocks])],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return
    names, handler = {}, signal.getsignal(signal.SIGTERM)
    try:
        for code in blocks:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exec(compile(code, str(page), "exec"), names)
    finally:
        signal.signal(signal.SIGTERM, handler)  # a page shows how one saves


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_one_that_runs(page):
    """None is marked as something else, which would neither run nor be noticed; {…} is for Sphinx."""
    lines = re.findall(r"^ *(?:```+|~~~+)(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert lines[1::2] == [""] * (len(lines) // 2)
    assert [line for line in lines[::2] if line != "python" and not line.startswith("{")] == []


def test_readmes_programs_before_and_after_end_with_the_same_bits():
    before, after = {}, {}
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    for code, names in zip(blocks, (before, after), strict=False):
        exec(code, names)
    assert "RMSProp" not in before
    assert isinstance(after["opt"], fastrms.RMSProp)
    for name in ("W", "b"):
        assert before[name].tobytes() == after[name].tobytes()
    assert np.mean(after["y"] ** 2) > 0.5
    assert np.mean(after["error"] ** 2) < 0.01


def test_readmes_table_of_contents_has_every_page():
    pages = {f"docs/{page.name}" for page in PAGES} - {"docs/README.md", "docs/index.md"}
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Documentation")[2]
    assert pages <= set(re.findall(r"\]\(([^)#]+)\)", table))


def test_the_glossary_is_in_alphabetical_order():
    terms = re.findall(r"^## (.+)$", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert terms == sorted(terms, key=str.casefold)
    assert len(terms) > 30


def test_claims_are_about_pages_that_are_there():
    assert CLAIMS.keys() <= {page.name for page in PAGES}


def test_there_are_blocks_to_run():
    assert sum(len(BLOCK.findall(page.read_text(encoding="utf-8"))) for page in PAGES) >= 30


def _links(page):
    return re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in _links(page):
        # Pictures are drawn when the pages are built; tests/plots/test_pictures.py looks for these.
        assert target.startswith("_pictures/") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page):
    for name, target in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (page.parent / target).read_text(encoding="utf-8"), name


def test_tables_of_contents_of_the_index_have_every_page_once():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    tables = re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    listed = [f"{line}.md" for table in tables for line in table.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted({page.name for page in PAGES} - {"README.md", "index.md"})


# Modules for use inside the package: what of them is public, `fastrms` itself has. Any other is public as a module.
INNER = {"dialects", "errors", "functional", "optimizer", "options"}  # what they have is in fastrms itself
MODULES = sorted(
    ["fastrms.mpi", "fastrms.plots", "fastrms.torch"]
    + [f"fastrms.{path.stem}" for path in (ROOT / "fastrms").glob("[!_]*.py") if path.stem not in INNER]
)


def test_the_api_page_has_every_public_name_and_module():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^   (fastrms\.[\w.]+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted([f"fastrms.{name}" for name in fastrms.__all__] + MODULES)


# Of numpydoc's checks those that find something missing or untrue; others are about layout.
GAPS = {
    "GL06", "GL07", "GL08",  # sections that are unknown or out of order, no docstring at all
    "SS01",  # no summary
    "PR01", "PR02", "PR03", "PR04", "PR06", "PR07",  # parameters: missing, unknown, out of order, no type, no text
    "RT01", "RT03", "YD01",  # no Returns, no text in it, no Yields
}  # fmt: skip


def _public(module):
    """The full names of what a module has in `__all__`, and of the public members of its classes, with the objects."""
    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing):
            continue  # a constant, which has a comment
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing):
            for member in dir(thing):
                owner = next(base for base in thing.__mro__ if member in base.__dict__)
                value = inspect.getattr_static(thing, member)
                # Fields of a dataclass are documented as parameters.
                if member.startswith("_") or member in getattr(thing, "__dataclass_fields__", ()):
                    continue
                if owner.__module__.startswith("fastrms"):
                    yield f"{module.__name__}.{name}.{member}", value


def _raises(thing):
    """Whether a function, or the making of an object of a class, raises an error in its own body."""
    made_by = "__post_init__" if hasattr(thing, "__post_init__") else "__init__"
    function = getattr(thing, made_by) if inspect.isclass(thing) else getattr(thing, "__func__", thing)
    # What a decorator made (the __init__ of a dataclass, for instance) has no source.
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def _gaps(name, thing, top):
    found = validate(name)
    yield from (f"{code}: {text}" for code, text in found["errors"] if code in GAPS)
    text = found["docstring"]
    if _raises(thing) and "\nRaises\n" not in text:
        yield "it raises, and has no section Raises"
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if top and not is_error and "\nExamples\n" not in text:
        yield "it has no section Examples"


@pytest.mark.parametrize("module", [_with_torch(name, name == "fastrms.torch") for name in ["fastrms", *MODULES]])
def test_every_public_name_is_documented_in_full(module):
    module = pytest.importorskip(module, exc_type=ImportError)
    gaps = {
        name: gaps
        for name, thing in _public(module)
        if (gaps := list(_gaps(name, thing, name.removeprefix(module.__name__).count(".") == 1)))
    }
    assert gaps == {}


def test_without_torch_one_line_says_how_to_run_what_needs_it():
    """As README says of the command that runs the tests."""
    some = ["fastrms/torch", "tests/torch/test_torch.py", "tests/kernels/test_bfloat16.py", "-k", "torch"]
    program = f"import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main({some!r}))"
    environment = os.environ | {"FASTRMS_NO_SKIPS": "but-torch", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("SKIPPED"))
    command = "python -m pip install torch && python -m pytest -m torch"
    assert re.fullmatch(
        rf"SKIPPED \[8\] tests.support.helpers\.py:\d+: torch is not installed\. .*: {re.escape(command)}", line
    )
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_needs_torch_has_its_mark():
    """Or `-m torch` would not choose it, and without torch it would have a line of its own."""
    for path in (ROOT / "tests").rglob("*.py"):
        skips = re.findall(r"""importorskip\(["']torch""", path.read_text(encoding="utf-8"))
        assert len(skips) == (path.name == "helpers.py"), f"{path.name}: expected the mark torch, or need_torch()"
