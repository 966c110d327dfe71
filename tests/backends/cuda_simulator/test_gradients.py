"""Gradients of all kinds, for `CudaRMSProp`."""

import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, assert_same_state
from simulator import KINDS, Theirs, arrays, kernels, pair

from fastrms import NonfiniteError
from fastrms.backends.cuda.gradients import Pieces
from fastrms.kernels import dlpack


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(kind, options, rng):
    shapes, dtypes = [(4, 3), (), (5,), (2, 1, 3)], [np.float32] * 4
    oracle, optimizer = pair(arrays(rng, shapes, dtypes), **options)
    for t in range(3):
        gradients = arrays(rng, shapes, dtypes)
        given = [KINDS[kind](g) for g in gradients]
        before = [np.array(getattr(g, "array", gradients[k])) for k, g in enumerate(given)]
        if t == 1:
            gradients[2] = given[2] = None
        oracle.step(gradients)
        assert optimizer.step(given) is optimizer.params
        for g, value in zip(given, before, strict=True):
            if isinstance(g, Theirs):
                assert_same_bits(g.array, value, "a gradient was written")
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float16, np.float64])
def test_gradients_of_other_dtypes_are_cast_as_numpy_casts(dtype, rng):
    oracle, optimizer = pair([np.ones((2, 3), np.float32)])
    gradient = (100 * rng.random((2, 3))).astype(dtype)
    oracle.step([gradient])
    optimizer.step([Theirs(gradient)])
    assert_same_state(optimizer, oracle)


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("kind", ["device", "bfloat16", "list"])
def test_what_is_cast_to_inf_follows_nonfinite_and_not_numpys_settings(kind, nonfinite, rng):
    gradient = 1e300 * rng.standard_normal((2, 3))
    with np.errstate(all="ignore"):
        cast = (gradient.astype(ml_dtypes.bfloat16) if kind == "bfloat16" else gradient).astype(np.float32)
    made = {"bfloat16": lambda g: g.astype(ml_dtypes.bfloat16), "list": lambda g: g.tolist()} | KINDS
    oracle, optimizer = pair([np.ones((2, 3), np.float32)], nonfinite=nonfinite)
    with np.errstate(all="ignore"):
        gradient = made[kind](gradient)
    for opt, g in ((oracle, cast), (optimizer, gradient)):
        # What stands for the device computes with NumPy, in threads that have settings of their own.
        with np.errstate(all="raise", invalid="ignore"):
            try:
                opt.step([g])
                assert nonfinite != "raise"
            except NonfiniteError:
                assert nonfinite == "raise"
    assert_same_state(optimizer, oracle)
    assert optimizer.skipped_steps == oracle.skipped_steps == (nonfinite == "skip")


def test_gradients_here_there_and_in_the_buffer_in_one_step(rng):
    shapes, dtypes = [(3, 2), (4,), (5,), (2, 2), (3,)], [np.float32, np.float64, np.float32, np.float32, np.float64]
    oracle, optimizer = pair(arrays(rng, shapes, dtypes))
    for _ in range(20):  # more than there are copies of tables on their way
        gradients = arrays(rng, shapes, dtypes)
        oracle.step(gradients)
        optimizer.grads[2].copy_to_device(gradients[2])
        optimizer.step([gradients[0], Theirs(gradients[1]), optimizer.grads[2], Theirs(gradients[3].T.copy().T),
                        gradients[4]])  # fmt: skip
    assert_same_state(optimizer, oracle)


def test_gradients_that_reach_into_the_optimizers_own_memory_are_copied_first():
    _, optimizer = pair([np.ones(4), np.ones(4)])
    ((low, high),) = optimizer.buffers["grads"].spans

    def found(address, stride):
        described = {"data": (address, False), "strides": (stride,), "shape": (4,), "typestr": "<f8"}
        theirs = Theirs(np.ones(4), **described)
        return optimizer.backend._finder.find((theirs, None), Pieces([(low, high)])).others

    for address, stride in ((high, -8), (high + 16, -16), (low - 16, 16), (low - 24, 8), (low, 0)):
        assert [ours for _, _, ours in found(address, stride)] == [True], (address - low, stride)
    for address, stride in ((high, 16), (low - 8, -8), (low - 64, 16), (high + 24, -8)):
        assert [ours for _, _, ours in found(address, stride)] == [False], (address - low, stride)
    assert found(low - 32, 8) == found(high, 8) == []  # dense: read where it lies


def test_ranges_of_memory_are_compared_with_all_pieces(rng):
    bounds = np.cumsum(rng.integers(1, 5, 40)).reshape(-1, 2).tolist()
    pieces = Pieces(map(tuple, bounds[::-1]))
    starts = rng.integers(-5, 110, 500)
    ends = starts + rng.integers(1, 9, 500)
    expected = [
        any(start < high and end > low for low, high in bounds) for start, end in zip(starts, ends, strict=True)
    ]
    assert pieces.overlaps(starts, ends).tolist() == expected
    assert [pieces.overlap(start, end) for start, end in zip(starts, ends, strict=True)] == expected
    assert any(expected)
    assert not all(expected)
    assert not Pieces(()).overlap(0, 1)
    assert not Pieces(()).overlaps(starts, ends).any()


# PyTorch's tensors, found by compiled code. Those of the processor stand for those of a device, as the simulator's
# memory is theirs.


@pytest.mark.torch
def test_tensors_of_torch_are_read_where_they_lie(rng):
    import torch

    shapes = [(3, 2), (4,), (), (0,), (5,)]
    oracle, optimizer = pair(arrays(rng, shapes, [np.float32] * 5))
    optimizer.backend._finder._device = dlpack.CPU
    for t in range(3):
        gradients = arrays(rng, shapes, [np.float32] * 5)
        given = [torch.from_numpy(g.copy()) for g in gradients]
        if t == 1:
            gradients[1] = given[1] = None
            given[4] = Theirs(gradients[4])
        oracle.step(gradients)
        found = optimizer.backend._finder.find(tuple(given), optimizer.backend.written)
        assert found.sources[0] == given[0].data_ptr()
        assert (found.sources[1] == kernels.ABSENT) == (t == 1)
        assert found.others == found.arrays == []
        assert kernels.LEGACY_STREAM in found.streams
        optimizer.step(given)
    assert_same_state(optimizer, oracle)


@pytest.mark.torch
def test_a_tensor_that_reaches_into_memory_that_is_written_is_not_read_where_it_lies():
    import torch

    _, optimizer = pair([np.ones(4)])
    optimizer.backend._finder._device = dlpack.CPU
    tensor = torch.arange(4.0, dtype=torch.float64)
    start = tensor.data_ptr()
    for low, high, there in ((-8, 0, True), (32, 40, True), (-8, 1, False), (31, 40, False), (8, 16, False)):
        found = optimizer.backend._finder.find((tensor,), Pieces([(start + low, start + high)]))
        assert (found.sources[0] == start) == there, (low, high)


def test_a_view_of_torch_whose_memory_has_the_positive_numbers(rng):
    class Negative(Theirs):
        def is_neg(self):
            return True

        def resolve_neg(self):
            return Theirs(-self.array)

    oracle, optimizer = pair([np.ones(3)])
    gradient = rng.standard_normal(3)
    oracle.step([-gradient])
    optimizer.step([Negative(gradient)])
    assert_same_state(optimizer, oracle)


# Gradients that are not finite.
