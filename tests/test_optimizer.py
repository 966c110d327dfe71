"""RMSProp as a class: structures, groups, gradients of all kinds, and that a step happens whole or not at all."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
from helpers import leaves, same_structure

from fastrms import DtypeError, OptionError, RMSProp, StructureError, rmsprop_update
from fastrms.kernels.reference import ReferenceRMSProp


def state(optimizer):
    return {
        name: [segment.tobytes() for segment in buffer.segments]
        for name, buffer in optimizer.buffers.items()
        if name != "grads"
    } | {"steps": optimizer.steps}


def test_the_example_of_the_readme():
    W1, b1 = np.ones((3, 2)), np.zeros(2)
    opt = RMSProp([W1, b1], lr=1e-3)
    W1, b1 = opt.params
    returned = opt.step([np.full((3, 2), 0.5), np.ones(2)])
    assert returned is opt.params
    assert returned[0] is W1
    reference = ReferenceRMSProp([np.ones((3, 2)), np.zeros(2)], lr=1e-3)
    reference.step([np.full((3, 2), 0.5), np.ones(2)])
    np.matmul(np.ones((3, 1)), np.ones((1, 2)), out=opt.grads[0])
    opt.grads[1][:] = -1
    opt.step()
    reference.step([np.ones((3, 2)), -np.ones(2)])
    assert W1.tobytes() == reference.params[0].tobytes()
    assert b1.tobytes() == reference.params[1].tobytes()
    assert opt.params[0] is W1


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "centered": True}])
@pytest.mark.parametrize(
    "params",
    [
        np.ones((2, 3)),
        [np.ones(2), np.ones((1, 2), np.float32)],
        (np.ones(2), np.ones(1)),
        {"W": np.ones(2), "b": np.float64(1)},
        {"layers": [{"W": np.ones(2)}, (np.ones(1),)]},
        np.float32(3),
    ],
    ids=["array", "list", "tuple", "dict", "nested", "scalar"],
)
def test_everything_has_the_structure_of_the_parameters(params, options):
    opt = RMSProp(params, **options)
    trees = [opt.params, opt.grads, opt.cache, opt.step(params), opt.param_groups[0]["params"]]
    trees += [opt.momentum_buffer, opt.grad_avg] if options else []
    for tree in trees:
        assert same_structure(params, tree)
        for given, leaf in zip(leaves(params), leaves(tree), strict=True):
            assert leaf.shape == given.shape
            assert leaf.dtype == given.dtype
    if not options:
        assert opt.momentum_buffer is None
        assert opt.grad_avg is None


def test_views_can_be_changed_in_place_and_not_replaced():
    opt = RMSProp(np.ones(3))
    opt.grads[:] = 2
    opt.grads *= 2
    opt.params += 1
    assert opt.buffers["grads"].flat.tolist() == [4, 4, 4]
    assert opt.buffers["params"].flat.tolist() == [2, 2, 2]
    for name in ("params", "grads", "cache", "momentum_buffer"):
        with pytest.raises(AttributeError, match=f"{name}: these views cannot be replaced"):
            setattr(opt, name, np.zeros(3))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], StructureError, "params: expected at least one array, got a list of 0 items"),
        ([np.ones(2, int)], DtypeError, r"params\[0\]: expected float32 or float64, got int64.*astype"),
        ([np.ones(2), np.ones(2, np.float16)], DtypeError, r"params\[1\]: .* got float16"),
        ({"W": np.ones(2, complex)}, DtypeError, r"params\['W'\]: .* got complex128"),
        ([np.ones(2, np.longdouble)], DtypeError, r"params\[0\]: expected float32 or float64"),
        ([1, 2], DtypeError, r"params\[0\]: .* got int64"),
        ((np.ones(2) for _ in "ab"), DtypeError, "params: expected an array, got generator object"),
        (None, DtypeError, "params: expected an array, got None"),
    ],
    ids=["empty", "int", "half", "complex", "longdouble", "python-int", "generator", "none"],
)
def test_bad_parameters(params, error, message):
    with pytest.raises(error, match=message):
        RMSProp(params)


def test_parameters_that_share_memory_are_refused_and_interlaced_ones_are_not():
    a = np.arange(10.0)
    for pair in ([a, a], [a[:6], a[5:]], [a.reshape(2, 5), a[::3]], {"x": a, "y": a[::-1]}):
        with pytest.raises(StructureError, match=r"params\[.*\] and params\[.*\] share memory"):
            RMSProp(pair)
    RMSProp([a[::2], a[1::2]])
    RMSProp([a[:5], a[5:], np.broadcast_to(np.float64(1), (3,))])
    many = np.zeros((500, 4))
    RMSProp(list(many))
    with pytest.raises(StructureError, match=r"params\[499\] and params\[500\]|params\[0\] and"):
        RMSProp([*many, many[499, 1:3]])


def test_parameter_groups_as_in_pytorch(rng):
    values, grads = [rng.standard_normal(3) for _ in range(4)], rng.standard_normal((5, 4, 3))
    opt = RMSProp(
        [{"params": values[:2], "lr": 1e-2}, {"params": {"a": values[2], "b": values[3]}, "weight_decay": 0.5}],
        lr=1e-3,
        momentum=0.5,
    )
    first = RMSProp(values[:2], lr=1e-2, momentum=0.5)
    second = RMSProp(values[2:], lr=1e-3, weight_decay=0.5, momentum=0.5)
    for g in grads:
        opt.step([[g[0], g[1]], {"b": g[3], "a": g[2]}])
        first.step([g[0], g[1]])
        second.step([g[2], g[3]])
    (a, b), rest = opt.params
    for ours, theirs in zip([a, b, rest["a"], rest["b"]], first.params + second.params, strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert opt.param_groups[1]["params"]["a"] is rest["a"]
    assert opt.param_groups[1]["weight_decay"] == 0.5
    assert dict(opt.param_groups[0]).keys() == dict(opt.param_groups[1]).keys()


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([{"params": [np.ones(2)]}, {"lr": 0.1}], StructureError, r"params\[1\]: expected a parameter group"),
        ([{"params": [np.ones(2)]}, np.ones(2)], StructureError, r"params\[1\]: expected a parameter group"),
        (
            [{"params": np.ones(2), "learning_rate": 1}],
            OptionError,
            r"param_groups\[0\]: 'learning_rate' is not an option",
        ),
        ([{"params": np.ones(2), "global_clip_norm": 1}], OptionError, "'global_clip_norm' is not an option"),
        ([{"params": []}], StructureError, "expected at least one array"),
    ],
    ids=["no-params", "array", "unknown", "global", "empty"],
)
def test_bad_groups(groups, error, message):
    with pytest.raises(error, match=message):
        RMSProp(groups)


def test_a_list_of_dicts_without_params_is_a_list_of_layers():
    opt = RMSProp([{"W": np.ones(2)}, {"W": np.ones(3)}])
    assert len(opt.param_groups) == 1
    opt.step([{"W": np.ones(2)}, {"W": np.ones(3)}])


def test_lr_sets_all_groups_and_says_when_they_differ():
    opt = RMSProp([{"params": np.ones(2), "lr": 0.1}, {"params": np.ones(2)}], lr=0.2)
    with pytest.raises(OptionError, match=r"lr: differs between groups, \[0.1, 0.2\]"):
        _ = opt.lr
    opt.lr = 0.5
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.5]
    assert opt.lr == 0.5
    with pytest.raises(OptionError, match="lr: expected"):
        opt.lr = -1
    assert opt.lr == 0.5
    assert (opt.decay_rate, opt.epsilon) == (0.9, 1e-8)


class OwnSchedule(RMSProp):
    """A method of its own is the learning rate."""

    def __init__(self, params):
        super().__init__(params, lr=self.rate)

    def rate(self, step):
        return 0.1 / (1 + step)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_whose_lr_is_a_method_of_its_own_has_the_method_of_the_copy(again):
    opt = OwnSchedule([np.ones(3)])
    opt.step([np.ones(3)])
    other = again(opt)
    assert other.lr.__self__ is other
    for each in (opt, other):
        each.step([np.full(3, 0.5)])
    assert state(opt) == state(other)


def test_pure_update_changes_nothing_it_is_given(rng):
    params = {"W": rng.standard_normal((3, 2)), "b": rng.standard_normal(2).astype(np.float32)}
    grads = {"b": rng.standard_normal(2).astype(np.float32), "W": rng.standard_normal((3, 2))}
    cache = {name: np.abs(value) for name, value in params.items()}
    before = copy.deepcopy((params, grads, cache))
    new_params, new_cache = rmsprop_update(params, grads, cache, 0.1, 0.8, 1e-6)
    for name in params:
        expected = 0.8 * cache[name] + (1 - 0.8) * grads[name] ** 2
        assert new_cache[name].tobytes() == expected.tobytes()
        assert new_params[name].tobytes() == (params[name] - 0.1 * grads[name] / (np.sqrt(expected) + 1e-6)).tobytes()
    for given, old in zip((params, grads, cache), before, strict=True):
        for name in given:
            assert given[name].tobytes() == old[name].tobytes()
    with pytest.raises(StructureError, match=r"cache\['b'\]: expected shape \(2,\), got \(3,\)"):
        rmsprop_update(params, grads, cache | {"b": np.ones(3)})
    from_nothing, _ = rmsprop_update(params, grads, None)
    assert from_nothing["W"].shape == (3, 2)


def test_an_optimizer_that_nobody_has_any_more_is_gone_at_once():
    opt = RMSProp([np.ones(3)], kernel="serial", momentum=0.9)
    opt.step([np.ones(3)])
    group, alive = opt.param_groups[0], weakref.ref(opt)
    gc.disable()
    try:
        del opt
        assert alive() is None
    finally:
        gc.enable()
    group["lr"] = 0.5  # somebody kept this
    assert group["lr"] == 0.5
    again = pickle.loads(pickle.dumps(group))
    again["lr"] = 0.25
    assert (again["lr"], group["lr"]) == (0.25, 0.5)
