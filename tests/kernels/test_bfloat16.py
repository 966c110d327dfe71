"""State in bfloat16: rounding, the contract of bits between kernels, and where it would stall."""

import copy
import pickle
import subprocess
import sys
import warnings

import ml_dtypes
import numba
import numpy as np
import pytest
from cases import OPTIONS, SIZES, WAYS, combinations
from helpers import JIT, assert_same_bits, wide

from fastrms import OptionError, OptionTypeError, RMSProp, from_bfloat16
from fastrms.buffers import bfloat16
from fastrms.buffers.bfloat16 import to_bfloat16
from fastrms.kernels import access
from fastrms.kernels.reference import ReferenceRMSProp


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
    assert_same_bits(opt.buffers["cache"].flat, to_bfloat16(reference.cache[0]))
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


STATE = ("cache", "momentum_buffer", "grad_avg")


def narrow(params=None, **options):
    """An optimizer with all state in 16 bits."""
    params = [np.ones((2, 3), np.float32), np.float32(2), np.ones((0, 2), np.float32)] if params is None else params
    return RMSProp(params, cache_dtype="bfloat16", momentum=0.9, centered=True, **options)


def test_state_is_shown_as_bfloat16_of_ml_dtypes(rng):
    opt = narrow()
    before = [view for name in STATE for view in getattr(opt, name)]
    opt.step([rng.standard_normal((2, 3)), 5.0, np.ones((0, 2))])
    assert [*map(id, before)] == [id(view) for name in STATE for view in getattr(opt, name)]
    for name in STATE:
        buffer, views = opt.buffers[name], getattr(opt, name)
        assert getattr(opt, name) is views
        for view, leaf in zip(views, buffer.leaves, strict=True):
            assert view.dtype == ml_dtypes.bfloat16
            assert leaf.dtype == buffer.views[0].dtype == np.uint16
            assert view.size == 0 or np.shares_memory(view, leaf)
            assert_same_bits(view.view(np.uint16), leaf)
            assert_same_bits(from_bfloat16(view), view.astype(np.float32))
            assert_same_bits(from_bfloat16(view), from_bfloat16(leaf))
    assert opt.grads[0].dtype == opt.params[0].dtype == np.float32


def test_what_is_written_to_bfloat16_views_is_the_state(rng):
    opt, other = narrow(), narrow()
    values = rng.standard_normal((2, 3)) ** 2
    opt.cache[0][...] = values
    other.buffers["cache"].leaves[0][...] = to_bfloat16(values)
    opt.momentum_buffer[1][...] += 3
    other.buffers["momentum_buffer"].leaves[1][...] = to_bfloat16(3)
    for each in (opt, other):
        each.step([np.ones((2, 3)), 5.0, np.ones((0, 2))])
    for name in STATE:
        assert_same_bits(opt.buffers[name].flat, other.buffers[name].flat)


def test_bfloat16_views_stay_through_loads_and_are_replaced_in_copies(rng, tmp_path):
    opt = narrow({"W": np.ones(3, np.float32), "b": np.ones(1, np.float32)})
    views = [opt.cache["W"], opt.cache, opt.momentum_buffer["b"]]
    opt.step({"W": rng.standard_normal(3), "b": [1.0]})
    state = opt.state_dict()
    assert {str(array.dtype) for name, array in state["arrays"].items() if name.startswith(STATE)} == {"uint16"}
    opt.save(tmp_path / "state.npz")
    expected = opt.cache["W"].copy()
    for load in (lambda: opt.load_state_dict(state), lambda: opt.load(tmp_path / "state.npz")):
        opt.step({"W": rng.standard_normal(3), "b": [1.0]})
        load()
        assert [*map(id, (opt.cache["W"], opt.cache, opt.momentum_buffer["b"]))] == [*map(id, views)]
        assert_same_bits(opt.cache["W"], expected)
    for other in (copy.copy(opt), copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert_same_bits(other.cache["W"], expected)
        assert not np.shares_memory(other.cache["W"], opt.cache["W"])
        assert np.shares_memory(other.cache["W"], other.buffers["cache"].flat)
        assert other.check() == []


def test_a_single_array_of_bfloat16_state_can_be_updated_in_place():
    opt = narrow(np.ones(3, np.float32), initial_scale=2.0)
    opt.cache *= 0.5
    assert from_bfloat16(opt.buffers["cache"].flat).tolist() == [1.0] * 3
    with pytest.raises(AttributeError, match="cache: these views cannot be replaced"):
        opt.cache = np.ones(3, ml_dtypes.bfloat16)


def test_check_finds_replaced_and_changed_views_of_bfloat16():
    opt = narrow()
    assert opt.check() == []
    kept = opt.cache[0]
    assert opt.check() == []
    opt.cache[0] = opt.cache[0] * 1
    assert [line.split(",")[0] for line in opt.check()] == ["cache[0]: expected the original view"]
    opt.cache[0] = kept
    assert opt.check() == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2.5 on: setting the shape is deprecated
        opt.grad_avg[0].shape = 6
    assert [line.split(",")[0] for line in opt.check()] == ["grad_avg[0]: expected a view of shape (2"]


def test_without_ml_dtypes_state_is_shown_as_uint16(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    bfloat16.ml_dtype.cache_clear()
    try:
        opt = narrow(initial_scale=1.0)
        assert opt.cache is opt.buffers["cache"].views
        assert opt.cache[0].dtype == np.uint16
        assert from_bfloat16(opt.cache[0]).tolist() == [[1.0] * 3] * 2
        opt.cache[1][...] = 0x4000
        assert from_bfloat16(opt.cache[1]) == 2
        assert opt.check() == []
    finally:
        bfloat16.ml_dtype.cache_clear()


def test_ml_dtypes_is_imported_when_16_bit_state_is_read_and_not_before():
    program = (
        "import sys, numpy as np\n"
        "from fastrms import RMSProp\n"
        "opt = RMSProp([np.ones(2, np.float32)], cache_dtype='bfloat16')\n"
        "opt.step([np.ones(2, np.float32)])\n"
        "opt.params, opt.grads, opt.check(), opt.state_dict(), RMSProp([np.ones(2)]).cache\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "assert opt.cache[0].dtype.name == 'bfloat16'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
