"""Each test here runs with every backend. The processes that some backends need are started once, for all their tests.

In such a process, on each rank, the selected tests run as elsewhere, and their outcomes are written to a file. Here a
test has the outcome that it had there.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from backends import BACKENDS, STARTED_FOR, mpiexec

SECONDS = 900  # a hang is a failure; on a busy machine CUDA's simulator takes minutes
REPORT = "FASTRMS_TEST_REPORT"  # the file of outcomes, to whose name each rank adds its number


def elsewhere(name):
    return BACKENDS[name].environment is not None and name != STARTED_FOR


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def backend(request, tmp_path, monkeypatch):
    backend = BACKENDS[request.param]
    if not elsewhere(request.param):
        backend.start(tmp_path, monkeypatch)
    return backend


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    name = pyfuncitem.callspec.params["backend"]
    if not elsewhere(name):
        return None
    if name == "ranks":
        pytest.importorskip("mpi4py")
        if mpiexec(2) is None:
            pytest.skip("there is no mpiexec")
    printed, *ranks = outcomes(pyfuncitem.session, name)
    for rank, found in enumerate(ranks):
        outcome, text = found.get(pyfuncitem.nodeid, ("missing", f"no outcome on rank {rank}, with\n{printed}"))
        if outcome == "skipped":
            pytest.skip(text)
        if outcome != "passed":
            pytest.fail(text, pytrace=False)
    return True


def outcomes(session, name, started={}):  # noqa: B006 - once in each process
    """Return what the processes of a backend printed, and for each rank the outcomes by test.

    The first of the workers of pytest-xdist starts the processes, and the others wait for it.
    """
    if name not in started:
        folder = session.config._tmp_path_factory.getbasetemp()
        if hasattr(session.config, "workerinput"):
            folder = folder.parent
        folder = folder / f"backend-{name}"
        try:
            folder.mkdir()
        except FileExistsError:
            end = time.monotonic() + SECONDS
            while not (folder / "printed").exists():
                assert time.monotonic() < end, f"no outcomes of {name} after {SECONDS} s"
                time.sleep(0.1)
        else:
            run(session, name, folder)
        reports = [folder / f"report-{rank}" for rank in range(BACKENDS[name].processes)]
        started[name] = [(folder / "printed").read_text(), *map(read, reports)]
    return started[name]


def run(session, name, folder):
    backend = BACKENDS[name]
    tests = [
        item.nodeid
        for item in session.items
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == name
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *backend.arguments, *tests]
    if backend.processes > 1:
        command = [*mpiexec(backend.processes), *command]
    environment = os.environ | backend.environment | {
        "FASTRMS_TEST_BACKEND": name,
        REPORT: str(folder / "report"),
        "PYTEST_ADDOPTS": "",  # two at a time, and a report, are for the tests around these
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    with open(folder / "output", "wb") as output:
        try:
            subprocess.run(
                command, env=environment, cwd=session.config.rootpath, stdout=output, stderr=subprocess.STDOUT,
                timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            output.write(f"\nno end after {SECONDS} s".encode())
    (folder / "output").rename(folder / "printed")


def read(path):
    """Return the outcome and the text of each test that a file has; a test has failed if any part of it has."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        test, outcome, text = json.loads(line)
        if found.get(test, ("passed",))[0] == "passed":
            found[test] = outcome, text
    return found


def pytest_runtest_logreport(report):
    if REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        rank = 0
        if STARTED_FOR == "ranks":
            from mpi4py import MPI

            rank = MPI.COMM_WORLD.rank
        text = report.longrepr[-1] if report.outcome == "skipped" else report.longreprtext
        with open(f"{os.environ[REPORT]}-{rank}", "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")
