"""The table of folders in docs/architecture.md, and the size of files and functions."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT, count_calls

import fastrms
from fastrms import RMSProp

PACKAGE = Path(fastrms.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def name_of(path):
    """Return the dotted name of a module within the package, "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROWS = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", PAGE.read_text(encoding="utf-8"), re.M)
# They only pass on names of others, and are imported by no module of the package.
FRONT = {"", "__main__"}


def imports(path):
    """Return the modules of the package that a module imports: at its top, in functions, and by import_module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {word.value for word in ast.walk(node) if isinstance(word, ast.Constant)}
    inside = {name.removeprefix("fastrms.") for name in found if isinstance(name, str) and name.startswith("fastrms.")}
    return inside & MODULES.keys() - {name_of(path)}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def row_of(module):
    return module.split(".")[0]


def test_the_table_has_every_file_and_folder():
    assert sorted(ROWS) == sorted({row_of(module) for module in MODULES} - FRONT)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - FRONT))
def test_imports_run_in_one_direction(module):
    own = ROWS.index(row_of(module))
    for other in GRAPH[module]:
        assert ROWS.index(row_of(other)) <= own, f"{module} imports {other}, which is further down in the table"


def test_no_imports_are_circular():
    # Of a package and a module in it, the package is imported first; what it passes on is no cycle.
    modules = {name: {other for other in GRAPH[name] if not name.startswith(f"{other}.")} for name in MODULES}
    assert len([*TopologicalSorter(modules).static_order()]) == len(MODULES)


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("module", sorted(MODULES))
def test_files_and_functions_are_short(module):
    path = MODULES[module]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for function in functions(path):
        docstring = ast.get_docstring(function, clean=False) or ""
        lines = function.end_lineno - function.lineno - docstring.count("\n")
        assert lines <= LONG.get((module, function.name), 60), function.name


# A compiled kernel, which cannot be cut without passing all of its arguments on.
LONG = {("kernels.cuda", "decide"): 75}


@pytest.mark.skipif(not JIT, reason="without the JIT a kernel is many functions of Python")
@pytest.mark.parametrize("arrays", [1, 1000])
def test_a_steady_step_calls_few_functions_of_python(arrays):
    """Each costs some 50 ns of a step of 2 us. The function that counts them is one of them."""
    opt = RMSProp([np.ones(10) for _ in range(arrays)], kernel="serial")
    gradients = [np.ones(10) for _ in range(arrays)]
    for _ in range(3):
        opt.step(gradients)
        opt.step()
    # The facade, the backend, flatten, refuse_replaced, items_of and the kernel.
    assert count_calls(lambda: opt.step(gradients), ("call",)) - 1 <= 6
    # The facade, the backend, refuse_replaced, take and the kernel.
    assert count_calls(opt.step, ("call",)) <= 5
