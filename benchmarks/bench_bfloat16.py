"""What 16-bit state gains: `python -m pytest benchmarks/bench_bfloat16.py` prints our own float32 beside it.

A step moves 20 bytes a parameter with a float32 cache and 16 with a bfloat16 one: at most 1.25 times faster where
memory is the limit. Division and square root, which are exact here, do not become fewer.
"""

import statistics
import time

import numpy as np
import pytest

from fastrms import RMSProp


@pytest.mark.parametrize("size", [100_000, 5_000_000, 50_000_000])
@pytest.mark.parametrize("kernel", ["serial", "parallel"])
def test_bfloat16_against_float32(kernel, size, capsys):
    params = np.random.default_rng(0).standard_normal(size, np.float32)
    optimizers = {name: RMSProp([params], kernel=kernel, cache_dtype=name) for name in (None, "bfloat16")}
    times = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.grads[0][:] = params
        optimizer.step()
    for _ in range(15 if size > 1_000_000 else 200):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    plain, narrow = (statistics.median(taken) for taken in times.values())
    with capsys.disabled():
        what = f"{kernel:9} {size:11,} parameters"
        print(
            f"\n{what}: float32 {1e3 * plain:7.3f} ms, bfloat16 {1e3 * narrow:7.3f} ms, {plain / narrow:.2f}x", end=""
        )
