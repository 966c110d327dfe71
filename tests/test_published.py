"""Numbers that others published for their RMSProp, which ours has to meet to the digits that they give."""

from typing import Any

import numpy as np
import pytest
from published import RUNS, Run

import fastrms
from fastrms.kernels.reference import ReferenceRMSProp

KERNELS = ("numpy", "serial", "parallel")


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def perceptron(params: list[Any], step: int) -> list[Any]:
    """The gradients of test/cpp/api/optim_baseline.py in PyTorch: two layers, sigmoids, the sum of the output."""
    inputs = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    weight, bias, weight_out, bias_out = params
    hidden = sigmoid(inputs @ weight.T + bias)
    output = sigmoid(hidden @ weight_out.T + bias_out)
    d_output = output * (1 - output)
    d_hidden = d_output @ weight_out * hidden * (1 - hidden)
    return [d_hidden.T @ inputs, d_hidden.sum(0), d_output.T @ hidden, d_output.sum(0)]


def regression(params: list[Any], step: int) -> list[Any]:
    """The gradients of candle-optimisers' tests: the squared error for y = 3 x1 + x2 - 2 at four points."""
    points = np.array([[2.0, 1.0], [7.0, 4.0], [-4.0, 12.0], [5.0, 8.0]])
    error = points @ (params[0] - np.array([3.0, 1.0])) + params[1] + 2
    return [2 * error @ points, 2 * error.sum()]


def linear(params: list[Any], step: int) -> list[Any]:
    """The gradients of burn's tests: the sum of the outputs of a 6 x 6 layer, for two batches of two."""
    batches = (
        [[0.6294, 0.0940, 0.8176, 0.8824, 0.5228, 0.4310], [0.7152, 0.9559, 0.7893, 0.5684, 0.5939, 0.8883]],
        [[0.8491, 0.2108, 0.8939, 0.4433, 0.5527, 0.2528], [0.3270, 0.0412, 0.5538, 0.9605, 0.3195, 0.9085]],
    )
    return [np.repeat(np.sum(batches[step], axis=0)[:, None], 6, axis=1), np.full(6, 2.0)]


# What uniform_(-1/sqrt(n), 1/sqrt(n)) gives in float64 after torch.manual_seed(0), as that script has it.
PERCEPTRON: dict[str, Any] = {
    "start": [
        [
            [-0.21089885683388707, -0.49755604664226288],
            [-0.14129216202471759, -0.34202889678659032],
            [-0.25236350828037230, 0.69755702554937782],
        ],
        [-0.10853121966252376, -0.29794849968753301, 0.68920150999557184],
        [[-0.05080313011597654, -0.39413518751058990, -0.28433759745928844]],
        [-0.07113812430174121],
    ],
    "gradient": perceptron,
}
BURN = ("0.743937", "0.783809", "0.742881", "0.740366", "0.748005", "0.743710", "0.239199")
PERCEPTRON_CENTERED = """0.7941000061626792 0.507452636734552 0.8637405354185987 0.663005089317529 0.7526661272860107
    1.7025887305065852 0.8964950370033696 0.7070877948157552 1.6942369105467197 -1.055840599214661
    -1.3991726335388424 -1.2893752132746332 -1.0761757981162612"""

# PyTorch, test/cpp/api/optim_baseline.h, after iterations 0, 100 and 1000.
NETWORKS = {
    "PyTorch": Run(
        "torch",
        {"lr": 0.1},
        after={
            1: """0.7890625772821005 0.502415108650816 0.8587027713011453 0.6579673123006431 0.7476283936579036
                1.6975509766054537 0.8914573371873159 0.7020499947573374 1.6891991194739453 -1.0508027874171133
                -1.3941348219724659 -1.2843374000099703 -1.0711379842715099""",
            101: """2.4485718582774427 2.2809152044417678 1.7346424449151967 1.5940004770230671 1.2507611318399818
                2.248993270255382 2.994661478530102 1.815048529086425 2.382542610897819 -2.3036981738757825
                -2.6337299521275646 -2.018370122358821 -1.6207875598008983""",
            1001: """3.0175156205790477 2.945200425145326 2.291469925522963 2.221721702578292 1.6544730927621267
                2.705431441204422 3.9190041004420175 2.6513176244659378 2.993736489599992 -4.053111559341913
                -4.450801801162238 -3.027184551913196 -2.353949890597345""",
        },
        **PERCEPTRON,
    ),
    "PyTorch, weight decay": Run(
        "torch",
        {"lr": 0.1, "weight_decay": 1e-2},
        after={
            1: """0.7890798754118442 0.5024321083861885 0.8587031097835685 0.6579677474141494 0.7476297677960806
                1.6975465611838714 0.891458601354904 0.7020500593937647 1.6891986479348047 -1.0508027868194278
                -1.3941348166291232 -1.2843373988951865 -1.0711379841318796""",
            101: """0.21398926523995987 0.2779011713348031 0.1868480279465855 0.2507569370784996
                0.19145335235116723 0.2557687813139495 0.6720959116683096 0.64807348480635 0.6542630070045603
                -1.435763364089916 -1.449355795007287 -1.4619011018356904 -1.9673083558727738""",
            1001: """0.2306170112270019 0.29368398381778194 0.23061747865501664 0.29368467998690806
                0.2306085559563821 0.2936719507340021 0.680671467383083 0.6806730903175792 0.6806434720800854
                -1.4635008778278134 -1.4635052859178375 -1.463420837506828 -2.1262432969587723""",
        },
        rtol=5e-12,  # near a minimum, where rounding grows: PyTorch 2.13 itself is 2e-12 off its numbers after 101
        **PERCEPTRON,
    ),
    "PyTorch, centered": Run(
        "torch",
        {"lr": 0.1, "weight_decay": 1e-6, "centered": True},
        after={
            1: PERCEPTRON_CENTERED,
            1001: """0.4875468895095058 0.6878747871467127 0.7787871237567608 1.046259254610218 0.4416468896022396
                0.8122992916762793 2.1078734515587483 2.17034337037527 2.066632596856854 -3.9782695475825225
                -4.3520930551154136 -3.0377809502927033 -2.403496388200805""",
        },
        **PERCEPTRON,
    ),
    "PyTorch, centered, momentum": Run(
        "torch",
        {"lr": 0.1, "weight_decay": 1e-6, "centered": True, "momentum": 0.9},
        after={
            1: PERCEPTRON_CENTERED,
            1001: """0.10393820340367545 0.1398207466618173 0.0831407198272949 0.10183584198629941 0.13949594516972202
                0.17822672100147108 0.34039464502063904 0.2486088886235969 0.31914045155310655 -4.174294597914298
                -4.037528929635062 -6.297198700024484 -7.182093090194918""",
        },
        **PERCEPTRON,
    ),
    # candle-optimisers, tests/rmsprop-tests.rs: PyTorch's numbers with its defaults, 100 steps.
    **{
        f"candle-optimisers, {arguments}": Run("torch", arguments, [np.zeros(2), 0.0], regression, {100: numbers})
        for arguments, numbers in (
            ({}, "1.6650 0.7867 1.3012"),
            ({"weight_decay": 0.4}, "1.6643 0.7867 1.2926"),
            ({"centered": True}, "1.8892 0.7617 1.3688"),
            ({"centered": True, "weight_decay": 0.4}, "1.8883 0.7621 1.3558"),
            ({"momentum": 0.4}, "2.3042 0.6835 1.5441"),
            ({"momentum": 0.4, "weight_decay": 0.4}, "2.3028 0.6858 1.5149"),
            ({"centered": True, "momentum": 0.4}, "2.4486 0.6715 1.5045"),
            ({"centered": True, "momentum": 0.4, "weight_decay": 0.4}, "2.4468 0.6744 1.4695"),
        )
    },
    # burn, crates/burn-core/src/optim/rmsprop.rs: test_rmsprop_optimizer_with_numbers_basic; each row has one value.
    "burn": Run(
        "torch",
        {"weight_decay": 0.05, "momentum": 0.9},
        [np.ones((6, 6)), np.full(6, 0.5)],
        linear,
        {2: " ".join(f"{x} " * 6 for x in BURN)},
    ),
}


def check(run: Run, kernel: str) -> None:
    optimizer = fastrms.RMSProp([np.array(p, run.dtype) for p in run.start], **run.options(), kernel=kernel)
    run.check(optimizer.params, 0)
    for step in range(max([*run.after, *(run.losses or {})])):
        gradients = [np.asarray(g, run.dtype) for g in run.gradient(optimizer.params, step)]
        run.check(optimizer.step(gradients), step + 1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", RUNS)
def test_run(name, kernel):
    check(RUNS[name], kernel)


# Without the parallel kernel: at 13 elements it has nothing to share out, and a thousand steps of that take seconds.
@pytest.mark.parametrize("kernel", ["numpy", "serial"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, kernel):
    check(NETWORKS[name], kernel)


@pytest.mark.parametrize("name", ["sorix page", "eps outside, 101 steps", "Torch 7", "Swift for TensorFlow"])
def test_run_by_the_pure_function(name):
    run = RUNS[name]
    params, cache = [np.array(p, run.dtype) for p in run.start], None
    for step in range(max(run.after)):
        gradients = [np.asarray(g, run.dtype) for g in run.gradient(params, step)]
        params, cache = fastrms.rmsprop_update(params, gradients, cache, **run.options())
        run.check(params, step + 1)


# Numbers for v, the running mean of squares, after one or two steps of a constant gradient.
CACHES = {
    # MLX, the first step of its default alpha.
    "MLX": ("mlx", {"learning_rate": 0.1}, [1.0], [[0.01]]),
    # TensorFlow, python/training/rmsprop_test.py.
    "TensorFlow 1": ("tensorflow", {"learning_rate": 2.0}, [0.1, 0.01], [[0.901, 0.90001], [0.8119, 0.810019]]),
    # Keras 3, optimizers/rmsprop_test.py: the clipped gradients of test_clip_norm and test_clip_value
    # are sqrt(1/2) and 1.
    "Keras clipnorm": ("keras", {"clipnorm": 1.0, "rho": 0.0}, [100.0, 100.0], [[0.5, 0.5]]),
    "Keras clipvalue": ("keras", {"clipvalue": 1.0, "rho": 0.0}, [100.0, 100.0], [[1.0, 1.0]]),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CACHES)
def test_cache(name, kernel):
    peer, arguments, gradient, published = CACHES[name]
    optimizer = fastrms.RMSProp(np.zeros(len(gradient)), **fastrms.dialect(peer, **arguments), kernel=kernel)
    for expected in published:
        optimizer.step(np.array(gradient))
        np.testing.assert_allclose(optimizer.cache, expected, rtol=1e-12)


def test_lasagne_meets_its_own_test():
    # Lasagne holds its rule, with eps inside, to Torch 7's numbers, with eps outside, by np.allclose as it comes.
    optimizer = fastrms.RMSProp(np.ones(3), **fastrms.dialect("lasagne", learning_rate=0.01))
    for _ in range(10):
        optimizer.step(np.array([0.2, 0.4, 0.6]) * optimizer.params)
    assert np.allclose(optimizer.params, [0.83205403985348, 0.83205322744821, 0.83205295664444])


def test_keras_excludes_from_weight_decay():
    # Keras 3, optimizers/rmsprop_test.py, test_weight_decay: an excluded variable keeps its value; here, its own group.
    groups = [
        {"params": [np.array(2.0)], **fastrms.dialect("keras", learning_rate=1.0, weight_decay=0.004)},
        {"params": [np.array(2.0)], **fastrms.dialect("keras", learning_rate=1.0)},
    ]
    optimizer = fastrms.RMSProp(groups)
    (decayed,), (excluded,) = optimizer.step([[np.array(0.0)], [np.array(0.0)]])
    assert decayed == pytest.approx(2 * 0.996, rel=1e-12)
    assert excluded == 2.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_reference_class_bit_for_bit(kernel, dtype):
    # The class of deep-ml's problem 200.
    rng = np.random.default_rng(200)
    start = [rng.standard_normal((3, 4)).astype(dtype), rng.standard_normal(5).astype(dtype)]
    reference = ReferenceRMSProp(start)
    optimizer = fastrms.RMSProp(start, **fastrms.dialect("reference"), kernel=kernel)
    for _ in range(100):
        gradients = [rng.standard_normal(p.shape).astype(dtype) for p in start]
        for ours, theirs in zip(optimizer.step(gradients), reference.step(gradients), strict=True):
            np.testing.assert_array_equal(ours, theirs, strict=True)


TORCH = {
    "default": {},
    "lr": {"lr": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "weight decay, centered": {"weight_decay": 0.1, "centered": True},
    "weight decay, centered, momentum": {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
    "all, maximize": {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    "eps": {"eps": 0.1},
}


@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("name", TORCH)
def test_beside_torch(name, dtype, rtol):
    import torch

    rng = np.random.default_rng(11)
    # Away from 0, where a relative tolerance would mean nothing.
    start = [rng.uniform(4, 6, (4, 5)).astype(dtype), rng.uniform(-6, -4, 7).astype(dtype)]
    theirs = [torch.nn.Parameter(torch.tensor(p)) for p in start]
    peer = torch.optim.RMSprop(theirs, **TORCH[name])
    optimizer = fastrms.RMSProp(start, **fastrms.dialect("torch", **TORCH[name]))
    for step in range(200):
        if step == 100:  # tells apart a learning rate inside and outside the momentum buffer
            peer.param_groups[0]["lr"] = optimizer.lr = 0.3 * optimizer.lr
        gradients = [rng.standard_normal(p.shape).astype(dtype) for p in start]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        peer.step()
        optimizer.step(gradients)
        for p, parameter in zip(optimizer.params, theirs, strict=True):
            np.testing.assert_allclose(p, parameter.detach().numpy(), rtol=rtol)


def test_negative_momentum_is_an_error_as_in_torch():
    with pytest.raises(fastrms.OptionError, match="momentum"):
        fastrms.RMSProp([np.ones(2)], **fastrms.dialect("torch", momentum=-1.0))
