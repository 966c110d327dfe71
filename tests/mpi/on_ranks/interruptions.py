"""Code of the user's that runs during a step, signals and threads that come in between, and a lack of memory."""

import functools
import gc
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from on_ranks.shared import (
    LAST,
    LAYOUTS,
    RANK,
    SIZE,
    ShardedRMSProp,
    add,
    assert_same,
    folder,
    gradients_of,
    params_of,
    raises,
    some_pairs,
)

import fastrms
from fastrms import RankError, RMSProp, StructureError

LAYOUT = LAYOUTS["mixed"]


class Calls:
    """A gradient that calls a function when NumPy converts it."""

    def __init__(self, item, do):
        self.item, self.do = item, do

    def __array__(self, dtype=None, copy=None):
        self.do()
        return self.item


class CallsMapping(Calls, Mapping):
    """A dict of gradients that calls a function when one of them is read."""

    def __getitem__(self, key):
        self.do()
        return self.item[key]

    def __iter__(self):
        return iter(self.item)

    def __len__(self):
        return len(self.item)


def step_with_schedule(opt, gradients, do):
    """Take a step whose learning rate is a function that calls another one."""
    rate = opt.lr
    opt.lr = lambda step: do() or rate
    try:
        opt.step(gradients)
    finally:
        if callable(opt.lr):
            opt.lr = rate


# Steps that call a function of the user's.
STEPS_THAT_CALL = {
    "lr": step_with_schedule,
    "__array__": lambda opt, gradients, do: opt.step(gradients | {"b": Calls(gradients["b"], do)}),
    "__getitem__": lambda opt, gradients, do: opt.step(CallsMapping(gradients, do)),
}


def users_code_that_raises_or_calls_the_optimizer():
    """All ranks raise, for an error on one rank or on all; collective calls are refused; the next step works."""
    path = folder() / "within.npz"
    params = params_of(LAYOUT)
    opt, alone = ShardedRMSProp(params, lr=0.01), RMSProp(params, lr=0.01)
    state = opt.state_dict()

    def fail():
        raise LookupError("no such batch")

    asked = {
        "raise": fail,
        "step": lambda: opt.step(),
        "ready": lambda: opt.ready("W", params["W"]),
        "discard": lambda: opt.discard(),
        "state_dict": lambda: opt.state_dict(),
        "load_state_dict": lambda: opt.load_state_dict(state),
        "save": lambda: opt.save(path),
        "load": lambda: opt.load(path),
    }
    step = 0
    for (place, call), name in some_pairs(STEPS_THAT_CALL.items(), asked):
        # An error in __array__ becomes an error about that gradient.
        kind = LookupError if name == "raise" else fastrms.StepInProgressError
        text = "no such batch" if name == "raise" else f"{name}: expected a call between two steps"
        gradients = gradients_of(LAYOUT, step := step + 1)
        for on_all in (False, True) if SIZE > 1 else (True,):
            for_this = asked[name] if on_all or RANK == LAST else lambda: None
            own = fastrms.DtypeError if place == "__array__" else kind
            with pytest.raises(own if on_all or RANK == LAST else RankError, match=text):
                call(opt, gradients[RANK], for_this)
        opt.step(gradients[RANK])
        alone.step(add(gradients))
        assert_same(opt, alone, f"{place}, {name}")
    assert not path.exists()


def users_code_that_sets_options():
    """On all ranks an option is set as on one process. On one rank only, all raise."""
    params = params_of(LAYOUT)
    changes = [("lr", 0.5, 0.02), ("momentum", 0.9, 0.5), ("centered", True, False), ("weight_decay", 0.1, 0.2),
               ("clip_norm", 0.01, 0.02), ("nonfinite", "raise", "skip")]  # fmt: skip
    for (place, call), (name, value, other) in some_pairs(STEPS_THAT_CALL.items(), changes):
        opt, alone = ShardedRMSProp(params, lr=0.01), RMSProp(params, lr=0.01)
        for step in range(3):
            gradients = gradients_of(LAYOUT, step)
            if step == 1:
                call(opt, gradients[RANK], functools.partial(setattr, opt, name, value))
                call(alone, add(gradients), functools.partial(setattr, alone, name, value))
            else:
                opt.step(gradients[RANK])
                alone.step(add(gradients))
            assert_same(opt, alone, f"{place}, {name}")
        if SIZE > 1:  # on one rank only
            with pytest.raises(fastrms.OptionError, match="expected the same on all ranks, got different ones on rank"):
                call(opt, gradients[RANK], functools.partial(setattr, opt, name, other if RANK == LAST else value))


def a_schedule_that_shrinks_a_gradient():
    opt = ShardedRMSProp([np.ones(200_000), np.ones(3)])
    mine = [np.ones(200_000), np.ones(3)]
    opt.lr = lambda step: mine[0].resize(4, refcheck=False) or 0.1
    raises(StructureError, "gradients[0]: expected shape (200000,), got (4,)", opt.step, mine)


def an_option_without_memory_for_its_state():
    """It is not set on the rank that has no memory, and the step finds that the ranks differ."""
    import resource  # not on Windows

    opt, alone = (cls([np.broadcast_to(np.float32(0), count)])
                  for cls, count in ((ShardedRMSProp, 2_000_000 * SIZE), (RMSProp, 1)))  # fmt: skip

    def step(count):
        opt.grads[0][...] = count
        opt.step()
        alone.step([np.full(1, count * SIZE, np.float32)])
        assert opt.params[0].min() == opt.params[0].max() == alone.params[0][0]

    step(1)
    gc.collect()  # garbage of earlier cases, which a later collection would make room with
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if RANK == LAST:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000, before[1]))
            held = []
            with suppress(MemoryError):  # fill the gaps in the heap, where the state could lie
                held.extend(np.empty(2_000_000, np.float32) for _ in range(1000))
            for set_momentum in (lambda: setattr(opt, "momentum", 0.9),
                                 lambda: opt.param_groups[0].__setitem__("momentum", 0.9),
                                 lambda: opt.param_groups[0].update(nesterov=True, momentum=0.9)):  # fmt: skip
                with pytest.raises(MemoryError):
                    set_momentum()
                assert opt.param_groups[0]["momentum"] == 0
                assert not opt.param_groups[0]["nesterov"]
        else:
            opt.param_groups[0]["momentum"] = 0.9
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    if SIZE > 1:
        raises(fastrms.OptionError, f"options: expected the same on all ranks, got different ones on "
               f"rank {LAST}", opt.step)  # fmt: skip
    opt.param_groups[0]["momentum"] = alone.param_groups[0]["momentum"] = 0.9
    step(2)
    step(3)


def signal_handlers_during_a_step():
    """Collective calls are refused, and options too, once the ranks have compared them."""
    opt, alone = ShardedRMSProp(np.ones(50), lr=0.1), RMSProp(np.ones(50), lr=0.1)
    path = folder() / "handler.npz"
    refused = []

    def handler(number, frame):
        for call in (lambda: opt.save(path), opt.state_dict, opt.discard, opt.step):
            with pytest.raises(fastrms.StepInProgressError, match="expected a call between two steps"):
                call()
            refused.append(opt.steps)
        # Not in `state_dict`, where a change does no harm.
        for name, value in (("lr", 0.2), ("momentum", 0.5), ("nonfinite", "skip"), ("kernel", "numpy")) * in_step[0]:
            kept = getattr(opt, name)
            with pytest.raises(fastrms.StepInProgressError, match="options: expected changes between two steps"):
                setattr(opt, name, value)
            assert getattr(opt, name) == kept
            refused.append(name)

    before = signal.signal(signal.SIGALRM, handler)
    in_step = [True]
    for call in (lambda: opt.step(np.ones(50)), opt.state_dict):  # rank 0 waits in it when the signal comes
        if RANK == 0 and SIZE > 1:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(0.3 * (RANK > 0))
        call()
        in_step[0] = False
    signal.signal(signal.SIGALRM, before)
    assert len(refused) == (12 if RANK == 0 and SIZE > 1 else 0)
    alone.step(np.full(50, float(SIZE)))
    assert_same(opt, alone)


def threads_that_set_an_option_wait_for_the_step():
    opt, alone = ShardedRMSProp(np.ones(50), lr=0.1), RMSProp(np.ones(50), lr=0.1)
    threads = []

    def rate(step):
        threads.append(threading.Thread(target=lambda: setattr(opt, "momentum", 0.5)))
        threads[-1].start()
        threads[-1].join(0.1)
        assert threads[-1].is_alive()
        assert opt.param_groups[0]["momentum"] == 0
        return 0.1

    opt.lr = rate
    opt.step(np.ones(50))
    threads[0].join()
    alone.step(np.full(50, float(SIZE)))
    opt.lr, alone.momentum = 0.1, 0.5
    assert_same(opt, alone)
    opt.step(np.ones(50))
    alone.step(np.full(50, float(SIZE)))
    assert_same(opt, alone)
