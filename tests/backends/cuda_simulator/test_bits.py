"""The bits of the host, from the CUDA kernels."""

import math

import numpy as np
import pytest
from helpers import assert_same_state, wide
from simulator import AS_RELEASED, DTYPES, Theirs, arrays, cuda, kernels, pair

from fastrms.kernels import norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [1, 31, 33, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 1, 2 * kernels.CHUNK + 3]
)
def test_every_size_has_the_bits_of_the_host(size, dtype, rng):
    start = wide(rng, size, dtype, -3, 3)
    for options in ({}, {"momentum": 0.9, "clip_norm": 3.0}):
        oracle, optimizer = pair([start], **options)
        gradient = wide(rng, size, dtype, -2, 2)
        oracle.step([gradient])
        optimizer.step([Theirs(gradient)])
        assert_same_state(optimizer, oracle, str(options))


def test_chunks_and_lanes_as_released(rng, monkeypatch):
    for module in (kernels, norms):
        for name, value in AS_RELEASED.items():
            monkeypatch.setattr(module, name, value)
    for dtype in DTYPES:
        test_every_size_has_the_bits_of_the_host(AS_RELEASED["CHUNK"] + 33, dtype, rng)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_bits_do_not_depend_on_threads_or_blocks(threads, rng, monkeypatch):
    monkeypatch.setattr(kernels, "THREADS", threads)
    monkeypatch.setattr(kernels, "BLOCKS", 2)
    shapes = [(3, 5), (kernels.CHUNK + 5,), (2,), (kernels.CHUNK,), (40,)]
    oracle, optimizer = pair(arrays(rng, shapes, [np.float32] * 5), global_clip_norm=1.0, bias_correction=True)
    for _ in range(2):
        gradients = arrays(rng, shapes, [np.float32] * 5)
        for opt in (oracle, optimizer):
            opt.step(gradients)
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_nan_and_subnormals_have_the_bits_of_the_host(dtype, rng):
    lowest = {np.float32: -45, np.float64: -320}[dtype]
    start = wide(rng, 60, dtype, lowest, 1)
    start[:3] = np.inf, -np.inf, np.nan
    for options in ({}, {"flush_subnormals": False}, {"flush_subnormals": False, "centered": True, "momentum": 0.9}):
        oracle, optimizer = pair([start], **options)
        for t in range(20):
            gradient = wide(rng, 60, dtype, lowest, -lowest // 2)
            gradient[10:13] = (np.inf, -np.inf, np.nan) if t == 5 else 0.0
            gradient[30 if t > 2 else 60 :] = 0
            for opt in (oracle, optimizer):
                opt.step([gradient])
        assert_same_state(optimizer, oracle, str(options))


def test_chunks_and_lanes_are_those_of_the_host():
    assert AS_RELEASED == {"CHUNK": 4096, "LANES": 32}


# Norms.

TOO_LARGE, TOO_SMALL = 1e200, 1e-200


@pytest.mark.parametrize(
    "gradients",
    [
        [TOO_LARGE, 3.0],
        [TOO_SMALL, TOO_SMALL],
        [TOO_SMALL, 0.0],
        [0.0, 0.0],
        [1.7e308, 1.7e308],
        [5e-324, 1e-320],
        [np.inf, 1.0],
        [np.nan, 1.0],
        [np.nan, np.inf],
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [1e-3, 1e-250])
@pytest.mark.parametrize("option", ["clip_norm", "global_clip_norm"])
def test_norms_at_the_ends_of_the_range_have_the_bits_of_the_host(option, limit, gradients):
    oracle, optimizer = pair([np.zeros(3), np.zeros(2)], **{option: limit})
    for opt in (oracle, optimizer):
        opt.step([np.full(3, gradients[0]), np.full(2, gradients[1])])
    assert_same_state(optimizer, oracle)


def exact_sum(values):
    """The sum as the kernel `decide` forms it."""

    @cuda.jit
    def add(values, result):
        digits = cuda.shared.array(kernels._DIGITS, kernels.numba.int64)
        for i in range(kernels._DIGITS):
            digits[i] = 0
        for i in range(values.size):
            kernels._add_exactly(digits, values[i])
        result[0] = kernels._rounded(digits)

    result = cuda.to_device(np.zeros(1))
    add[1, 1](cuda.to_device(np.array(values)), result)
    return float(result.copy_to_host()[0])


HALF = 2.0**-53  # of the last place of 1


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [1.0, HALF],
        [1.0, HALF, 5e-324],
        [1.0, 2 * HALF, HALF],
        [1.0, 2 * HALF, HALF, 2.0**-1074],
        [1.0, 1 - HALF],
        [1.0] * 7,
        [1.0, *[HALF / 4] * 3, HALF / 4],
        [1.0, 1 - HALF, HALF],
        [1.0, 2.0**-1022, 3 * 2.0**-1074],
    ],
    ids=str,
)
def test_the_sum_over_parameters_is_exact_and_rounded_once(values):
    assert exact_sum(values) == math.fsum(values)


def test_the_sum_over_parameters_of_random_numbers(rng):
    for low in (-1, -17, -40, -300):
        values = np.minimum(1.0, np.abs(wide(rng, 200, np.float64, low, 0)))
        values[17] = 1.0
        assert exact_sum(values) == math.fsum(values)


def test_many_norms_are_combined_as_on_the_host(rng):
    shapes = [(int(n),) for n in rng.integers(1, 4, 25)]
    start = arrays(rng, shapes, [np.float64] * 25)
    oracle, optimizer = pair(start, global_clip_norm=1e-3)
    gradients = arrays(rng, shapes, [np.float64] * 25, -9, 2)
    gradients[7] = None
    for opt in (oracle, optimizer):
        opt.step(gradients)
    assert_same_state(optimizer, oracle)


# Bias correction, whose factors the device looks up.


@pytest.mark.parametrize("decay_rate", [0.0, 0.5, 0.9, 0.9999])
def test_bias_is_corrected_as_on_the_host_from_any_number_of_steps(decay_rate, rng):
    groups = [{"params": [np.ones(3)]}, {"params": [np.ones(2)], "decay_rate": 0.7}]
    oracle, optimizer = pair(groups, bias_correction=True, decay_rate=decay_rate)
    state = oracle.state_dict()
    for steps in (0, 3, 1022, 5000):
        for opt in (oracle, optimizer):
            sat_out = {"skipped": np.array([min(1, steps), 0])}
            opt.load_state_dict(state | {"steps": steps, "arrays": state["arrays"] | sat_out})
            for t in range(4):
                opt.step([[None if t == 1 else np.full(3, 0.5)], [np.full(2, -3.0)]])
        assert_same_state(optimizer, oracle, f"from {steps} on")
    optimizer.steps = 7
    assert optimizer.steps == 7
