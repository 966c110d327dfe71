"""
A recurrent network in plain NumPy
==================================

A small network reads a handwritten digit row by row: at each of 8 time steps it sees one
row of 8 pixels, and after the last row it predicts the digit::

    python -m pip install matplotlib scikit-learn

Gradients are propagated back through time, where they can grow. So the program clips their
common norm. It adds them up in the optimizer's gradient buffer.
"""

import matplotlib.pyplot as plt
import numpy as np
from fastrms import RMSProp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HIDDEN = 48

x, y = load_digits(return_X_y=True)
x = (x / 16).reshape(-1, 8, 8)  # digit, time, pixel
train_x, test_x, train_y, test_y = train_test_split(
    x, y, test_size=0.2, random_state=0, stratify=y
)

rng = np.random.default_rng(0)
opt = RMSProp(
    {
        "in": rng.standard_normal((8, HIDDEN)) / np.sqrt(8),
        # Orthogonal: it keeps the length of what it remembers.
        "back": np.linalg.qr(rng.standard_normal((HIDDEN, HIDDEN)))[0],
        "bias": np.zeros(HIDDEN),
        "out": rng.standard_normal((HIDDEN, 10)) / np.sqrt(HIDDEN),
        "out_bias": np.zeros(10),
    },
    lr=2e-3,
    global_clip_norm=1.0,
)
p, g = opt.params, opt.grads


def forward(x):
    """The hidden state before each time step and after the last, and the scores."""
    states = [np.zeros((len(x), HIDDEN))]
    for t in range(8):
        states.append(np.tanh(x[:, t] @ p["in"] + states[-1] @ p["back"] + p["bias"]))
    return states, states[-1] @ p["out"] + p["out_bias"]


def backward(x, y):
    """Write the gradient of the mean cross-entropy to `opt.grads`, and return that loss."""
    states, scores = forward(x)
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(y)), y]).mean()
    probabilities[np.arange(len(y)), y] -= 1
    delta = probabilities / len(y)

    np.matmul(states[-1].T, delta, out=g["out"])
    np.sum(delta, axis=0, out=g["out_bias"])
    for name in ("in", "back", "bias"):
        g[name][...] = 0
    delta = delta @ p["out"].T
    for t in reversed(range(8)):
        delta = delta * (1 - states[t + 1] ** 2)
        g["in"] += x[:, t].T @ delta
        g["back"] += states[t].T @ delta
        g["bias"] += delta.sum(axis=0)
        delta = delta @ p["back"].T
    return loss


losses = []
for _ in range(25):
    order = rng.permutation(len(train_y))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        losses.append(backward(train_x[rows], train_y[rows]))
        opt.step()

accuracy = np.mean(forward(test_x)[1].argmax(axis=1) == test_y)
print(f"{opt.steps} steps, loss of the last batch {losses[-1]:.4f}", end=", ")
print(f"test accuracy {accuracy:.3f}")
assert accuracy > 0.95

# %%
# The loss of each batch, and its mean over the 45 batches of an epoch:

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(losses, color="#BBBBBB", linewidth=0.8, label="one batch")
means = np.mean(np.reshape(losses, (25, 45)), axis=1)
axes.plot(np.arange(25) * 45 + 22, means, color="#000000", label="mean of an epoch")
axes.set(xlabel="step", ylabel="cross-entropy", yscale="log")
axes.legend(frameon=False)
plt.show()
