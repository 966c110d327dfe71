"""What all tests share: two threads at least, and one set of NumPy error settings."""

import os

# Before Numba is imported: the parallel kernel is tested on one and on two threads, also on a machine with one core.
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, os.cpu_count() or 1)))

import numpy as np
import pytest
from helpers import JIT

from fastrms.kernels import dlpack

# What tests start in processes of their own; here it would be imported, to be searched for doctests.
collect_ignore = ["mpi_ending.py", "mpi_program.py", "simulated", "simulated/simulator.py"]

# A skipped test looks like a passed one in a summary. Where everything that tests need is installed, as in CI, none may
# be skipped.
NO_SKIPS = os.environ.get("FASTRMS_NO_SKIPS") == "1"


def pytest_configure(config):
    # What is said where there is no GPU is tested too, so that all but `-m gpu` sees none.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _no_skip(report):
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"FASTRMS_NO_SKIPS=1, and yet this was skipped: {report.longrepr[-1]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _no_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _no_skip((yield))


@pytest.fixture(autouse=True)
def _scalars_as_compiled():
    """With the JIT off the kernels run on NumPy scalars, which warn where compiled code and NumPy's oracle do not."""
    if JIT:
        yield
    else:
        with np.errstate(all="ignore"):
            yield


@pytest.fixture
def rng(request):
    """A generator seeded by the test's own name, so that adding a test does not change another's numbers."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture(params=["compiled", "python", "numpy"])
def way(request, monkeypatch):
    """How tensors are found: by compiled code, or by Python as with a PyTorch without DLPack's table; or copied."""
    if request.param == "python":
        monkeypatch.setattr(dlpack, "exchange_function", lambda kind: 0)
    return {"kernel": "numpy"} if request.param == "numpy" else {}
