"""`RMSProp(kernel="cuda")` without a GPU: `cuda_simulator` in the simulator, and the errors without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SIMULATED, CONFORMANCE = (Path(__file__).parent / name for name in ("cuda_simulator", "conformance"))

# Numba's own CUDA target, which numba-cuda replaces where it is installed, by an import hook.
BUILT_IN = """if True:
    import sys
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "NumbaCudaFinder"]
    from numba import cuda
    assert "numba_cuda" not in cuda.__file__
"""


def run(arguments, **environment):
    """Run Python with the variables set, and return its exit status and output."""
    variables = {"NUMBA_ENABLE_CUDASIM": "0", "NUMBA_DISABLE_JIT": "0"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("numba-cuda", ["-m", "not torch"]),
        pytest.param("numba-cuda", ["-m", "torch"], marks=pytest.mark.torch),
        (
            "built in",
            [
                str(CONFORMANCE),
                "-k",
                "(every_option and (defaults or all) or file_alone) and cuda and not in-place or of_every_kind or "
                "steady or said",
            ],
        ),
    ],
    ids=["numba-cuda", "tensors of torch", "built in"],
)
def test_in_the_simulator(target, chosen):
    # NumPy's scalars, which kernels compute with there, warn of what arrays and compiled code leave to the result.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(SIMULATED), *chosen]
    program = ["-c", f"{BUILT_IN}\n    import pytest; sys.exit(pytest.main({options!r}))"]
    status, output = run(
        program if target == "built in" else ["-m", "pytest", *options],
        NUMBA_ENABLE_CUDASIM="1",
        FASTRMS_NO_SKIPS="1",
        FASTRMS_TEST_BACKEND="cuda",
        PYTEST_ADDOPTS="",  # two at a time, and a report, are for the tests around this one
        NUMBA_NUM_THREADS="2",
    )
    assert status == 0, output
    assert " passed" in output


WITHOUT = """if True:
    import numpy as np
    from fastrms import DeviceError, FastrmsError, RMSProp
    try:
        RMSProp([np.ones(3)], kernel="cuda")
    except DeviceError as error:
        assert isinstance(error, FastrmsError) and isinstance(error, RuntimeError)
        print(error)
"""


def test_without_a_device_it_says_so():
    status, output = run(["-c", WITHOUT], CUDA_VISIBLE_DEVICES="")  # or without a driver
    assert status == 0, output
    assert output.startswith('kernel: expected a GPU for "cuda", got none: there is ')


def test_without_the_package_it_says_how_to_install_it():
    hidden = 'import sys; sys.modules["numba.cuda"] = None\n'
    status, output = run(["-c", hidden + WITHOUT])
    assert status == 0, output
    assert output.startswith('kernel: expected a GPU for "cuda", but the package numba-cuda cannot be imported (')
    assert output.strip().endswith('install with: python -m pip install "fastrms[cuda]"')


def test_a_numpy_that_numba_cuda_does_not_know_is_named():
    # As numba-cuda 0.30 fails with NumPy 2.5, on a machine that has a GPU.
    broken = """if True:
    from numba import cuda
    from numba.cuda import descriptor

    def refresh():
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")

    cuda.is_available = lambda: True
    descriptor.cuda_target.typing_context.refresh = refresh
"""
    status, output = run(["-c", f"{broken}\n{WITHOUT}"])
    assert status == 0, output
    assert "none: numba.cuda fails with NumPy " in output
    assert output.strip().endswith('needs NumPy < 2.5; install it with: python -m pip install "numpy<2.5"')


def test_nobody_who_does_not_ask_for_it_imports_cuda():
    program = "import sys, fastrms, numpy as np; fastrms.RMSProp([np.ones(3)]).step([np.ones(3)])"
    status, output = run(["-c", f"{program}; print([name for name in sys.modules if 'cuda' in name.split('.')])"])
    assert (status, output.strip()) == (0, "[]")
