"""Time of one step, ours beside NumPy: `python -m pytest benchmarks`.

The same ways, cases and checks as those of `fastrms bench`, which has more of each. The table of pytest-benchmark times
each way by itself. The line below it, for the target of 3x, comes from rounds in which all ways take turns, so that
noise and drift of the machine hit each alike.
"""

import statistics
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from fastrms import RMSProp
from fastrms.bench.implementations import IMPLEMENTATIONS
from fastrms.bench.measure import quartiles, take_turns, time_in_turns
from fastrms.bench.workers import LocalWorker
from fastrms.plots import format_seconds

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES

sys.path.pop(0)

WAYS = [name for name, each in IMPLEMENTATIONS.items() if each.process == "here"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_step(benchmark, name, way):
    worker = LocalWorker(numba.config.NUMBA_NUM_THREADS)
    worker.open(way, CASES[name])  # checks the bits
    runner = worker.runner(way)
    runner.prepare()
    benchmark.group = f"a step over {name}"
    benchmark(runner.step)


def test_step_over_1e5_is_three_times_faster_than_the_reference_class(capsys):
    (case,) = [case for case in CASES.values() if (case.arrays, case.params) == (1, 100_000)]
    worker = LocalWorker(numba.config.NUMBA_NUM_THREADS)
    times = {way: [] for way in WAYS}
    for way in WAYS:
        worker.open(way, case)
    for way, _ in take_turns(WAYS, 1, least=100, most=100):
        times[way].append(worker.time(way, 3))
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    base = medians["reference"]
    with capsys.disabled():
        print(f"\n\na step over {case.name}, median of 100 interleaved rounds")
        for way, median in medians.items():
            quarter, _, three_quarters = (format_seconds(t, plain=True) for t in quartiles(times[way]))
            spread = f"(middle half {quarter} to {three_quarters})"
            label, time = IMPLEMENTATIONS[way].label, format_seconds(median, plain=True)
            print(f"{label:24} {time:>8}  {spread:36} {base / median:5.2f}x")
    # A ratio within one run, and no time. "auto" may have settled on parallel just before another program took a core.
    assert base / min(medians["auto"], medians["serial"]) >= 3


def test_what_a_step_adds_to_the_compiled_call(capsys):
    opt = RMSProp([np.ones(1_000, np.float32)], kernel="serial")
    opt.step()
    ((kernel, *arguments),) = opt.backend._steady_calls[False, "serial"]
    times = time_in_turns({"opt.step()": opt.step, "compiled call": lambda: kernel(*arguments)}, 0.2, turn=5e-4)
    step, bare = (1e6 * statistics.median(taken) for taken in times.values())
    with capsys.disabled():
        print(
            f"\n1,000 float32: opt.step() {step:.2f} us, the bare compiled call {bare:.2f} us, {step - bare:.2f} more"
        )
