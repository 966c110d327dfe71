"""State of PyTorch's and Keras' RMSprop: training goes on here as it would have there, and the other way round."""

import copy
import sys

import numpy as np
import pytest
from helpers import assert_same_bits
from interop_peers import Keras, Torch

from fastrms import OptionError, RMSProp, dialect, interop

# What Keras does when NumPy 2 asks one of its variables for an array; the warning names its own modules.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning:keras"
)

SHAPES = [(4, 3), (3,), (), (0, 2), (2, 3, 2)]
KINDS = {"float32": 1e-5, "float64": 1e-12}
STEPS = 12


def arrays(rng, dtype):
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in SHAPES]


def assert_near(ours, theirs, dtype, settings=None):
    # Keras on torch takes the norms of clipping in float32, also of float64 gradients.
    tolerance = max(KINDS[dtype], 1e-8 if settings in ("clipnorm", "global_clipnorm") else 0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def keras(monkeypatch):
    """Keras on torch; the precision of its learning rate is set back afterwards."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    # Keras imports JAX where there is one, whose threads make each later fork warn.
    monkeypatch.setitem(sys.modules, "jax", None)
    keras = pytest.importorskip("keras")
    floatx = keras.config.floatx()
    yield keras
    keras.config.set_floatx(floatx)


@pytest.fixture
def peer(request, dtype):
    """The class above that a test is for."""
    if request.param is Keras:
        request.getfixturevalue("keras").config.set_floatx(dtype)
    return request.param


# Both need torch, Keras as its backend.
PEERS = [
    pytest.param(peer, settings, marks=pytest.mark.torch, id=f"{peer.__name__}-{settings}")
    for peer in (Torch, Keras)
    for settings in peer.settings
]
each_setting = pytest.mark.parametrize(("peer", "settings"), PEERS, indirect=["peer"])
each_dtype = pytest.mark.parametrize("dtype", KINDS)


@each_dtype
@each_setting
@pytest.mark.parametrize("other", [False, True], ids=["their momentum", "the other momentum"])
def test_goes_on_here_as_it_would_have_there(peer, settings, dtype, other, rng):
    theirs = peer(arrays(rng, dtype), peer.settings[settings])
    for _ in range(STEPS):
        theirs.step(arrays(rng, dtype))
    ours = theirs.ours(**(peer.other if other else {}))
    assert ours.steps == STEPS
    assert_near(ours.params, theirs.values(), dtype, settings)
    for _ in range(STEPS):
        gradients = arrays(rng, dtype)
        theirs.step(gradients)
        ours.step(gradients)
        assert_near(ours.params, theirs.values(), dtype, settings)


@each_dtype
@each_setting
@pytest.mark.parametrize("other", [False, True], ids=["their momentum", "the other momentum"])
def test_goes_on_there_as_it_would_have_here(peer, settings, dtype, other, rng):
    start = arrays(rng, dtype)
    options = dialect(peer.__name__.lower(), **peer.settings[settings])
    ours = RMSProp(start, **(options | (peer.other if other else {})))
    for _ in range(STEPS):
        ours.step(arrays(rng, dtype))
    theirs = peer(start, {})
    theirs.take_over(ours)
    for _ in range(STEPS):
        gradients = arrays(rng, dtype)
        theirs.step(gradients)
        ours.step(gradients)
        assert_near(ours.params, theirs.values(), dtype, settings)


@each_dtype
@each_setting
def test_there_and_back_has_the_same_bits(peer, settings, dtype, rng):
    start = arrays(rng, dtype)
    options = dialect(peer.__name__.lower(), **peer.settings[settings]) | {"lr": 0.125}  # which float32 has exactly
    ours = RMSProp(start, **options)
    for _ in range(3):
        ours.step(arrays(rng, dtype))
    theirs = peer(start, {})
    theirs.take_over(ours)
    back = theirs.ours()
    assert {**back.param_groups[0], "params": None} == {**ours.param_groups[0], "params": None}
    assert (back.steps, back.global_clip_norm) == (ours.steps, ours.global_clip_norm)
    for name in ours.buffers.keys() - {"grads"}:
        assert_same_bits(back.buffers[name].block, ours.buffers[name].block, name)


# What is particular to torch.


@pytest.mark.torch
@each_dtype
@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.9, "centered": True, "eps": 1e-3}], ids=["plain", "all"])
def test_groups_of_torch(arguments, dtype, rng):
    theirs = Torch(arrays(rng, dtype), arguments, cuts=[1, 3])
    for _ in range(STEPS):
        theirs.step(arrays(rng, dtype))
    ours = theirs.ours()
    back = Torch(theirs.values(), {}, cuts=[1, 3])
    back.take_over(ours)
    assert [group["lr"] for group in ours.param_groups] == [0.01, 0.02, 0.03]
    for _ in range(STEPS):
        gradients = arrays(rng, dtype)
        nested = [gradients[:1], gradients[1:3], gradients[3:]]
        for optimizer, given in ((theirs, gradients), (back, gradients), (ours, nested)):
            optimizer.step(given)
        assert_near(ours.buffers["params"].leaves, theirs.values(), dtype)
        assert_near(back.values(), theirs.values(), dtype)
    for one, other in zip(back.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.torch
def test_parameters_without_a_gradient_yet(rng):
    start = arrays(rng, "float64")
    theirs = Torch(start, {"momentum": 0.9, "centered": True, "eps": 0.1})
    counts = [0, 1, 3, 3, 2]
    for step in range(3):
        theirs.step([g if step < n else None for g, n in zip(arrays(rng, "float64"), counts, strict=True)])
    assert sorted(theirs.optimizer.state_dict()["state"]) == [1, 2, 3, 4]
    ours = theirs.ours()
    assert ours.steps == 3
    assert (ours.steps - ours.state_dict()["arrays"]["skipped"]).tolist() == counts
    assert_same_bits(ours.cache[0], np.zeros((4, 3)))
    back = Torch(theirs.values(), {})
    back.take_over(ours)
    assert [int(entry["step"]) for entry in back.optimizer.state_dict()["state"].values()] == counts
    for _ in range(3):
        gradients = arrays(rng, "float64")
        for optimizer in (theirs, ours, back):
            optimizer.step(gradients)
        assert_near(ours.params, theirs.values(), "float64")
        assert_near(back.values(), theirs.values(), "float64")


@pytest.mark.torch
def test_state_of_other_kinds_than_tensors_is_read_too(rng):
    theirs = Torch(arrays(rng, "float32"), {"momentum": 0.9})
    theirs.step(arrays(rng, "float32"))
    theirs.step(arrays(rng, "float32"))
    state = theirs.optimizer.state_dict()
    plain = {
        "state": {k: {name: value.tolist() for name, value in entry.items()} for k, entry in state["state"].items()},
        "param_groups": [dict(state["param_groups"][0], lr=np.float64(0.01), initial_lr=0.5, name="all", t=None)],
    }
    plain["state"][3] = {name: np.zeros((0, 2)) for name in state["state"][3]} | {"step": 2}
    ours, same = theirs.ours(), interop.from_torch(plain, theirs.values())
    assert_same_bits(same.buffers["cache"].block, ours.buffers["cache"].block)
    assert_same_bits(same.buffers["momentum_buffer"].block, ours.buffers["momentum_buffer"].block)
    assert (same.steps, same.lr) == (2, 0.01)


@pytest.mark.torch
def test_structure_is_that_of_the_parameters_which_are_copied(rng):
    import torch

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.RMSprop(model.named_parameters(), lr=torch.tensor(0.25))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = [p.detach().numpy().copy() for p in model.parameters()]
    ours = interop.from_torch(optimizer.state_dict(), dict(model.named_parameters()), kernel="serial", clip_norm=1.0)
    assert list(ours.params) == ["weight", "bias"]
    assert (ours.kernel, ours.param_groups[0]["clip_norm"], ours.lr) == ("serial", 1.0, 0.25)
    ours.step({"weight": np.ones((2, 3)), "bias": np.ones(2)})
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(parameter.detach().numpy(), old)
    one = interop.from_torch(optimizer.state_dict(), (model.weight, model.bias))
    assert type(one.params) is tuple


@pytest.mark.torch
def test_options_are_set_for_all_groups(rng):
    theirs = Torch(arrays(rng, "float64"), {}, cuts=[2])
    theirs.step(arrays(rng, "float64"))
    ours = theirs.ours(lr=lambda k: 0.5**k, global_clip_norm=2.0, nonfinite="raise")
    assert [group["lr"](1) for group in ours.param_groups] == [0.5, 0.5]
    assert (ours.global_clip_norm, ours.nonfinite) == (2.0, "raise")
    # torch gets the rate of the next step, the second.
    ours.global_clip_norm = None
    assert [group["lr"] for group in interop.to_torch(ours)["param_groups"]] == [0.5, 0.5]


@pytest.mark.torch
def test_what_is_handed_over_is_copied(rng):
    ours = RMSProp(arrays(rng, "float64"), momentum=0.9, centered=True)
    ours.step(arrays(rng, "float64"))
    state, (_, variables) = interop.to_torch(ours), interop.to_keras(_with(ours, eps_in_sqrt=True))
    before = copy.deepcopy((state["state"], variables))
    ours.step(arrays(rng, "float64"))
    for i, entry in before[0].items():
        assert all(bool((state["state"][i][name] == value).all()) for name, value in entry.items())
    for name, value in before[1].items():
        assert_same_bits(variables[name], value)


def _with(opt, **options):
    for group in opt.param_groups:
        group.update(options)
    return opt


@pytest.mark.torch
def test_16_bit_state(rng):
    theirs = Torch(arrays(rng, "float32"), {"momentum": 0.5, "lr": 0.25, "alpha": 0.9})
    theirs.step(arrays(rng, "float32"))
    ours = theirs.ours(cache_dtype="bfloat16", lr_in_momentum=True)
    state = theirs.optimizer.state_dict()["state"]
    found = interop.to_torch(ours)["state"]
    for i, entry in state.items():
        for name in ("square_avg", "momentum_buffer"):
            assert found[i][name].dtype == entry[name].dtype
            np.testing.assert_allclose(found[i][name], entry[name], rtol=2**-8)


@pytest.mark.torch
def test_steps_are_counted_in_a_dtype_that_can(rng):
    import torch

    opt = RMSProp([np.ones(2)])
    opt.load_state_dict(opt.state_dict() | {"steps": 2049})
    before = torch.get_default_dtype()
    try:
        for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2):
            torch.set_default_dtype(dtype)
            step = interop.to_torch(opt)["state"][0]["step"]
            assert (step.dtype, float(step)) == (expected, 2049.0)
    finally:
        torch.set_default_dtype(before)


# What is particular to Keras.


@pytest.mark.torch
def test_variables_of_a_model_by_hand_and_saved(keras, rng):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)])
    optimizer = keras.optimizers.RMSprop(0.125, momentum=0.5)
    model.compile(optimizer, loss="mse")
    x, y = rng.standard_normal((16, 3)), rng.standard_normal((16, 1))
    model.fit(x, y, epochs=3, batch_size=4, verbose=0)
    store = {}
    optimizer.save_own_variables(store)
    opts = [
        interop.from_keras(optimizer.get_config(), v, model.trainable_variables) for v in (store, optimizer.variables)
    ]
    assert [opt.steps for opt in opts] == [12, 12]
    for name in ("params", "cache", "momentum_buffer"):
        assert_same_bits(opts[0].buffers[name].block, opts[1].buffers[name].block)
    assert_same_bits(opts[0].cache[2], optimizer.variables[4].numpy())
    assert_same_bits(opts[0].momentum_buffer[1], optimizer.variables[7].numpy())


@pytest.mark.torch
def test_the_variables_have_the_last_word_on_the_rate(keras, rng):
    theirs = Keras(arrays(rng, "float64"), {})
    config = theirs.optimizer.get_config()
    theirs.optimizer.learning_rate = 0.25
    assert interop.from_keras(config, theirs.optimizer.variables, theirs.params).lr == 0.25


@pytest.mark.torch
def test_a_schedule(keras, rng):
    keras.config.set_floatx("float64")
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    theirs = Keras(arrays(rng, "float64"), {"learning_rate": schedule, "momentum": 0.5})
    for _ in range(3):
        theirs.step(arrays(rng, "float64"))
    with pytest.raises(OptionError, match="lr: the learning rate is a schedule; pass it as a function of the step"):
        theirs.ours()
    ours = theirs.ours(lr=lambda k: 0.1 * 0.5 ** (k / 2))
    for _ in range(5):
        gradients = arrays(rng, "float64")
        theirs.step(gradients)
        ours.step(gradients)
        np.testing.assert_allclose(ours.params[0], theirs.values()[0], rtol=1e-6)  # of its schedules, which are float32
    assert interop.to_keras(ours)[0]["learning_rate"] == 0.1 * 0.5**4


@pytest.mark.torch
def test_variables_without_weight_decay_are_a_group(keras, rng):
    keras.config.set_floatx("float64")
    theirs = Keras(arrays(rng, "float64"), {"weight_decay": 0.1})
    optimizer = keras.optimizers.RMSprop(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=theirs.params[1:3])
    optimizer.build(theirs.params)
    theirs.optimizer = optimizer
    theirs.step(arrays(rng, "float64"))
    v = theirs.params
    groups = [{"params": [v[0]]}, {"params": v[1:3], "weight_decay": 0.0}, {"params": v[3:]}]
    ours = interop.from_keras(optimizer.get_config(), optimizer.variables, groups)
    for _ in range(3):
        g = arrays(rng, "float64")
        theirs.step(g)
        ours.step([g[:1], g[1:3], g[3:]])
    assert_near(ours.buffers["params"].leaves, theirs.values(), "float64")


def test_clipping_that_is_off_there_is_off_here(rng):
    config = {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-7, "clipnorm": 0.0, "clipvalue": -1.0}
    opt = interop.from_keras(config, [0, 0.5, np.zeros(2)], [np.ones(2)])
    assert (opt.param_groups[0]["clip_norm"], opt.param_groups[0]["clip_value"]) == (None, None)
