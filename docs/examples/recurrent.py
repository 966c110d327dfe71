"""A small recurrent network in plain NumPy that reads a handwritten digit row by row.

    python -m pip install scikit-learn      # for the data

At each of 8 time steps it sees one row of 8 pixels; after the last it says which digit
it was. Gradients go back through time, where they can grow, so their common norm is
clipped. They are added up in the optimizer's own buffer.
"""

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


for _ in range(25):
    order = rng.permutation(len(train_y))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        loss = backward(train_x[rows], train_y[rows])
        opt.step()

accuracy = np.mean(forward(test_x)[1].argmax(axis=1) == test_y)
print(f"{opt.steps} steps, loss of the last batch {loss:.4f}, test accuracy {accuracy:.3f}")
assert accuracy > 0.95
