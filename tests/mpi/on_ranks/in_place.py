"""Parameters in arrays of the program, which all ranks update in place."""

import copy
import itertools

import numpy as np
from helpers import assert_same_bits
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
    folder,
    gradients_of,
    params_of,
    raises,
    raises_on,
    some_pairs,
    take_step,
)

import fastrms
from fastrms import RMSProp, StructureError

LAYOUT = LAYOUTS["mixed"]
OPTIONS = [
    {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    {"centered": True, "bias_correction": True},
    {"clip_norm": 3.0, "global_clip_norm": 9.0, "nonfinite": "raise"},
]


def arrays_that_the_program_changes_between_steps():
    """The arrays are what the next step starts from, as in a program that clips its weights."""
    rng = np.random.default_rng(RANK)
    ways, kernels = itertools.cycle(["dict", "buffer", "ready"]), itertools.cycle(KERNELS)
    for (name, layout), options in itertools.product(LAYOUTS.items(), OPTIONS):
        arrays = params_of(layout)
        kernel = next(kernels)
        opt = ShardedRMSProp(arrays, in_place=True, kernel=kernel, **options)
        alone = RMSProp(params_of(layout), kernel=kernel, **options)
        for step in range(STEPS):
            gradients, way = gradients_of(layout, step), next(ways)
            absent = list(layout)[step % len(layout)]
            for each in gradients:
                each[absent] = None if way != "buffer" else each[absent]
            params = take_step(opt, gradients[RANK], way, rng)
            assert all(params[key] is array for key, array in arrays.items())
            alone.step(add(gradients))
            for own, view in zip(arrays.values(), alone.params.values(), strict=True):
                assert_same_bits(own, view, f"{name}, {options}, {way}")
                np.clip(own, -0.5, 0.5, out=own)
                np.clip(view, -0.5, 0.5, out=view)
        assert_same(opt, alone, f"{name}, {options}")
        assert opt.check(**arrays) == []


def all_ranks_start_from_the_values_of_rank_0():
    arrays, more, first = params_of(LAYOUT, seed=RANK), params_of(LAYOUT, seed=RANK), params_of(LAYOUT)
    opt = ShardedRMSProp(arrays, in_place=True)
    opt.add_param_group({"params": more})
    for key, array in first.items():
        assert_same_bits(arrays[key], array, key)
        assert_same_bits(more[key], array, key)
    if SIZE > 1:
        different = params_of(LAYOUT, seed=RANK)
        raises(StructureError, "params['W']: expected the same values on all ranks",
               lambda: ShardedRMSProp(different, in_place=True, check_params="raise"))  # fmt: skip
        for key, array in params_of(LAYOUT, seed=RANK).items():
            assert_same_bits(different[key], array, key)
        raises(StructureError, "check_params and in_place on all ranks, got different ones on",
               lambda: ShardedRMSProp(params_of(LAYOUT), in_place=RANK == LAST))  # fmt: skip
    array = np.ones((2, 3)).T if RANK == LAST else np.ones((3, 2))
    raises_on(LAST, fastrms.DtypeError, "params[0]: expected a writable, C-contiguous array, which a step can update",
              lambda: ShardedRMSProp([array], in_place=True))  # fmt: skip
    raises(fastrms.OptionTypeError, "in_place: expected True or False, got 'yes'",
           lambda: ShardedRMSProp(np.ones(3), in_place="yes"))  # fmt: skip


def arrays_that_cannot_be_written_on_one_rank_raise_on_all():
    """Nothing has been written anywhere, and the next step works, with other options and state too."""
    for kernel in KERNELS:
        make_unwritable(kernel)


def make_unwritable(kernel):
    arrays = params_of(LAYOUT)
    opt, alone = ShardedRMSProp(arrays, in_place=True, kernel=kernel), RMSProp(params_of(LAYOUT), kernel=kernel)
    state, path = opt.state_dict(), folder() / f"in-place-{SIZE}.npz"
    opt.save(path)
    gradients = gradients_of(LAYOUT, 0)
    dtype = arrays["W"].dtype
    if RANK == LAST:  # before the first step
        arrays["W"].dtype = f"i{dtype.itemsize}"
    raises_on(LAST, StructureError, "params['W']: expected the original array", opt.step, gradients[RANK])
    arrays["W"].dtype = dtype
    opt.step(gradients[RANK])
    alone.step(add(gradients))

    def after_ready():
        for key, gradient in gradients[RANK].items():
            opt.ready(key, gradient)
        opt.step()

    before = copy.deepcopy(arrays)
    for call in (
        lambda: opt.step(gradients[RANK]), opt.step, after_ready, lambda: opt.load_state_dict(state),
        lambda: opt.load(path), lambda: opt.add_param_group({"params": [np.ones(3)]}),
    ):  # fmt: skip
        arrays["f"].flags.writeable = RANK != LAST
        raises_on(LAST, StructureError, "params['f']: expected an array that a step can write to", call)
        opt.state_dict()  # reads the arrays
        arrays["f"].flags.writeable = True
        for key, array in before.items():
            assert_same_bits(arrays[key], array, key)
        assert (opt.steps, len(opt.param_groups)) == (1, 1)
    opt.momentum = alone.momentum = 0.9
    opt.global_clip_norm = alone.global_clip_norm = 9.0
    for call in (lambda: opt.step(gradients[RANK]), opt.state_dict, lambda: opt.save(path)):
        if RANK == LAST:
            arrays["W"].shape = (91,)
        raises_on(LAST, StructureError, "params['W']: expected ", call)
        arrays["W"].shape = (13, 7)
    opt.step(gradients[RANK])
    alone.step(add(gradients))
    assert_same(opt, alone)


def checkpoints_are_loaded_into_the_arrays():
    path = folder() / f"in-place-of-{SIZE}.npz"
    arrays = params_of(LAYOUT)
    opt, alone = (cls(params, momentum=0.9, **options) for cls, params, options in (
        (ShardedRMSProp, arrays, {"in_place": True}), (RMSProp, params_of(LAYOUT), {})
    ))  # fmt: skip
    for step in range(2):
        gradients = gradients_of(LAYOUT, step)
        opt.step(gradients[RANK])
        alone.step(add(gradients))
    opt.save(path)
    state = opt.state_dict()
    for load in (lambda each: each.load(path), lambda each: each.load_state_dict(state if RANK == 0 else None)):
        others = params_of(LAYOUT, seed=7 + RANK)
        later = ShardedRMSProp(others, in_place=True)
        load(later)
        for key, array in others.items():
            assert later.params[key] is array
            assert_same_bits(array, alone.params[key], key)
        assert_same(later, alone)
    made = ShardedRMSProp.from_checkpoint(path, reduction="sum")
    gradients = gradients_of(LAYOUT, 2)
    alone.step(add(gradients))
    for each in (opt, made):
        each.step(gradients[RANK])
        assert_same(each, alone)


def arrays_in_every_form_and_order():
    """Single arrays, nestings and groups; a 0-d array, an empty one, a part of another, and a subclass of ndarray."""

    class Tensor(np.ndarray):
        pass

    memory = np.zeros(50)
    trees = [
        memory[3:40],
        [np.ones(()), np.ones((0, 4), np.float32), (np.ones(70).view(Tensor), {"b": np.ones(33, np.float32)})],
        [{"params": {"W": np.ones((9, 9)), "c": memory[40:45]}}, {"params": [np.ones(19, np.float32)], "lr": 0.1}],
    ]
    for tree, kernel in some_pairs(trees, KERNELS):
        views, own = copy.deepcopy(tree), copy.deepcopy(tree)
        opt, alone = ShardedRMSProp(own, in_place=True, kernel=kernel), RMSProp(views, kernel=kernel)
        for _ in range(2):
            opt.step(opt.params)
            total = alone.buffers["grads"].like()
            total.gather(alone.params)
            for segment in total.segments:
                segment *= SIZE
            if SIZE in (1, 2):  # otherwise the sum may be rounded in another order
                alone.step(total.views)
                assert_same(opt, alone)
        mine = [np.asarray(array).tobytes() for array in opt.buffers["params"].leaves]
        assert COMM.bcast(mine) == mine
