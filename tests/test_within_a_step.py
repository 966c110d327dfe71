"""What runs in the midst of a step: functions of the user's, signal handlers, other threads.

A step that is asked for within a step is refused. Options may be set at any time, and hold. Whoever looks at the state
finds one that belongs to its counts.
"""

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, whole
from mid_step import OPTIONS, PLACES, make

from fastrms import RMSProp

KERNELS = ["numpy", "serial", "parallel"]


# What a function may ask of the optimizer that calls it, and must not get.
REFUSED = {
    "step": lambda opt, gradients, path: opt.step(gradients),
    "step()": lambda opt, gradients, path: opt.step(),
    "load_state_dict": lambda opt, gradients, path: opt.load_state_dict(opt.state_dict()),
    "load": lambda opt, gradients, path: opt.load(path),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", REFUSED)
def test_a_function_that_a_step_calls_may_not_ask_for_another(what, place, kernel, rng, tmp_path):
    opt, gradients = make(rng, kernel=kernel)
    opt.step(gradients)
    opt.save(tmp_path / "state.npz")
    before = whole(opt)
    # What a method of an array raises is an error about that array.
    with pytest.raises(Exception, match=r"expected a call between two steps, got one during a step"):
        PLACES[place](opt, gradients, lambda: REFUSED[what](opt, gradients, tmp_path / "state.npz"))
    assert whole(opt) == before
    opt.step(gradients)
    assert opt.steps == 2


@pytest.mark.parametrize("place", PLACES)
def test_a_function_that_a_step_calls_may_save(place, rng, tmp_path):
    opt, gradients = make(rng)
    opt.step(gradients)
    seen = []

    def save():
        opt.save(tmp_path / "state.npz")
        seen.append(RMSProp.from_checkpoint(tmp_path / "state.npz", lr=opt.lr))

    expected = whole(opt)
    PLACES[place](opt, gradients, save)
    assert opt.steps == 2
    for state in seen:
        assert whole(state) == expected
    assert seen


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_an_option_that_a_function_sets_holds_for_this_step_and_the_next(place, name, kernel, rng):
    opt, gradients = make(rng, kernel=kernel)
    other = RMSProp(opt.params, kernel=kernel)
    for optimizer in (opt, other):
        optimizer.step(gradients)
    PLACES[place](opt, gradients, lambda: setattr(opt, name, OPTIONS[name]))
    setattr(other, name, OPTIONS[name])
    other.step(gradients)
    for _ in range(3):
        assert whole(opt) == whole(other)
        for optimizer in (opt, other):
            optimizer.step(gradients)
            optimizer.step({key: gradient.copy() for key, gradient in gradients.items()})


def test_a_schedule_that_puts_a_number_in_its_own_place_is_called_once(rng):
    calls = []

    def schedule(step):
        calls.append(step)
        opt.lr = 0.5
        return 1e-3

    opt, gradients = make(rng, lr=schedule)
    other = RMSProp(opt.params, lr=0.5)
    for _ in range(3):
        opt.step(gradients)
        other.step(gradients)
        assert_same_bits(opt.params["a"], other.params["a"])
    assert opt.lr == 0.5
    assert calls == [0]


def test_memory_of_a_gradient_may_go_while_the_rate_is_computed(rng):
    gradients = [rng.standard_normal(200_000), rng.standard_normal(3)]

    def shrink(step):
        gradients[0].resize(4, refcheck=False)
        return 1e-3

    opt = RMSProp([np.ones(200_000), np.ones(3)], lr=shrink)
    with pytest.raises(ValueError, match=r"gradients\[0\]: expected shape \(200000,\), got \(4,\)"):
        opt.step(gradients)
    assert opt.steps == 0


@pytest.mark.parametrize("name", ["momentum", "centered"])
def test_other_threads_that_set_options_leave_nothing_stale(name, rng):
    """The calls of a step are kept from one to the next; those made while a buffer is being made would be wrong."""
    start = [rng.standard_normal(4) for _ in range(3000 if JIT else 50)]
    gradients = [rng.standard_normal(4) for _ in start]
    for _ in range(3):
        opt, other = RMSProp(start), RMSProp(start)
        opt.step(gradients)
        setter = threading.Thread(target=opt.param_groups[0].__setitem__, args=(name, OPTIONS[name]))
        setter.start()
        while setter.is_alive():
            opt.step(gradients)
        setter.join()
        other.load_state_dict(opt.state_dict())
        for optimizer in (opt, other):
            optimizer.step(gradients)
            optimizer.step(gradients)
        assert whole(opt) == whole(other)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_pickle_made_while_another_thread_steps_is_of_one_step(kernel):
    size = 200_000 if JIT else 100
    opt = RMSProp([np.zeros(size)], lr=1.0, decay_rate=0.0, epsilon=1e-30, kernel=kernel)
    stop = threading.Event()

    def train():
        gradients = [np.ones(size)]
        while not stop.is_set():
            opt.step(gradients)

    thread = threading.Thread(target=train)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread.start()
    try:
        copies = [pickle.loads(pickle.dumps(opt)) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    for other in copies:  # each step goes down by 1
        assert set(np.unique(other.params[0]).tolist()) == {-float(other.steps)}


def test_a_count_of_steps_that_is_set_is_one_that_a_run_can_have(rng, tmp_path):
    opt = RMSProp([np.ones(2), np.ones(2)], bias_correction=True)
    for _ in range(3):
        opt.step([np.ones(2), None])
    for value in (2.5, -1, "x", None, True, 2**53 + 1):
        with pytest.raises((TypeError, ValueError), match=r"^steps: expected a whole number"):
            opt.steps = value
        with pytest.raises((TypeError, ValueError), match=r"^skipped_steps: expected a whole number"):
            opt.skipped_steps = value
    assert opt.steps == 3
    opt.steps = opt.skipped_steps = 2**53  # the most that float64 counts
    assert (opt.steps, opt.skipped_steps) == (2**53, 2**53)
    opt.steps = np.int64(0)  # to begin a schedule again
    opt.save(tmp_path / "state.npz")
    assert RMSProp.from_checkpoint(tmp_path / "state.npz").steps == 0
    opt.step([np.ones(2), np.ones(2)])
    assert all(np.isfinite(view).all() for view in opt.params)


def test_a_step_that_fails_is_not_counted(rng, tmp_path):
    """With bias correction a count that is ahead divides by 0."""
    opt = RMSProp([np.ones(3), np.ones(3)], bias_correction=True, storage=tmp_path / "folder")
    in_parts = opt.backend.storage.pages.call_in_parts

    def fail(*call):
        raise OSError("the disk is gone")

    opt.backend.storage.pages.call_in_parts = fail
    with pytest.raises(OSError, match="the disk is gone"):
        opt.step([None, np.ones(3)])
    assert (opt.steps, list(opt.backend.state.counts.absent)) == (0, [0, 0])
    opt.backend.storage.pages.call_in_parts = in_parts
    opt.step([None, np.ones(3)])
    assert (opt.steps, list(opt.backend.state.counts.absent)) == (1, [1, 0])
    assert np.isfinite(opt.params[1]).all()
    opt.step([np.ones(3), np.ones(3)])
    assert np.isfinite(opt.params[0]).all()
    opt.close()


FEWER_THREADS = """if True:
    import pickle, sys
    import numpy as np
    opt = pickle.load(sys.stdin.buffer)
    opt.step([np.ones(3)])
    print(opt.num_threads, opt.steps)
"""


def test_a_pickle_comes_to_a_process_with_fewer_threads():
    opt = RMSProp([np.ones(3)], kernel="parallel", num_threads=2)
    done = subprocess.run(
        [sys.executable, "-c", FEWER_THREADS], input=pickle.dumps(opt), env=os.environ | {"NUMBA_NUM_THREADS": "1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.stdout == b"1 1\n", done.stderr


@pytest.mark.parametrize("name", ["lr", "momentum", "centered", "clip_norm", "nonfinite", "kernel", "num_threads"])
def test_an_option_that_another_thread_sets_waits_for_the_end_of_the_step(name, rng):
    opt, gradients = make(rng, kernel="parallel" if name == "num_threads" else "serial")
    value = {"lr": 0.5, "momentum": 0.9, "centered": True, "clip_norm": 0.1, "nonfinite": "skip", "kernel": "numpy",
             "num_threads": 1}[name]  # fmt: skip
    setter = threading.Thread(target=setattr, args=(opt, name, value))
    seen = []

    def rate(step):
        setter.start()
        setter.join(0.1)
        seen.append(setter.is_alive())
        return 1e-3

    opt.lr = rate
    opt.step(gradients)
    setter.join()
    assert (seen, getattr(opt, name)) == ([True], value)
