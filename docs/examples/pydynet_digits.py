"""
pydynet: parameters updated in place
====================================

pydynet has PyTorch's interface, in NumPy. Its backward pass adds gradients to
``parameter.grad``, and its optimizers change ``parameter.data`` in place::

    python -m pip install pydynet matplotlib scikit-learn

With ``in_place=True``, fastrms updates the ``.data`` arrays too. Each ``.grad`` becomes a
view of the optimizer's gradient buffer. So the calls of ``zero_grad()``, ``backward()`` and
``step()`` stay as they are. The changed lines are marked.

pydynet calls its rule Adadelta, but the rule is RMSProp with epsilon inside the root. The
final parameters are bit-identical.
"""

import fastrms
import matplotlib.pyplot as plt
import numpy as np
import pydynet
from pydynet import nn, optim
from sklearn.datasets import load_digits

x, y = load_digits(return_X_y=True)
x = x / 16
train, test = np.arange(1400), np.arange(1400, len(x))


def trained(swapped):
    np.random.seed(0)  # noqa: NPY002 - pydynet draws from it
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    parameters = list(net.parameters())
    if swapped:
        arrays = [p.data for p in parameters]
        options = {"lr": 2e-3, "decay_rate": 0.9, "epsilon": 1e-6, "eps_in_sqrt": True}
        optimizer = fastrms.RMSProp(arrays, in_place=True, **options)  # changed
        for p, gradient in zip(parameters, optimizer.grads, strict=True):  # changed
            p.grad = gradient  # changed
    else:
        optimizer = optim.Adadelta(parameters, lr=2e-3, rho=0.9, eps=1e-6)
    loss_of = nn.CrossEntropyLoss()
    rng, losses = np.random.default_rng(0), []
    for _ in range(20):
        order = rng.permutation(train)
        for start in range(0, len(order), 50):
            rows = order[start : start + 50]
            optimizer.zero_grad()
            loss = loss_of(net(pydynet.Tensor(x[rows])), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.data))
    with pydynet.no_grad():
        right = net(pydynet.Tensor(x[test])).data.argmax(axis=1) == y[test]
    return [p.data for p in parameters], losses, right.mean()


theirs, their_losses, _ = trained(swapped=False)
ours, our_losses, accuracy = trained(swapped=True)
same = all(map(np.array_equal, theirs, ours))
print(f"560 steps, the same bits: {same}, test accuracy {accuracy:.3f}")

# %%
# Both optimizers give the same loss in each step:

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(their_losses, color="#BBBBBB", linewidth=4, label="pydynet's Adadelta")
axes.plot(our_losses, color="#0072B2", linewidth=0.8, label="fastrms")
axes.set(xlabel="step", ylabel="loss of a batch", yscale="log")
axes.legend(frameon=False)
plt.show()
