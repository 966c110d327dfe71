"""pydynet: parameters that are updated in place.

    python -m pip install pydynet scikit-learn

pydynet has PyTorch's interface, in NumPy. Its backward pass adds gradients to
`parameter.grad`. Its optimizers read `parameter.grad` and change `parameter.data` in
place. With `in_place=True`, fastrms updates the `.data` arrays too. Each `.grad` becomes a
view of the optimizer's gradient buffer. So the calls of `zero_grad()`, `backward()` and
`step()` stay as they are. The changed lines are marked.

pydynet calls its rule Adadelta, but the rule is RMSProp with epsilon under the root. All
parameters have the same bits at the end.
"""

import fastrms
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
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(train)
        for start in range(0, len(order), 50):
            rows = order[start : start + 50]
            optimizer.zero_grad()
            loss = loss_of(net(pydynet.Tensor(x[rows])), y[rows])
            loss.backward()
            optimizer.step()
    with pydynet.no_grad():
        right = net(pydynet.Tensor(x[test])).data.argmax(axis=1) == y[test]
    return [p.data for p in parameters], right.mean()


theirs, _ = trained(swapped=False)
ours, accuracy = trained(swapped=True)
same = all(map(np.array_equal, theirs, ours))
print(f"560 steps, the same bits: {same}, test accuracy {accuracy:.3f}")
