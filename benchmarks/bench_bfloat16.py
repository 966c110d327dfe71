"""The gain and the cost of 16-bit state: `python -m pytest benchmarks/bench_bfloat16.py` prints float32 beside it.

A step moves 20 bytes a parameter with a float32 cache, and 16 bytes with a bfloat16 cache. It is 1.25 times faster if
memory is the limit, and as fast as before if division and square root are the limit: their number stays. The cost shows
in training: the handwritten digits, a perceptron 64-128-64-10, batches of 64, 30 epochs, from the same starts.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from fastrms import RMSProp
from fastrms.bench.measure import time_in_turns
from fastrms.demo import data, mlp

SETTINGS = {
    "decay_rate=0.9": {},
    "decay_rate=0.99": {"decay_rate": 0.99},
    "momentum=0.9": {"momentum": 0.9, "lr": 1e-4},
    "centered, momentum=0.9": {"centered": True, "momentum": 0.9, "lr": 1e-4},
}
SIZES, BATCH_SIZE, EPOCHS, SEEDS = (64, 128, 64, 10), 64, 30, 10


def train(cache_dtype, options, seed, epochs=EPOCHS):
    """Train once; return the loss on the training rows, and the loss and the accuracy on the test rows."""
    digits = data.split(*data.load_digits(), np.float32, seed, "digits")
    rng = np.random.default_rng(seed)
    opt = RMSProp(mlp.init_params(SIZES, np.float32, rng), cache_dtype=cache_dtype, **options)
    for _ in range(epochs):
        order = rng.permutation(len(digits.train_y))
        for first in range(0, len(order), BATCH_SIZE):
            rows = order[first : first + BATCH_SIZE]
            opt.step(mlp.loss_and_gradients(opt.params, digits.train_x[rows], digits.train_y[rows])[1])
    fitted, _ = mlp.evaluate(opt.params, digits.train_x, digits.train_y)
    return [fitted, *mlp.evaluate(opt.params, digits.test_x, digits.test_y)]


def train_all(seeds=SEEDS, epochs=EPOCHS):
    """Mean and standard deviation of the results of `train` over seeds, for all settings and both kinds of state."""
    rows = []
    for name, options in SETTINGS.items():
        for cache_dtype in (None, "bfloat16"):
            found = np.array([train(cache_dtype, options, seed, epochs) for seed in range(seeds)])
            figures = {"mean": found.mean(axis=0).tolist(), "deviation": found.std(axis=0).tolist()}
            rows.append({"setting": name, "cache": cache_dtype or "float32", "seeds": seeds, **figures})
    return rows


@pytest.mark.parametrize("size", [100_000, 5_000_000, 50_000_000])
@pytest.mark.parametrize("kernel", ["serial", "parallel"])
def test_bfloat16_against_float32(kernel, size, capsys):
    params = np.random.default_rng(0).standard_normal(size, np.float32)
    optimizers = {str(name): RMSProp([params], kernel=kernel, cache_dtype=name) for name in (None, "bfloat16")}
    for optimizer in optimizers.values():
        optimizer.grads[0][:] = params
    times = time_in_turns({name: optimizer.step for name, optimizer in optimizers.items()}, 0.5, turn=0.002)
    plain, narrow = (statistics.median(taken) for taken in times.values())
    with capsys.disabled():
        what = f"{kernel:9} {size:11,} parameters"
        print(
            f"\n{what}: float32 {1e3 * plain:7.3f} ms, bfloat16 {1e3 * narrow:7.3f} ms, {plain / narrow:.2f}x", end=""
        )


def test_training(capsys):
    with capsys.disabled():
        print("\n\ndigits, one seed                training loss, test loss, test accuracy")
        for row in train_all(seeds=1):
            print(f"{row['setting']:26} {row['cache']:9} {', '.join(f'{mean:.4f}' for mean in row['mean'])}")


if __name__ == "__main__":  # how `tables.py` asks for the training
    short = {"seeds": 1, "epochs": 2} if "--quick" in sys.argv else {}
    Path(sys.argv[1]).write_text(json.dumps(train_all(**short), indent=1), encoding="utf-8")
