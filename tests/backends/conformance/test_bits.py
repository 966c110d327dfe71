"""Every backend gives the bits of the NumPy kernel, for every option, layout and kind of gradient."""

import contextlib

import numpy as np
import pytest
from cases import GRADIENTS, LAYOUTS, OPTION_SETS, drawn, of_gradients
from helpers import assert_same_bits, assert_same_state, items, wide

from fastrms import RMSProp

MIXED = LAYOUTS["list"]


def described(tree):
    """A structure with shapes and dtypes in the place of arrays."""
    if isinstance(tree, dict):
        return {key: described(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(described, tree))
    return tuple(tree.shape), np.dtype(tree.dtype)


@pytest.mark.parametrize("options", OPTION_SETS)
def test_every_option_has_the_bits_of_the_numpy_kernel(options, backend, rng):
    layout, options = LAYOUTS["large and small"], {"lr": 0.01} | OPTION_SETS[options]
    if "cache_dtype" in options:
        layout = [leaf._replace(dtype=np.float32) for leaf in layout]
        if "bfloat16" in backend.refuses:
            error, message = backend.refuses["bfloat16"]
            with pytest.raises(error, match=message):
                backend.make(drawn(layout, rng), **options)
            return
    optimizers = backend.pair(drawn(layout, rng, large=backend.large), **options)
    for t in range(4):
        # From far below where squares are subnormal to moderate, so that floors and bounds are crossed.
        gradients = backend.gradients(layout, rng, options, low=-30 if t % 2 else -3)
        if t == 1:
            gradients[0] = None
        if t == 2 and options.get("nonfinite") == "skip":
            gradients[0][0, 0] = np.nan
        for opt in optimizers:
            opt.step(gradients)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "bias_correction": True, "global_clip_norm": 0.5}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_bits_of_the_numpy_kernel(layout, options, backend, rng):
    layout = LAYOUTS[layout]
    params = drawn(layout, rng, large=backend.large)
    ours, oracle = backend.pair(params, **options)
    for t in range(3):
        gradients = backend.gradients(layout, rng, options)
        if t == 1:
            for view, gradient in zip(items(ours.grads), items(gradients), strict=True):
                backend.fill(view, gradient)
        assert ours.step(*[gradients] * (t != 1)) is ours.params
        oracle.step(gradients)
    assert_same_state(ours, oracle)
    assert described(ours.params) == described(ours.grads) == described(oracle.params)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5, "nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_every_kind_of_gradient_has_the_bits_of_the_numpy_kernel(kind, options, backend, rng):
    optimizers = ours, oracle = backend.pair(drawn(MIXED, rng), **options)
    for t in range(3):
        gradients = [GRADIENTS[kind](gradient) for gradient in backend.gradients(MIXED, rng, options)]
        before = [np.array(gradient) for gradient in gradients]
        cast = [np.array(g).astype(leaf.dtype) for g, leaf in zip(gradients, MIXED, strict=True)]
        if t == 1:
            gradients[3] = cast[3] = None
        ours.step(gradients)
        oracle.step(cast)
        for gradient, value in zip(gradients, before, strict=True):
            if gradient is not None:
                assert_same_bits(gradient, value, "a gradient was written")
    assert_same_state(*optimizers)


def test_gradients_in_the_buffer_stay_and_are_the_same_as_its_views(backend, rng):
    optimizers = backend.pair(drawn(MIXED, rng), weight_decay=0.1, clip_value=0.2, maximize=True)
    ours, oracle = optimizers
    gradients = drawn(MIXED, rng)
    for view, gradient in zip(ours.grads, gradients, strict=True):
        backend.fill(view, gradient)
    for given in ((), (ours.grads,), (list(ours.grads),), ([None, *ours.grads[1:]],)):
        ours.step(*given)
        oracle.step(gradients if not given or given[0][0] is not None else [None, *gradients[1:]])
    assert_same_state(*optimizers)


def test_gradients_that_are_the_optimizers_own_memory_are_read_before_it_is_written(backend, rng):
    layout = [LAYOUTS["array"]] * 3
    ours, oracle = backend.pair(drawn(layout, rng))
    gradients = drawn(layout, rng)
    for view, gradient in zip(ours.grads, gradients, strict=True):
        backend.fill(view, gradient)
    oracle.step([gradients[1], gradients[0], oracle.params[0].copy()])
    ours.step([ours.grads[1], ours.grads[0], ours.params[0]])  # two are swapped, one is another's parameter
    assert_same_state(ours, oracle)


def test_the_arrays_that_were_given_as_parameters_are_not_written(backend):
    start = np.ones(4)
    opt = backend.make([start], weight_decay=0.1)
    start.flags.writeable = False
    opt.step([np.full(4, 0.5)])
    assert start.tolist() == [1] * 4


def test_options_of_groups_change_from_the_next_step_on(backend, rng):
    layout = [LAYOUTS["array"], LAYOUTS["tuple"]]
    optimizers = backend.pair([{"params": params} for params in drawn(layout, rng)], lr=lambda step: 0.1 / (1 + step))
    changes = [
        lambda opt: None,
        lambda opt: opt.param_groups[1].update(lr=0.5, momentum=0.9),
        lambda opt: opt.param_groups[0].update(centered=True, maximize=True),
        lambda opt: opt.param_groups[0].update(decay_rate=0.5, epsilon=1.0),
        lambda opt: setattr(opt, "nonfinite", "skip"),
        lambda opt: opt.param_groups[0].update(bias_correction=True, decay_rate=0.5),
        lambda opt: opt.param_groups[1].update(weight_decay=0.5, eps_in_sqrt=True, clip_value=0.1),
        lambda opt: setattr(opt, "global_clip_norm", 0.1),
        lambda opt: setattr(opt, "nonfinite", "propagate"),
        lambda opt: opt.param_groups[1].update(bias_correction=True, clip_norm=0.1, momentum=0.0),
        lambda opt: opt.param_groups[0].update(bias_correction=False, centered=False),
        lambda opt: opt.param_groups[1].update(bias_correction=False),
        lambda opt: setattr(opt, "global_clip_norm", None),
        lambda opt: setattr(opt, "lr", 0.25),
    ]
    for t, change in enumerate(changes):
        gradients = backend.gradients(layout, rng, ["clip_norm", "global_clip_norm"])
        if t % 3 == 1:
            gradients[1] = (None, gradients[1][1])
        for opt in optimizers:
            change(opt)
            opt.step(gradients)
        assert_same_state(*optimizers, f"after change {t}")


@pytest.mark.parametrize("name", ["momentum", "centered", "lr", "clip_norm", "nonfinite"])
def test_an_option_that_the_function_given_as_lr_sets_holds_for_this_step_and_the_next(name, backend, rng):
    value = {"lr": 0.5, "momentum": 0.9, "centered": True, "clip_norm": 0.01, "nonfinite": "skip"}[name]
    optimizers = ours, oracle = backend.pair(drawn(MIXED, rng))
    gradients = backend.gradients(MIXED, rng, [name])

    def rate(step):
        ours.lr = 1e-3
        setattr(ours, name, value)
        return 1e-3

    for opt in optimizers:
        opt.step(gradients)
    ours.lr = rate
    ours.step(gradients)
    setattr(oracle, name, value)
    oracle.step(gradients)
    assert_same_state(*optimizers)
    for opt in optimizers:
        opt.step(gradients)
    assert_same_state(*optimizers)


def test_a_function_given_as_lr_is_called_once_a_step_with_the_steps_taken(backend):
    seen = []
    opt = backend.make([np.ones(3)], lr=lambda step: seen.append(step) or 0.1, nonfinite="skip")
    for value in (1.0, np.nan, 1.0, 1.0):
        opt.step([np.full(3, value)])
    assert seen == [0, 1, 1, 2]
    assert (opt.steps, opt.skipped_steps) == (3, 1)


def test_a_parameter_without_a_gradient_keeps_its_value_its_state_and_its_count(backend, rng):
    layout = [LAYOUTS["array"], LAYOUTS["array"]]
    options = {"momentum": 0.9, "weight_decay": 0.1, "bias_correction": True}
    start = drawn(layout, rng)
    opt, alone = backend.make(start, **options), RMSProp(start[1:], kernel="numpy", **options)
    for t in range(6):
        gradients = drawn(layout, rng)
        present = t in (1, 2, 5)
        opt.step([gradients[0], gradients[1] if present else None])
        if present:
            alone.step(gradients[1:])
    before = opt.state_dict()["arrays"]
    for name, array in alone.state_dict()["arrays"].items():
        if name != "skipped":
            assert_same_bits(before[name][12:], array, name)
    opt.step([None, None])
    after = opt.state_dict()["arrays"]
    assert after.pop("skipped").tolist() == [1, 4]
    for name, array in after.items():
        assert_same_bits(array, before[name], name)
    assert opt.steps == 7


# One parameter at a time, rows, and groups that are added.


@contextlib.contextmanager
def unless_refused(backend, what):
    """Expect the error of a backend that cannot do this."""
    if what not in backend.refuses:
        yield
        return
    error, message = backend.refuses[what]
    with pytest.raises(error, match=message):
        yield


def keys_of(tree, keys=()):
    if isinstance(tree, dict):
        return [key for name, item in tree.items() for key in keys_of(item, (*keys, name))]
    if isinstance(tree, list | tuple):
        return [key for k, item in enumerate(tree) for key in keys_of(item, (*keys, k))]
    return [keys]


@pytest.mark.parametrize("layout", ["array", "dict", "nested", "groups", "many small", "large and small", "empty"])
def test_one_parameter_at_a_time_has_the_bits_of_a_whole_step(layout, backend, rng):
    layout = LAYOUTS[layout]
    options = {"momentum": 0.9, "bias_correction": True, "lr": lambda step: 0.1 / (step + 1)}
    ours, oracle = backend.pair(drawn(layout, rng, large=backend.large), **options)
    with unless_refused(backend, "one by one"):
        for t in range(3):
            gradients = drawn(of_gradients(layout), rng, large=backend.large)
            if t == 1 and isinstance(gradients, list):
                gradients[0] = None if not isinstance(gradients[0], dict) else dict.fromkeys(gradients[0])
            keys = keys_of(gradients)
            for number in rng.permutation(len(keys)):
                assert ours.steps == t
                updated = ours.step_parameter(keys[number], items(gradients)[number])
                assert updated is items(ours.params)[number]
            oracle.step(gradients)
            assert_same_state(ours, oracle, f"step {t}")


# Those that need the gradients of all parameters together are refused.
@pytest.mark.parametrize(
    "options", [name for name in OPTION_SETS if not {"global_clip_norm", "nonfinite"} & {*OPTION_SETS[name]}]
)
def test_every_option_has_the_bits_of_a_whole_step_for_one_parameter_at_a_time(options, backend, rng):
    layout, options = LAYOUTS["large and small"], {"lr": 0.01} | OPTION_SETS[options]
    if "cache_dtype" in options:
        layout = [leaf._replace(dtype=np.float32) for leaf in layout]
        if "bfloat16" in backend.refuses:
            return
    ours, oracle = backend.pair(drawn(layout, rng, large=backend.large), **options)
    with unless_refused(backend, "one by one"):
        for _ in range(2):
            gradients = drawn(layout, rng, large=backend.large)
            for number, gradient in enumerate(gradients):
                ours.step_parameter(number, gradient)
            oracle.step(gradients)
        assert_same_state(ours, oracle)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "clip_value": 0.1}])
@pytest.mark.parametrize("shape", [(50, 3), (40, 2, 2), (30,)], ids=str)
def test_rows_are_updated_as_parameters_of_their_own(shape, options, backend, rng):
    table = np.asarray(wide(rng, shape, np.float32, -1, 1))
    ours = backend.make({"table": table, "bias": np.ones(2)}, lr=0.1, **options)
    oracle = RMSProp(list(map(np.array, table)), kernel="numpy", lr=0.1, **options)
    with unless_refused(backend, "one by one"):
        for size in (7, 1, 90, 0):
            rows = rng.integers(0, shape[0], size)
            gradient = np.asarray(wide(rng, (size, *shape[1:]), np.float32, -1, 1))
            assert ours.step_rows("table", rows - shape[0] * (rows % 2), gradient) is ours.params["table"]
            ours.step_parameter("bias", np.ones(2))
            sums = [None] * shape[0]
            for row, part in zip(rows, gradient, strict=True):
                sums[row] = part if sums[row] is None else sums[row] + part
            oracle.step(sums)
        assert_same_bits(ours.params["table"], np.array(oracle.params))
        assert_same_bits(ours.cache["table"], np.array(oracle.cache))
        assert ours.steps == 4


def test_a_group_that_is_added_has_the_bits_of_one_that_was_there_without_gradients(backend, rng):
    body, head = LAYOUTS["nested"], LAYOUTS["list"]
    start, new, options = drawn(body, rng), drawn(head, rng), {"momentum": 0.9, "bias_correction": True}
    ours = backend.make(start, **options)
    groups = [{"params": start}, {"params": new, "lr": 0.5, "centered": True}]
    oracle = RMSProp(groups, kernel="numpy", **options)
    for _ in range(2):
        gradients = drawn(body, rng)
        ours.step(gradients)
        oracle.step([gradients, [None] * len(head)])
    ours.add_param_group({"params": backend.given(list(map(np.array, new))), "lr": 0.5, "centered": True})
    for t in range(4):
        gradients = [backend.gradients(body, rng, ["clip_norm"]), backend.gradients(head, rng, ["clip_norm"])]
        oracle.step(gradients)
        if t == 1:
            for view, gradient in zip(items(ours.grads), items(gradients), strict=True):
                backend.fill(view, gradient)
        ours.step(*[gradients] * (t != 1))
        if t == 2:
            for opt in (ours, oracle):
                opt.param_groups[0].update(momentum=0.0, clip_norm=0.5)
        assert_same_state(ours, oracle, f"step {t}")


def test_a_limit_of_inf_for_all_gradients_clips_nothing(backend, rng):
    params = drawn(MIXED, rng)
    ours = backend.make(params, momentum=0.9, global_clip_norm=np.inf)
    oracle = RMSProp(params, kernel="numpy", momentum=0.9)
    for value in (1e30, np.inf, np.nan):
        gradients = drawn(MIXED, rng)
        gradients[3][2] = value
        for opt in (ours, oracle):
            opt.step(gradients)
        assert ours.last_grad_norm == pytest.approx(np.float32(value), rel=1e-6, nan_ok=True)
        oracle.global_clip_norm = np.inf
        assert_same_state(ours, oracle)
        oracle.global_clip_norm = None


@pytest.mark.parametrize(
    "options", [{"global_clip_norm": 1.0}, {"global_clip_norm": np.inf}, {"clip_norm": 1e9}, {}], ids=str
)
def test_the_norm_of_the_last_gradients_and_zeros_in_the_buffer(options, backend):
    opt = backend.make([np.ones(2), np.ones(1)], **options)
    opt.step([np.array([3.0, 0.0]), np.array([4.0])])
    assert opt.last_grad_norm == (5.0 if options else None)
    opt.step([None, np.array([4.0])])
    assert opt.last_grad_norm == (4.0 if options else None)
    opt.zero_grad()
    assert [np.asarray(view).tolist() for view in opt.grads] == [[0, 0], [0]]


def test_whether_the_last_step_was_skipped(backend):
    opt = backend.make([np.ones(2)], nonfinite="skip")
    seen = [opt.last_skipped]
    for value in (1.0, np.nan, np.inf, 1.0, 1.0):
        opt.step([np.full(2, value)])
        seen.append(opt.last_skipped)
    assert seen == [False, False, True, True, False, False]
