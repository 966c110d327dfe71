"""Runs of RMSProp that others published, as tables: the settings, and the numbers digit by digit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

import fastrms

Gradient = Callable[[list[Any], int], list[Any]]


def always(*gradients: Any) -> Gradient:
    """The same gradients at each step."""
    return lambda params, step: [np.asarray(g) for g in gradients]


def in_turn(*steps: list[Any]) -> Gradient:
    """The gradients of each step."""
    return lambda params, step: [np.asarray(g) for g in steps[step]]


def bowl(*curvatures: Any) -> Gradient:
    """The gradients of the sum of c x²/2."""
    return lambda params, step: [np.asarray(c) * p for c, p in zip(curvatures, params, strict=True)]


def sum_of_squares(*weights: float) -> Callable[[list[Any]], Any]:
    """The loss w x² + ... of one parameter, for the losses that some publish."""
    return lambda params: np.sum(np.asarray(weights) * np.float64(params[0]) ** 2)


@dataclass(frozen=True)
class Run:
    """One published run: what was done, and the numbers.

    `peer` is a dialect with `arguments`, or None if `arguments` are options of RMSProp. `after` maps a number of steps
    to all parameters in order, as printed there ("-" where nothing is), `losses` to the loss then.
    """

    peer: str | None
    arguments: Mapping[str, Any]
    start: list[Any]
    gradient: Gradient
    after: Mapping[int, str]
    loss: Callable[[list[Any]], Any] | None = None
    losses: Mapping[int, str] | None = None
    dtype: type = np.float64
    rtol: float = 1e-12

    def options(self) -> dict[str, Any]:
        return dict(self.arguments) if self.peer is None else fastrms.dialect(self.peer, **self.arguments)

    def check(self, params: list[Any], steps: int) -> None:
        flat = np.concatenate([np.ravel(p) for p in params])
        if steps in self.after:
            assert_digits(flat, self.after[steps], self, f"parameters after {steps} steps")
        if self.loss is not None and steps in (self.losses or {}):
            assert_digits([self.loss(params)], self.losses[steps], self, f"loss after {steps} steps")


def assert_digits(values: Any, published: str, run: Run, what: str) -> None:
    """Within half a unit of the last digit that was printed; with 13 digits or more, within `run.rtol`."""
    words = published.split()
    assert len(words) == len(values)
    for k, (word, value) in enumerate(zip(words, values, strict=True)):
        if word == "-":
            continue
        number = Decimal(word).as_tuple()
        size = abs(float(word))
        tolerance = run.rtol * size if len(number.digits) >= 13 else 0.5 * 10.0**number.exponent
        if run.dtype is np.float32:
            # They computed in float32 too, where the order of operations decides the last digits: two roundings of
            # the number, or of 1, near which the parameters start.
            tolerance += 2 * float(np.finfo(np.float32).eps) * max(1.0, size)
        assert abs(float(value) - float(word)) <= tolerance, f"{what}, number {k}: {value!r}, published {word}"


SORIX_X = ("4.0000", "3.3734", "2.9043", "2.5283", "2.2157", "1.9503", "1.7217", "1.5230", "1.3489", "1.1959")
SORIX_LOSS = (
    *("275.0000", "176.0000", "125.1775", "92.7866", "70.3128"),
    *("54.0031", "41.8402", "32.6073", "25.5132", "20.0162"),
)
# The three steps of the runs that we made with other libraries (below).
OURS: dict[str, Any] = {
    "start": [[1.0, -2.0], [3.0]],
    "gradient": in_turn([[0.3, -1.2], [2.0]], [[-0.7, 0.5], [1.0]], [[1.5, -0.25], [-3.0]]),
}
RATES = np.array([0.1, 1.0, 2.0, 10.0, 100.0])  # of dfdx' tests, whose loss is the sum of (rate x)²
DFDX: dict[str, Any] = {"start": [np.ones(5)], "gradient": bowl(2 * RATES**2), "dtype": np.float32}
# TensorFlow's form, with eps in the root and the cache started from 1, which dfdx takes from timm's RMSpropTF.
DFDX_OPTIONS = {"lr": 0.01, "eps_in_sqrt": True, "lr_in_momentum": True, "initial_scale": 1.0}
TF1: dict[str, Any] = {"start": [[1.0, 2.0], [3.0, 4.0]], "gradient": always([0.1, 0.1], [0.01, 0.01])}

RUNS = {
    # sorix, docs/learn/optimizers/03-RMSprop.ipynb; the losses there are those before each step.
    "sorix page": Run(
        "sorix",
        {"lr": 0.1},
        [[5.0, 5.0]],
        bowl([2.0, 20.0]),
        {n: f"{x} {x}" for n, x in enumerate(SORIX_X, 1)},
        sum_of_squares(1, 10),
        dict(enumerate(SORIX_LOSS)),
    ),
    # The same page at commit 0a595d70, when sorix' default of decay was 0.9; its tensors are float32.
    "sorix page, decay 0.9": Run(
        "sorix",
        {"lr": 0.1, "decay": 0.9},
        [[5.0, 5.0]],
        bowl([2.0, 20.0]),
        {1: "4.6838 4.6838", 2: "4.4616 4.4616", 5: "3.9762 3.9762", 10: "3.3808 3.3808"},
        sum_of_squares(1, 10),
        {1: "241.3149", 2: "218.9631", 9: "133.8827"},
        np.float32,
    ),
    # GeeksforGeeks, machine-learning/gradient-descent-with-rmsprop-from-scratch.
    "eps inside, 50 steps": Run(
        None,
        {"lr": 0.1, "eps_in_sqrt": True},
        [[-4.0, 3.0]],
        bowl([10.0, 14.0]),
        {50: "-0.10352260359924752 0.0025296212056016548"},
        sum_of_squares(5, 7),
        {50: "0.05362944016394148"},
    ),
    # A tutorial's printout for f = x² + y².
    "eps outside, 101 steps": Run(
        None,
        {"lr": 0.1, "epsilon": 1e-6},
        [[5.0, 4.0]],
        bowl([2.0, 2.0]),
        {
            1: "4.68377233 3.68377236",
            21: "2.3688824 1.47561697",
            41: "0.95903672 0.35004133",
            61: "0.13761293 0.00745214",
            81: "3.91649374e-04 3.12725069e-09",
            101: "-3.07701828e-17 2.18862195e-20",
        },
    ),
    # Dive into Deep Learning, chapter_optimization/rmsprop, whose rule is Lasagne's: f = 0.1 x1² + 2 x2².
    "d2l page": Run("lasagne", {"learning_rate": 0.4}, [[-5.0, -2.0]], bowl([0.2, 4.0]), {20: "-0.010599 0.000000"}),
    # Lasagne, tests/test_updates.py: numbers of Torch 7's optim.rmsprop, which has eps outside.
    "Torch 7": Run(
        None,
        {"lr": 0.01, "epsilon": 1e-6},
        [np.ones(3)],
        bowl([0.2, 0.4, 0.6]),
        {10: "0.83205403985348 0.83205322744821 0.83205295664444"},
    ),
    # Keras 3, optimizers/rmsprop_test.py: test_single_step, to the digits that the library has.
    "Keras, one step": Run(
        "keras",
        {"learning_rate": 0.5},
        [[1.0, 2.0, 3.0, 4.0]],
        always([1.0, 6.0, 7.0, 2.0]),
        {1: "-0.581138039515368 0.418861191876071 1.418861186049879 2.418861367558127"},
    ),
    # The same, test_weight_decay: 2 * 0.996³, all of its digits.
    "Keras, weight decay": Run(
        "keras", {"learning_rate": 1.0, "weight_decay": 0.004}, [[2.0]], always([0.0]), {3: "1.976095872000"}
    ),
    # The same, test_correctness_with_golden: a first gradient of 0.01, then 0.1 to 1.
    "Keras, centered": Run(
        "keras",
        {"centered": True},
        [np.ones(10)],
        in_turn([np.full(10, 0.01)], *[[np.arange(1, 11) / 10]] * 4),
        {n: " ".join([x] * 10) for n, x in enumerate(("0.9967", "0.9933", "0.9908", "0.9885", "0.9864"), 1)},
    ),
    # Keras 3, docstring of RMSprop: the loss is x²/2.
    "Keras docstring": Run("keras", {"learning_rate": 0.1}, [[10.0]], bowl([1.0]), {1: "9.683772"}),
    # TensorFlow, python/training/rmsprop_test.py: testWithoutMomentum and testWithMomentum.
    "TensorFlow 1": Run(
        "tensorflow",
        {"learning_rate": 2.0, "epsilon": 1.0},
        after={1: "0.854942917872916 - 2.98549051318061 -", 2: "0.706362052600739 - 2.970624708280404 -"},
        **TF1,
    ),
    "TensorFlow 1, momentum": Run(
        "tensorflow",
        {"learning_rate": 2.0, "momentum": 0.5, "epsilon": 1e-5},
        after={1: "0.78929968246095 - 2.978918383171096 -", 2: "0.461988841764614 - 2.946155750328954 -"},
        **TF1,
    ),
    # TensorFlow.js, tfjs-core/src/optimizers/rmsprop_optimizer_test.ts: its rule is Keras' with eps 1e-8.
    "TensorFlow.js, momentum": Run(
        "keras",
        {"learning_rate": 0.1, "rho": 0.95, "momentum": 0.1, "epsilon": 1e-8},
        [[1.0, 2.0]],
        bowl([2.0, 2.0]),
        {1: "0.5527865 1.5527864", 2: "0.2874418 1.2294267"},
        sum_of_squares(1, 1),
        {1: "2.7167187"},
        np.float32,
    ),
    "TensorFlow.js, centered": Run(
        "keras",
        {"learning_rate": 0.1, "rho": 0.95, "momentum": 0.1, "epsilon": 1e-8, "centered": True},
        [[1.0, 2.0]],
        bowl([2.0, 2.0]),
        {1: "0.5411684 1.5411685", 2: "0.2677834 1.2035918"},
        sum_of_squares(1, 1),
        {1: "2.668063", 2: "1.520341"},
        np.float32,
    ),
    # Swift for TensorFlow, Tests/TensorFlowTests/OptimizerTests.swift: testRMSPropNumerical.
    "Swift for TensorFlow": Run(
        None,
        {"lr": 1e-3, "epsilon": 1e-7},
        [np.zeros(3)],
        always([-5.0, 0.1, 0.2]),
        {1000: "1.0091327 -1.0091326 -1.0091326"},
        dtype=np.float32,
    ),
    # optax, docstring of rmsprop, in float64.
    "optax docstring": Run(
        "optax",
        {"learning_rate": 0.003},
        [[1.0, 2.0, 3.0]],
        bowl([2.0, 2.0, 2.0]),
        {},
        sum_of_squares(1, 1, 1),
        {0: "14.0", 1: "1.39E+01", 2: "1.38E+01", 3: "1.37E+01", 4: "1.37E+01", 5: "13.620835710068233"},
    ),
    # dfdx, dfdx/src/nn/optim/rmsprop.rs: its tests of the same names.
    **{
        f"dfdx, {name}": Run(None, DFDX_OPTIONS | options, after={1: first, 5: last}, **DFDX)
        for name, options, first, last in (
            (
                "default",
                {},
                "0.9997892 0.98245883 0.9703907 0.9683808 0.96837723",
                "0.9988262 0.9256831 0.8990271 0.8955128 0.8955067",
            ),
            (
                "momentum",
                {"momentum": 0.9},
                "0.9997892 0.98245883 0.9703907 0.9683808 0.96837723",
                "0.9970101 0.798177 0.71185935 0.69974965 0.6997286",
            ),
            (
                "diff_alpha",
                {"decay_rate": 0.5},
                "0.99971724 0.9873509 0.9859671 0.985858 0.98585784",
                "0.99683434 0.9457051 0.9436056 0.9434466 0.9434464",
            ),
            (
                "diff_eps",
                {"epsilon": 1e-2},
                "0.9997904 0.98252594 0.97041094 0.9683808 0.96837723",
                "0.9988343 0.9259014 0.89906746 0.8955129 0.8955067",
            ),
            (
                "centered",
                {"centered": True},
                "0.9997892 0.98218256 0.96900064 0.9666708 0.9666667",
                "0.9988262 0.9190646 0.8847198 0.87998855 0.8799804",
            ),
            (
                "l2_weight_decay",
                {"weight_decay": 0.5},
                "0.9945992 0.9797556 0.97018003 0.96838075 0.96837723",
                "0.97128564 0.9186157 0.89865 0.89551276 0.8955067",
            ),
            (
                "decoupled_weight_decay",
                {"weight_decay": 0.5, "decoupled_weight_decay": True},
                "0.9947892 0.97745883 0.9653907 0.9633808 0.96337724",
                "0.9740982 0.90218556 0.8758817 0.8724158 0.87240976",
            ),
        )
    },
    # Not published, but taken from the libraries themselves, for what nobody publishes numbers of: one run each of
    # optax 0.2.8 and Keras 3.15.1 on JAX, and of TensorFlow 2.21's compat.v1, in float64 and with their defaults.
    **{
        f"{peer} itself, {name}": Run(peer, {"learning_rate": 0.1} | arguments, after={3: numbers}, **OURS)
        for peer, name, arguments, numbers in (
            ("optax", "default", {}, "0.6913946641756024 -1.7453714572089616 2.798042243682989"),
            (
                "optax",
                "eps outside",
                {"eps": 0.1, "eps_in_sqrt": False},
                "0.8128455881067816 -1.79916315643268 2.8391624790551386",
            ),
            ("optax", "momentum", {"momentum": 0.9}, "0.4142922560673036 -1.319069876781601 2.124595011456524"),
            (
                "optax",
                "nesterov",
                {"momentum": 0.9, "nesterov": True},
                "0.16425769463617546 -1.1325343463124025 2.0101777539938603",
            ),
            (
                "optax",
                "nesterov, schedule",
                {"learning_rate": lambda step: 0.1 / (1 + step), "momentum": 0.9, "nesterov": True},
                "0.1287263965482317 -1.043275829919135 1.878459786033136",
            ),
            (
                "optax",
                "initial scale",
                {"initial_scale": 0.5},
                "0.8713240781072339 -1.8761286201281113 2.907107299598785",
            ),
            (
                "optax",
                "bias correction",
                {"bias_correction": True},
                "0.8791597828884653 -1.921297982546444 2.971972665303799",
            ),
            (
                "optax",
                "bias correction, centered",
                {"bias_correction": True, "centered": True, "eps": 0.1},
                "0.8697719740819229 -1.6421782280738115 2.3336332152670494",
            ),
            (
                "optax",
                "centered, nesterov, initial scale, eps outside",
                {"centered": True, "momentum": 0.5, "nesterov": True, "initial_scale": 1.0, "eps_in_sqrt": False},
                "0.8468746392606565 -1.8272641908090816 2.8206182377304168",
            ),
            ("keras", "clipnorm", {"clipnorm": 1.0}, "0.7261817749243917 -1.7831122623781375 2.6464513707559125"),
            ("keras", "clipvalue", {"clipvalue": 0.5}, "0.744989720363678 -1.8002499861975156 2.6464519198877845"),
            (
                "keras",
                "global_clipnorm",
                {"global_clipnorm": 1.0},
                "0.7853931513194679 -1.838751329426347 2.671932734185064",
            ),
            (
                "keras",
                "centered, momentum, weight decay",
                {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
                "0.5470583894125343 -1.4901836650385978 2.3566028219100112",
            ),
            (
                "tensorflow",
                "centered, momentum",
                {"centered": True, "momentum": 0.5, "epsilon": 0.1},
                "0.9111081475674805 -1.8498134299994686 2.772934103820439",
            ),
        )
    },
}
