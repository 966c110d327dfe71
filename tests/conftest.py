"""What all tests share: two threads at least, and one set of NumPy error settings."""

import os
from pathlib import Path

# Before Numba is imported: the parallel kernel is tested on one and on two threads, also on a machine with one core.
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, os.cpu_count() or 1)))

import numpy as np
import pytest
from helpers import JIT, WITHOUT_FRAMEWORKS, WITHOUT_TORCH, need_frameworks, need_torch, undefine_gradients

from fastrms.kernels import dlpack

# What tests start in processes of their own, or import where there is torch; pytest would import it here, to look for
# doctests.
collect_ignore = [
    "backends/cuda_simulator",
    "mpi/on_ranks",
    "support/simulator.py",
    "support/torch_pairs.py",
    "typed_user_code.py",
]

# A skipped test looks like a passed one in a summary. With FASTRMS_NO_SKIPS=1 every skip is a failure; with "but-torch"
# every skip but those for want of torch and of the frameworks in the examples, which the extra `test` does not install.
NO_SKIPS = os.environ.get("FASTRMS_NO_SKIPS", "0")
ALLOWED = {"0": ("",), "1": (), "but-torch": (WITHOUT_TORCH, WITHOUT_FRAMEWORKS)}  # in the reason of a skip
ADAPTER = Path(__file__).parent.parent / "fastrms" / "torch"


class Everywhere:
    """A plugin, because hooks and fixtures of this file are not called for doctests in fastrms/."""

    @pytest.fixture(autouse=True)
    def _undefined_gradients(self, request):
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(request.node, pytest.DoctestItem):
                undefine_gradients(patch)
            yield

    @pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
    def pytest_collection_modifyitems(self, items):
        for item in items:
            if item.path.parent == ADAPTER:
                item.add_marker("torch")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if item.get_closest_marker("torch"):
            need_torch()
        for mark in item.iter_markers("frameworks"):
            need_frameworks(mark.args)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        return self.report((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        report = yield
        if report.skipped and collector.path.parent == ADAPTER:
            try:  # For any ImportError pytest has the same reason, and a line of its own.
                need_torch()
            except pytest.skip.Exception as skip:
                why = pytest.ExceptionInfo.from_exception(skip)
                line = why.traceback.filter(why)[-1]
                report.longrepr = (str(line.path), line.lineno + 1, f"Skipped: {skip}")
        return self.report(report)

    @staticmethod
    def report(report):
        if report.skipped and not hasattr(report, "wasxfail"):
            allowed, reason = ALLOWED[NO_SKIPS], report.longrepr[-1]
            if not any(text in reason for text in allowed):
                report.outcome = "failed"
                report.longrepr = f"FASTRMS_NO_SKIPS={NO_SKIPS}, and yet this was skipped: {reason}"
        return report


def pytest_configure(config):
    if NO_SKIPS not in ALLOWED:
        raise pytest.UsageError(f"FASTRMS_NO_SKIPS: expected one of {', '.join(ALLOWED)}; got {NO_SKIPS!r}")
    config.pluginmanager.register(Everywhere())
    # What is said where there is no GPU is tested too, so that all but `-m gpu` sees none.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
