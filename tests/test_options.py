"""Hyper-parameters: their ranges, when they are checked, and what the numbers for a kernel are."""

import importlib.util
import inspect
import itertools
import math
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numba.core import event

from fastrms import OptionError, OptionTypeError, RMSProp, dialect, rmsprop_update, warmup
from fastrms._checks import GROUP_DEFAULTS, HOST_KERNELS, check_option
from fastrms.kernels import UPDATES
from fastrms.kernels.hyper import HYPER_FIELDS, hyper_values
from fastrms.options import Group, Keywords

NAN, INF = math.nan, math.inf

# Option: values that are taken, values out of range, values of the wrong kind.
RANGES = {
    "lr": ([0, 1e-3, 5.0, np.float32(0.1), np.array(0.1)], [-1e-9, NAN, INF], ["0.1", True, 1j, None, [0.1]]),
    "decay_rate": ([0, 0.9, 0.999999], [-0.1, 1, 1.5, NAN], ["a", None, False]),
    "epsilon": ([1e-30, 1, np.int64(2)], [0, -1e-8, NAN, INF, 1e-50, 1e39], ["a", None, True]),
    "momentum": ([0, 0.9], [-0.1, 1, NAN], ["a", None, True]),
    "weight_decay": ([0, 0.1, 2], [-0.1, NAN, INF, 1e39], ["a", None, True]),
    "initial_scale": ([0, 1.0], [-1, NAN, INF, 1e39], ["a", None, True]),
    "clip_value": ([None, 0.1], [0, -1, NAN, INF, 1e-50], ["a", True]),
    "clip_norm": ([None, 0.1], [0, -1, NAN, INF], ["a", True]),
    "global_clip_norm": ([None, 0.1, INF], [0, -1, NAN, -INF], ["a", True]),
    "nesterov": ([False, np.False_], [], [1, 0, None, "yes"]),
    "centered": ([True, np.True_], [], [1, 0, None, "yes"]),
    "decoupled_weight_decay": ([True], [], [1, None]),
    "maximize": ([True], [], [1, None]),
    "eps_in_sqrt": ([True], [], [1, None]),
    "bias_correction": ([True], [], [1, None]),
    "lr_in_momentum": ([True], [], [1, None]),
    "flush_subnormals": ([False], [], [1, None]),
    "kernel": (["auto", "numpy", "serial", "parallel"], ["gpu", ""], [None, 1]),
    "num_threads": ([None, 1, 2, np.int64(1)], [0, -1, 10_000], [1.0, "2", True]),
}


def cases(which):
    return [pytest.param(name, value, id=f"{name}={value}") for name, row in RANGES.items() for value in row[which]]


def test_the_table_has_every_option():
    assert RANGES.keys() == GROUP_DEFAULTS.keys() | {"global_clip_norm", "kernel", "num_threads"}


@pytest.mark.parametrize(("name", "value"), cases(0))
def test_good_values_are_taken(name, value):
    opt = RMSProp([np.ones(2, np.float32)], **{name: value})
    opt.step([np.ones(2)])
    assert np.isfinite(opt.params[0]).all()
    if name in GROUP_DEFAULTS:
        assert opt.param_groups[0][name] == value


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_values_out_of_range_raise_and_the_error_names_option_and_value(name, value):
    with pytest.raises(OptionError, match=f"^{name}: .*{value!r}".replace("+", r"\+")):
        RMSProp([np.ones(2, np.float32)], **{name: value})
    if name in GROUP_DEFAULTS:
        with pytest.raises(OptionError, match=name):
            RMSProp([{"params": np.ones(2, np.float32), name: value}])


@pytest.mark.parametrize(("name", "value"), cases(2))
def test_values_of_the_wrong_kind_raise(name, value):
    with pytest.raises(OptionTypeError, match=f"^{name}: expected "):
        RMSProp([np.ones(2)], **{name: value})


@pytest.mark.parametrize(("name", "value"), cases(1) + cases(2))
def test_a_bad_assignment_raises_and_the_old_value_stays(name, value):
    opt = RMSProp([np.ones(2, np.float32)])
    if name in GROUP_DEFAULTS:
        before = opt.param_groups[0][name]
        with pytest.raises((OptionError, OptionTypeError), match=name):
            opt.param_groups[0][name] = value
        assert opt.param_groups[0][name] == before
    else:
        before = getattr(opt, name)
        with pytest.raises((OptionError, OptionTypeError), match=name):
            setattr(opt, name, value)
        assert getattr(opt, name) == before


def numbers_of(value):
    """The number in the form that each library has for one, by name."""
    import jax.numpy as jnp
    import keras

    forms = {kind.__name__: kind(value) for kind in (np.float16, np.float32, np.longdouble, Fraction, Decimal)}
    forms |= {f"0-d {dtype}": np.array(value, dtype) for dtype in ("f4", ">f8", "g", object)}
    forms |= {"0-d Decimal": np.array(Decimal(value), object), "bfloat16": ml_dtypes.bfloat16(value)}
    forms |= {f"jax {dtype}": jnp.array(value, dtype) for dtype in ("float32", "float16", "bfloat16")}
    return forms | {"keras tensor": keras.ops.convert_to_tensor(value), "keras variable": keras.Variable(value)}


def numbers():
    value = 0.3125  # a number of each dtype
    names = [name for name, row in RANGES.items() if 0.1 in row[0]] + ["decay_rate", "momentum"]
    for name, (form, number) in itertools.product(names, numbers_of(value).items()):
        opt = RMSProp([np.ones(2, np.float32)], **{name: number})
        setting = opt.global_clip_norm if name == "global_clip_norm" else opt.param_groups[0][name]
        assert (setting, type(setting)) == (value, float), (name, form)
        if name in GROUP_DEFAULTS and name != "initial_scale":
            opt.param_groups[0][name] = number
            opt.param_groups[0][name] = value
            opt.param_groups[0][name] = number
            assert type(opt.param_groups[0][name]) is float
        assert check_option(name, number) == value


@pytest.mark.torch
def test_numbers_of_torch_are_options():
    import torch

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for number in (torch.tensor(0.3125, dtype=dtype), torch.nn.Parameter(torch.tensor(0.3125, dtype=dtype)),
                       torch.tensor(0.3125, dtype=dtype, requires_grad=True) * 1):  # fmt: skip
            assert RMSProp([np.ones(2)], number).lr == 0.3125
            assert RMSProp([np.ones(2)], epsilon=number).epsilon == 0.3125
            opt = RMSProp([np.ones(2)], lambda step: number)  # noqa: B023
            opt.step([np.ones(2)])
            assert opt.params[0][0] < 1
    for no_number in (torch.tensor(True), torch.tensor(1 + 0j), torch.tensor([0.1])):
        with pytest.raises(OptionTypeError, match=r"^lr: expected a number or a function of the step, got tensor"):
            RMSProp([np.ones(2)], no_number)


@pytest.mark.parametrize(
    "value",
    [np.array(True), np.array(True, object), np.array(1j), np.complex64(1), np.array("0.1"), np.str_("0.1"), b"0.1",
     np.bytes_(b"1"), np.void(b"1"), np.timedelta64(1, "s"), np.array(1, "m8[s]"), np.datetime64("2026"),
     np.array([0.1]), np.array([[0.1]]), np.array(None, object), np.array([]), (0.1,)],
    ids=repr,
)  # fmt: skip
def test_what_is_no_single_real_number_is_no_option(value):
    with pytest.raises(OptionTypeError, match=r"^epsilon: expected a number, got "):
        RMSProp([np.ones(2)], epsilon=value)
    with pytest.raises(OptionTypeError, match=r"^the function given as lr returned, at step 0: lr: expected "):
        RMSProp([np.ones(2)], lambda step: value).step([np.ones(2)])


def no_numbers():
    import jax.numpy as jnp

    for value in (jnp.array(True), jnp.array(1j), jnp.array([0.1])):
        test_what_is_no_single_real_number_is_no_option(value)


def schedules():
    import optax
    from keras.optimizers import schedules as kinds

    made = {
        "constant": optax.constant_schedule(0.1),
        "cosine": optax.cosine_decay_schedule(0.1, 10),
        "exponential": optax.exponential_decay(0.1, 10, 0.9),
        "piecewise": optax.piecewise_constant_schedule(0.1, {2: 0.5}),
        "linear": optax.linear_schedule(0.1, 0.01, 10),
        "polynomial": optax.polynomial_schedule(0.1, 0.01, 2, 10),
        "warmup": optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10),
        "one cycle": optax.linear_onecycle_schedule(10, 0.1),
        "joined": optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.2)], [2]),
        "restarts": optax.sgdr_schedule([
            {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 2, "decay_steps": 5, "end_value": 0.0}
        ]),
        "Keras exponential": kinds.ExponentialDecay(0.1, 10, 0.9),
        "Keras cosine": kinds.CosineDecay(0.1, 10),
        "Keras restarts": kinds.CosineDecayRestarts(0.1, 10),
        "Keras polynomial": kinds.PolynomialDecay(0.1, 10),
        "Keras inverse": kinds.InverseTimeDecay(0.1, 10, 0.5),
        "Keras piecewise": kinds.PiecewiseConstantDecay([1, 2], [0.1, 0.2, 0.3]),
    }  # fmt: skip
    for name, schedule in made.items():
        opt = RMSProp([np.ones(2)], dialect("optax", learning_rate=schedule)["lr"], momentum=0.5)
        other = RMSProp([np.ones(2)], lambda step: float(schedule(step)), momentum=0.5)  # noqa: B023
        for _ in range(4):
            assert np.array_equal(opt.step([np.ones(2)]), other.step([np.ones(2)])), name
    opt.lr = made["cosine"]
    opt.step([np.ones(2)])
    assert rmsprop_update([np.ones(2)], [np.ones(2)], None, lr=opt.lr)[0][0][0] < 1


def arrays():
    import jax.numpy as jnp

    gradients = [jnp.array([1.5, 2], jnp.bfloat16), jnp.array(5, jnp.float8_e5m2)]
    opt, other = (RMSProp([np.ones(2, np.float32), np.ones((), np.float32)]) for _ in range(2))
    opt.step(gradients)
    other.step([np.array([1.5, 2]), 5])
    assert np.array_equal(opt.params[0], other.params[0])
    assert opt.params[1] == other.params[1]


def test_what_jax_optax_and_keras_have():
    for name in ("jax", "optax", "keras"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    # In a process of their own, as each fork warns where JAX was imported; in one, as importing takes seconds.
    program = "from test_options import *; numbers(); no_numbers(); schedules(); arrays()"
    environment = os.environ | {
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_an_epsilon_too_small_for_float32_is_fine_for_float64_alone():
    RMSProp([np.ones(2)], epsilon=1e-60)
    with pytest.raises(OptionError, match="epsilon: 1e-60 rounds to 0 in float32"):
        RMSProp([np.ones(2), np.ones(2, np.float32)], epsilon=1e-60)
    with pytest.raises(OptionError, match="epsilon: 1e-60 rounds to 0 in float32"):
        RMSProp([{"params": np.ones(2), "epsilon": 1e-60}, {"params": np.ones(2, np.float32), "epsilon": 1e-60}])
    RMSProp([{"params": np.ones(2), "epsilon": 1e-60}, {"params": np.ones(2, np.float32)}])


def test_nesterov_needs_momentum_wherever_it_is_set():
    with pytest.raises(OptionError, match="nesterov: True needs momentum > 0"):
        RMSProp([np.ones(2)], nesterov=True)
    opt = RMSProp([np.ones(2)], nesterov=True, momentum=0.9)
    with pytest.raises(OptionError, match="nesterov"):
        opt.param_groups[0]["momentum"] = 0.0
    assert opt.param_groups[0]["momentum"] == 0.9


def test_a_group_is_a_mapping_that_refuses_what_it_cannot_do():
    group = RMSProp([np.ones(2)]).param_groups[0]
    assert set(group) == {"params", *GROUP_DEFAULTS}
    assert len(group) == len(list(group))
    with pytest.raises(
        OptionError, match="'alpha' is not an option of a parameter group; expected 'decay_rate', which torch"
    ):
        group["alpha"] = 0.9
    with pytest.raises(OptionError, match="'params' cannot be set"):
        group["params"] = []
    with pytest.raises(OptionError, match="initial_scale: can only be set at construction"):
        group["initial_scale"] = 1.0
    with pytest.raises(OptionError, match="cannot be deleted"):
        del group["lr"]
    with pytest.raises(KeyError):
        group["alpha"]
    group.update(lr=0.5, weight_decay=0.1)
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.1)


def test_warmup_leaves_nothing_to_compile_and_refuses_what_the_class_refuses():
    warmup(["float32"], momentum=0.9, clip_norm=1.0)
    with event.install_recorder("numba:compile") as compiled:
        for kernel in ("serial", "parallel"):
            opt = RMSProp([np.ones((3, 2), np.float32)], kernel=kernel, momentum=0.5, clip_norm=0.1)
            opt.step([np.ones((3, 2), np.float32)])
            opt.step()
    assert len(compiled.buffer) == 0
    with pytest.raises(OptionError, match="momentum"):
        warmup(momentum=2.0)


def test_the_signature_has_the_defaults_of_the_table():
    signature = inspect.signature(RMSProp).parameters
    assert {name: signature[name].default for name in GROUP_DEFAULTS} == GROUP_DEFAULTS


def test_positional_order_is_the_references():
    opt = RMSProp([np.ones(2)], 0.5, 0.25, 0.125)
    assert (opt.lr, opt.decay_rate, opt.epsilon) == (0.5, 0.25, 0.125)
    with pytest.raises(TypeError):
        RMSProp([np.ones(2)], 0.5, 0.25, 0.125, 0.9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay_rate", [0.0, 0.5, 0.9, 0.99, 0.999999])
def test_floors_decide_exactly_as_the_product_would(dtype, decay_rate):
    values = dict(
        zip(HYPER_FIELDS, hyper_values(GROUP_DEFAULTS | {"decay_rate": decay_rate}, 0.1, np.dtype(dtype)), strict=True)
    )
    tiny = np.finfo(dtype).tiny
    for floor, weight in ((values["gradient_floor"], values["rest"]), (values["mean_floor"], 1.0)):
        x = dtype(floor)
        below = np.nextafter(x, dtype(0))
        with np.errstate(under="ignore"):
            assert dtype(weight) * (x * x) >= tiny
            assert dtype(weight) * (below * below) < tiny
    off = hyper_values(GROUP_DEFAULTS | {"flush_subnormals": False}, 0.1, np.dtype(dtype))
    assert [off[HYPER_FIELDS.index(name)] for name in ("gradient_floor", "mean_floor", "state_floor")] == [0, 0, 0]


def test_type_checkers_see_every_option():
    own = {"params", "lr", "decay_rate", "epsilon", "kernel", "cache_dtype", "storage", "stream", "in_place"}
    assert {*Keywords.__annotations__, *own} == set(inspect.signature(RMSProp).parameters)
    assert set(Group.__annotations__) == {"params", *GROUP_DEFAULTS}
    assert ("auto", *UPDATES) == HOST_KERNELS
