"""Threads and processes: many optimizers in threads, one shared by threads, and steps after fork, on every layer."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import numba
import numpy as np
import pytest
from helpers import JIT, assert_same_bits, steps

from fastrms import RMSProp
from fastrms.kernels import threads
from fastrms.kernels.reference import ReferenceRMSProp

LAYERS = ["omp", "workqueue", "tbb"]
# Where pip puts the library of the package tbb; the loader of a virtual environment's Python does not look there.
TBB = Path(sys.prefix) / "lib" / "libtbb.so.12"


def run(program, layer, *arguments):
    """Run a program in a process whose Numba has this threading layer, and return what it prints."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "2"}
    if layer == "tbb":
        if not TBB.exists():
            pytest.skip("the package tbb is not installed")
        environment["LD_LIBRARY_PATH"] = f"{TBB.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


THREADS = """if True:
    import sys, threading
    import numba, numpy as np
    from fastrms import RMSProp
    from fastrms.kernels.reference import ReferenceRMSProp
    count, wrong = int(sys.argv[1]), []
    def train(number):
        rng = np.random.default_rng(number)
        start = [rng.standard_normal(3000), rng.standard_normal((4, 5)).astype(np.float32)]
        reference = ReferenceRMSProp(start)
        opt = RMSProp(start, kernel=("parallel", "serial", "parallel", "auto")[number % 4])
        for step in range(count):
            gradients = [np.roll(start[0], step), start[1] * (step % 7)]
            reference.step(gradients)
            opt.step(gradients)
        for ours, theirs in zip(opt.params, reference.params):
            if ours.tobytes() != theirs.tobytes():
                wrong.append(number)
    threads = [threading.Thread(target=train, args=(number,)) for number in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(len(wrong), numba.threading_layer())
"""


@pytest.mark.skipif(not JIT, reason="about threads of compiled code")
@pytest.mark.parametrize("layer", LAYERS)
def test_eight_threads_with_an_optimizer_each(layer):
    assert run(THREADS, layer, "1000") == ["0", layer]


@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
def test_one_optimizer_shared_by_threads_takes_one_step_after_the_other(kernel, rng):
    start = [rng.standard_normal(500), rng.standard_normal(500).astype(np.float32)]
    gradients = [rng.standard_normal(500), rng.standard_normal(500).astype(np.float32)]
    opt = RMSProp(start, kernel=kernel, momentum=0.5)
    count = steps(200)
    alone = RMSProp(start, kernel=kernel, momentum=0.5)
    seen = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads take turns within a step
    try:

        def work():
            for _ in range(count):
                opt.step(gradients)

        def look():
            while len(seen) < 20:
                seen.append(opt.state_dict())
                time.sleep(0.001)

        threads = [threading.Thread(target=work) for _ in range(8)] + [threading.Thread(target=look)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    states = {state["steps"]: state for state in seen}
    for step in range(8 * count + 1):
        if step in states:  # no state is of between two steps, or between the two dtypes of one
            for name, array in alone.state_dict()["arrays"].items():
                assert states[step]["arrays"][name].tobytes() == array.tobytes()
        if step < 8 * count:
            alone.step(gradients)
    assert opt.steps == 8 * count
    for ours, theirs in zip(opt.params, alone.params, strict=True):
        assert_same_bits(ours, theirs)


FORK = """if True:
    import multiprocessing, sys
    import numba, numpy as np
    from fastrms import RMSProp
    from fastrms.kernels.reference import ReferenceRMSProp

    size, start = 200_000, np.linspace(-1, 1, 200_000)
    if "__main__" == __name__:
        old = RMSProp([start], kernel="parallel", clip_norm=1e9)
        old.step([start])

    def child(kernel):
        reference = ReferenceRMSProp([start])
        new = RMSProp([start], kernel=kernel, num_threads=2)
        for opt in (old, new):
            opt.params[0][...] = start
            opt.cache[0][...] = 0
        for _ in range(3):
            reference.step([start])
            for opt in (old, new):
                opt.step([start])
        ok = all(opt.params[0].tobytes() == reference.params[0].tobytes() for opt in (old, new))
        return ok, new.explain()[0]

    kernels = ["parallel", "auto", "serial", "numpy"]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(child, kernels).get(60)
    print(sum(ok for ok, _ in found), sum("forked" in why for _, why in found))
    old.step([start])  # the parent goes on with its threads
    print(numba.threading_layer())
"""


@pytest.mark.skipif(not JIT or not hasattr(os, "fork"), reason="about threads of compiled code after fork")
@pytest.mark.parametrize(("layer", "forked"), [("omp", "2"), ("workqueue", "0"), ("tbb", "0")])
def test_a_child_of_fork_steps_with_the_right_bits(layer, forked):
    assert run(FORK, layer) == ["4", forked, layer]


def in_another_process(start):
    opt = RMSProp([start], kernel="parallel")
    opt.step([start])
    return opt.params[0], numba.threading_layer()


WAYS = f"""if True:
    import sys
    sys.path[:0] = {[os.path.dirname(file) for file in (__file__, helpers.__file__)]!r}
    import multiprocessing
    import numba, numpy as np
    from test_processes import in_another_process
    if __name__ == "__main__":
        start = np.linspace(-1, 1, 70_000)
        in_another_process(start)
        if sys.argv[1] == "joblib":
            from joblib import Parallel, delayed
            found = Parallel(n_jobs=2)(delayed(in_another_process)(start) for _ in range(3))
        else:
            with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
                found = pool.map(in_another_process, [start] * 3)
        print(*{{array.tobytes().hex() for array, _ in found}})
        print(*{{layer for _, layer in found}})
"""


@pytest.mark.skipif(not JIT, reason="about threads of compiled code")
@pytest.mark.parametrize(("way", "layer"), list(zip(["forkserver", "spawn", "joblib"], LAYERS, strict=True)))
def test_other_ways_to_start_processes(way, layer):
    start = np.linspace(-1, 1, 70_000)
    reference = ReferenceRMSProp([start])
    reference.step([start])
    assert run(WAYS, layer, way) == [reference.params[0].tobytes().hex(), layer]


def test_a_process_whose_threads_were_never_started_can_start_them():
    assert threads.threads_work()
