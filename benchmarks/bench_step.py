"""Time of one step, ours beside the reference class: `python -m pytest benchmarks`.

The table of pytest-benchmark times each way by itself. The line below it, for the target of 3x, comes from rounds in
which all ways take turns, so that noise and drift of the machine hit each alike.
"""

import statistics
import time

import numpy as np
import pytest

from fastrms import RMSProp
from fastrms.kernels.reference import ReferenceRMSProp

# Sizes of one float32 array, and 1,000 small ones.
SHAPES = {
    "one array of 1e3": [(1_000,)],
    "one array of 1e5": [(100_000,)],
    "one array of 1e6": [(1_000_000,)],
    "1,000 arrays of 10x10": [(10, 10)] * 1000,
}


def ways(shapes):
    """Each way to take a step, as a function without arguments, after a check that all give the same bits."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    grads = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    reference = ReferenceRMSProp(params)
    optimizers = {kernel: RMSProp(params, kernel=kernel) for kernel in ("numpy", "serial", "parallel", "auto")}
    expected = reference.step(grads)
    for optimizer in optimizers.values():
        for ours, theirs in zip(optimizer.step(grads), expected, strict=True):
            assert ours.tobytes() == theirs.tobytes()
    return {
        "reference class": lambda: reference.step(grads),
        **{f"{kernel}, step()": optimizer.step for kernel, optimizer in optimizers.items()},
        "auto, step(list)": lambda: optimizers["auto"].step(grads),
    }


@pytest.mark.parametrize("way", ["reference class", "numpy, step()", "serial, step()", "parallel, step()",
                                 "auto, step()", "auto, step(list)"])  # fmt: skip
@pytest.mark.parametrize("shapes", SHAPES)
def test_step(benchmark, shapes, way):
    benchmark.group = f"a step over {shapes}, float32"
    benchmark(ways(SHAPES[shapes])[way])


def test_step_over_1e5_is_three_times_faster_than_the_reference_class(capsys):
    functions = ways(SHAPES["one array of 1e5"])
    times = {name: [] for name in functions}
    for _ in range(300):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["reference class"]
    with capsys.disabled():
        print("\n\na step over one array of 1e5 float32, median of 300 interleaved rounds")
        for name, median in medians.items():
            quarter, _, three_quarters = statistics.quantiles(times[name], n=4)
            spread = f"{1e6 * quarter:.0f} to {1e6 * three_quarters:.0f}"
            print(f"{name:18} {1e6 * median:7.1f} us  (middle half {spread} us)  {base / median:5.2f}x")
    assert base / medians["auto, step()"] >= 3  # a ratio within one run, and no time
