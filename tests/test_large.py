"""More than 2**31 elements: `python -m pytest -m large`, needs 22 GB of memory and some minutes."""

import numpy as np
import pytest

from fastrms import RMSProp

pytestmark = pytest.mark.large

PERIOD = 1_000_003  # a prime: no block, strip or thread begins at a multiple of it
START = 0.5


def repeated(period, size):
    """An array of this many elements that has `period` over and over."""
    array = np.empty(size, np.float32)
    for low in range(0, size, PERIOD):
        array[low : low + PERIOD] = period[: size - low]
    return array


def assert_repeats(array, period):
    for low in range(0, array.size, PERIOD):
        part = array[low : low + PERIOD]
        assert part.tobytes() == period[: part.size].tobytes(), f"from {low:,} on"


@pytest.mark.parametrize("kernel", ["serial", "parallel"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [((2**30 + 77, 2**30 + 77), {}), ((2**31 + 77,), {"cache_dtype": "bfloat16"})],
    ids=["two arrays", "one array"],
)
def test_more_than_two_to_the_31_elements(sizes, options, kernel, rng):
    period = rng.standard_normal(PERIOD).astype(np.float32)
    gradient = repeated(period, sizes[0])
    starts = [np.broadcast_to(np.float32(START), size) for size in sizes]  # take no memory
    opt = RMSProp(starts, kernel=kernel, nonfinite="skip", **options)
    oracle = RMSProp([np.full(PERIOD, START, np.float32)], kernel="numpy", **options)
    assert opt.buffers["params"].size > 2**31
    for _ in range(2):
        opt.step([gradient] * len(sizes))
        oracle.step([period])
    gradient[-1] = np.nan
    opt.step([gradient] * len(sizes))
    assert (opt.steps, opt.skipped_steps) == (2, 1)
    for name in ("params", "cache"):
        for view in opt.buffers[name].leaves:
            assert_repeats(view, oracle.buffers[name].flat)
