"""Updates on several ranks have the bits of one process: options, layouts, groups, missing and nonfinite gradients."""

import itertools

import numpy as np
from helpers import assert_same_bits, leaves
from on_ranks.shared import (
    COMM,
    KERNELS,
    LAST,
    LAYOUTS,
    RANK,
    SIZE,
    STEPS,
    ShardedRMSProp,
    add,
    assert_same,
    assert_same_params,
    gradients_of,
    params_of,
    raises,
    take_step,
)

import fastrms
from fastrms import RMSProp, StructureError, mpi

OPTIONS = [
    {},
    {"momentum": 0.9, "nesterov": True},
    {"centered": True, "bias_correction": True},
    {"weight_decay": 0.1, "maximize": True, "eps_in_sqrt": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "initial_scale": 1.0},
    {"clip_value": 2.0},
    {"clip_norm": 3.0},
    {"global_clip_norm": 5.0},
    {"clip_value": 4.0, "clip_norm": 9.0, "global_clip_norm": 11.0, "nonfinite": "raise"},
    {"lr": lambda step: 0.1 / (step + 1), "momentum": 0.5, "lr_in_momentum": True, "nonfinite": "skip"},
]


def all_options_and_layouts():
    """All options with all layouts, and kernels and ways to pass gradients in turns."""
    rng = np.random.default_rng(RANK)
    kernels, ways = itertools.cycle(KERNELS), itertools.cycle(["dict", "buffer", "ready"])
    for (name, layout), options in itertools.product(LAYOUTS.items(), OPTIONS):
        kernel, way = next(kernels), next(ways)
        params = params_of(layout)
        opt = ShardedRMSProp(params, kernel=kernel, **options)
        alone = RMSProp(params, kernel=kernel, **options)
        for step in range(STEPS):
            gradients = gradients_of(layout, step)
            assert take_step(opt, gradients[RANK], way, rng) is opt.params
            alone.step(add(gradients))
        assert_same(opt, alone, f"{name}, {options}, {kernel}, {way}")


def parameter_groups():
    """Groups of nested parameters, each with its own options, which change between steps."""
    layout = LAYOUTS["mixed"]
    names = [["W", "b"], ["c"], ["d", "e", "f"]]

    def grouped(items):
        return [[items["W"], {"b": items["b"]}], items["c"], (items["d"], [items["e"], items["f"]])]

    params = params_of(layout)
    parts = grouped(params)
    own = [{"lr": 0.1, "momentum": 0.9}, {"clip_norm": 3.0}, {"centered": True, "weight_decay": 0.1}]
    made = [cls([{"params": part} | options for part, options in zip(parts, own, strict=True)], global_clip_norm=20.0)
            for cls in (ShardedRMSProp, RMSProp)]  # fmt: skip
    keys = [(0, 0), (0, 1, "b"), (1,), (2, 0), (2, 1, 0), (2, 1, 1)]
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        mine = gradients[RANK]
        if step % 2:
            for key, name in zip(keys, itertools.chain(*names), strict=True):
                made[0].ready(key, mine[name])
            made[0].step()
        else:
            made[0].step(grouped(mine))
        made[1].step(grouped(add(gradients)))
        for opt in made:
            opt.param_groups[1]["lr"] = 0.01 * step
            opt.param_groups[2]["momentum"] = 0.5 * (step > 1)
    assert made[0].param_groups[0]["params"] is made[0].params[0]
    assert_same(*made)
    if SIZE > 1:
        raises(StructureError, "key: expected one of (0, 0), (0, 1, 'b'), 1, (2, 0)", made[0].ready, 7, mine["W"])


def none_on_all_ranks_is_skipped_and_on_some_is_zeros():
    layout = LAYOUTS["mixed"]
    for way, options in itertools.product(["dict", "ready"], [{}, {"global_clip_norm": 3.0, "nonfinite": "raise"}]):
        rng = np.random.default_rng(RANK)
        params = params_of(layout)
        made = [cls(params, bias_correction=True, momentum=0.9, **options) for cls in (ShardedRMSProp, RMSProp)]
        for step in range(STEPS):
            gradients = gradients_of(layout, step)
            for rank, k in itertools.product(range(SIZE), range(len(layout))):
                if (step + k) % 3 == 0 or (step + k + rank) % 2 == 0:
                    gradients[rank][list(layout)[k]] = None
            take_step(made[0], gradients[RANK], way, rng)
            made[1].step(add(gradients))
        assert made[1].backend.state.counts.absent.any()
        assert_same(*made, way)


def gradients_whose_sum_is_rounded():
    """The update is that of the sum as the ranks rounded it, and all ranks have the same bits."""
    layout = LAYOUTS["odd"] | LAYOUTS["mixed"]
    for options in ({}, {"clip_norm": 2.0, "global_clip_norm": 3.0}):
        params = params_of(layout)
        made = [cls(params, momentum=0.9, **options) for cls in (ShardedRMSProp, RMSProp)]
        for step in range(STEPS):
            gradients = gradients_of(layout, step, whole_numbers=False)
            made[0].step(gradients[RANK])
            total = made[1].buffers["grads"].like()
            total.gather(add(gradients))
            for all_, own, bounds in zip(
                total.segments, made[0]._shards._own["grads"].segments, made[0]._shards.bounds, strict=True
            ):
                if SIZE == 1:  # the gradients may be read where they are
                    continue
                all_[bounds[RANK] : bounds[RANK + 1]] = own
                made[0]._ranks.all_gather(all_, bounds)
            np.testing.assert_allclose(total.views["W"], add(gradients)["W"], rtol=1e-4, atol=1e-5)
            made[1].step(total.views)
            for ours, theirs in zip(leaves(made[0].params), leaves(made[1].params), strict=True):
                if options:
                    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
                else:
                    assert_same_bits(ours, theirs)
            mine = [view.tobytes() for view in leaves(made[0].params)]
            assert COMM.bcast(mine) == mine


def norms_whose_squares_overflow_or_underflow():
    """The squares of the elements are in the range of float64, their sums are not; shards cut the parameters."""
    for scale in (2.0**507, 2.0**-480):
        layout = {"a": ((490,), np.float64), "b": ((700,), np.float64), "c": ((3,), np.float64)}
        params = params_of(layout)
        options = {"clip_norm": 3.0 * scale, "global_clip_norm": 4.0 * scale, "kernel": KERNELS[0]}
        made = [cls(params, **options) for cls in (ShardedRMSProp, RMSProp)]
        for step in range(STEPS):
            gradients = gradients_of(layout, step)
            for each in gradients:
                each["a"] *= scale
                each["b"] *= scale
                each["c"] *= scale
            made[0].step(gradients[RANK])
            made[1].step(add(gradients))
        assert all(np.isfinite(view).all() and view.any() for view in leaves(made[1].cache))
        assert_same(*made)


def mean_is_the_default_reduction():
    layout = LAYOUTS["odd"]
    params = params_of(layout)
    opt, alone = mpi.ShardedRMSProp(params, clip_value=1.2), RMSProp(params, clip_value=1.2)
    assert opt.reduction == "mean"  # by default
    for step in range(STEPS):
        gradients = gradients_of(layout, step)
        opt.step(gradients[RANK])
        alone.step({name: total / total.dtype.type(SIZE) for name, total in add(gradients).items()})
    assert_same(opt, alone)


def nonfinite_gradients_raise_or_skip_on_all_ranks():
    layout = LAYOUTS["mixed"]
    for options in ({}, {"clip_norm": 1.0}, {"clip_value": 0.5, "global_clip_norm": 1.0}):
        params = params_of(layout)
        raising, skipping = (ShardedRMSProp(params, nonfinite=word, **options) for word in ("raise", "skip"))
        alone = RMSProp(params, **options)
        for step in range(3):
            gradients = gradients_of(layout, step)
            spoilt = {name: gradient.copy() for name, gradient in gradients[RANK].items()}
            if RANK == LAST:
                spoilt["W"][12, 6] = spoilt["W"][0, 0] = np.nan
                spoilt["f"][-1] = np.inf
            error = raises(fastrms.NonfiniteError, "W']: 2 NaN and 0 inf among 91 values; gradients['f']: 0 NaN and 1",
                           raising.step, spoilt)  # fmt: skip
            assert error.counts == {"['W']": 2, "['f']": 1}
            assert skipping.step(spoilt) is skipping.params
            assert skipping.skipped_steps == step + 1
            for opt in (raising, skipping):
                opt.step(gradients[RANK])
            alone.step(add(gradients))
        for opt in (raising, skipping):
            assert_same_params(opt, alone)


def nonfinite_sum_of_finite_gradients():
    opt = ShardedRMSProp([np.ones(40, np.float32)], nonfinite="skip")
    opt.step([np.full(40, 3e38, np.float32)])
    assert opt.skipped_steps == (SIZE > 1)
