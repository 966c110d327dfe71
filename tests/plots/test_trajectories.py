"""Test functions of two variables, and trajectories of RMSProp and other methods on them."""

import math

import numpy as np
import pytest
from helpers import assert_same_bits, bits

import fastrms
from fastrms import OptionError, OptionTypeError
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.plots.functions import TEST_FUNCTIONS, Landscape
from fastrms.plots.methods import METHODS, AdaGrad, Adam, GradientDescent, Momentum
from fastrms.plots.trajectories import descend

TORCH = {
    "gradient-descent": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "adagrad": ("Adagrad", {"eps": 1e-8}),
    "adam": ("Adam", {}),
}


@pytest.mark.parametrize(
    ("name", "x", "y", "value"),
    [
        ("bowl", 1, 2, 33),
        ("ellipse", 1, 2, 41),
        ("rosenbrock", -1.2, 1, 24.2),
        ("beale", 0, 0, 1.5**2 + 2.25**2 + 2.625**2),
        ("beale", 2, 2, 3.5**2 + 8.25**2 + 16.625**2),
        ("saddle", 3, 2, 5),
        ("ravine", 1, -1, 20),
        ("ravine", 1, 1, 0.2),
    ],
)
def test_built_in_values(name, x, y, value):
    assert TEST_FUNCTIONS[name].value_at(x, y) == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize("name", TEST_FUNCTIONS)
def test_gradients_are_those_of_the_functions(name, rng):
    given = TEST_FUNCTIONS[name]
    numerical = Landscape(given.function)
    for x, y in rng.uniform(-3, 3, (200, 2)):
        # Central differences lose about as many digits as the value has before the point.
        close = pytest.approx(given.gradient_at(x, y), rel=1e-8, abs=1e-9 * max(1, abs(given.value_at(x, y))))
        assert numerical.gradient_at(x, y) == close


@pytest.mark.parametrize("name", [name for name in TEST_FUNCTIONS if name != "saddle"])
def test_minima_are_the_lowest_points(name):
    landscape = TEST_FUNCTIONS[name]
    for x, y in landscape.minima:
        assert landscape.value_at(x, y) == 0
        assert bits(abs(landscape.gradient_at(x, y))) == bits(np.zeros(2))
    assert descend(name, steps=0).grid[2].min() >= 0


def test_rmsprop_is_the_reference_and_every_kernel():
    descent = descend("rosenbrock", [{"lr": 0.02}, {"lr": 0.02, "kernel": "serial"}], steps=60)
    reference = ReferenceRMSProp([np.array(descent.landscape.start)], lr=0.02)
    points = [reference.params[0]]
    for _ in range(60):
        points.append(reference.step([descent.landscape.gradient_at(*points[-1])])[0])
    for trace in descent.traces:
        assert_same_bits(trace.points, np.array(points))
        assert_same_bits(trace.values, np.array([descent.landscape.value_at(*point) for point in points]))


@pytest.mark.torch
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_those_of_torch(method):
    import torch

    name, options = TORCH[method]
    (trace,) = descend("beale", [], [(method, {"lr": 0.005})], steps=100).traces
    param = torch.tensor(TEST_FUNCTIONS["beale"].start, dtype=torch.float64, requires_grad=True)
    optimizer = getattr(torch.optim, name)([param], lr=0.005, **options)
    points = [param.detach().numpy().copy()]
    for _ in range(100):
        param.grad = torch.tensor(TEST_FUNCTIONS["beale"].gradient_at(*points[-1]))
        optimizer.step()
        points.append(param.detach().numpy().copy())
    np.testing.assert_allclose(trace.points, points, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "points", "rates"),
    [
        (GradientDescent, [[0.5, 1.0], [0.0, 1.5]], [[0.5, 0.5], [0.5, 0.5]]),
        (Momentum, [[0.5, 1.0], [-0.45, 1.5]], [[0.5, 0.5], [0.5, 0.5]]),
        (
            AdaGrad,
            [[0.5, 1.0], [0.5 - 0.5 / math.sqrt(2), 1.5]],
            [[0.5, 5e7], [0.5 / math.sqrt(2), 0.5]],
        ),
        # The corrected means of 1 and 1, and of 0 and -1; of the squares likewise.
        (
            Adam,
            [[0.5, 1.0], [0.0, 1 + 0.5 * (0.1 / 0.19) * math.sqrt(1.999)]],
            [[0.5, 5e7], [0.5, 0.5 * math.sqrt(1.999)]],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_two_steps_by_hand(make, points, rates):
    start = np.array([1.0, 1.0])
    optimizer = make(start, 0.5)
    for gradient, point, rate in zip(([1.0, 0.0], [1.0, -1.0]), points, rates, strict=True):
        np.testing.assert_allclose(optimizer.step(np.array(gradient)), point, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(optimizer.rate, rate, rtol=1e-7)
    assert start.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 0.3},
        {"epsilon": 0.3, "eps_in_sqrt": True},
        {"epsilon": 0.01, "centered": True},
        {"bias_correction": True},
        {"epsilon": 0.1, "centered": True, "bias_correction": True, "eps_in_sqrt": True},
        {"initial_scale": 1.0},
        {"lr": lambda step: 0.1 / (1 + step)},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_rates_are_what_the_gradient_was_multiplied_by(options):
    (trace,) = descend("bowl", [options], steps=30).traces
    gradients = np.array([TEST_FUNCTIONS["bowl"].gradient_at(*point) for point in trace.points[:-1]])
    # Both sides are differences of rounded numbers.
    np.testing.assert_allclose(np.diff(trace.points, axis=0), -trace.rates * gradients, rtol=1e-6, atol=1e-14)


def test_rates_of_the_default_picture():
    """As docs/path.md says: RMSProp arrives, leaves, and wanders within half an lr of the minimum; AdaGrad settles."""
    descent = descend("ellipse")
    rmsprop, gradient_descent, momentum, adagrad = (trace.rates for trace in descent.traces)
    assert (np.diff(adagrad, axis=0) <= 0).all()
    assert (rmsprop.max(axis=0) > 10 * rmsprop[0]).all()
    assert np.ptp(gradient_descent) == np.ptp(momentum) == 0
    values = descent.traces[0].values
    assert values[50] < 1e-10
    assert 55 < 50 + np.argmax(values[50:] > 0.1) < 65
    last = abs(descent.traces[0].points[-100:])
    assert (last.max(axis=0) < 0.51 * 0.2).all()
    assert (last.min(axis=0) > 0.4 * 0.2).all()
    assert max(trace.values[-1] for trace in descent.traces[1:]) < 1e-10


GRID = [digit * power for power in (0.001, 0.01, 0.1, 1) for digit in (1, 2, 5)]
TUNED = [name for name in TEST_FUNCTIONS if name != "saddle"]


@pytest.mark.parametrize("method", ["rmsprop", *METHODS])
@pytest.mark.parametrize("name", TUNED)
def test_default_rates_are_the_best_of_the_grid(name, method):
    means = {}
    for lr in GRID:
        settings, beside = ([{"lr": lr}], []) if method == "rmsprop" else ([], [(method, {"lr": lr})])
        (trace,) = descend(name, settings, beside).traces
        means[lr] = trace.values.mean() if trace.lost_at is None else math.inf
    best = min(means, key=means.get)
    assert TEST_FUNCTIONS[name].rates[method] == pytest.approx(best)
    assert best != GRID[-1]


def test_the_saddle_has_first_steps_of_one_length():
    first = [
        trace.points[1, 0] - trace.points[0, 0] for trace in descend("saddle", [{}], list(METHODS), steps=1).traces
    ]
    assert np.ptp(first) < 0.06 * np.mean(first)


@pytest.mark.parametrize("name", TEST_FUNCTIONS)
def test_the_note_says_how_default_rates_were_chosen(name):
    note = descend(name, steps=1).note
    assert note.startswith("Default lr: ")
    assert (f"over {TEST_FUNCTIONS[name].steps} steps" in note) == (name in TUNED)
    assert descend(name, [{"lr": 1}, {}], steps=1).note == note
    assert descend(name, [{"lr": 1}], [("adam", {"lr": 1})], steps=1).note == ""


def test_notes_of_functions_of_the_users_own():
    assert "not tuned" in descend(lambda x, y: x * x + y * y, steps=1).note
    assert "not tuned" in descend(Landscape(lambda x, y: x * x, name="mine"), steps=1).note
    assert descend(Landscape(lambda x, y: x * x, rates={"momentum": 1}), steps=1).note == ""
    assert descend(Landscape(lambda x, y: x * x, rates_note="tried"), steps=1).note == "tried"


def test_by_default_all_methods_and_beside_settings_none():
    labels = ["RMSProp, lr 0.2", "gradient descent, lr 0.05", "momentum, lr 0.02", "AdaGrad, lr 1"]
    assert [trace.label for trace in descend().traces] == labels
    assert [trace.label for trace in descend(settings=[{}]).traces] == labels[:1]
    assert [trace.label for trace in descend(beside=["momentum"]).traces] == [labels[0], labels[2]]


def test_labels():
    settings = [{"lr": 1, "centered": True}, {"flush_subnormals": False}, {"lr": math.sin, "clip_norm": None}]
    labels = [trace.label for trace in descend("bowl", settings, [("adagrad", {"epsilon": 1e-3})], steps=1).traces]
    assert labels == [
        "RMSProp, lr 1, centered",
        "RMSProp, lr 0.2, flush_subnormals off",
        "RMSProp, lr sin, clip_norm None",
        "AdaGrad, lr 1, epsilon 0.001",
    ]
    assert [trace.label for trace in descend("bowl", {"mine": {}, "yours": {}}).traces] == ["mine", "yours"]


@pytest.mark.parametrize("dialect", ["torch", "keras"])
def test_settings_of_a_dialect(dialect):
    options = fastrms.dialect(dialect)
    (trace,) = descend("bowl", [options], steps=3).traces
    assert trace.rates[0, 0] == pytest.approx(options["lr"] / math.sqrt(1 - options["decay_rate"]) / 16, rel=1e-5)


def test_zero_steps():
    (trace,) = descend("bowl", [{}], steps=0).traces
    assert (trace.points.tolist(), trace.rates.shape, trace.lost_at) == ([[-1.6, 1.3]], (0, 2), None)


def test_a_start_out_of_the_region_extends_it_unless_it_is_given():
    x, y = descend("bowl", start=(5, -2), steps=1).region
    assert x == pytest.approx((-2, 5.7))
    assert y == pytest.approx((-2.4, 2))
    with pytest.raises(OptionError, match=r"start: expected a point in the region .*, got \(5.0, -2.0\)"):
        descend("bowl", start=(5, -2), region=((-2, 2), (-2, 2)))


@pytest.mark.parametrize(
    ("settings", "beside"),
    [([], [("gradient-descent", {"lr": 1})]), ([], [("momentum", {"lr": 1})]), ([{"lr": 1e200}], [])],
    ids=["gradient-descent", "momentum", "rmsprop"],
)
def test_divergence_ends_a_path(settings, beside):
    (trace,) = descend("rosenbrock", settings, beside, steps=1000).traces
    assert trace.lost_at == len(trace.points) <= 20
    assert trace.caption == f"{trace.label} (diverged at step {trace.lost_at})"
    assert np.isfinite(trace.points).all()
    assert np.isfinite(trace.values).all()
    assert len(trace.points) == len(trace.values) == len(trace.rates) + 1


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_a_path_ends_where_there_is_no_gradient(nonfinite):
    cliff = Landscape(lambda x, y: x + y, lambda x, y: (1, 1 if y > 0 else math.nan))
    (trace,) = descend(cliff, [{"lr": 0.1, "nonfinite": nonfinite}], start=(0, 0.3), steps=50).traces
    assert trace.points[-1, 1] <= 0 < trace.points[-2, 1]
    assert trace.lost_at == len(trace.points)


def raises(error):
    def function(x, y):
        if x < 0:
            raise error("no value here")
        return (x - 1) ** 2 + y**2

    return function


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, OverflowError])
def test_no_value_where_arithmetic_fails(error):
    descent = descend(raises(error), [{}], start=(1, 1))
    x, _, values = descent.grid
    assert np.isnan(values[:, x < 0]).all()
    assert np.isfinite(values[:, x >= 0]).all()
    with pytest.raises(OptionError, match="start: expected a point at which function has a value"):
        descend(raises(error), start=(-1, 1))


def test_other_errors_of_the_function_come_out_as_they_are():
    with pytest.raises(KeyError, match="no value here"):
        descend(raises(KeyError), start=(-1, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_no_value_at_the_start(value):
    with pytest.raises(OptionError, match=r"start: .* has a value of at most 1e\+150, got \(1.0, 1.0\)"):
        descend(Landscape(lambda x, y: value, name="none"), start=(1, 1))


def test_a_region_without_a_value():
    only = Landscape(lambda x, y: 1.0 if x == 1.23 else math.nan, lambda x, y: (0, 0), name="only")
    descent = descend(only, start=(1.23, 0), steps=1)
    with pytest.raises(OptionError, match="region: only has no finite value in"):
        _ = descent.grid


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, r"None \(NoneType\)"),
        ("1", r"'1' \(str\)"),
        (1j, r"1j \(complex\)"),
        (True, r"True \(bool\)"),
        ([1.0], r"\[1.0\] \(list\)"),
        (np.ones(2), r"array\(\[1., 1.\]\) \(array of shape \(2,\)\)"),
    ],
)
def test_a_function_that_returns_no_number(value, shown):
    with pytest.raises(OptionTypeError, match=f"function: expected a number at x=1, y=2, got {shown}"):
        descend(lambda x, y: value, start=(1, 2))


@pytest.mark.parametrize("value", [None, 1.0, (1, 2, 3), ("a", "b"), [[1], [2, 3]], np.ones((2, 1))], ids=str)
def test_a_gradient_that_is_no_two_numbers(value):
    landscape = Landscape(lambda x, y: x + y, lambda x, y: value)
    with pytest.raises(OptionTypeError, match="gradient: expected two numbers at x=1, y=2, got"):
        descend(landscape, start=(1, 2))


@pytest.mark.parametrize("value", [np.float32(1.5), np.array(1.5), np.int8(3), 7], ids=repr)
def test_kinds_of_numbers(value):
    assert Landscape(lambda x, y: value).value_at(0, 0) == float(value)


def test_functions_get_two_floats():
    kinds = set()

    def function(x, y):
        kinds.update({type(x), type(y)})
        return math.hypot(x, y)

    _ = descend(function).grid
    assert all(issubclass(kind, float) for kind in kinds)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"function": "hill"}, OptionError, "function: expected one of ('bowl', 'ellipse', 'rosenbrock', 'beale'"),
        ({"function": 3}, OptionTypeError, "function: expected a function of x and y, got 3"),
        ({"settings": {"lr": 0.1}}, OptionTypeError, "settings['lr']: expected a dict of options of RMSProp, got 0.1"),
        ({"settings": "lr=1"}, OptionTypeError, "settings: expected a list of dicts of options, got 'lr=1'"),
        ({"settings": 1}, OptionTypeError, "settings: expected a list of dicts of options, got 1"),
        (
            {"settings": [{}, {"rate": 1}]},
            OptionError,
            "settings[1]: 'rate' is not an option of RMSProp on a path; the options are lr",
        ),
        ({"settings": [{"params": 1}]}, OptionError, "settings[0]: 'params' is not an option of RMSProp"),
        (
            {"settings": [{"storage": "x"}]},
            OptionError,
            "settings[0]: 'storage' is not an option of RMSProp on a path; the",
        ),
        ({"settings": {"a": {"lr": -1}}}, OptionError, "settings['a']: lr: expected a number"),
        (
            {"settings": [{"decay_rate": 1}]},
            OptionError,
            "settings[0]: decay_rate: expected a number with decay_rate >= 0 and < 1",
        ),
        ({"settings": [{}] * 9}, OptionError, "settings and beside: expected 1 to 8 paths in one picture, got 9"),
        ({"settings": []}, OptionError, "settings and beside: expected 1 to 8 paths in one picture, got 0"),
        ({"beside": "adagrad"}, OptionTypeError, "beside: expected a list of names such as ['adagrad'], got 'adagrad'"),
        (
            {"beside": ["lion"]},
            OptionError,
            "beside[0]: expected one of ('gradient-descent', 'momentum', 'adagrad', 'adam')",
        ),
        (
            {"beside": [3]},
            OptionError,
            "beside[0]: expected one of ('gradient-descent', 'momentum', 'adagrad', 'adam')",
        ),
        (
            {"beside": [("momentum", 0.9)]},
            OptionTypeError,
            "beside[0]: expected a dict of options of momentum, got 0.9",
        ),
        (
            {"beside": [("adagrad", {"momentum": 0.9})]},
            OptionError,
            "beside[0]: 'momentum' is not an option of adagrad",
        ),
        ({"beside": [("adagrad", {"lr": -1})]}, OptionError, "beside[0]: lr: expected a number"),
        ({"beside": [("adagrad", {"lr": abs})]}, OptionTypeError, "beside[0]: lr: expected a number, got <built-in"),
        ({"beside": [("momentum", {"momentum": 1})]}, OptionError, "beside[0]: momentum: expected a number"),
        (
            {"beside": [("adam", {"beta1": 1})]},
            OptionError,
            "beside[0]: beta1: expected a number with beta1 >= 0 and < 1",
        ),
        ({"beside": [("adam", {"beta2": "x"})]}, OptionTypeError, "beside[0]: beta2: expected a number, got 'x' (str)"),
        ({"beside": [("adagrad", {"epsilon": 0})]}, OptionError, "beside[0]: epsilon: expected a number"),
        ({"start": (1, math.nan)}, OptionError, "start: expected two finite numbers, x and y, got (1, nan)"),
        ({"start": 1}, OptionError, "start: expected two finite numbers, x and y, got 1"),
        ({"start": ("a", "b")}, OptionError, "start: expected two finite numbers, x and y, got ('a', 'b')"),
        ({"steps": -1}, OptionError, "steps: expected a whole number of at least 0, got -1"),
        ({"steps": 1.5}, OptionError, "steps: expected a whole number of at least 0, got 1.5"),
        ({"steps": True}, OptionError, "steps: expected a whole number of at least 0, got True"),
        ({"region": (1, 2)}, OptionError, "region: expected ((x_low, x_high), (y_low, y_high)), finite, got (1, 2)"),
        ({"region": ((1, 1), (0, 2))}, OptionError, "region: expected ((x_low, x_high), (y_low, y_high))"),
        ({"region": ((0, math.inf), (0, 2))}, OptionError, "region: expected ((x_low, x_high), (y_low, y_high))"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        descend(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": 3}, OptionTypeError, "gradient: expected a function of x and y, got 3"),
        ({"rates": {"lion": 1}}, OptionError, "rates: expected names out of ('rmsprop', 'gradient-descent', "),
        ({"minima": [(1,)]}, OptionError, "minima: expected two finite numbers"),
        ({"start": None}, OptionError, "start: expected two finite numbers"),
        ({"steps": None}, OptionError, "steps: expected a whole number"),
        ({"region": None}, OptionError, "region: expected"),
        ({"azimuth": "north"}, OptionTypeError, "azimuth: expected a number of degrees, got 'north'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_landscapes(options, error, message):
    with pytest.raises(error) as caught:
        Landscape(max, **options)
    assert str(caught.value).startswith(message)


def test_names_of_landscapes():
    def hill(x, y):
        return -x * x - y * y

    class Hill:
        def __call__(self, x, y):
            return hill(x, y)

    assert [Landscape(hill).name, Landscape(Hill()).name, Landscape(hill, name="mine").name] == ["hill", "Hill", "mine"]
