"""Steady steps that are one compiled call: when they are taken, when they are not, and what they count."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, count_calls

from fastrms import RMSProp
from fastrms.backends import tuner
from fastrms.kernels import cpu

pytestmark = pytest.mark.skipif(not JIT, reason="the interpreter has no such call")


@pytest.fixture(params=["auto", "parallel"])
def opt(request):
    """An optimizer whose next step is one call, with gradients of 1 in the buffer."""
    opt = RMSProp([np.zeros(5), np.zeros((2, 3))], lr=0.1, kernel=request.param)
    opt.step([np.ones(5), np.ones((2, 3))])
    opt.buffers["grads"].flat[:] = 1
    opt.step()
    assert takes_one_call(opt)
    return opt


def takes_one_call(opt, gradients=None):
    before, steps = opt.params[0].copy(), opt.steps
    taken = opt.backend.at_once is not None and opt.backend.at_once.step(gradients)
    assert opt.steps == steps + taken
    assert (opt.params[0] != before).all() == taken
    return taken


def test_a_step_from_the_buffer_and_one_from_a_list_are_one_call_each(opt):
    assert takes_one_call(opt)
    assert takes_one_call(opt, [np.ones(5), np.ones((2, 3))])
    assert takes_one_call(opt, (np.ones(5), np.ones((2, 3))))
    # The facade, the step, and the look at replaced views.
    assert count_calls(opt.step, ("call",)) <= 4


def test_a_dict_too():
    gradients = {"W": np.ones((2, 2)), "b": np.ones(2)}
    opt = RMSProp({"W": np.zeros((2, 2)), "b": np.zeros(2)})
    opt.step(gradients)
    assert opt.backend.at_once.step({"b": np.ones(2), "W": np.ones((2, 2))})
    assert not opt.backend.at_once.step({"W": np.ones((2, 2))})


@pytest.mark.parametrize(
    "gradients",
    [
        [np.ones(5)],
        [np.ones(5), None],
        [np.ones(5), np.ones(6)],
        [np.ones(5), np.ones((3, 2)).T],
        [np.ones(5), np.ones((2, 3), np.float32)],
        np.ones(11),
        {"W": np.ones(5)},
    ],
    ids=["too few", "None", "shape", "strides", "dtype", "array", "dict"],
)
def test_other_gradients_are_left_to_the_general_step(gradients, opt):
    assert not takes_one_call(opt, gradients)


def test_views_that_were_replaced_are_left_to_the_general_step(opt):
    opt.grads[0] = np.ones(5)
    assert not takes_one_call(opt)


@pytest.mark.parametrize(
    "change",
    [
        lambda opt: setattr(opt, "lr", 0.5),
        lambda opt: setattr(opt, "kernel", "numpy"),
        lambda opt: setattr(opt, "nonfinite", "skip"),
        lambda opt: setattr(opt, "global_clip_norm", 1.0),
        lambda opt: opt.param_groups[0].update(momentum=0.9),
        lambda opt: opt.load_state_dict(opt.state_dict()),
        lambda opt: opt.save,
    ],
    ids=["lr", "kernel", "nonfinite", "global_clip_norm", "momentum", "load_state_dict", "nothing"],
)
def test_calls_from_before_a_change_take_no_step_after_it(change, opt):
    twin = RMSProp([np.zeros(5), np.zeros((2, 3))], lr=0.1)
    twin.load_state_dict(opt.state_dict())
    twin.step([np.ones(5), np.ones((2, 3))])
    opt.buffers["grads"].flat[:] = twin.buffers["grads"].flat[:] = 1
    opt.step()
    kept = opt.backend.at_once  # as another thread may hold it
    before = change(opt) is not None
    change(twin)
    assert kept.step(None) == before
    for each in (opt, twin) if not before else (twin,):
        each.step()
    for name in ("params", "cache"):
        assert_same_bits(opt.buffers[name].flat, twin.buffers[name].flat)
    assert opt.steps == twin.steps


WITHOUT_A_LOCK = pytest.mark.parametrize("opt", ["auto"], indirect=True)


@WITHOUT_A_LOCK
def test_it_waits_while_another_thread_holds_the_optimizer(opt):
    turns, held, done = opt.backend.turns, threading.Event(), threading.Event()

    def hold():
        with turns.between_steps("save", changes=False):
            held.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    assert not takes_one_call(opt)
    stepper = threading.Thread(target=opt.step)
    stepper.start()
    stepper.join(0.2)
    steps_meanwhile, waits = opt.steps, stepper.is_alive()
    done.set()
    holder.join()
    stepper.join()
    assert waits
    assert opt.steps == steps_meanwhile + 1
    assert takes_one_call(opt)  # the step has admitted it again


@WITHOUT_A_LOCK
def test_it_waits_for_a_step_of_another_thread(opt):
    begun, done = threading.Event(), threading.Event()

    class Gradient:
        def __array__(self, dtype=None, copy=None):
            begun.set()
            done.wait(10)
            return np.ones(5)

    stepper = threading.Thread(target=opt.step, args=([Gradient(), np.ones((2, 3))],))
    stepper.start()
    assert begun.wait(10)
    meanwhile = takes_one_call(opt)
    done.set()
    stepper.join()
    assert not meanwhile


@pytest.mark.parametrize(
    "make",
    [
        lambda: RMSProp([np.zeros(3)], kernel="numpy"),
        lambda: RMSProp([np.zeros(3)], kernel="parallel", num_threads=1),
        lambda: RMSProp([np.zeros(3)], nonfinite="raise"),
        lambda: RMSProp([np.zeros(3), np.zeros(3, np.float32)]),
        lambda: RMSProp([{"params": [np.zeros(3)]}, {"params": [np.zeros(3)]}]),
    ],
    ids=["numpy", "num_threads", "nonfinite", "two dtypes", "two groups"],
)
def test_steps_that_need_more_than_one_call_never_are_one(make):
    opt = make()
    for _ in range(3):
        opt.step()
    assert opt.backend.at_once is None
    assert opt.steps == 3


@pytest.mark.parametrize("options", [{"lr": lambda t: 0.1}, {"bias_correction": True}, {"clip_norm": 1.0}])
def test_steps_whose_numbers_change_never_are_one(options):
    opt = RMSProp([np.zeros(3)], **options)
    for _ in range(3):
        opt.step([np.ones(3)])
    assert not opt.backend.at_once.step([np.ones(3)])
    assert opt.steps == 3


def test_a_ticket_counts_for_its_own_optimizer_only(opt):
    other = RMSProp([np.zeros(3)])
    other.step()
    other.backend.at_once.admit()
    assert takes_one_call(opt)
    assert other.steps == 1


def test_the_call_that_is_not_admitted_returns_a_status_of_its_own():
    assert len({cpu.FOUND, cpu.FOUND_SOME, cpu.NOT_ADMITTED}) == 3
    assert max(cpu.FOUND, cpu.FOUND_SOME, cpu.NOT_ADMITTED) < 0


def test_the_tuner_chooses_among_calls_and_learns_of_each():
    size = tuner.TRY_PARALLEL_FROM
    opt, twin = RMSProp([np.zeros(size)]), RMSProp([np.zeros(size)], kernel="numpy")
    chosen, learnt = opt.backend._tuner, []
    chosen.step_done = lambda: learnt.append(chosen.variant)
    gradient = np.random.default_rng(0).standard_normal(size)
    for chosen.variant in ("serial", "parallel", "serial", "parallel"):
        known = chosen.variant in learnt
        assert opt.backend.at_once.step([gradient]) == known
        if not known:
            opt.step([gradient])
        twin.step([gradient])
    assert learnt == ["serial", "parallel", "serial", "parallel"]
    assert opt.steps == 4
    assert_same_bits(opt.buffers["params"].flat, twin.buffers["params"].flat)


def test_threads_that_step_one_optimizer_take_turns():
    size, steps = 20_000, 100
    opt, twin = RMSProp([np.zeros(size)], kernel="parallel"), RMSProp([np.zeros(size)])
    gradient = np.ones(size)
    opt.step([gradient])

    def train():
        for _ in range(steps):
            opt.step([gradient])

    with ThreadPoolExecutor(3) as pool:
        for _ in pool.map(lambda _: train(), range(3)):
            pass
    for _ in range(1 + 3 * steps):
        twin.step([gradient])
    assert opt.steps == twin.steps
    assert_same_bits(opt.buffers["params"].flat, twin.buffers["params"].flat)
