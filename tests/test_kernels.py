"""The choice of kernel, when something is compiled, where it is cached, and what is imported."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from helpers import JIT
from numba.core import event

import fastrms
from fastrms import RMSProp
from fastrms.kernels import cpu
from fastrms.kernels.hyper import HYPER_FIELDS

PACKAGE = Path(fastrms.__file__).parent


@pytest.mark.skipif(not JIT, reason="nothing is compiled with the JIT off")
@pytest.mark.parametrize("kernel", ["serial", "parallel"])
def test_nothing_is_compiled_for_new_shapes_rates_and_groups(kernel, rng):
    def train(groups, options):
        opt = RMSProp(groups, kernel=kernel, **options)
        for _ in range(2):
            opt.step([[np.ones(p.shape) for p in group["params"]] for group in groups])
            opt.step()
            for group in opt.param_groups:
                group["lr"] = rng.random()
                group["weight_decay"] = rng.choice([0.0, rng.random()])
                group["clip_value"] = rng.choice([None, rng.random() + 0.1])
                group["clip_norm"] = rng.choice([None, rng.random() + 0.1])
                group["epsilon"] = 10.0 ** rng.integers(-12, 0)
                group["decay_rate"] = 0.99 * rng.random()
                if group["momentum"]:
                    group["momentum"] = 0.01 + 0.9 * rng.random()
        return opt

    variants = [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}]
    for options in variants:
        for dtype in (np.float32, np.float64):
            train([{"params": [np.ones(3, dtype)]}], options | {"clip_norm": 1.0})
    with event.install_recorder("numba:compile") as compiled:
        for i in range(1000):
            shapes = [tuple(rng.integers(0, 5, rng.integers(0, 4))) for _ in range(rng.integers(1, 6))]
            params = [np.ones(shape, rng.choice([np.float32, np.float64])) for shape in shapes]
            cut = int(rng.integers(0, len(params)))
            groups = [{"params": params[cut:], "lr": rng.random()}]
            if cut:
                groups.append({"params": params[:cut], "maximize": bool(rng.integers(2))})
            train(groups, variants[i % 4] | {"global_clip_norm": rng.choice([None, 1.0])})
    assert [item.data for _, item in compiled.buffer] == []


@pytest.mark.skipif(not JIT, reason="nothing is compiled with the JIT off")
@pytest.mark.parametrize(("step", "function"), [("opt.step(grads)", "serial_from"), ("opt.step()", "serial")])
@pytest.mark.parametrize("shape", [(3, 4), (100, 100)])
def test_a_first_step_compiles_one_function(step, function, shape, tmp_path):
    program = f"""if True:
        import numpy as np
        from numba.core import caching, event
        from fastrms import RMSProp
        grads = [np.ones({shape}, np.float32), np.ones(7, np.float32)]
        opt = RMSProp(grads)
        with event.install_recorder("numba:compile") as compiled:
            for _ in range(3):
                {step}
        found = [e.data["dispatcher"] for _, e in compiled.buffer if e.is_start]
        print(*[d.__name__ for d in found if not isinstance(d._cache, caching.NullCache)])
    """
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [function]


def test_the_compiled_rule_unpacks_as_many_numbers_as_there_are():
    unpack = numba.njit(lambda hyper: cpu._unpack(hyper))
    assert len(unpack(np.zeros(len(HYPER_FIELDS)))) == len(HYPER_FIELDS)


# Who may import whom inside the package; tests/ holds the arrows of docs/design.md.
ARROWS = {
    "errors": set(),
    "options": {"dialects", "errors"},
    "dialects": {"errors"},
    "buffers": {"attributes", "errors"},
    "overlap": {"buffers", "errors"},
    "kernels.compiled": set(),
    "kernels.cpu": {"kernels", "kernels.compiled"},
    "kernels.dlpack": {"kernels.compiled", "kernels.cpu"},
    "kernels.reference": {"options"},
    "kernels.norms": {"kernels.reference", "kernels.choice", "kernels.compiled", "kernels.cpu", "kernels"},
    "kernels.pointers": set(),
    "kernels.cuda": {"kernels", "kernels.cpu", "kernels.norms"},
    "kernels.choice": {"errors"},
    "kernels": {"kernels.cpu", "kernels.reference", "kernels"},
    "runs": {"buffers", "options", "kernels", "kernels.norms", "storage"},
    "attributes": {"dialects", "errors"},
    "archives": {"errors"},
    "heads": {"archives", "buffers", "errors", "options"},
    "checkpoints": {"archives", "buffers", "errors", "heads", "options"},
    "mapped": {"buffers", "errors", "kernels.norms"},
    "storage": {"archives", "buffers", "errors", "heads", "kernels.norms", "mapped", "options"},
    "stepping": {"attributes", "errors", "options", "buffers", "runs", "storage", "kernels", "kernels.norms"},
    "optimizer": {
        "errors", "options", "attributes", "buffers", "overlap", "checkpoints", "stepping", "storage", "kernels",
        "kernels.reference",
    },
    "functional": {"optimizer"},
    "device": {"buffers", "errors", "kernels"},
    "cuda": {"buffers", "device", "errors", "kernels", "optimizer", "options", "overlap", "runs"},
    "torch": {"dialects", "errors", "options", "kernels", "kernels.choice", "optimizer"},
    "scipy": {"errors", "options", "optimizer"},
    "mpi.ranks": {"errors"},
    "mpi.handover": {"buffers", "mpi.ranks"},
    "mpi.unsharded": {"optimizer", "options", "mpi.ranks"},
    "mpi.sharded": {
        "errors", "options", "buffers", "runs", "kernels", "kernels.norms", "optimizer", "mpi.ranks", "mpi.handover",
        "mpi.unsharded",
    },
    "mpi": {"mpi.sharded"},
    "interop": {"dialects", "errors", "heads", "options", "optimizer", "kernels.reference"},
    "landscapes": {"errors"},
    "descent": {"errors", "landscapes", "optimizer", "options"},
    "plots.measurements": set(),
    "plots.paths": {"descent", "errors"},
}  # fmt: skip


@pytest.mark.parametrize("module", ARROWS)
def test_imports_run_in_one_direction(module):
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = PACKAGE / module.replace(".", "/") / "__init__.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastrms":
            inner = node.module.removeprefix("fastrms").lstrip(".")
            # `from fastrms import kernels` imports the package's module of that name.
            names = {inner} if inner else {alias.name for alias in node.names}
            found |= names
    assert found <= ARROWS[module]


def test_importing_fastrms_loads_numpy_and_numba_and_nothing_else():
    program = """if True:
        import sys, sysconfig
        import numpy, numba
        before = set(sys.modules)
        from fastrms import RMSProp
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names) - {"fastrms", "numpy", "numba", "llvmlite", "__mp_main__"}))
    """
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
