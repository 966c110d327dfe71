"""The contract of bits: every kernel gives the reference's, however the numbers are split and whoever computes them."""

import numpy as np
import pytest
from cases import OPTIONS, SIZES, WAYS, combinations
from helpers import JIT, assert_same_bits, steps, wide

from fastrms import RMSProp
from fastrms.backends import tuner
from fastrms.kernels.reference import ReferenceRMSProp

DTYPES = [np.float32, np.float64]


def random_split(rng, vector, pieces):
    """`vector` as a list of `pieces` arrays, some of them empty or 2-D."""
    cuts = np.sort(rng.integers(0, vector.size + 1, pieces - 1))
    parts = np.split(vector, cuts)
    return [part.reshape(2, -1) if part.size and part.size % 2 == 0 else part for part in parts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_default_options_equal_the_reference_over_1000_steps(size, dtype, rng):
    start = wide(rng, size, dtype, -3, 3)
    reference = ReferenceRMSProp([start])
    optimizers = {name: RMSProp([start], **way) for name, way in WAYS.items()}
    count = steps(1000 if size < 1000 else 100)
    for t in range(count):
        grad = wide(rng, size, dtype)
        reference.step([grad])
        for name, optimizer in optimizers.items():
            optimizer.step([grad])
            if t % 50 == 0 or t == count - 1:
                assert_same_bits(optimizer.params[0], reference.params[0], f"params, {name}, step {t}")
                assert_same_bits(optimizer.cache[0], reference.cache[0], f"cache, {name}, step {t}")


@pytest.mark.skipif(not JIT, reason="a million elements take the interpreter minutes")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_and_three_elements(dtype, rng):
    size = 1_000_003
    start = wide(rng, size, dtype, -3, 3)
    reference = ReferenceRMSProp([start])
    optimizers = {name: RMSProp([start], **way) for name, way in WAYS.items()}
    for _ in range(20):
        grad = wide(rng, size, dtype)
        reference.step([grad])
        for optimizer in optimizers.values():
            optimizer.step([grad])
    for name, optimizer in optimizers.items():
        assert_same_bits(optimizer.params[0], reference.params[0], name)
        assert_same_bits(optimizer.cache[0], reference.cache[0], name)


@pytest.mark.parametrize("variant", tuner.VARIANTS)
@pytest.mark.parametrize("size", [1, 1000, 2 * 1024 + 48 * 16 + 3, *([50_021] if JIT else [])])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.float32, {}),
        (np.float64, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
        (np.float32, {"momentum": 0.9, "cache_dtype": "bfloat16"}),
    ],
)
def test_no_choice_of_the_tuner_changes_a_bit(variant, size, dtype, options, monkeypatch, rng):
    monkeypatch.setattr(tuner, "TRY_PARALLEL_FROM", 1)
    monkeypatch.setattr(tuner, "TRY_PREFETCHING_FROM", 1)
    parts = np.split(wide(rng, size, dtype, -3, 3), [5, size // 2, size - 17]) if size > 100 else [np.ones(1, dtype)]
    grads = [wide(rng, part.size, dtype) for part in parts]
    oracle, optimizer = RMSProp(parts, kernel="numpy", **options), RMSProp(parts, **options)
    optimizer.backend._tuner = tuner.Tuner([variant])
    for t in range(4):
        oracle.step(grads)
        if t % 2:
            optimizer.buffers["grads"].gather(grads, "grads")
        optimizer.step(None if t % 2 else grads)  # from the buffer too, where all is one span
    for name, buffer in optimizer.buffers.items():
        if name != "grads":
            assert_same_bits(buffer.flat, oracle.buffers[name].flat, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [1, 2, 3, 10, 77, 500])
def test_any_split_into_arrays_gives_the_same_bits(pieces, dtype, rng):
    size = 20_011 if JIT else 501
    start = wide(rng, size, dtype, -3, 3)
    reference = ReferenceRMSProp([start])
    optimizers = {name: RMSProp(random_split(rng, start, pieces), **way) for name, way in WAYS.items()}
    for _ in range(steps(100)):
        grad = wide(rng, size, dtype)
        reference.step([grad])
        for optimizer in optimizers.values():
            layout = optimizer.buffers["grads"].layout
            optimizer.step([grad[leaf.start : leaf.stop].reshape(leaf.shape) for leaf in layout.leaves])
    for name, optimizer in optimizers.items():
        assert_same_bits(optimizer.buffers["params"].flat, reference.params[0], name)
        assert_same_bits(optimizer.buffers["cache"].flat, reference.cache[0], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_inf_and_nan_stay_in_their_element(way, dtype, rng):
    start = wide(rng, 100, dtype, -3, 3)
    start[[3, 4, 5]] = np.inf, -np.inf, np.nan
    reference, optimizer = ReferenceRMSProp([start]), RMSProp([start], **WAYS[way])
    clean = RMSProp([start], kernel="numpy")
    for t in range(5):
        grad = wide(rng, 100, dtype, -3, 3)
        clean.step([grad])
        if t == 1:
            grad[[10, 11, 12]] = np.inf, -np.inf, np.nan
        with np.errstate(all="ignore"):
            reference.step([grad])
        optimizer.step([grad])
        assert_same_bits(optimizer.params[0], reference.params[0])
        assert_same_bits(optimizer.cache[0], reference.cache[0])
    untouched = np.delete(np.arange(100), [3, 4, 5, 10, 11, 12])
    assert np.isfinite(optimizer.params[0][untouched]).all()
    assert np.isnan(optimizer.params[0][[5, 10, 11, 12]]).all()
    assert_same_bits(optimizer.params[0][untouched], clean.params[0][untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_all_bits_are_the_references_without_flushing_subnormals_included(way, dtype, rng):
    lowest = {np.float32: -45, np.float64: -320}[dtype]
    start = wide(rng, 300, dtype, lowest, 1)
    reference = ReferenceRMSProp([start])
    optimizer = RMSProp([start], flush_subnormals=False, **WAYS[way])
    subnormal = 0
    for t in range(steps(1000)):
        # Half the elements get no gradient from the middle on: their cache decays into the subnormals and stays.
        grad = wide(rng, 300, dtype, lowest, -lowest // 2)
        grad[: 150 if t > 20 else 0] = 0
        with np.errstate(all="ignore"):
            reference.step([grad])
        optimizer.step([grad])
        cache = reference.cache[0]
        subnormal += np.count_nonzero((cache > 0) & (cache < np.finfo(dtype).tiny))
    assert_same_bits(optimizer.params[0], reference.params[0])
    assert_same_bits(optimizer.cache[0], reference.cache[0])
    assert subnormal > 0


@pytest.mark.parametrize(("dtype", "epsilon"), [(np.float32, 1e-10), (np.float32, 1e-8), (np.float64, 1e-130)])
@pytest.mark.parametrize("decay_rate", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("way", WAYS)
def test_flushing_keeps_all_elements_without_subnormals_and_the_rest_within_one_rounding(
    way, decay_rate, dtype, epsilon, rng
):
    size = 2000 if JIT else 60
    tiny = np.finfo(dtype).tiny
    middle = np.log10(float(tiny)) / 2  # squares of 10**middle are the smallest normal number
    options = {"lr": 0.01, "decay_rate": decay_rate, "epsilon": epsilon}
    optimizer = RMSProp([np.zeros(size, dtype)], **options, **WAYS[way])
    grads = wide(rng, (steps(400), size), dtype, middle - 4, middle + 4)
    grads[:, : size // 4] = wide(rng, (len(grads), size // 4), dtype, middle + 2, 0)  # none of these is subnormal
    grads[len(grads) // 2 :, size // 2 :] = 0  # and these decay

    cache = np.zeros(size, dtype)
    clean = np.ones(size, bool)
    for grad in grads:
        before = optimizer.params[0].copy()
        optimizer.step([grad])
        with np.errstate(under="ignore"):
            square = (1 - decay_rate) * grad**2
            cache = decay_rate * cache + square
            change = options["lr"] * grad / (np.sqrt(cache) + epsilon)
            expected = before - change
        for value in (square, cache):
            clean &= (value == 0) & (grad == 0) | (value >= tiny)
        assert_same_bits(optimizer.params[0][clean], expected[clean], "params without subnormals")
        assert_same_bits(optimizer.cache[0][clean], cache[clean], "cache without subnormals")
        one_rounding = np.spacing(np.maximum(np.abs(expected), np.abs(change)))
        assert (np.abs(optimizer.params[0] - expected) <= one_rounding).all()
        ours = optimizer.cache[0]
        assert ((ours == 0) | (ours >= tiny)).all(), "a subnormal was stored"
    assert clean.sum() >= size // 4
    assert not clean.all()


@pytest.mark.parametrize("part", range(8))
def test_every_combination_of_options_has_the_same_bits_in_every_kernel(part, rng):
    shapes = [(40, 5), (), (0,), (65,), (7, 3)]
    dtypes = [np.float32, np.float64, np.float64, np.float32, np.float64]
    for names in combinations()[part :: 8 if JIT else 64]:
        options = {name: OPTIONS[name] for name in sorted(names)}
        params = [np.asarray(rng.standard_normal(s)).astype(d) for s, d in zip(shapes, dtypes, strict=True)]
        optimizers = {name: RMSProp(params, lr=0.01, **options, **way) for name, way in WAYS.items()}
        for t in range(4):
            # From far below where squares are subnormal to moderate, so that floors and bounds are crossed.
            low = -30 if t % 2 else -3
            grads = [
                np.asarray(wide(rng, s, np.float64, low, 1)).astype(d) for s, d in zip(shapes, dtypes, strict=True)
            ]
            if t == 2:
                grads[0] = None
            for optimizer in optimizers.values():
                optimizer.step(grads)
        oracle = optimizers.pop("numpy")
        for name, optimizer in optimizers.items():
            assert optimizer.buffers.keys() == oracle.buffers.keys()
            for buffer in oracle.buffers.keys() - {"grads"}:
                for ours, theirs in zip(
                    optimizer.buffers[buffer].segments, oracle.buffers[buffer].segments, strict=True
                ):
                    assert_same_bits(ours, theirs, f"{buffer} of {name} with {options}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}], ids=str)
def test_options_have_the_same_bits_at_every_size(options, dtype, rng):
    for size in SIZES:
        start = wide(rng, size, dtype, -3, 3)
        optimizers = {
            name: RMSProp([start], clip_norm=3.0, global_clip_norm=2.0, **options, **way) for name, way in WAYS.items()
        }
        for _ in range(3):
            grad = wide(rng, size, dtype, -2, 2)
            for optimizer in optimizers.values():
                optimizer.step([grad])
        for name, optimizer in optimizers.items():
            for buffer in optimizer.buffers.keys() - {"grads"}:
                oracle = optimizers["numpy"].buffers[buffer]
                assert_same_bits(optimizer.buffers[buffer].flat, oracle.flat, f"{buffer} of {name} at {size}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flush", [True, False])
def test_all_state_decays_to_zero_and_not_into_subnormals(flush, dtype, rng):
    """Dead units: gradients end, and every average decays by half a step."""
    options = {"momentum": 0.5, "centered": True, "decay_rate": 0.5, "flush_subnormals": flush}
    optimizers = {name: RMSProp([np.ones(40, dtype)], **options, **way) for name, way in WAYS.items()}
    grad = wide(rng, 40, dtype, -3, 3)
    subnormal = dict.fromkeys(("cache", "momentum_buffer", "grad_avg"), 0)
    for _ in range(1200 if dtype is np.float64 else 200):
        for optimizer in optimizers.values():
            optimizer.step([grad])
        grad = np.zeros_like(grad)
        for buffer in subnormal:
            values = [np.abs(optimizer.buffers[buffer].flat) for optimizer in optimizers.values()]
            for other in values[1:]:
                assert_same_bits(other, values[0], buffer)
            subnormal[buffer] += np.count_nonzero((values[0] > 0) & (values[0] < np.finfo(dtype).tiny))
    for buffer, count in subnormal.items():
        assert (count == 0) == flush, buffer
        assert not flush or not optimizers["serial"].buffers[buffer].flat.any()


@pytest.mark.parametrize("flush", [True, False])
def test_the_variance_is_clamped_where_rounding_makes_it_negative(flush):
    # Constant float32 gradients near 1e3: many differences v - m^2 are below 0 (apache/mxnet issue 6235).
    grad = np.linspace(900, 1100, 2000, dtype=np.float32)
    optimizers = {
        name: RMSProp([np.ones(2000, np.float32)], centered=True, flush_subnormals=flush, **way)
        for name, way in WAYS.items()
    }
    negative = 0
    for _ in range(steps(200)):
        for optimizer in optimizers.values():
            optimizer.step([grad])
        oracle = optimizers["numpy"]
        negative += np.count_nonzero(oracle.cache[0] - oracle.grad_avg[0] ** 2 < 0)
        assert np.isfinite(oracle.params[0]).all()
        for name, optimizer in optimizers.items():
            assert_same_bits(optimizer.params[0], oracle.params[0], name)
    assert negative > 0 or not JIT


def test_a_variance_below_the_normal_numbers_is_flushed(rng):
    magnitudes = (10.0 ** rng.uniform(-19.0, -18.4, 2000)).astype(np.float32)
    options = {"centered": True, "epsilon": 1e-30, "decay_rate": 0.5}
    optimizers = {name: RMSProp([np.ones(2000, np.float32)], **options, **way) for name, way in WAYS.items()}
    oracle, small = optimizers["numpy"], 0
    for _ in range(steps(20)):
        grad = (magnitudes * rng.uniform(0.9, 1.1, 2000)).astype(np.float32)
        for optimizer in optimizers.values():
            optimizer.step([grad])
        variance = oracle.cache[0].astype(float) - oracle.grad_avg[0].astype(float) ** 2
        small += np.count_nonzero((variance > 0) & (variance < np.finfo(np.float32).tiny))
        for name, optimizer in optimizers.items():
            assert_same_bits(optimizer.params[0], oracle.params[0], name)
    assert small > 0
