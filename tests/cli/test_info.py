"""`fastrms info`: what it prints."""

import os
import re
import subprocess
import sys
from functools import partial

import numba
import numpy as np
import pytest
from helpers import JIT

import fastrms
from fastrms import RMSProp
from fastrms.backends.tuner import Tuner
from fastrms.bench import in_situ, machine
from fastrms.bench.cases import Network
from fastrms.cli import info, main

pytestmark = pytest.mark.skipif(not JIT, reason="there is nothing to say about kernels that are not compiled")

SHORT = ["info", "--seconds", "0.01"]


def lines_of(capsys, *more):
    assert main([*SHORT, *more]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    return out.splitlines()


def value(lines, name):
    return next(line.removeprefix(name).strip() for line in lines if line.startswith(name + " "))


def test_facts(capsys, monkeypatch):
    monkeypatch.setenv("OMP_SOMETHING", "7")
    monkeypatch.setenv("FASTRMS_TEST", "8")
    monkeypatch.setenv("UNRELATED", "9")
    lines = lines_of(capsys)
    assert value(lines, "fastrms") == fastrms.__version__
    assert value(lines, "NumPy") == np.__version__
    assert value(lines, "Numba") == numba.__version__
    assert value(lines, "Numba threads") == str(numba.config.NUMBA_NUM_THREADS)
    assert value(lines, "threading layer") in ("omp", "tbb", "workqueue")
    assert value(lines, "processor").endswith(f"{machine.processors()} available")
    assert value(lines, "BLAS")
    assert value(lines, "GPU")  # or why there is none
    assert os.path.isdir(value(lines, "kernel cache"))
    text = "\n".join(lines)
    assert "OMP_SOMETHING=7" in text
    assert "FASTRMS_TEST=8" in text
    assert "UNRELATED" not in text


def test_what_auto_chose_and_why(capsys, monkeypatch):
    monkeypatch.setattr(fastrms.RMSProp, "explain", lambda self: [f"{self.buffers['params'].flat.size} in all"])
    text = "\n".join(lines_of(capsys))
    assert "784-512-512-10" in text
    assert "669706 in all" in text
    assert re.search(r"\d steps, \S+ ms per step, of which \S+ ms for the optimizer", text)


def test_the_training_lasts_until_auto_has_chosen(monkeypatch):
    monkeypatch.setattr(Tuner, "FIRST_LOOK", 0.01)
    for each, decided in ((0.005, False), (0.01, True)):  # too short for a trial, and just long enough
        monkeypatch.setattr(in_situ, "RMSProp", partial(RMSProp, num_threads=2))
        _, optimizer = in_situ.train_with_auto(Network("784-512-10", (784, 512, 10), "float32"), each)
        assert optimizer.backend.decided == decided


@pytest.mark.parametrize(
    ("blas", "processors", "timeout", "advice"),
    [
        ("openblas 0.3", 2, None, "OPENBLAS_THREAD_TIMEOUT=20"),
        ("openblas 0.3", 2, "20", "None: OPENBLAS_THREAD_TIMEOUT is already set."),
        ("openblas 0.3", 1, None, "only one processor"),
        ("mkl 2025", 2, None, "does not use OpenBLAS"),
    ],
)
def test_advice(monkeypatch, blas, processors, timeout, advice):
    monkeypatch.setattr(machine, "blas", lambda: [blas])
    monkeypatch.setattr(machine, "processors", lambda: processors)
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    if timeout:
        monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", timeout)
    assert advice in next(info._advice())


def test_measure_compares_processes_with_and_without_the_setting(monkeypatch, capsys):
    seen = []

    def train(environment):
        seen.append(environment.get("OPENBLAS_THREAD_TIMEOUT"))
        time = 0.002 if seen[-1] is None else 0.001
        return dict.fromkeys(("reference", "auto", "serial", "parallel"), time)

    monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", "4")
    monkeypatch.setattr(info, "_train_in_process", train)
    text = "\n".join(lines_of(capsys, "--measure"))
    assert seen == [None, "20", None, "20"]
    assert re.search(r"auto +unset: 2 ms, =20: 1 ms, 2.00x", text)


def test_a_measurement_that_fails(monkeypatch):
    monkeypatch.setattr(info, "NETWORK", "nonsense")
    with pytest.raises(info.CommandError, match=r"--measure: fastrms bench --in-situ failed: .*--networks: expected"):
        info._train_in_process(dict(os.environ))


def test_blas_without_threadpoolctl(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    (line,) = machine.blas()
    assert line
    assert machine.versions().keys() == {"fastrms", "Python", "NumPy", "Numba"}


def test_information_for_files_holds_no_path(monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", os.environ.get("NUMBA_CACHE_DIR", "__pycache__"))
    monkeypatch.setenv("NUMBA_SOMETHING", "1")
    about = machine.describe()
    assert about["environment"]["NUMBA_SOMETHING"] == "1"
    assert "NUMBA_CACHE_DIR" not in about["environment"]
    assert about["numba_threads"] == numba.config.NUMBA_NUM_THREADS


def test_tuner_and_zero_copy_switched_off_and_no_extra_needed():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'sklearn'])); "
        f"from fastrms.cli import main; sys.exit(main({SHORT}))"
    )
    environment = os.environ | {"FASTRMS_ZERO_COPY": "0", "FASTRMS_TUNE": "0"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "step(list)        copies every gradient (FASTRMS_ZERO_COPY=0)" in done.stdout
    assert "arrays: serial; FASTRMS_TUNE is 0 in the environment" in done.stdout
