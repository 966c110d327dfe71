"""State in bfloat16: rounding, the contract of bits between kernels, and where it would stall."""

import copy
import pickle

import numba
import numpy as np
import pytest
from cases import OPTIONS, SIZES, WAYS, combinations
from helpers import JIT, assert_same_bits, wide

from fastrms import OptionError, OptionTypeError, RMSProp, from_bfloat16
from fastrms.kernels import access
from fastrms.kernels.reference import ReferenceRMSProp, to_bfloat16


def every_kind(rng, count):
    """float32 numbers of all bit patterns, with those next to a tie, NaN, inf and subnormals among them."""
    bits = rng.integers(0, 2**32, count, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, count, dtype=np.uint32) << 16) | rng.choice([0x7FFF, 0x8000, 0x8001], count).astype(
        np.uint32
    )
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-39, 3.4e38, -3.4e38], np.float32).view(np.uint32)
    return (
        np.concatenate([bits, ties, special, [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]]).astype(np.uint32).view(np.float32)
    )


@pytest.mark.torch
def test_rounding_is_that_of_torch(rng):
    import torch

    numbers = every_kind(rng, 200_000)
    numbers = numbers[~np.isnan(numbers)]  # which of its NaNs torch takes is its own affair
    theirs = torch.from_numpy(numbers).to(torch.bfloat16)
    assert_same_bits(to_bfloat16(numbers), theirs.view(torch.uint16).numpy())
    assert_same_bits(from_bfloat16(to_bfloat16(numbers)), theirs.float().numpy())


def test_compiled_rounding_is_that_of_numpy(rng):
    numbers = every_kind(rng, 50_000 if JIT else 500)
    ours = np.empty(numbers.size, np.uint16)
    store = numba.njit(lambda out, x: [access.store_state(out, i, x[i]) for i in range(x.size)])
    store(ours, numbers)
    assert_same_bits(ours, to_bfloat16(numbers))
    back = np.empty(numbers.size, np.float32)
    load = numba.njit(lambda out, x: [access.store_state(out, i, access.load_state(x, i)) for i in range(x.size)])
    load(back, ours)
    assert_same_bits(back, from_bfloat16(ours))
    assert np.isnan(back[np.isnan(numbers)]).all()


@pytest.mark.parametrize("part", range(4))
def test_every_combination_of_options_has_the_same_bits_in_every_kernel(part, rng):
    shapes = [(40, 5), (), (0,), (65,), (7, 3)]
    for names in combinations()[part :: 4 if JIT else 64]:
        options = {name: OPTIONS[name] for name in sorted(names)}
        params = [np.asarray(rng.standard_normal(shape)).astype(np.float32) for shape in shapes]
        optimizers = {
            name: RMSProp(params, lr=0.01, cache_dtype="bfloat16", **options, **way) for name, way in WAYS.items()
        }
        for t in range(4):
            grads = [np.asarray(wide(rng, shape, np.float32, -30 if t % 2 else -3, 1)) for shape in shapes]
            if t == 2:
                grads[0] = None
            for optimizer in optimizers.values():
                optimizer.step(grads)
        oracle = optimizers.pop("numpy")
        for name, optimizer in optimizers.items():
            for buffer in oracle.buffers.keys() - {"grads"}:
                assert_same_bits(
                    optimizer.buffers[buffer].flat, oracle.buffers[buffer].flat, f"{buffer}, {name}, {options}"
                )
                assert optimizer.buffers[buffer].flat.dtype == (np.float32 if buffer == "params" else np.uint16)


def test_sizes_around_every_edge_have_the_same_bits_in_every_kernel(rng):
    for size in SIZES:
        start = wide(rng, size, np.float32, -3, 3)
        optimizers = {name: RMSProp([start], cache_dtype="bfloat16", **way) for name, way in WAYS.items()}
        for _ in range(3):
            grad = wide(rng, size, np.float32)
            for optimizer in optimizers.values():
                optimizer.step([grad])
        for name, optimizer in optimizers.items():
            assert_same_bits(optimizer.params[0], optimizers["numpy"].params[0], name)
            assert_same_bits(optimizer.cache[0], optimizers["numpy"].cache[0], name)


def test_a_step_computes_in_float32_and_rounds_what_it_stores(rng):
    start, grad = rng.standard_normal((2, 100)).astype(np.float32)
    opt, reference = RMSProp([start], cache_dtype="bfloat16"), ReferenceRMSProp([start])
    opt.step([grad])
    reference.step([grad])
    assert_same_bits(opt.params[0], reference.params[0])
    assert_same_bits(opt.cache[0], to_bfloat16(reference.cache[0]))
    assert np.abs(from_bfloat16(opt.cache[0]) / reference.cache[0] - 1).max() <= 2.0**-8


def test_the_cache_stays_within_its_bound_of_the_float32_one(rng):
    """docs/options.md: the average is off by at most 2**-8/(1 - d) of itself, and one rounding."""
    for decay_rate in (0.5, 0.9, 0.99):
        start, scale = np.zeros(500, np.float32), wide(rng, 500, np.float32, -3, 3)
        opts = [RMSProp([start], decay_rate=decay_rate, cache_dtype=c) for c in (None, "bfloat16")]
        for _ in range(300 if JIT else 10):
            grad = scale * rng.uniform(0.9, 1.1, 500).astype(np.float32)
            for opt in opts:
                opt.step([grad])
        ratio = from_bfloat16(opts[1].cache[0]) / opts[0].cache[0]
        bound = 2.0**-8 / (1 - decay_rate) + 2.0**-8
        assert (np.abs(ratio - 1) <= bound + 2 * bound**2).all()


@pytest.mark.parametrize("name", ["decay_rate", "momentum"])
def test_where_nothing_would_decay_any_more_is_an_error(name):
    RMSProp([np.ones(2, np.float32)], cache_dtype="bfloat16", **{name: 0.996})
    for value in (255 / 256, 0.999):
        with pytest.raises(OptionError, match=f"{name}: {value} would not decay in bfloat16"):
            RMSProp([np.ones(2, np.float32)], cache_dtype="bfloat16", **{name: value})
    opt = RMSProp([np.ones(2, np.float32)], cache_dtype="bfloat16", momentum=0.5)
    with pytest.raises(OptionError, match="would not decay"):
        opt.param_groups[0][name] = 0.999
    # What is refused does stall, and what is taken does not.
    bits = to_bfloat16(np.linspace(1, 2, 1000, dtype=np.float32))
    assert (to_bfloat16(np.float32(0.998) * from_bfloat16(bits)) == bits).any()
    assert (to_bfloat16(np.float32(0.996) * from_bfloat16(bits)) < bits).all()


@pytest.mark.parametrize(
    ("params", "value", "error"),
    [
        (np.ones(2, np.float32), "float16", OptionError),
        (np.ones(2, np.float32), np.float16, OptionTypeError),
        (np.ones(2), "bfloat16", OptionError),
        ([np.ones(2), np.ones(2, np.float32)], "bfloat16", OptionError),
    ],
    ids=["float16", "type", "float64", "mixed"],
)
def test_what_it_does_not_go_with(params, value, error):
    with pytest.raises(error, match="cache_dtype: "):
        RMSProp(params, cache_dtype=value)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_initial_scale_copies_and_pickles(again, rng):
    opt = RMSProp([rng.standard_normal(9).astype(np.float32)], cache_dtype="bfloat16", initial_scale=1.0, momentum=0.9)
    assert from_bfloat16(opt.cache[0]).tolist() == [1.0] * 9
    grads = rng.standard_normal((4, 9)).astype(np.float32)
    opt.step([grads[0]])
    other = again(opt)
    for grad in grads[1:]:
        opt.step([grad])
        other.step([grad])
    for name in opt.buffers.keys() - {"grads"}:
        assert_same_bits(opt.buffers[name].flat, other.buffers[name].flat)
