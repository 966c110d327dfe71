"""Clipping by value and norm: against its definition, at the edges of the range, and with the same bits everywhere."""

import math

import numpy as np
import pytest
from helpers import JIT, assert_same_bits

from fastrms import RMSProp
from fastrms.kernels.norms import CHUNK, SpanNorms, combine

KERNELS = ["numpy", "serial", "parallel"]


def spans_of(*sizes):
    stops = np.cumsum(sizes)
    return np.column_stack([stops - sizes, stops, np.zeros((len(stops), 2), stops.dtype)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "size", [0, 1, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, *([3 * CHUNK + 5, 100_003] if JIT else [])]
)
def test_norms_are_right_and_the_same_in_every_kernel(size, dtype, rng):
    grads = rng.standard_normal(size + 7).astype(dtype)
    norms = SpanNorms(spans_of(3, size, 4))
    found = {kernel: norms(grads, np.inf, kernel) for kernel in KERNELS}
    exact = [math.sqrt(math.fsum(float(g) ** 2 for g in part)) for part in np.split(grads, [3, 3 + size])]
    np.testing.assert_allclose(found["numpy"], exact, rtol=1e-13)
    for kernel in KERNELS:
        assert_same_bits(found[kernel], found["numpy"], kernel)
    clipped = {kernel: norms(grads, 0.5, kernel) for kernel in KERNELS}
    exact = [np.linalg.norm(np.clip(part.astype(float), -0.5, 0.5)) for part in np.split(grads, [3, 3 + size])]
    np.testing.assert_allclose(clipped["serial"], exact, rtol=1e-12)
    for kernel in KERNELS:
        assert_same_bits(clipped[kernel], clipped["numpy"], kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("magnitude", [1e-320, 1e-300, 1e-160, 1e-130, 1.0, 1e150, 1e160, 1e300])
def test_norms_beyond_the_range_of_squares(magnitude, kernel):
    grads = np.array([3.0, -4.0, 0.0, 1.0]) * magnitude
    found = SpanNorms(spans_of(3, 1))(grads, np.inf, kernel)
    np.testing.assert_allclose(found, [5 * magnitude, magnitude], rtol=1e-12 if magnitude > 1e-310 else 1e-3)
    assert combine(found) == pytest.approx(math.sqrt(26) * magnitude, rel=1e-12 if magnitude > 1e-310 else 1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_non_finite_gradients_make_non_finite_norms(kernel):
    found = SpanNorms(spans_of(2, 2, 2))(np.array([1.0, np.inf, 1.0, np.nan, 3.0, 4.0]), np.inf, kernel)
    assert found[0] == np.inf
    assert np.isnan(found[1])
    assert found[2] == 5
    assert np.isnan(combine(found))
    assert combine(found[[0, 2]]) == np.inf
    assert combine(np.zeros(3)) == 0


def gradient_seen(options, grads, params=None):
    """The gradients that the rule gets, read off the cache: v = (1 - d) g^2 after one step with d = 0."""
    params = [np.zeros(np.shape(g)) for g in grads] if params is None else params
    opt = RMSProp(params, decay_rate=0.0, **options)
    opt.step(grads)
    return [np.sqrt(v) * np.sign(g) for v, g in zip(opt.cache, grads, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kind_of_clipping_and_their_order(kernel):
    grads = [np.array([3.0, -4.0]), np.array([[0.3, 0.4]]), np.array(12.0)]

    def seen(**options):
        return np.concatenate([g.ravel() for g in gradient_seen({"kernel": kernel, **options}, grads)])

    np.testing.assert_allclose(seen(), [3, -4, 0.3, 0.4, 12])
    np.testing.assert_allclose(seen(clip_value=2.0), [2, -2, 0.3, 0.4, 2])
    np.testing.assert_allclose(seen(clip_norm=1.0), [0.6, -0.8, 0.3, 0.4, 1])
    norm = math.sqrt(25 + 0.25 + 144)
    np.testing.assert_allclose(seen(global_clip_norm=1.0), np.array([3, -4, 0.3, 0.4, 12]) / norm)
    np.testing.assert_allclose(seen(global_clip_norm=100.0), [3, -4, 0.3, 0.4, 12])
    # By value first, then each parameter, then all together.
    third = np.array([3 / 5, -4 / 5, 0.3, 0.4, 1.0])
    np.testing.assert_allclose(seen(clip_norm=1.0, global_clip_norm=1.0), third / np.linalg.norm(third))
    first = np.array([2, -2, 0.3, 0.4, 2])
    second = first / [math.sqrt(8), math.sqrt(8), 1, 1, 2]
    np.testing.assert_allclose(seen(clip_value=2.0, clip_norm=1.0), second)
    np.testing.assert_allclose(
        seen(clip_value=2.0, clip_norm=1.0, global_clip_norm=0.5), 0.5 * second / np.linalg.norm(second)
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_clipping_is_by_the_raw_gradient_without_weight_decay(kernel):
    params = [np.array([10.0, 10.0])]
    seen = gradient_seen({"kernel": kernel, "clip_norm": 1.0, "weight_decay": 0.1}, [np.array([3.0, 4.0])], params)
    np.testing.assert_allclose(seen[0], [1.6, 1.8])


def test_skipped_parameters_do_not_count_in_the_global_norm():
    opt = RMSProp([np.zeros(2), np.zeros(1)], decay_rate=0.0, global_clip_norm=1.0)
    opt.step([np.array([3.0, 4.0]), np.array([1e6])])
    opt.step([np.array([3.0, 4.0]), None])
    np.testing.assert_allclose(np.sqrt(opt.cache[0]), [0.6, 0.8])


def test_the_global_norm_is_over_all_groups_and_dtypes():
    opt = RMSProp(
        [{"params": [np.zeros(1, np.float32), np.zeros(1)]}, {"params": np.zeros(1), "clip_norm": 2.0}],
        decay_rate=0.0,
        global_clip_norm=1.0,
    )
    opt.step([[np.array([1.0]), np.array([2.0])], np.array([100.0])])
    seen = [float(np.sqrt(v[0])) for v in (*opt.cache[0], opt.cache[1])]
    np.testing.assert_allclose(seen, np.array([1, 2, 2]) / 3, rtol=1e-6)
