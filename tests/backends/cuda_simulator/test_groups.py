"""Groups that are added to an optimizer on the device. The conformance suite shows their bits."""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_same_bits, assert_same_state, whole
from simulator import KINDS, Theirs, arrays, cuda, kernels, pair

from fastrms import OptionError, RMSProp, StructureError
from fastrms.backends.cuda.backend import CudaBackend

BODY, HEAD = ([(4, 3), (), (0,)], [np.float32, np.float64, np.float64]), ([(7,), (2, 2)], [np.float32, np.float64])


def grown(rng, group=None, **options):
    """The oracle and the same on the device, both with a group that was added after a step."""
    body, head = arrays(rng, *BODY), arrays(rng, *HEAD)
    optimizers = pair(body, **options)
    gradients = arrays(rng, *BODY)
    for opt in optimizers:
        opt.step(gradients)
        opt.add_param_group({"params": head, **(group or {})})
    return optimizers


def test_views_stay(rng):
    _, opt = pair(arrays(rng, *BODY))
    views, container, gradient = list(opt.params), opt.params, opt.grads[0]
    opt.add_param_group({"params": arrays(rng, *HEAD)})
    assert opt.params[0] is container
    assert all(view is now for view, now in zip(views, opt.params[0], strict=True))
    assert opt.grads[0][0] is gradient
    assert opt.check(body=opt.params[0], head=opt.params[1]) == []
    assert len(opt.explain()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(kind, rng):
    options = {"momentum": 0.9, "bias_correction": True, "global_clip_norm": 0.5}
    oracle, opt = grown(rng, {"centered": True}, **options)
    for t in range(3):
        gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
        given = [[KINDS[kind](g) for g in group] for group in gradients]
        if t == 1:
            gradients[1][0] = given[1][0] = None
            given[0][0] = gradients[0][0]  # on the host
        oracle.step(gradients)
        opt.step(given)
        assert_same_state(opt, oracle, f"step {t}")
        assert opt.last_grad_norm == oracle.last_grad_norm


def test_gradients_on_the_host_and_in_the_buffer(rng):
    oracle, opt = grown(rng)
    for t in range(6):  # pinned memory is used again
        gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
        if t % 3 == 1:
            gradients[0][1] = gradients[1][1] = None
        oracle.step(gradients)
        if t % 3 == 2:  # some are in the buffer
            opt.grads[1][0].copy_to_device(gradients[1][0])
            gradients[1][0] = opt.grads[1][0]
        opt.step(gradients)
    assert_same_state(opt, oracle)


def test_gradients_that_are_memory_of_either_group_are_read_before_it_is_written(rng):
    same = [(4,)], [np.float32]
    oracle, opt = pair(arrays(rng, *same))
    for each, head in (
        (oracle, arrays(np.random.default_rng(1), *same)),
        (opt, arrays(np.random.default_rng(1), *same)),
    ):
        each.add_param_group({"params": head})
    for _ in range(2):
        oracle.step([[oracle.params[1][0].copy()], [oracle.params[0][0].copy()]])
        opt.step([[opt.params[1][0]], [opt.params[0][0]]])
    assert_same_state(opt, oracle)


def test_one_parameter_at_a_time(rng):
    oracle, opt = grown(rng, {"lr": 0.5}, momentum=0.9, bias_correction=True)
    for _ in range(2):
        gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
        oracle.step(gradients)
        for key in ((1, 1), (0, 0), (0, 2), (1, 0), (0, 1)):
            assert opt.step_parameter(key, gradients[key[0]][key[1]]) is opt.params[key[0]][key[1]]
        assert_same_state(opt, oracle)
    opt.step_rows((1, 1), [1, 0, 1], Theirs(np.ones((3, 2))))
    opt.finish_step()
    oracle.step([[None] * 3, [None, np.array([[1.0, 1.0], [2.0, 2.0]])]])
    assert_same_state(opt, oracle)


def test_parameters_on_the_device(rng):
    body, head = arrays(rng, *BODY), arrays(rng, *HEAD)
    oracle, opt = pair(body)
    oracle.add_param_group({"params": head})
    opt.add_param_group({"params": [Theirs(head[0]), cuda.to_device(head[1])]})
    assert_same_state(opt, oracle)
    before = whole(opt)
    tied = Theirs(head[0])
    for params, message in (
        ([tied, tied], r"params\[2\]\[0\] and params\[2\]\[1\] share memory"),
        ([opt.params[0][0]], r"params\[2\]: expected new parameters, got an array that shares memory with a parameter"),
        ([opt.grads[1][1]], r"params\[2\]: expected new parameters"),
    ):
        with pytest.raises(StructureError, match=message):
            opt.add_param_group({"params": params})
    with pytest.raises(OptionError, match="lr: expected"):
        opt.add_param_group({"params": [np.ones(1)], "lr": -1.0})
    assert (whole(opt), len(opt.param_groups)) == (before, 2)


def test_copies_and_pickles(rng):
    oracle, opt = grown(rng, {"momentum": 0.5})
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), pickle.loads(pickle.dumps(oracle))):
        assert_same_state(other, oracle)
        gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
        expected = copy.deepcopy(oracle)
        for each in (other, expected):
            each.step(gradients)
            each.add_param_group({"params": [np.ones(2)]})
            each.step([*gradients, [np.ones(2)]])
        assert_same_state(other, expected)
    assert_same_state(opt, oracle)


def test_checkpoints_fit_optimizers_with_and_without_groups_that_were_added(rng, tmp_path):
    oracle, opt = grown(rng, {"momentum": 0.5})
    gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
    for each in (oracle, opt):
        each.step(gradients)
        each.save(tmp_path / f"{each.kernel}.npz")
    for path in ("cuda.npz", "numpy.npz"):
        for kernel in ("cuda", "numpy"):
            assert_same_state(RMSProp.from_checkpoint(tmp_path / path, kernel=kernel), oracle)
        for each in (oracle, opt):
            each.step(gradients)
            each.load(tmp_path / path)
        assert_same_state(opt, oracle)
    opt.load_state_dict(oracle.state_dict())
    oracle.load_state_dict(opt.state_dict())
    for each in (oracle, opt):
        each.step(gradients)
    assert_same_state(opt, oracle)


def test_counts_on_the_device_are_taken_over(rng):
    options = {"nonfinite": "skip", "bias_correction": True, "clip_norm": 1.0}
    oracle, opt = pair(arrays(rng, *BODY), **options)
    for t in range(4):
        gradients = arrays(rng, *BODY)
        if t % 2:
            gradients[0][0, 0] = np.nan
        if t == 2:
            gradients[1] = None
        for each in (oracle, opt):
            each.step(gradients)
    norm = opt.last_grad_norm
    for each in (oracle, opt):
        each.add_param_group({"params": [np.ones(3)]})
    assert (opt.steps, opt.skipped_steps, opt.last_skipped) == (2, 2, True)
    assert_same_bits(opt.last_grad_norm, norm)
    for _ in range(2):
        gradients = [arrays(rng, *BODY), [np.ones(3)]]
        for each in (oracle, opt):
            each.step(gradients)
    assert_same_state(opt, oracle)


def test_another_stream_is_that_of_all_groups(rng):
    _, opt = grown(rng)
    before = opt.stream
    opt.stream = cuda.stream()
    stream = opt.stream  # the simulator's default stream, as another object
    assert stream is not before
    for buffer in opt.buffers.values():
        assert {id(array.stream) for array in (*buffer.leaves, *buffer.segments)} == {id(stream)}
    opt.momentum = 0.5
    assert opt.momentum_buffer[1][0].stream is stream


def test_a_step_launches_without_waiting(rng, request):
    _, opt = grown(rng, clip_norm=0.5, nonfinite="skip", bias_correction=True)
    no_waiting = request.getfixturevalue("no_waiting")
    for _ in range(2):
        opt.step([[Theirs(g) for g in arrays(rng, *group)] for group in (BODY, HEAD)])
    assert no_waiting == []


@pytest.mark.parametrize("where", ["_use_parameters", "take_in", "new_buffer"])
def test_an_interrupt_leaves_all_of_a_group_or_nothing(where, rng, monkeypatch):
    oracle, opt = pair(arrays(rng, *BODY))
    group = {"params": arrays(rng, *HEAD), "momentum": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(CudaBackend, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.add_param_group(group)
    assert len(opt.param_groups) == 1 + (where == "_use_parameters")
    gradients = [arrays(rng, *BODY), arrays(rng, *HEAD)]
    if len(opt.param_groups) == 1:
        opt.add_param_group(group)
    oracle.add_param_group(group)
    for key in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        opt.step_parameter(key, gradients[key[0]][key[1]])
    opt.step(gradients)
    for _ in range(2):
        oracle.step(gradients)
    assert_same_state(opt, oracle)


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_addresses_of_all_groups_count_as_written(rng):
    _, opt = grown(rng)
    opt.step([arrays(rng, *BODY), arrays(rng, *HEAD)])
    written = opt.backend.written
    for leaf in (*opt.params[0][:2], *opt.params[1], *opt.cache[1]):
        address = kernels.interface_of(leaf)["data"][0]
        assert any(low <= address < high for low, high in written.bounds)
