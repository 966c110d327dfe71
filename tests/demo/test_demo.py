"""The demo: the two training runs, and what it says of them."""

import re
from itertools import groupby

import numpy as np
import pytest
from helpers import bits

from fastrms import RMSProp
from fastrms.cli import demo, main
from fastrms.demo import data, mlp
from fastrms.demo.experiment import Experiment, network_name
from fastrms.demo.training import Batches, Training, first_difference, train_both
from fastrms.kernels.reference import ReferenceRMSProp

DTYPES = ("float32", "float64")
TINY = ["--hidden", "4", "--epochs", "1", "--batch-size", "512"]


def run(tmp_path, *arguments):
    return main(["demo", *TINY, "--output", str(tmp_path), *arguments])


def batch(rng, rows, sizes, dtype="float64"):
    return rng.normal(size=(rows, sizes[0])).astype(dtype), rng.integers(0, sizes[-1], rows)


@pytest.mark.parametrize("gradients", ["list", "buffer"])
@pytest.mark.parametrize("kernel", ["auto", "numpy", "serial", "parallel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits(capsys, tmp_path, dtype, kernel, gradients):
    hidden = ["--hidden", "9", "5", "--batch-size", "128", "--seed", "3"]
    assert run(tmp_path, *hidden, "--dtype", dtype, "--kernel", kernel, "--gradients", gradients) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"64-9-5-10, 695 parameters, {dtype}" in out
    assert f"kernel {kernel}, " in out
    assert f"gradients {'as a list' if gradients == 'list' else 'written into its buffer'}" in out
    assert "The losses of all 12 steps and the final parameters have the same bits." in out
    losses = re.search(r"final training loss +(\S+) +(\S+)", out).groups()
    assert losses[0] == losses[1]


def test_learns_the_digits(capsys, tmp_path):
    assert run(tmp_path, "--hidden", "32", "--epochs", "4", "--batch-size", "32", "--lr", "0.003") == 0
    out = capsys.readouterr().out
    accuracies = [float(number) for number in re.findall(r"(\S+)%", re.search("test accuracy.*", out).group())]
    assert len(accuracies) == 2
    assert min(accuracies) > 85


def test_batch_larger_than_the_training_set(capsys, tmp_path):
    assert run(tmp_path, "--batch-size", "5000", "--epochs", "2") == 0
    assert "2 epochs of 1 step, 1,437 rows a batch" in capsys.readouterr().out


def tampered_step(at, change):
    real = RMSProp.step

    def step(self, *arguments):
        result = real(self, *arguments)
        if self.steps == at:
            change(self.params)
        return result

    return step


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_fails_when_losses_differ(monkeypatch, capsys, tmp_path, quiet):
    def change(params):
        params[-2][...] *= 1.001

    monkeypatch.setattr(RMSProp, "step", tampered_step(2, change))
    assert run(tmp_path, *quiet) == 1
    out, err = capsys.readouterr()
    message = r"fastrms demo: error: the two training runs differ: the losses differ first at step 3 of 3: "
    end = r"(\S+) with the reference and (\S+) with fastrms, a difference of (\S+)\n"
    gap = re.fullmatch(message + end, err).groups()
    reference, fast, difference = map(float, gap)
    assert abs(reference - fast) == pytest.approx(difference, rel=0.01)
    assert "the same bits" not in out
    assert "bit for bit. With" not in out
    assert ("Result: different losses. " in out) == (not quiet)
    assert ("speed-up" in out) == (not quiet)
    assert (tmp_path / demo.PLOT_NAME).exists()


def test_fails_when_one_bit_of_the_final_parameters_differs(monkeypatch, capsys, tmp_path):
    def change(params):
        params[3][4] = np.nextafter(params[3][4], np.float32(np.inf))

    # The last step: no loss comes after it.
    monkeypatch.setattr(RMSProp, "step", tampered_step(3, change))
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    assert (
        "the losses of all 3 steps have the same bits, but the final parameters differ, first in b2 (flat index 4)"
        in err
    )


def test_fails_when_only_one_diverges(monkeypatch, capsys, tmp_path):
    def change(params):
        params[0][...] = np.nan

    monkeypatch.setattr(RMSProp, "step", tampered_step(2, change))
    assert run(tmp_path) == 1
    assert re.search(r"the loss at step 3 is \d\S+ with the reference and nan with fastrms", capsys.readouterr().err)


def test_diverging_training_is_an_error(capsys, tmp_path):
    assert run(tmp_path, "--lr", "1e38", "--epochs", "50") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"fastrms demo: error: the training diverged: the loss is \w+ at step \d+; use a smaller --lr than 1e\+38\n",
        err,
    )
    assert "middle half" not in out


def test_trainings_take_turns_on_the_same_batches(rng):
    sizes = [5, 4, 3]
    start = mlp.init_params(sizes, "float32", rng)
    before = [bits(param) for param in start]
    x, y = batch(rng, 10, sizes, "float32")
    order = []
    batches = Batches(x, y, 4, 3, rng)
    pair = train_both(start, batches, lr=0.1, kernel="serial", into_buffer=False, on_step=order.append)
    reference, fast = pair
    assert isinstance(reference.optimizer, ReferenceRMSProp)
    assert isinstance(fast.optimizer, RMSProp)
    r, f = [id(reference)] * 3, [id(fast)] * 3
    assert [id(training) for training in order] == r + f + f + r + r + f
    assert [bits(param) for param in start] == before
    for training in pair:
        assert len(training.losses) == len(training.step_seconds) == len(training.optimizer_seconds) == 9
        for whole, part in zip(training.step_seconds, training.optimizer_seconds, strict=True):
            assert whole > part > 0
    # The step that compiles is not among them.
    assert fast.optimizer.steps == 9
    assert bits(reference.losses) == bits(fast.losses)


def test_turns_are_ten_steps(rng):
    sizes = [5, 4, 3]
    x, y = batch(rng, 23, sizes)
    order = []
    start = mlp.init_params(sizes, "float64", rng)
    reference, fast = train_both(
        start, Batches(x, y, 1, 2, rng), lr=0.1, kernel="serial", into_buffer=False, on_step=order.append
    )
    turns = [(each is fast, len(list(steps))) for each, steps in groupby(order)]
    assert turns == [(False, 10), (True, 20), (False, 13), (True, 3 + 10), (False, 20), (True, 13), (False, 3)]
    assert bits(reference.losses) == bits(fast.losses)


def test_each_epoch_has_all_rows_in_a_new_order(rng):
    sizes = [5, 4, 3]
    x, y = batch(rng, 12, sizes)
    start = mlp.init_params(sizes, "float64", rng)
    # Steps too small to change the parameters: what a loss is depends on the rows of its batch alone.
    reference, _ = train_both(start, Batches(x, y, 4, 4, rng), lr=1e-30, kernel="serial", into_buffer=False)
    epochs = np.reshape(reference.losses, (4, 3))
    np.testing.assert_allclose(epochs.mean(axis=1), mlp.evaluate(start, x, y)[0])
    assert len(np.unique(epochs.round(9))) == 12


def test_buffer_is_written_without_a_copy(rng):
    sizes = [5, 4, 3]
    x, y = batch(rng, 8, sizes)
    given = []
    real = RMSProp.step

    class Recording(RMSProp):
        def step(self, *arguments):
            given.append(arguments)
            return real(self, *arguments)

    optimizer = Recording(mlp.init_params(sizes, "float64", rng))
    Training(optimizer, optimizer.grads).step(x, y)
    Training(optimizer).step(x, y)
    assert given[0] == (None,)  # as without an argument
    assert len(given[1][0]) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_difference(dtype):
    a = np.array([[1.0, 0.0], [np.nan, 2.0]], dtype)
    b = a.copy()
    assert first_difference(a, b) is None
    b[1, 1] = np.nextafter(b[1, 1], 3, dtype=dtype)
    assert first_difference(a, b) == 3
    b[0, 1] = -0.0
    assert first_difference(a, b) == 1


def trained(steps, optimizers, params):
    return Training(ReferenceRMSProp(params), None, [np.float32(1)] * len(steps), steps, optimizers)


def known_pair(rng):
    """Training runs whose steps took 1, 2 and 30 ms, and 4 ms each."""
    params = mlp.init_params([2, 2], "float32", rng)
    reference = trained([1e-3, 2e-3, 30e-3], [0.5e-3, 0.6e-3, 0.7e-3], params)
    return reference, trained([4e-3, 4e-3, 4e-3], [0.1e-3, 0.2e-3, 0.3e-3], params)


def test_table_of_known_times(capsys, rng):
    x = np.arange(40.0).reshape(20, 2)
    dataset = data.split(x, np.arange(20) % 2, "float32", 0, "data")
    pair = dict(zip(("reference", "fast"), known_pair(rng), strict=True))
    experiment = Experiment(dataset, [2, 2], Batches(dataset.train_x, dataset.train_y, 4, 1, rng), rng)
    demo._print_results(demo.make_console(), experiment, pair, "what to conclude")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["", "what to conclude", ""]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
    # Medians; slower is said as it is. The ratios of steps are 1/4, 2/4 and 30/4.
    assert ["training step", "2.00 ms", "4.00 ms", "0.50x", "0.38x to 4.00x"] in rows
    assert ["of which optimizer", "600 us", "200 us", "3.00x", "2.67x to 4.00x"] in rows
    assert ["optimizer's share", "30.0%", "5.0%"] in rows


@pytest.mark.parametrize(
    ("ratio", "text"), [(12.345, "12.35x"), (1, "1.00x"), (0.5, "0.50x"), (0.0342, "0.034x"), (0.03, "0.030x")]
)
def test_ratios_have_two_digits(ratio, text):
    assert demo._times(ratio) == text


@pytest.mark.parametrize(
    ("rest", "shown"), [(1.0, None), (1.09, None), (0.92, None), (1.12, "1.12 ms"), (0.89, "890 us")]
)
def test_a_busy_machine_is_noticed(rng, rest, shown):
    """The rest of a step runs the same code in both training runs."""
    params = mlp.init_params([2, 2], "float32", rng)
    pair = trained([3e-3] * 5, [2e-3] * 5, params), trained([rest * 1e-3 + 5e-4] * 5, [5e-4] * 5, params)
    conclusion = demo._conclusion(True, False, ("NumPy reference", "fastrms"), *pair)
    if shown:
        assert conclusion == "Result: the same losses, bit for bit. The machine was too busy to compare times."
        assert f"took 1.00 ms with the NumPy reference and {shown} with fastrms" in demo._warning(False, *pair)
        assert demo._warning(True, *pair) is None  # ranks share the work
    else:
        assert re.fullmatch(
            r"Result: the same losses, bit for bit. With fastrms, a training step is \S+x \(\S+x to \S+x\) as "
            r"fast, its optimizer part 4.00x.", conclusion,
        )  # fmt: skip
        assert demo._warning(False, *pair) is None


@pytest.mark.parametrize("mpi", [False, True])
def test_a_speed_up_that_varies_much_is_not_claimed(rng, mpi):
    params = mlp.init_params([2, 2], "float32", rng)
    steady, uneven = trained([3e-3] * 6, [2e-3] * 6, params), trained([1e-3, 3e-3] * 3, [5e-4, 2e-3] * 3, params)
    assert "varied too much, from 1.00x to 3.00x (quartiles)" in demo._warning(mpi, steady, uneven)
    assert demo._conclusion(True, mpi, ("one", "two"), steady, uneven).endswith("too busy to compare times.")


def test_the_first_lines_and_the_plot_say_what_to_conclude(monkeypatch, capsys, tmp_path):
    titles = []
    real = Experiment.plot
    monkeypatch.setattr(Experiment, "plot", lambda self, runs, text: titles.append(text) or real(self, runs, text))
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert re.match(
        r"fastrms \S+: train one network twice .*\. Expect the same losses, bit for bit, in less time\.\n", out
    )
    assert re.search(r"^Result: the same losses, bit for bit\. ", out, re.MULTILINE).group() in titles[0]
    assert titles[0] in out


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([64, 10], "64-10"),
        ([64, 512, 512, 10], "64-512-512-10"),
        ([64, *[32] * 50, 10], "64-[32]*50-10"),
        ([2, 3, 3, 3, 3, 4, 5], "2-[3]*4-4-5"),
    ],
)
def test_network_in_words(sizes, expected):
    assert network_name(sizes) == expected
