"""The choice of kernel, when something is compiled, where it is cached, and what is imported."""

import itertools
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from helpers import JIT
from numba.core import event

from fastrms import RMSProp
from fastrms.kernels import cpu
from fastrms.kernels.hyper import HYPER_FIELDS


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
    for options, dtype, more in itertools.product(variants, (np.float32, np.float64), ({}, {"clip_norm": 1.0})):
        train([{"params": [np.ones(3, dtype)]}], options | more)  # the short rule, and the extended rule with norms
    with event.install_recorder("numba:compile") as compiled:
        for i in range(300):
            shapes = [tuple(rng.integers(0, 5, rng.integers(0, 4))) for _ in range(rng.integers(1, 6))]
            params = [np.ones(shape, rng.choice([np.float32, np.float64])) for shape in shapes]
            cut = int(rng.integers(0, len(params)))
            groups = [{"params": params[cut:], "lr": rng.random()}]
            if cut:
                groups.append({"params": params[:cut], "maximize": bool(rng.integers(2))})
            train(groups, variants[i % 4] | {"global_clip_norm": rng.choice([None, 1.0])})
    assert [item.data for _, item in compiled.buffer] == []


@pytest.mark.skipif(not JIT, reason="nothing is compiled with the JIT off")
def test_first_steps_compile_one_function(tmp_path):
    program = """if True:
        import numpy as np
        from numba.core import caching, event
        from fastrms import RMSProp
        with event.install_recorder("numba:compile") as compiled:
            for shape in [(3, 4), (100, 100)]:
                grads = [np.ones(shape, np.float32), np.ones(7, np.float32)]
                for given in [(grads,), ()]:
                    opt = RMSProp(grads)
                    for _ in range(3):
                        opt.step(*given)
        found = [e.data["dispatcher"] for _, e in compiled.buffer if e.is_start]
        print(*[d.__name__ for d in found if not isinstance(d._cache, caching.NullCache)])
    """
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["serial_from"]


def test_the_compiled_rule_unpacks_as_many_numbers_as_there_are():
    unpack = numba.njit(lambda hyper: cpu._unpack(hyper))
    assert len(unpack(np.zeros(len(HYPER_FIELDS)))) == len(HYPER_FIELDS)


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
