"""Signal handlers in the midst of a step, of a save and of a setting: state and counts are of one step."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from helpers import JIT, steps, whole
from mid_step import OPTIONS, at_every_line, make

from fastrms import RMSProp, StepInProgressError

STEPPING = {"step", "take", "_make_calls", "make_plan", "use_options", "_locate", "_in_place", "refuse_replaced"}
SETTING = {"_set_options", "assign", "with_changes", "add_state", "add_buffers", "options_changed", "update"}


@pytest.mark.skipif(not JIT, reason="where compiled code is the interpreter's, a step has lines between updates")
@pytest.mark.parametrize("name", ["momentum", "centered", "lr", "clip_norm"])
def test_an_option_that_a_signal_handler_sets_in_a_step_holds_from_the_next_on(name, rng):
    start, gradients = [rng.standard_normal(5)], [rng.standard_normal(5)]

    def make():
        opt = RMSProp(start, kernel="serial")
        opt.step(gradients)
        opt.weight_decay = 0.0  # so that the calls of the step are made anew
        return opt

    def handler(opt):
        setattr(opt, name, OPTIONS[name])

    for number, opt in at_every_line(make, lambda opt: opt.step(gradients), handler, STEPPING):
        other = RMSProp(start, kernel="numpy")
        other.load_state_dict(opt.state_dict())
        for _ in range(2):
            for optimizer in (opt, other):
                optimizer.step(gradients)
            assert whole(opt) == whole(other), f"line {number}"
    assert number > 30


def test_an_option_that_a_signal_handler_sets_while_another_one_is_set_holds(rng):
    start, gradients = [rng.standard_normal(5)], [rng.standard_normal(5)]

    def make():
        opt = RMSProp(start)
        opt.step(gradients)
        return opt

    def handler(opt):
        opt.momentum = 0.9
        opt.step(gradients)

    for number, opt in at_every_line(make, lambda opt: setattr(opt, "lr", 0.5), handler, SETTING):
        assert (opt.lr, opt.momentum) == (0.5, 0.9), f"line {number}"
        other = RMSProp(start, kernel="numpy")
        other.load_state_dict(opt.state_dict())
        for optimizer in (opt, other):
            optimizer.step(gradients)
        assert whole(opt) == whole(other), f"line {number}"
    assert number > 10


def test_ctrl_c_while_an_option_is_set_leaves_nothing_stale(rng):
    """Steps after it use the options that can be read, be they the old or the new ones."""
    start, gradients = [rng.standard_normal(5)], [rng.standard_normal(5)]

    def make():
        opt = RMSProp(start)
        opt.step(gradients)
        return opt

    def act(opt):
        with suppress(KeyboardInterrupt):
            opt.lr = 0.5

    def handler(opt):
        raise KeyboardInterrupt

    found = set()
    for number, opt in at_every_line(make, act, handler, SETTING):
        found.add(opt.lr)
        other = RMSProp(start, kernel="numpy")
        other.load_state_dict(opt.state_dict())
        for optimizer in (opt, other):
            optimizer.step(gradients)
        assert whole(opt) == whole(other), f"line {number}"
    assert found == {1e-3, 0.5}


def trajectory(make, gradients, count):
    """All that `state_dict` has after each step, as bytes."""
    opt, states = make(), []
    for step in range(count + 1):
        states.append(whole(opt))
        opt.step(gradients(step))
    return states


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
@pytest.mark.parametrize("kernel", ["numpy", "serial", "parallel"])
@pytest.mark.parametrize("way", ["list", "none", "buffer", "cast"])
def test_a_signal_handler_that_saves_finds_state_and_counts_of_one_step(way, kernel, rng):
    shapes = [(40, 5), (3,), (300,)]
    start = [rng.standard_normal(shape) for shape in shapes]
    fixed = [rng.standard_normal(shape) for shape in shapes]
    count = steps(400)

    def make():
        groups = [{"params": [start[0]]}, {"params": [start[1].astype(np.float32)], "momentum": 0.5},
                  {"params": [start[2]], "bias_correction": True}]  # fmt: skip
        return RMSProp(groups, kernel=kernel)

    def gradients(step):
        if way == "none" and step % 2:
            return [[None], [fixed[1].astype(np.float32)], [fixed[2]]]
        if way == "cast":
            return [[g.astype(np.longdouble)] for g in fixed]
        return [[fixed[0]], [fixed[1].astype(np.float32)], [fixed[2]]]

    states = trajectory(make, gradients, count)
    opt = make()
    found, refused = [], []

    def handler(number, frame):
        try:
            found.append(whole(opt))
        except StepInProgressError:
            refused.append(opt.steps)
        if trains:  # the handler may come right after the timer is stopped
            signal.setitimer(signal.ITIMER_REAL, 2e-4)  # not by itself: a handler would come into the handler

    trains = True
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
    try:
        for step in range(count):
            if way == "buffer":
                opt.buffers["grads"].gather(gradients(step))
                opt.step()
            else:
                opt.step(gradients(step))
    finally:
        trains = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(found) > (10 if JIT else 0)
    for state in found:
        assert state == states[state["steps"]]
    # Compiled kernels and the count after them are one operation, into which no handler comes.
    assert not refused or kernel != "serial" or not JIT
    assert whole(opt) == states[count]


def test_a_handler_in_the_midst_of_parts_of_a_file_is_refused(rng, tmp_path):
    """Steps on mapped files are made of many calls: there the state of one step is only between steps."""
    opt = RMSProp([rng.standard_normal(1000)], storage=tmp_path / "folder")
    in_parts, seen = opt.backend.storage.pages.call_in_parts, []

    def interrupted(*call):
        in_parts(*call)
        with pytest.raises(StepInProgressError, match=r"^save: expected a call between two steps"):
            opt.save(tmp_path / "state.npz")
        seen.append(opt.steps)

    opt.backend.storage.pages.call_in_parts = interrupted
    opt.step()
    assert seen == [0]
    opt.save(tmp_path / "state.npz")
    opt.close()


def test_a_handler_may_not_step_while_the_state_is_saved_or_loaded(rng, tmp_path, monkeypatch):
    opt, gradients = make(rng)
    opt.step(gradients)
    expected, seen = whole(opt), []
    backend = type(opt.backend)
    parts = backend.parts

    def asking(self, array):
        with pytest.raises(StepInProgressError, match=r"^step: .* during a step, save or load"):
            opt.step(gradients)
        seen.append(array)
        return parts(self, array)

    monkeypatch.setattr(backend, "parts", asking)
    opt.save(tmp_path / "state.npz")
    state = opt.state_dict()
    assert len(seen) >= 2
    write = backend.write

    def looking(self, segment, values):
        for call in (opt.step, opt.state_dict, lambda: opt.load_state_dict(state)):
            with pytest.raises(StepInProgressError, match=r"during a step, save or load"):
                call()
        seen.append(segment)
        write(self, segment, values)

    monkeypatch.setattr(backend, "write", looking)
    opt.load(tmp_path / "state.npz")
    opt.load_state_dict(state)
    monkeypatch.undo()
    assert len(seen) >= 6
    assert whole(opt) == whole(RMSProp.from_checkpoint(tmp_path / "state.npz")) == expected
    opt.step(gradients)


def test_a_handler_may_look_while_the_state_is_saved(rng, tmp_path, monkeypatch):
    opt, gradients = make(rng)
    opt.step(gradients)
    expected, seen = whole(opt), []
    backend = type(opt.backend)
    parts = backend.parts

    def looking(self, array):
        monkeypatch.undo()  # once, as looking asks for parts too
        seen.append(whole(opt))
        return parts(self, array)

    for call in (opt.state_dict, lambda: opt.save(tmp_path / "state.npz")):
        monkeypatch.setattr(backend, "parts", looking)
        call()
    assert seen == [expected, expected]


INTERRUPTED = """if True:
    import sys
    import numpy as np
    from numba.core import event
    from fastrms import RMSProp

    class Interrupt(event.Listener):
        left = int(sys.argv[1])
        def on_start(self, event):
            Interrupt.left -= 1
            if Interrupt.left < 0:
                raise KeyboardInterrupt
        def on_end(self, event):
            pass

    groups = [{"params": [np.ones(3)]}, {"params": [np.ones(3, "f")], "momentum": 0.5}]
    opt = RMSProp(groups, bias_correction=True, kernel="serial")
    event.register("numba:compile", Interrupt())
    try:
        opt.step([[None], [np.ones(3)]])
    except KeyboardInterrupt:
        print("interrupted")
    print(opt.steps, opt.backend.state.counts.absent.tolist(), [float(p[0][0]) for p in opt.params])
"""


@pytest.mark.skipif(not JIT, reason="about compiling")
def test_ctrl_c_in_the_first_compilation_counts_nothing(tmp_path):
    for number in range(0, 200, 20):  # of some 40 functions that are compiled
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / str(number))}
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, str(number)], env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if not done.stdout.startswith("interrupted"):
            break
        assert done.stdout == "interrupted\n0 [0, 0] [1.0, 1.0]\n", done.stderr
    assert done.stdout.startswith("1 [1, 0] [1.0, 0."), done.stderr
    assert number > 10


def test_an_option_that_a_handler_sets_while_the_state_is_read_belongs_to_a_later_state(rng, tmp_path, monkeypatch):
    """It brings a buffer, which a state that began before it does not have."""
    opt, gradients = make(rng)
    opt.step(gradients)
    backend = type(opt.backend)
    read = backend.read

    def setting(self, segment):
        opt.momentum = 0.5
        return read(self, segment)

    for take in (opt.state_dict, lambda: opt.save(tmp_path / "state.npz")):
        opt.momentum = 0.0
        vars(opt.backend.state)["buffers"].pop("momentum_buffer", None)
        monkeypatch.setattr(backend, "read", setting)
        state = take()
        monkeypatch.undo()
        assert opt.momentum == 0.5
        other = make(rng)[0]
        if state is None:
            other.load(tmp_path / "state.npz")
        else:
            other.load_state_dict(state)
        assert other.momentum == 0.0
