"""What tests of the benchmark share: short times, and a kernel of the user's own."""

import sys

import pytest

from fastrms.bench import measure, workers

GOOD = """
import numpy as np
def update(params, grads, cache, lr, decay_rate, epsilon):
    cache[...] = decay_rate * cache + (1 - decay_rate) * grads**2
    params -= lr * grads / (np.sqrt(cache) + epsilon)
def rounded(params, grads, cache, lr, decay_rate, epsilon):
    cache += (1 - decay_rate) * (grads * grads - cache)
    params -= lr * grads / (np.sqrt(cache) + epsilon)
def eps_inside(params, grads, cache, lr, decay_rate, epsilon):
    cache[...] = decay_rate * cache + (1 - decay_rate) * grads**2
    params -= lr * grads / np.sqrt(cache + 1e-3)
def broken(params, grads, cache, lr, decay_rate, epsilon):
    raise ValueError("on purpose")
number = 3
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    # What only makes times steadier.
    monkeypatch.setattr(measure, "PAUSE", 0)
    monkeypatch.setattr(workers, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(workers, "WARM_SECONDS", 0)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_kernels.py").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    yield "my_kernels"
    sys.modules.pop("my_kernels", None)
