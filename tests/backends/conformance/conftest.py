"""Each test here runs with every backend. The processes that some backends need are started once, for all their tests.

In such a process, on each rank, the selected tests run as elsewhere, and their outcomes are written to a file. Here a
test has the outcome that it had there. The processes start as soon as the tests are selected, and run beside all other
tests: the simulator of CUDA takes a minute, for which a test would only wait.
"""

import functools
import json
import os
import subprocess
import sys
import threading
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
    if BACKENDS[name].processes > 1:
        pytest.importorskip("mpi4py")
        if mpiexec(2) is None:
            pytest.skip("there is no mpiexec")
    printed, *ranks = outcomes(folder_of(pyfuncitem.session, name), name)
    for rank, found in enumerate(ranks):
        outcome, text = found.get(pyfuncitem.nodeid, ("missing", f"no outcome on rank {rank}, with\n{printed}"))
        if outcome == "skipped":
            pytest.skip(text)
        if outcome != "passed":
            pytest.fail(text, pytrace=False)
    return True


def is_elsewhere(item):
    return (
        hasattr(item, "callspec") and "backend" in item.callspec.params and elsewhere(item.callspec.params["backend"])
    )


def pytest_collection_modifyitems(items):
    items.sort(key=is_elsewhere)  # last, when their outcomes are there


def pytest_collection_finish(session):
    if session.config.option.collectonly or STARTED_FOR:
        return
    for name in filter(elsewhere, BACKENDS):
        tests = [
            item.nodeid
            for item in session.items
            if hasattr(item, "callspec") and item.callspec.params.get("backend") == name
        ]
        if tests and (BACKENDS[name].processes == 1 or mpiexec(2) is not None):
            start(session, name, tests)


def folder_of(session, name):
    """Return the folder of a backend's outcomes, the same in all workers of pytest-xdist."""
    folder = session.config._tmp_path_factory.getbasetemp()
    return (folder.parent if hasattr(session.config, "workerinput") else folder) / f"backend-{name}"


def start(session, name, tests):
    """Start the processes of a backend, unless another worker of pytest-xdist has done so."""
    folder, backend = folder_of(session, name), BACKENDS[name]
    try:
        folder.mkdir()
    except FileExistsError:
        return
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
        process = subprocess.Popen(
            command, env=environment, cwd=session.config.rootpath, stdout=output, stderr=subprocess.STDOUT
        )
    session.config.add_cleanup(lambda: stop(process))
    threading.Thread(target=lambda: (process.wait(), (folder / "ended").touch()), daemon=True).start()


def stop(process):
    """End processes that nobody waits for any more, as after Ctrl-C or with -x."""
    process.terminate()
    process.wait()


@functools.cache
def outcomes(folder, name):
    """Return what the processes of a backend printed, and for each rank the outcomes by test."""
    end = time.monotonic() + SECONDS
    while not (folder / "ended").exists() and time.monotonic() < end:
        time.sleep(0.1)
    printed = (folder / "output").read_text()
    if not (folder / "ended").exists():
        printed += f"\nno end after {SECONDS} s"
    return printed, *(read(folder / f"report-{rank}") for rank in range(BACKENDS[name].processes))


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
        if STARTED_FOR and BACKENDS[STARTED_FOR].processes > 1:
            from mpi4py import MPI

            rank = MPI.COMM_WORLD.rank
        text = report.longrepr[-1] if report.outcome == "skipped" else report.longreprtext
        with open(f"{os.environ[REPORT]}-{rank}", "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")
