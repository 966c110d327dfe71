"""Which kernel runs: as asked for, or what a trial during training finds; and how threads wait."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from helpers import JIT

from fastrms import RMSProp
from fastrms.backends import plan, tuner
from fastrms.backends.tuner import VARIANTS, Tuner
from fastrms.kernels import UPDATES, cpu, threads


class Training:
    """A training whose steps take as long as `seconds` says for each variant, by a clock of its own."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.used = seconds, 0.0, []
        self.tuner = Tuner(list(seconds), lambda: self.now)
        self.tuner.step_done()

    def run(self, steps):
        for _ in range(steps):
            self.used.append(self.tuner.variant)
            self.now += self.seconds[self.tuner.variant]
            self.tuner.step_done()
        return self


TRIAL = Tuner.ROUNDS * Tuner.STEPS


def test_nothing_is_tried_in_the_first_seconds():
    training = Training(serial=0.01, parallel=0.001).run(190)
    assert set(training.used) == {"serial"}
    assert training.tuner.reason == "after 2 s of training, auto also tries parallel"


def test_the_faster_one_is_kept():
    training = Training(serial=0.01, parallel=0.006).run(700)
    assert training.used[-400:] == ["parallel"] * 400
    assert training.used.count("serial") < 201 + TRIAL
    assert training.tuner.reason == "a training step took 10 ms with serial, 6 ms with parallel"
    training = Training(serial=0.01, parallel=0.01).run(600)
    assert training.used[-300:] == ["serial"] * 300


def test_a_trial_waits_until_its_kernels_are_compiled():
    training, done = Training(serial=0.01, parallel=0.006), []
    training.tuner = Tuner(["serial", "parallel"], lambda: training.now, lambda: lambda: bool(done))
    training.run(500)
    assert set(training.used) == {"serial"}
    assert not training.tuner.trying
    done.append(True)
    training.run(TRIAL)
    assert set(training.used) == {"serial", "parallel"}
    assert training.tuner.trying
    assert not training.tuner.decided
    text = tuner.explain(10**6, "auto", training.tuner, 2)
    assert text == "serial; after 2 s of training, auto also tries parallel; a trial is running"
    training.run(TRIAL + 1)
    assert training.tuner.decided
    assert tuner.explain(10**6, "auto", training.tuner, 2).startswith("parallel; a training step took")


def test_a_trial_of_a_much_slower_kernel_ends_after_its_first_round():
    training = Training(serial=0.01, parallel=0.1).run(500)
    assert training.used.count("parallel") == Tuner.STEPS
    assert training.used[-1] == "serial"


def test_the_fastest_of_several_is_kept_and_slow_ones_leave_the_trial():
    training = Training(serial=0.01, parallel=0.012, ahead=0.008, both=0.007).run(700)
    assert training.used[-300:] == ["both"] * 300
    assert training.used.count("parallel") == Tuner.STEPS
    assert training.used.count("ahead") == TRIAL
    training = Training(serial=0.01, parallel=0.0099, ahead=0.0098).run(300)
    assert training.used[-10:] == ["serial"] * 10


def test_it_looks_again_after_twice_as_long_and_finds_what_has_changed():
    training = Training(serial=0.01, parallel=0.1).run(500)
    training.seconds = {"serial": 0.01, "parallel": 0.005}
    training.run(2000)
    assert training.used[-1] == "parallel"
    training.seconds = {"serial": 0.01, "parallel": 0.02}
    training.run(5000)
    assert training.used[-1] == "serial"
    trials = sum(a == "serial" and b == "parallel" for a, b in zip(training.used, training.used[1:], strict=False))
    assert trials < 20


def test_it_looks_again_at_once_when_steps_become_slower():
    training = Training(serial=0.01, parallel=0.006).run(400)
    assert training.used[-1] == "parallel"
    training.seconds = {"serial": 0.011, "parallel": 0.1}  # another program took a core
    training.run(Tuner.SLOW_STEPS + 2 * Tuner.STEPS + 1)
    assert training.used[-1] == "serial"
    assert training.used[-50:].count("parallel") > Tuner.SLOW_STEPS


def test_a_pause_between_steps_is_no_training():
    training = Training(serial=0.01, parallel=0.006).run(300)
    training.used.clear()
    for _ in range(20):
        training.now += 100.0  # the user looks at what came out
        training.run(5)
    assert set(training.used) == {"parallel"}


def test_a_pause_ahead_of_the_first_trial_is_none_either():
    training = Training(serial=0.01, parallel=0.006)
    for _ in range(10):
        training.run(5)
        training.now += 100.0
    assert set(training.used) == {"serial"}


def test_threads_that_wake_up_after_a_pause_do_not_decide():
    training = Training(serial=40e-6, parallel=24e-6).run(60_000)
    assert training.used[-1] == "parallel"
    training.used.clear()
    for _ in range(20):
        training.now += 100.0
        training.seconds["parallel"] = 240e-6
        training.run(2 * Tuner.SLOW_STEPS)
        training.seconds["parallel"] = 24e-6
        training.run(200)
    assert set(training.used) == {"parallel"}


def test_threads_that_wake_up_in_a_trial_do_not_decide():
    training, awake = Training(serial=400e-6, parallel=200e-6), 0
    for _ in range(10_000):
        awake = awake + 1 if training.tuner.variant == "parallel" else 0
        training.seconds["parallel"] = 200e-6 if awake > 19 else 500e-6
        training.run(1)
    assert training.used[-1] == "parallel"


def test_single_slow_steps_do_not_decide():
    training = Training(serial=0.01, parallel=0.006)
    for _ in range(1000):
        training.run(1)
        if len(training.used) % 7 == 0:
            training.now += 5.0  # an evaluation of the user's
            training.tuner.step_done()
    assert training.used[-500:].count("parallel") > 450  # the rest are of trials


@pytest.fixture
def small_trials(monkeypatch):
    """Trials begin at once, and with few elements."""
    monkeypatch.setattr(Tuner, "FIRST_LOOK", 0.0)
    monkeypatch.setattr(Tuner, "LAST_LOOK", 0.0)
    monkeypatch.setattr(Tuner, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(Tuner, "DROPPED_SECONDS", 0.0)
    monkeypatch.setattr(tuner, "TRY_PARALLEL_FROM", 50)
    monkeypatch.setattr(tuner, "TRY_PREFETCHING_FROM", 55)


def test_bits_do_not_depend_on_trials(small_trials, rng):
    size = 4 * cpu.LINES_AHEAD * 8  # elements: enough that some are prefetched
    params = [rng.standard_normal(size), rng.standard_normal((5, 5)).astype(np.float32)]
    opt, serial = RMSProp(params, momentum=0.9), RMSProp(params, momentum=0.9, kernel="serial")
    used = set()
    for t in range(3 * TRIAL * len(VARIANTS)):
        used.add(opt.backend.variant)
        gradients = [rng.standard_normal(size), None if t % 5 == 0 else rng.standard_normal((5, 5))]
        opt.step(gradients)
        serial.step(gradients)
        assert [leaf.tobytes() for leaf in opt.params] == [leaf.tobytes() for leaf in serial.params]
    assert used == (set(VARIANTS) if JIT else {"serial", "parallel"})


@pytest.mark.parametrize(
    ("size", "variant", "expected"),
    [
        (60, "parallel with prefetching", ("parallel", cpu.LINES_AHEAD)),
        (52, "parallel with prefetching", ("parallel", 0)),
        (49, "parallel with prefetching", ("serial", None)),
        (60, "serial with prefetching", ("serial", cpu.LINES_AHEAD)),
        (60, "auto", ("serial", None)),
    ],
)
def test_small_runs_neither_prefetch_nor_use_threads(size, variant, expected, small_trials):
    backend = RMSProp([np.zeros(60), np.zeros(size, np.float32)]).backend
    assert backend.variant_of(backend._runs[1], variant) == expected


def test_explain_says_what_runs_and_why(small_trials):
    opt = RMSProp([np.zeros(60), np.zeros(3, np.float32)], num_threads=2)
    opt.step()
    large, small = opt.explain()
    assert large.startswith("group 0, 60 float64 in 1 array: ")
    assert "small" not in large
    assert small == "group 0, 3 float32 in 1 array: serial; threads do not pay below 50 elements"
    opt.kernel = "numpy"
    assert opt.explain()[0].endswith("numpy, as requested")
    one = RMSProp([np.zeros(52)], num_threads=1)
    assert one.explain() == ["group 0, 52 float64 in 1 array: serial; only one thread is available"]
    assert one.backend._tuner is None


def test_only_auto_with_many_elements_and_threads_is_watched():
    many = [np.zeros(tuner.TRY_PARALLEL_FROM)]  # too few for prefetching to gain
    assert RMSProp(many).backend._tuner is not None
    assert RMSProp([np.zeros(tuner.TRY_PARALLEL_FROM - 1)]).backend._tuner is None
    for kernel in ("numpy", "serial", "parallel"):
        opt = RMSProp(many, kernel=kernel)
        assert opt.backend._tuner is None
        opt.kernel = "auto"
        assert opt.backend._tuner is not None
        opt.num_threads = 1
        assert opt.backend._tuner is None
    if JIT:
        one_thread = RMSProp([np.zeros(tuner.TRY_PREFETCHING_FROM)], num_threads=1)
        assert one_thread.explain()[0].endswith("; after 2 s of training, auto also tries serial with prefetching")


def test_a_variable_of_the_environment_turns_trials_off(monkeypatch):
    many = [np.zeros(tuner.TRY_PREFETCHING_FROM)]
    for value, tries in {"0": False, "1": True}.items():
        monkeypatch.setenv("FASTRMS_TUNE", value)
        opt = RMSProp(many)
        assert (opt.backend._tuner is not None) == tries
        assert ("FASTRMS_TUNE" in opt.explain()[0]) == (not tries)


def test_num_threads_holds_during_the_step_only(monkeypatch):
    seen = []

    def note(*arguments):
        seen.append(numba.get_num_threads())

    monkeypatch.setitem(plan.FROM_TABLE if JIT else UPDATES, "parallel", note)
    before = numba.get_num_threads()
    opt = RMSProp([np.zeros(10)], kernel="parallel", num_threads=1)
    opt.step()
    opt.num_threads = 2
    opt.step()
    opt.num_threads = None
    opt.step()
    assert seen == [1, 2, before]
    assert numba.get_num_threads() == before


def test_num_threads_is_given_back_after_an_error(monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(plan.FROM_TABLE if JIT else UPDATES, "parallel", fail)
    before = numba.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        RMSProp([np.zeros(10)], kernel="parallel", num_threads=1).step()
    assert numba.get_num_threads() == before


@pytest.mark.parametrize(
    ("users_own", "expected"),
    [
        ({}, f"GOMP_SPINCOUNT = '{threads.SPIN_COUNT}'"),
        ({"OMP_WAIT_POLICY": "passive"}, "GOMP_SPINCOUNT = '0'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
    ],
    ids=["nothing set", "policy set", "count set"],
)
def test_idle_threads_spin_for_a_moment_only_unless_the_user_says_otherwise(users_own, expected):
    """GNU OpenMP prints at its start what it took from the environment."""
    program = """if True:
        import os
        before = dict(os.environ)
        import numba, numpy as np
        from fastrms import RMSProp
        RMSProp([np.ones(3)], kernel="parallel").step()
        assert dict(os.environ) == before
        print(numba.threading_layer())
    """
    theirs = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in theirs} | users_own
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "NUMBA_THREADING_LAYER": "omp", "NUMBA_DISABLE_JIT": "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "omp"
    assert expected in run.stderr


def test_a_plan_that_ctrl_c_has_ended_begins_anew():
    tuner = Tuner(["serial", "parallel"])
    tuner.step_done()
    with pytest.raises(KeyboardInterrupt):
        tuner._plan.throw(KeyboardInterrupt)
    for _ in range(3):
        tuner.step_done()
    assert tuner.variant == "serial"
