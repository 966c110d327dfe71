"""Gradients that are handed over one by one, alias the gradient buffer, or are too long for one message."""

import numpy as np
from on_ranks.shared import (
    LAST,
    LAYOUTS,
    RANK,
    STEPS,
    ShardedRMSProp,
    add,
    assert_same,
    assert_same_params,
    gradients_of,
    params_of,
    raises,
    raises_on,
    some_pairs,
    take_step,
)

import fastrms
from fastrms import RMSProp, StructureError
from fastrms.mpi import buckets, communicator


def handed_over_in_any_order():
    """Two optimizers, on each rank in another order, in small buckets; one rank may pass a dict instead."""
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 20, 2  # so that both kinds of reductions are used
    layout = LAYOUTS["mixed"]
    params = params_of(layout)
    opt, other, alone = (cls(params, momentum=0.9) for cls in (ShardedRMSProp, ShardedRMSProp, RMSProp))
    rng = np.random.default_rng(RANK)
    for step in range(2 * STEPS):
        gradients = gradients_of(layout, step)
        mine = gradients[RANK]
        passes_dict = step % 3 == 2 and RANK == 0
        keys = [(each, key) for each in (opt, other) for key in mine]
        rng.shuffle(keys)
        for each, key in keys:
            if each is opt and passes_dict:
                continue
            if key == "W":
                each.grads["W"][...] = mine["W"]
                each.ready(key, each.grads["W"])
            else:
                each.ready(key, mine[key])
        opt.step(mine if passes_dict else None)
        other.step()
        alone.step(add(gradients))
        assert_same(opt, alone)
        assert_same(other, alone)
    assert opt._ranks.channel.requests == []
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 1 << 20, 4
    # A single array has no key of its own.
    single = ShardedRMSProp(np.ones(20))
    single.ready((), np.ones(20))
    assert single.step() is single.params


def refused_when_handed_over_or_in_the_step():
    """Nothing has changed after an error, and the next step works; `discard` forgets what was handed over."""
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 20, 2
    layout = LAYOUTS["mixed"]
    opt, alone = (cls(params_of(layout), momentum=0.9) for cls in (ShardedRMSProp, RMSProp))
    gradients = gradients_of(layout, 0)
    mine = gradients[RANK]
    raises(StructureError, "key: expected one of 'W', 'b', 'c', 'd', 'e', 'f', got 'w'", opt.ready, "w", mine["W"])
    raises(StructureError, "key: expected one of", opt.ready, ["W"], mine["W"])
    raises(StructureError, "gradients['W']: expected shape (13, 7), got (7, 13)", opt.ready, "W", mine["W"].T)
    raises(fastrms.DtypeError, "gradients['b']: expected an array", opt.ready, "b", "text")
    assert not opt._shards._buckets.begun
    for key in mine:
        if RANK != LAST or key not in ("b", "d"):
            opt.ready(key, mine[key])
    if RANK != LAST:
        raises(
            StructureError, "gradients['b']: expected one call of ready() before each step", opt.ready, "b", mine["b"]
        )
    raises_on(LAST, StructureError, "got none for ['b'], ['d']; call ready(key, None)", opt.step)
    for key in mine:
        opt.ready(key, mine[key])
    raises_on(LAST, StructureError, "expected step() without an argument after ready()", opt.step,
              mine if RANK == LAST else None)  # fmt: skip
    if RANK == LAST:
        opt.ready("f", mine["f"])
    opt.discard()
    opt.discard()
    assert_same_params(opt, alone)
    for way in ("ready", "dict"):
        take_step(opt, mine, way, np.random.default_rng(RANK))
        alone.step(add(gradients))
        assert_same(opt, alone)
    assert opt._ranks.channel.requests == []
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 1 << 20, 4


def longer_than_one_message():
    """With limits that these arrays exceed: steps, `state_dict` and `load_state_dict`."""
    communicator.MAX_ELEMENTS, communicator.BLOCK_SIZE = 10, 7
    layout = LAYOUTS["odd"] | LAYOUTS["mixed"]
    opt, alone = ShardedRMSProp(params_of(layout, seed=RANK), centered=True), RMSProp(params_of(layout), centered=True)
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        opt.step(gradients[RANK])
        alone.step(add(gradients))
    assert_same(opt, alone)
    state = opt.state_dict()
    opt.step(gradients[RANK])
    opt.load_state_dict(state)
    assert_same(opt, alone)
    communicator.MAX_ELEMENTS, communicator.BLOCK_SIZE = 2**28 - 1, 1 << 22


def aliases_of_the_gradient_buffer():
    """Gradients that lie in the gradient buffer, at other places, behind wrappers that hide it."""
    wrappers = [
        lambda view: np.lib.stride_tricks.as_strided(view),
        lambda view: np.asarray(memoryview(view)),
        lambda view: np.frombuffer(view, view.dtype).reshape(view.shape),
        lambda view: np.from_dlpack(view),
        lambda view: np.lib.stride_tricks.sliding_window_view(view, view.shape).reshape(view.shape),
    ]
    layout = dict.fromkeys("abc", ((40,), np.float64))
    params = params_of(layout)
    for wrap, way in some_pairs(wrappers, ["dict", "ready"]):
        opt, alone = ShardedRMSProp(params), RMSProp(params)
        for step in range(3):
            gradients = gradients_of(layout, step)
            for name, gradient in gradients[RANK].items():
                opt.grads[name][...] = gradient
            a, b, c = (wrap(opt.grads[name]) for name in "abc")
            if way == "dict":
                opt.step({"a": b, "b": c, "c": a})  # all are read before any is written
                alone.step(add([{"a": each["b"], "b": each["c"], "c": each["a"]} for each in gradients]))
            else:  # each has the values that lie there when it is handed over
                opt.ready("a", b)
                opt.ready("b", wrap(opt.grads["b"])[::-1])
                opt.ready("c", a)
                opt.step()
                alone.step(add([{"a": each["b"], "b": each["b"][::-1], "c": each["b"]} for each in gradients]))
        assert_same(opt, alone, way)
