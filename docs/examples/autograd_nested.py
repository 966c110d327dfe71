"""HIPS autograd with nested dict parameters: a network on the handwritten digits.

    python -m pip install autograd scikit-learn

autograd returns gradients in the structure of the parameters, whatever that is, and
`opt.step` takes them so.
"""

import autograd.numpy as np
from autograd import value_and_grad
from fastrms import RMSProp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def forward(params, x):
    hidden = np.tanh(np.dot(x, params["hidden"]["W"]) + params["hidden"]["b"])
    return np.dot(hidden, params["out"]["W"]) + params["out"]["b"]


def loss(params, x, y):
    scores = forward(params, x)
    highest = np.max(scores, axis=1, keepdims=True)
    log_sums = highest[:, 0] + np.log(np.sum(np.exp(scores - highest), axis=1))
    return np.mean(log_sums - scores[np.arange(len(y)), y])


x, y = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(
    x / 16, y, test_size=0.2, random_state=0, stratify=y
)

rng = np.random.RandomState(0)
params = {
    "hidden": {"W": rng.randn(64, 64) / 8, "b": np.zeros(64)},
    "out": {"W": rng.randn(64, 10) / 8, "b": np.zeros(10)},
}
opt = RMSProp(params, lr=3e-3)
params = opt.params  # the same nesting, now views of one flat buffer

for _ in range(15):
    order = rng.permutation(len(train_y))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        value, gradients = value_and_grad(loss)(params, train_x[rows], train_y[rows])
        opt.step(gradients)

accuracy = np.mean(forward(params, test_x).argmax(axis=1) == test_y)
print(
    f"{opt.steps} steps, loss of the last batch {value:.4f}, test accuracy {accuracy:.3f}"
)
assert accuracy > 0.95
