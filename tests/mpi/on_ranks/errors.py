"""All ranks raise or none: different parameters, options or calls, errors on one rank, time limits."""

import itertools
import os
import time
from contextlib import suppress

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
    assert_same_params,
    folder,
    gradients_of,
    params_of,
    raises,
    raises_on,
)

import fastrms
from fastrms import RankError, RMSProp, StructureError
from fastrms.mpi import communicator

LAYOUT = LAYOUTS["mixed"]


def parameters_and_options_are_compared_when_the_optimizer_is_made():
    assert_same_params(ShardedRMSProp(params_of(LAYOUT, seed=RANK)), RMSProp(params_of(LAYOUT)))
    ShardedRMSProp(params_of(LAYOUT), check_params="raise")
    called = []
    scheduled = ShardedRMSProp(params_of(LAYOUT), lr=lambda step: called.append(step) or 0.1)
    for _ in range(2):
        scheduled.step(params_of(LAYOUT))
    assert called == [0, 1]  # once a step, and not before
    raises(fastrms.OptionTypeError, "comm: expected an intracommunicator", lambda: ShardedRMSProp(np.ones(3), comm=7))
    raises(fastrms.OptionError, "reduction: expected one of", lambda: ShardedRMSProp(np.ones(3), reduction="max"))
    raises(fastrms.OptionError, "check_params: expected", lambda: ShardedRMSProp(np.ones(3), check_params="no"))
    raises(TypeError, "unexpected keyword argument 'moment'", lambda: ShardedRMSProp(np.ones(3), moment=0.9))
    if SIZE == 1:
        return
    different = params_of(LAYOUT)
    different["c"][1, 2] += RANK == LAST
    others = f"on all ranks, got different ones on rank {LAST} than on rank 0"
    raises(StructureError, f"params['c']: expected the same values {others}",
           lambda: ShardedRMSProp(different, check_params="raise"))  # fmt: skip
    raises(StructureError, f"params: expected the same structure, shapes, dtypes, check_params and in_place {others}",
           lambda: ShardedRMSProp(np.ones(3 + (RANK == LAST))))  # fmt: skip
    raises(fastrms.OptionError, f"options: expected the same {others}",
           lambda: ShardedRMSProp(np.ones(3), momentum=0.5 * (RANK == LAST)))  # fmt: skip
    rate = 2.0 if RANK == LAST else 0.9
    raises_on(LAST, fastrms.OptionError, "decay_rate: expected", lambda: ShardedRMSProp(np.ones(3), 0.1, rate))
    raises_on(0, fastrms.DtypeError, "params['a']: expected float32 or float64, got int64",
              lambda: ShardedRMSProp({"a": np.ones(3, np.int64 if RANK == 0 else np.float64)}))  # fmt: skip


def errors_in_steps_raise_on_all_ranks():
    """Each rank raises, its own error or one that names the rank; nothing has changed, and the next step works."""
    params = params_of(LAYOUT)
    opt, alone = ShardedRMSProp(params, momentum=0.9), RMSProp(params, momentum=0.9)
    for step, (kind, text, change) in enumerate([
        (StructureError, "gradients['c']: expected shape (3, 30), got (2,)", {"c": np.ones(2)}),
        (fastrms.DtypeError, "gradients['b']: expected an array", {"b": "text"}),
        (StructureError, "gradients: unknown 'x'", {"x": np.ones(3)}),
    ]):  # fmt: skip
        gradients = gradients_of(LAYOUT, step)
        raises_on(LAST, kind, text, opt.step, gradients[RANK] | (change if RANK == LAST else {}))
        opt.step(gradients[RANK])
        alone.step(add(gradients))
        assert_same(opt, alone)
    mine = opt.params["W"]
    if RANK == 0:
        opt.params["W"] = mine.copy()
    raises_on(0, StructureError, "params['W']: expected the original view", opt.step, gradients[RANK])
    opt.params["W"] = mine
    opt.lr = lambda step: 1 / 0 if RANK == LAST else 0.1
    raises_on(LAST, ZeroDivisionError, "division", opt.step, gradients[RANK])
    opt.lr = 0.1
    opt.nonfinite = "raise"
    with np.errstate(over="raise"):  # the cast gives inf, whatever NumPy's settings are
        raises(fastrms.NonfiniteError, "gradients['c']: 0 NaN and 90 inf among 90 values", opt.step,
               gradients[RANK] | {"c": np.full((3, 30), 1e300 if RANK == LAST else 1)})  # fmt: skip
    opt.nonfinite = "propagate"
    if SIZE > 1:
        opt.lr = 0.1 + RANK
        raises(fastrms.OptionError, "lr: expected the same on all ranks, got different ones on rank", opt.step,
               gradients[RANK])  # fmt: skip
        opt.lr = 0.1
        opt.param_groups[0]["epsilon"] = 1e-8 + 1e-3 * (RANK == LAST)
        raises(fastrms.OptionError, f"options: expected the same on all ranks, got different ones on "
               f"rank {LAST} than on rank 0;", opt.step, gradients[RANK])  # fmt: skip
        opt.param_groups[0]["epsilon"] = 1e-8
    alone.lr = 0.1
    opt.step(gradients[RANK])
    alone.step(add(gradients))
    assert_same(opt, alone)
    # What a user writes into the parameters is what the next step starts from.
    opt.params["W"][...] = alone.params["W"][...] = 2.0
    opt.step(gradients[RANK])
    alone.step(add(gradients))
    assert_same(opt, alone)


def different_calls_raise_on_all_ranks():
    """Nothing has changed, gradients that were handed over are kept, and the ranks can go on."""
    params = params_of(LAYOUT)
    opt, alone = ShardedRMSProp(params, momentum=0.9), RMSProp(params, momentum=0.9)
    state = opt.state_dict()
    path = folder() / "different.npz"

    def call(name):
        return {
            "step": lambda: opt.step(gradients[RANK]),
            "save": lambda: opt.save(path),
            "load": lambda: opt.load(path),
            "load_state_dict": lambda: opt.load_state_dict(state),
            "add_param_group": lambda: opt.add_param_group({"params": [np.ones(3)]}),
        }.get(name, lambda: getattr(opt, name)())

    calls = ["step", "discard", "state_dict", "load_state_dict", "save", "load", "add_param_group"]
    pairs = list(itertools.permutations(calls, 2)) if SIZE == 2 else [("save", "step"), ("step", "load")]
    for number, (mine, theirs) in enumerate(pairs if SIZE > 1 else ()):
        gradients = gradients_of(LAYOUT, number)
        begun = number % 3 == 0
        if begun:
            for key, gradient in gradients[RANK].items():
                opt.ready(key, gradient)
        one, others = ("step", "state_dict") if begun else (mine, theirs)
        error = raises(RankError, "expected the same call on all ranks, got ", call(one if RANK == LAST else others))
        assert f"{one}() on rank {LAST}; nothing was changed" in str(error), str(error)
        assert f"on rank{'s 0,' if SIZE > 2 else ' 0,'} " in str(error), str(error)
        opt.step(None if begun else gradients[RANK])
        alone.step(add(gradients))
        assert_same(opt, alone, f"{mine}, {theirs}")
    assert not path.exists()


def different_options_or_kinds_of_state_are_found_by_checkpoints():
    if SIZE == 1:
        return
    opt, alone = (cls(params_of(LAYOUT)) for cls in (ShardedRMSProp, RMSProp))
    state, path = opt.state_dict(), folder() / "different.npz"
    if RANK == LAST:
        opt.param_groups[0]["centered"] = True
        opt.param_groups[0]["centered"] = False  # and keeps its mean gradient
    calls = [
        opt.state_dict, lambda: opt.save(path), lambda: opt.load(path), lambda: opt.load_state_dict(state)
    ]  # fmt: skip
    for call in calls:
        raises(fastrms.OptionError, "options or kinds of state: expected the same on all ranks, got different ones on "
               f"rank {LAST} than on rank 0", call)  # fmt: skip
    opt.param_groups[0]["centered"] = True
    opt.param_groups[0]["epsilon"] = 1e-8 + 1e-3 * (RANK == LAST)
    raises(fastrms.OptionError, "options or kinds of state: expected", opt.state_dict)
    opt.load_state_dict(alone.state_dict())  # makes the options the same
    assert (opt.epsilon, opt.param_groups[0]["centered"]) == (1e-8, False)
    opt.state_dict()


def an_error_of_one_rank_ends_all_after_one_that_all_raised():
    """An error is not taken for an earlier one that all ranks raised and that is gone, at whose address it may lie."""
    ranks = ShardedRMSProp(np.ones(3))._ranks
    ended = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicator, "end_all", ended.append)
        for k in range(100):
            with suppress(ValueError), ranks.leaving():
                raise ranks.all_raise(ValueError(k))
            assert len(ended) == k * (SIZE > 1)
            with suppress(ValueError), ranks.leaving():
                raise ValueError(k)
    assert len(ended) == 100 * (SIZE > 1)


def timeout_values_and_late_ranks():
    """All values of `timeout`, and ranks that come late but in time."""
    os.environ.pop("FASTRMS_MPI_TIMEOUT", None)
    given = [("auto", 600.0), (None, None), (0, None), (np.inf, None), (2, 2.0), (np.float32(0.5), 0.5)]
    for value, expected in given:
        assert ShardedRMSProp(np.ones(3), timeout=value).timeout == expected
    os.environ["FASTRMS_MPI_TIMEOUT"] = "17"
    opt = ShardedRMSProp(np.ones(3), lr=0.1)
    assert (opt.timeout, ShardedRMSProp(np.ones(3), timeout=3).timeout) == (17, 3)
    os.environ["FASTRMS_MPI_TIMEOUT"] = "0"
    assert ShardedRMSProp(np.ones(3)).timeout is None
    os.environ["FASTRMS_MPI_TIMEOUT"] = "soon"
    raises(fastrms.OptionError, "the environment variable FASTRMS_MPI_TIMEOUT: expected a number of seconds >= 0, got "
           "'soon'", lambda: ShardedRMSProp(np.ones(3)))  # fmt: skip
    del os.environ["FASTRMS_MPI_TIMEOUT"]
    for value, kind in [(-1, fastrms.OptionError), (np.nan, fastrms.OptionError), (True, fastrms.OptionTypeError),
                        ("1", fastrms.OptionTypeError), ([2], fastrms.OptionTypeError)]:  # fmt: skip
        raises(kind, 'timeout: expected a number of seconds >= 0, None or "auto", got', setattr, opt, "timeout", value)
        raises_on(LAST, kind, "timeout: expected a number of seconds >= 0",
                  lambda value=value: ShardedRMSProp(np.ones(3), timeout=value if RANK == LAST else 5))  # fmt: skip
    assert opt.timeout == 17
    for opt.timeout in (20, None):
        time.sleep(0.2 * RANK)
        opt.step(np.ones(3))
    opt._ranks._meeting = None  # as with a library of MPI 3, which has no persistent collectives
    time.sleep(0.2 * RANK)
    opt.step(np.ones(3))
    assert opt.steps == 3
