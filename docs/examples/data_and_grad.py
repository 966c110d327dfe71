"""
Objects with .data and .grad
============================

Many libraries written for learning, such as sorix, have PyTorch's training loop: backward
passes add to ``.grad``, and the optimizer has ``step()`` and ``zero_grad()``::

    python -m pip install matplotlib scikit-learn

Here, ``.data`` and ``.grad`` of each parameter are views of the optimizer's buffers. So a
step copies nothing, and ``zero_grad`` is one assignment.
"""

import fastrms
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression


class Parameter:
    """An array and its gradient."""

    def __init__(self, data):
        self.data = np.asarray(data, np.float64)
        self.grad = np.zeros_like(self.data)


class RMSprop:
    """The optimizer of such a loop; `parameters` get views as their `.data` and `.grad`."""

    def __init__(self, parameters, **options):
        self.fast = fastrms.RMSProp([parameter.data for parameter in parameters], **options)
        views = zip(self.fast.params, self.fast.grads, strict=True)
        for parameter, (data, grad) in zip(parameters, views, strict=True):
            parameter.data, parameter.grad = data, grad

    def step(self):
        self.fast.step()

    def zero_grad(self):
        self.fast.buffers["grads"].flat[:] = 0


# %%
# First, a run whose numbers sorix publishes: x² + 10 y² from (5, 5), with learning rate 0.1
# and decay rate 0.99.

x, y = Parameter(5.0), Parameter(5.0)
optimizer = RMSprop([x, y], **fastrms.dialect("sorix", lr=0.1, decay=0.99))
path = ""
points = [(5.0, 5.0)]
for _ in range(10):
    optimizer.zero_grad()
    x.grad += 2 * x.data
    y.grad += 20 * y.data
    optimizer.step()
    path += f" {x.data:.4f}"
    points.append((float(x.data), float(y.data)))
print(f"x after each step:{path}")
assert path == " 4.0000 3.3734 2.9043 2.5283 2.2157 1.9503 1.7217 1.5230 1.3489 1.1959"

# %%
# Although the function is 10 times as steep in y as in x, both coordinates move at the same
# speed:

around = np.linspace(-1, 6, 100)
figure, axes = plt.subplots(figsize=(4.5, 4), layout="constrained")
height = around**2 + 10 * around[:, None] ** 2
axes.contour(around, around, height, levels=12, colors="#CCCCCC")
axes.plot(*np.array(points).T, "o-", color="#0072B2", markersize=4)
axes.set(xlabel="x", ylabel="y", title="10 steps from (5, 5)", aspect="equal")
plt.show()

# %%
# Then, a model: linear regression on the data of 442 patients with diabetes. The gradient
# is the sum over four parts of the data.

rows, target = load_diabetes(return_X_y=True)
rows = rows / rows.std(axis=0)
target = target / target.std()
weights, bias = Parameter(np.zeros(10)), Parameter(0.0)
optimizer = RMSprop([weights, bias], lr=0.01)
for epoch in range(1500):
    optimizer.fast.lr = 0.01 * 0.997**epoch
    optimizer.zero_grad()
    for part in range(4):
        some = rows[part::4]
        error = some @ weights.data + bias.data - target[part::4]
        weights.grad += some.T @ error / len(rows)
        bias.grad += error.sum() / len(rows)
    optimizer.step()

explained = 1 - np.mean((rows @ weights.data + bias.data - target) ** 2)
best = LinearRegression().fit(rows, target).score(rows, target)
print(f"{optimizer.fast.steps} steps", end=", ")
print(f"variance explained {explained:.4f}, at best {best:.4f}")
assert abs(explained - best) < 1e-4
