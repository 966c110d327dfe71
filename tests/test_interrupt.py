"""Ctrl-C at every line of Python that a step runs: parameters, state and counts are as before it or as after it."""

import copy
import gc
import itertools
import linecache
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import JIT, whole

import fastrms
from fastrms import RMSProp
from fastrms.kernels import pointers

PACKAGE = str(Path(fastrms.__file__).parent)
SHAPES = [(40, 5), (), (65,)]
DTYPES = [np.float32, np.float64, np.float64]


KERNELS, WAYS = ["serial", "parallel", "auto"], ["list", "cast", "none", "buffer"]
OPTIONS = [
    {}, {"momentum": 0.9, "nonfinite": "raise"}, {"clip_norm": 1.0, "centered": True, "bias_correction": True},
    {"num_threads": 1},
]  # fmt: skip
# Kernels with ways to give gradients, first and later steps. Each set of options meets each of these once at least.
KINDS = [
    (KERNELS[k], WAYS[w], steady, OPTIONS[(k + w + 2 * steady) % len(OPTIONS)])
    for k, w, steady in itertools.product(range(len(KERNELS)), range(len(WAYS)), [False, True])
]


def interrupted(function, number):
    """Call a function with Ctrl-C at the line of that number, counted from 0; whether it came that far."""
    seen, entered = 0, set()  # the latter with frames, as that of a generator is entered again

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None

        def at_line(frame, event, argument):
            nonlocal seen
            if event != "line":
                return at_line
            # The line of a with statement comes again ahead of the call of __exit__; no signal handler comes there.
            line = frame.f_lineno
            if (frame, line) in entered:
                return at_line
            if linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("with "):
                entered.add((frame, line))
            seen += 1
            if seen == number + 1:
                sys.settrace(None)
                raise KeyboardInterrupt
            return at_line

        return at_line

    before = sys.gettrace()
    gc.disable()  # it would call __del__ of earlier optimizers, which is no part of this
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return seen > number


def elsewhere(function):
    """What a function returns on another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def arrays(rng):
    return [np.asarray(rng.standard_normal(s)).astype(d) for s, d in zip(SHAPES, DTYPES, strict=True)]


def of_each_parameter(opt):
    """Value and state of each parameter, as bytes."""
    buffers = [buffer for name, buffer in opt.buffers.items() if name != "grads"]
    return [b"".join(buffer.leaves[k].tobytes() for buffer in buffers) for k in range(len(SHAPES))]


def ways(opt, gradients):
    def from_buffer():
        opt.buffers["grads"].gather(gradients)
        opt.step()

    return {
        "list": lambda: opt.step(gradients),
        "cast": lambda: opt.step([g.astype(np.longdouble) for g in gradients]),
        "none": lambda: opt.step([None, *gradients[1:]]),
        "buffer": from_buffer,
    }


@pytest.mark.skipif(not JIT, reason="compiled code cannot be interrupted, the interpreter's can")
@pytest.mark.parametrize(("kernel", "way", "steady", "options"), KINDS)
def test_ctrl_c_at_every_line_of_a_step(kernel, way, steady, options, rng):
    start = RMSProp(arrays(rng), kernel=kernel, **options)
    first, gradients = arrays(rng), arrays(rng)
    start.step(first)
    done = copy.deepcopy(start)
    ways(done, gradients)[way]()
    before, after = whole(start), whole(done)
    found = set()
    for number in range(10_000):
        opt = copy.deepcopy(start)
        if steady:  # so that the short ways are taken that a second step has
            state = opt.state_dict()
            ways(opt, gradients)[way]()
            opt.load_state_dict(state)
        if not interrupted(ways(opt, gradients)[way], number):
            break
        now = whole(opt)
        assert now in (before, after), f"line {number}"
        assert opt.check() == []
        found.add((now == before, now == after))
        # And it goes on, in this thread and in others: no lock is held.
        assert elsewhere(
            lambda opt=opt: opt.backend.turns.lock.acquire(blocking=False) and opt.backend.turns.lock.release() is None
        )
        opt.step(first)
        assert whole(opt) != now
    assert number > 10
    assert (True, False) in found
    assert (False, True) in found


# A file that is being opened at that moment is closed by the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_ctrl_c_at_every_line_of_saving(kind, rng, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    opt = RMSProp(arrays(rng))
    path = tmp_path / f"state.{kind}"
    opt.save(path)
    old = path.read_bytes()
    opt.step(arrays(rng))
    other = tmp_path / f"other.{kind}"
    opt.save(other)
    new = other.read_bytes() if kind == "safetensors" else None
    found = set()
    for number in range(10_000):
        path.write_bytes(old)
        if not interrupted(lambda: opt.save(path), number):
            break
        now = path.read_bytes()
        loaded = RMSProp.from_checkpoint(path)
        assert now == old or of_each_parameter(loaded) == of_each_parameter(opt)
        assert now in (old, new) or new is None
        found.add(now == old)
    assert found == {True, False}


@pytest.mark.parametrize("what", ["load", "an option of all groups", "an option of the whole"])
def test_after_ctrl_c_at_every_line_of_setting_options_steps_do_what_these_say(what, rng):
    start, gradients = arrays(rng), arrays(rng)
    saved = RMSProp(start, lr=0.2, global_clip_norm=0.1)
    saved.step(gradients)
    act = {
        "load": lambda opt: opt.load_state_dict(saved.state_dict()),
        "an option of all groups": lambda opt: setattr(opt, "lr", 0.2),
        "an option of the whole": lambda opt: setattr(opt, "global_clip_norm", 0.1),
    }[what]
    number, came = 0, True
    while came:
        opt, other = RMSProp(start), RMSProp(start)
        for _ in range(2):
            opt.step(gradients)
        came = interrupted(lambda opt=opt: act(opt), number)
        other.load_state_dict(opt.state_dict())
        for each in (opt, other):
            each.step(gradients)
        assert whole(opt) == whole(other), f"line {number}"
        number += 1
    assert number > 10


def test_the_short_ways_are_there():
    """Otherwise the lines of `test_ctrl_c_at_every_line_of_a_step` would be others than those of usual steps."""
    assert pointers.available() or not JIT
