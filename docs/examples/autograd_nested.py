"""
autograd: gradients in nested dicts
===================================

HIPS autograd differentiates NumPy programs. Its gradients have the structure of the
parameters, here dicts in a dict, and ``opt.step`` takes them as they are::

    python -m pip install autograd matplotlib scikit-learn

autograd has its own RMSProp, which flattens parameters and gradients in each step and
contains the training loop. With fastrms, the loop is in the program. The changed lines are
marked. The mean square of autograd's RMSProp starts at 1, so the program sets
``initial_scale=1``. The final parameters are bit-identical.
"""

import autograd.numpy as np
import fastrms
import matplotlib.pyplot as plt
from autograd import grad
from autograd.misc.optimizers import rmsprop
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
batches = [rng.choice(len(train_y), 32, replace=False) for _ in range(675)]


def gradient(params, step):
    return grad(loss)(params, train_x[batches[step]], train_y[batches[step]])


theirs = rmsprop(gradient, params, num_iters=len(batches), step_size=3e-3)

opt = fastrms.RMSProp(params, lr=3e-3, initial_scale=1)  # changed
for step in range(len(batches)):  # changed
    ours = opt.step(gradient(opt.params, step))  # changed

same = all(np.array_equal(theirs[k][name], ours[k][name]) for k in ours for name in ours[k])
accuracy = np.mean(forward(ours, test_x).argmax(axis=1) == test_y)
print(f"{opt.steps} steps, the same bits: {same}, test accuracy {accuracy:.3f}")

# %%
# The weights of the first 16 hidden units, as pictures of 8 x 8 pixels. Orange pixels raise
# the activation of the unit, purple pixels lower it.

figure, axes = plt.subplots(2, 8, figsize=(7, 2), layout="constrained")
for place, weights in zip(axes.flat, ours["hidden"]["W"].T, strict=False):
    place.imshow(weights.reshape(8, 8), cmap="PuOr_r", vmin=-1, vmax=1)
    place.axis("off")
plt.show()
