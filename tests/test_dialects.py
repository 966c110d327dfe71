"""`dialect`: the names, defaults and rules of other projects."""

import numpy as np
import pytest

from fastrms import OptionError, OptionTypeError, RMSProp, dialect
from fastrms.dialects import DIALECTS

# What each project's own source has: (what has no default there, all options that the rest comes to). In order: the
# class of deep-ml's problem 200; sorix/optim/optim.py; torch/optim/rmsprop.py; keras/src/optimizers/rmsprop.py;
# tensorflow/python/training/rmsprop.py, optax/_src/alias.py, python/mlx/optimizers/optimizers.py, lasagne/updates.py,
# chainer/optimizers/rmsprop_graves.py.
INSIDE = {"eps_in_sqrt": True, "lr_in_momentum": True}
DEFAULTS = {
    "reference": ({}, {"lr": 1e-3, "decay_rate": 0.9, "epsilon": 1e-8}),
    "sorix": ({}, {"lr": 1e-3, "decay_rate": 0.99, "epsilon": 1e-8}),
    "torch": ({}, {"lr": 1e-2, "decay_rate": 0.99, "epsilon": 1e-8}),
    "keras": (
        {},
        {"lr": 1e-3, "decay_rate": 0.9, "epsilon": 1e-7, "decoupled_weight_decay": True} | INSIDE,
    ),
    "tensorflow": (
        {"learning_rate": 0.5},
        {"lr": 0.5, "decay_rate": 0.9, "epsilon": 1e-10, "initial_scale": 1.0} | INSIDE,
    ),
    "optax": ({"learning_rate": 0.5}, {"lr": 0.5, "decay_rate": 0.9, "epsilon": 1e-8} | INSIDE),
    "mlx": ({"learning_rate": 0.5}, {"lr": 0.5, "decay_rate": 0.99, "epsilon": 1e-8}),
    "lasagne": ({}, {"lr": 1.0, "decay_rate": 0.9, "epsilon": 1e-6, "eps_in_sqrt": True}),
    "graves": (
        {},
        {"lr": 1e-4, "decay_rate": 0.95, "momentum": 0.9, "epsilon": 1e-4, "centered": True} | INSIDE,
    ),
}

# Every argument of each project, with a value that is not its default, and the option it becomes.
ARGUMENTS = {
    "reference": {"lr": ("lr", 0.5), "decay_rate": ("decay_rate", 0.5), "epsilon": ("epsilon", 0.5)},
    "sorix": {
        "lr": ("lr", 0.5),
        "decay": ("decay_rate", 0.5),
        "eps": ("epsilon", 0.5),
        "weight_decay": ("weight_decay", 0.5),
    },
    "torch": {
        "lr": ("lr", 0.5),
        "alpha": ("decay_rate", 0.5),
        "eps": ("epsilon", 0.5),
        "weight_decay": ("weight_decay", 0.5),
        "momentum": ("momentum", 0.5),
        "centered": ("centered", True),
        "maximize": ("maximize", True),
    },
    "keras": {
        "learning_rate": ("lr", 0.5),
        "rho": ("decay_rate", 0.5),
        "momentum": ("momentum", 0.5),
        "epsilon": ("epsilon", 0.5),
        "centered": ("centered", True),
        "weight_decay": ("weight_decay", 0.5),
        "clipnorm": ("clip_norm", 0.5),
        "clipvalue": ("clip_value", 0.5),
        "global_clipnorm": ("global_clip_norm", 0.5),
    },
    "tensorflow": {
        "learning_rate": ("lr", 0.25),
        "decay": ("decay_rate", 0.5),
        "momentum": ("momentum", 0.5),
        "epsilon": ("epsilon", 0.5),
        "centered": ("centered", True),
    },
    "optax": {
        "learning_rate": ("lr", 0.25),
        "decay": ("decay_rate", 0.5),
        "eps": ("epsilon", 0.5),
        "initial_scale": ("initial_scale", 0.5),
        "eps_in_sqrt": ("eps_in_sqrt", False),
        "centered": ("centered", True),
        "momentum": ("momentum", 0.5),
        "bias_correction": ("bias_correction", True),
    },
    "mlx": {"learning_rate": ("lr", 0.25), "alpha": ("decay_rate", 0.5), "eps": ("epsilon", 0.5)},
    "lasagne": {"learning_rate": ("lr", 0.5), "rho": ("decay_rate", 0.5), "epsilon": ("epsilon", 0.5)},
    "graves": {
        "lr": ("lr", 0.5),
        "alpha": ("decay_rate", 0.5),
        "momentum": ("momentum", 0.5),
        "eps": ("epsilon", 0.5),
    },
}
EACH_ARGUMENT = [(peer, name) for peer, names in ARGUMENTS.items() for name in names]

IGNORED = [
    ("torch", "foreach", True),
    ("torch", "capturable", False),
    ("torch", "differentiable", False),
    ("keras", "name", "rmsprop"),
    ("tensorflow", "name", "RMSProp"),
    ("tensorflow", "use_locking", False),
]

# None stands for "off" there, and its absence here.
OFF = [
    ("keras", "weight_decay"),
    ("keras", "clipnorm"),
    ("keras", "clipvalue"),
    ("keras", "global_clipnorm"),
    ("optax", "momentum"),
]


def test_tables_cover_every_peer():
    assert DEFAULTS.keys() == ARGUMENTS.keys() == DIALECTS.keys()


def test_docstring_lists_every_peer():
    assert all(f'"{peer}"' in dialect.__doc__ for peer in DIALECTS)


@pytest.mark.parametrize("peer", DEFAULTS)
def test_defaults(peer):
    required, options = DEFAULTS[peer]
    assert dialect(peer, **required) == options


@pytest.mark.parametrize(("peer", "name"), EACH_ARGUMENT)
def test_argument(peer, name):
    required, defaults = DEFAULTS[peer]
    option, value = ARGUMENTS[peer][name]
    assert dialect(peer, **(required | {name: value})) == defaults | {option: value}


def test_nesterov_goes_with_momentum():
    options = dialect("optax", learning_rate=0.5, momentum=0.9, nesterov=True)
    assert options == DEFAULTS["optax"][1] | {"momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize("momentum", [None, 0.0], ids=str)
def test_nesterov_without_momentum_changes_nothing(momentum):
    # As in optax, where RMSProp itself would raise.
    options = dialect("optax", learning_rate=0.5, momentum=momentum, nesterov=True)
    assert "nesterov" not in options
    RMSProp([np.ones(2)], **options)


@pytest.mark.parametrize(("peer", "name", "value"), IGNORED)
def test_ignored(peer, name, value):
    required, options = DEFAULTS[peer]
    assert dialect(peer, **(required | {name: value})) == options


@pytest.mark.parametrize(("peer", "name"), OFF)
def test_none_is_off(peer, name):
    required, options = DEFAULTS[peer]
    assert dialect(peer, **(required | {name: None})) == options


@pytest.mark.parametrize("peer", DEFAULTS)
def test_unknown_argument(peer):
    required, _ = DEFAULTS[peer]
    with pytest.raises(
        OptionError, match=f"{peer}: unknown argument 'beta'; the arguments are .*{list(ARGUMENTS[peer])[-1]}"
    ):
        dialect(peer, **required, beta=0.9)


@pytest.mark.parametrize("peer", [peer for peer, (required, _) in DEFAULTS.items() if required])
def test_required_argument(peer):
    with pytest.raises(OptionError, match=f"{peer}: 'learning_rate' is required"):
        dialect(peer)


@pytest.mark.parametrize("name", ["pytorch", "Torch", "", "adam"])
def test_unknown_peer(name):
    with pytest.raises(OptionError, match=f"expected one of reference, sorix, torch, .* graves; got '{name}'"):
        dialect(name)


@pytest.mark.parametrize("peer", DEFAULTS)
def test_result_makes_an_optimizer_and_a_group(peer):
    required, options = DEFAULTS[peer]
    alone = RMSProp([np.ones(3)], **dialect(peer, **required))
    group = RMSProp([{"params": [np.ones(3)], **dialect(peer, **required)}, {"params": [np.ones(3)], "lr": 0.125}])
    gradients = [np.array([0.5, -1.0, 2.0])]
    for optimizer in (alone, group):
        assert {name: optimizer.param_groups[0][name] for name in options} == options
    for _ in range(2):
        alone.step(gradients)
        group.step([gradients, gradients])
    np.testing.assert_array_equal(group.params[0][0], alone.params[0])
    assert not np.array_equal(group.params[1][0], alone.params[0])


def test_results_are_independent():
    dialect("torch")["lr"] = 5.0
    assert dialect("torch")["lr"] == 1e-2


@pytest.mark.parametrize("eps", [0.0, -1e-8])
def test_mlx_needs_positive_eps(eps):
    # MLX, python/tests/test_optimizers.py: eps of 0 or less raises.
    with pytest.raises(OptionError, match="epsilon"):
        RMSProp([np.ones(2)], **dialect("mlx", learning_rate=0.1, eps=eps))


@pytest.mark.parametrize("peer", ["keras", "tensorflow", "optax", "mlx"])
def test_learning_rate_function(peer):
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5**step

    optimizer = RMSProp([np.ones(2)], **dialect(peer, learning_rate=schedule))
    assert optimizer.lr is schedule
    for _ in range(3):
        optimizer.step([np.ones(2)])
    assert asked == [0, 1, 2]


# Each project's rule, element by element, in the words of its documentation. s is the state, and starts as given.
def plain(p, g, s, o):
    s["v"] = o["decay"] * s["v"] + (1 - o["decay"]) * g**2
    return p - o["lr"] * g / (np.sqrt(s["v"]) + o["eps"])


def plain_inside(p, g, s, o):
    s["v"] = o["decay"] * s["v"] + (1 - o["decay"]) * g**2
    return p - o["lr"] * g / np.sqrt(s["v"] + o["eps"])


def l2(p, g, s, o):
    return plain(p, g + o["wd"] * p, s, o)


def torch_form(p, g, s, o):
    g = -g + o["wd"] * p
    s["v"] = o["decay"] * s["v"] + (1 - o["decay"]) * g**2
    s["m"] = s["m"] + (1 - o["decay"]) * (g - s["m"])
    s["b"] = o["momentum"] * s["b"] + g / (np.sqrt(s["v"] - s["m"] ** 2) + o["eps"])
    return p - o["lr"] * s["b"]


def tensorflow_form(p, g, s, o):
    s["v"] = s["v"] + (g**2 - s["v"]) * (1 - o["decay"])
    s["m"] = s["m"] + (g - s["m"]) * (1 - o["decay"])
    s["b"] = o["momentum"] * s["b"] + o["lr"] * g / np.sqrt(s["v"] - s["m"] ** 2 + o["eps"])
    return p - s["b"]


def keras_form(p, g, s, o):
    return tensorflow_form(p - p * o["wd"] * o["lr"], np.clip(g, -o["clip"], o["clip"]), s, o)


# Name: (project, its arguments, rule, numbers for the rule, v at the start). lr is 0.1, and 0.03 from step 20 on.
RULES = {
    "reference": ("reference", {}, plain, {"decay": 0.9, "eps": 1e-8}, 0),
    "sorix": ("sorix", {"weight_decay": 0.1}, l2, {"decay": 0.99, "eps": 1e-8, "wd": 0.1}, 0),
    "torch": (
        "torch",
        {"weight_decay": 0.1, "momentum": 0.5, "centered": True, "maximize": True, "eps": 0.01},
        torch_form,
        {"decay": 0.99, "eps": 0.01, "wd": 0.1, "momentum": 0.5},
        0,
    ),
    "keras": (
        "keras",
        {"weight_decay": 0.1, "momentum": 0.5, "centered": True, "clipvalue": 0.5, "epsilon": 0.01},
        keras_form,
        {"decay": 0.9, "eps": 0.01, "wd": 0.1, "momentum": 0.5, "clip": 0.5},
        0,
    ),
    "tensorflow": (
        "tensorflow",
        {"momentum": 0.5, "centered": True, "epsilon": 0.01},
        tensorflow_form,
        {"decay": 0.9, "eps": 0.01, "momentum": 0.5},
        1,
    ),
    "optax": ("optax", {"eps": 0.01, "initial_scale": 0.5}, plain_inside, {"decay": 0.9, "eps": 0.01}, 0.5),
    "mlx": ("mlx", {"eps": 0.01}, plain, {"decay": 0.99, "eps": 0.01}, 0),
    "lasagne": ("lasagne", {"epsilon": 0.01}, plain_inside, {"decay": 0.9, "eps": 0.01}, 0),
    "graves": ("graves", {}, tensorflow_form, {"decay": 0.95, "eps": 1e-4, "momentum": 0.9}, 0),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    peer, arguments, rule, numbers, v = RULES[name]
    rng = np.random.default_rng(9)
    p = rng.uniform(4, 6, 10)  # far from 0, so that a relative tolerance has a meaning
    lr_name = next(name for name, option in DIALECTS[peer].names.items() if option == "lr")
    optimizer = RMSProp(p, **dialect(peer, **arguments, **{lr_name: 0.1}))
    state = {"v": np.full(10, float(v)), "m": np.zeros(10), "b": np.zeros(10)}
    for step in range(40):
        lr = 0.1 if step < 20 else 0.03  # tells apart a rate inside and outside the momentum buffer
        optimizer.lr = lr
        g = rng.standard_normal(10)
        p = rule(p, g, state, numbers | {"lr": lr})
        np.testing.assert_allclose(optimizer.step(g), p, rtol=1e-12, err_msg=f"step {step}")


@pytest.mark.parametrize(("peer", "name"), [("torch", "lr"), ("torch", "alpha"), ("keras", "epsilon"), ("mlx", "eps")])
def test_none_where_it_means_nothing(peer, name):
    required, _ = DEFAULTS[peer]
    with pytest.raises((OptionError, OptionTypeError)):
        RMSProp([np.ones(2)], **dialect(peer, **(required | {name: None})))


def test_sorix_takes_both_names_of_its_decay_rate():
    assert dialect("sorix", alpha=0.5) == dialect("sorix", decay=0.5) == dialect("sorix", alpha=0.1, decay=0.5)
