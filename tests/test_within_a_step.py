"""What runs in the midst of a step: functions of the user's, signal handlers, other threads.

A step that is asked for within a step is refused. Options may be set at any time, and hold. Whoever looks at the state
finds one that belongs to its counts.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import pytest
from helpers import JIT, assert_same_bits, steps, whole

from fastrms import RMSProp, StepInProgressError

KERNELS = ["numpy", "serial", "parallel"]


class Array:
    """An array of another library, which does something when it is looked at."""

    def __init__(self, array, do):
        self._array, self._do = array, do

    def __array__(self, dtype=None, copy=None):
        self._do()
        return self._array


class Lazy(Mapping):
    """A mapping that does something when an item is taken, or when its length is asked for."""

    def __init__(self, items, do, where):
        self._items, self._do, self._where = items, do, where

    def __getitem__(self, key):
        if self._where == "__getitem__":
            self._do()
        return self._items[key]

    def __len__(self):
        if self._where == "__len__":
            self._do()
        return len(self._items)

    def __iter__(self):
        if self._where == "__iter__":
            self._do()
        return iter(self._items)

    def __contains__(self, key):
        if self._where == "__contains__":
            self._do()
        return key in self._items


# How a step comes to call a function; parameters are {"a": ..., "b": ...}.
def with_rate(opt, gradients, do):
    before = opt.lr

    def rate(step):
        opt.lr = before
        do()
        return before

    opt.lr = rate
    opt.step(gradients)


PLACES = {
    "lr": with_rate,
    "__array__": lambda opt, gradients, do: opt.step({**gradients, "b": Array(gradients["b"], do)}),
    **{
        f"Mapping.{where}": lambda opt, gradients, do, where=where: opt.step(Lazy(gradients, do, where))
        for where in ("__getitem__", "__len__", "__contains__")
    },
}


def make(rng, **options):
    tree = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal(5)}
    return RMSProp(tree, **options), {key: rng.standard_normal(array.shape) for key, array in tree.items()}


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
    with pytest.raises(Exception, match=r"expected a call between two steps, got one in the midst of a step"):
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


OPTIONS = {
    "lr": 0.5,
    "momentum": 0.9,
    "centered": True,
    "weight_decay": 0.1,
    "clip_norm": 0.01,
    "global_clip_norm": 0.01,
    "nonfinite": "raise",
}


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


def at_every_line(make, act, handler, names):
    """Let `handler` come to what `make` makes while `act` is under way, at each line of functions of these names.

    Yields the number of the line and what was made.
    """
    for number in range(10_000):
        made, seen = make(), 0

        def trace(frame, event, argument, number=number, made=made):
            if "fastrms" not in frame.f_code.co_filename or frame.f_code.co_name not in names:
                return None

            def at_line(frame, event, argument):
                nonlocal seen
                if event == "line":
                    seen += 1
                    if seen == number + 1:
                        sys.settrace(None)
                        handler(made)
                return at_line

            return at_line

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            act(made)
        finally:
            sys.settrace(before)
        if seen <= number:
            return
        yield number, made


STEPPING = {"step", "take", "_make_calls", "make_plan", "use_options", "_locate", "_copy", "refuse_replaced"}
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


def trajectory(make, gradients, count):
    """All that `state_dict` has after each step, as bytes."""
    opt, states = make(), []
    for step in range(count + 1):
        states.append(whole(opt))
        opt.step(gradients(step))
    return states


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
@pytest.mark.parametrize("kernel", KERNELS)
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
        signal.setitimer(signal.ITIMER_REAL, 2e-4)  # not by itself: a handler would come into the handler

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


def test_a_handler_may_not_step_while_the_state_is_saved_or_loaded(rng, tmp_path, monkeypatch):
    opt, gradients = make(rng)
    opt.step(gradients)
    expected, seen = whole(opt), []
    backend = type(opt.backend)
    parts = backend.parts

    def asking(self, array):
        with pytest.raises(StepInProgressError, match=r"^step: .* in the midst of a step, save or load"):
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
            with pytest.raises(StepInProgressError, match=r"in the midst of a step, save or load"):
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
    for number in range(0, 200, 12):  # of some 40 functions that are compiled
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
