"""
PennyLane: a quantum circuit
============================

The circuit has two qubits and classifies two species of iris. Its parameters stay
PennyLane's own arrays, a subclass of ndarray::

    python -m pip install pennylane scikit-learn

``qml.grad`` differentiates a function with respect to the arguments whose attribute
``requires_grad`` is True. Plain views lack this attribute. ``in_place=True`` keeps
PennyLane's arrays. The changed lines are marked.

PennyLane divides before it multiplies: ``(lr / sqrt(v + eps)) * g``. So the final
parameters of the two optimizers are equal only up to rounding. The program prints::

    60 steps, at most 2e-13 apart, accuracy 0.950
"""

import fastrms
import numpy as np
import pennylane as qml
from pennylane import numpy as pnp
from sklearn.datasets import load_iris

x, y = load_iris(return_X_y=True)
x, y = x[50:, 2:] - x[50:, 2:].mean(axis=0), np.where(y[50:] == 1, 1, -1)


@qml.qnode(qml.device("default.qubit", wires=2))
def circuit(weights, x):
    qml.AngleEmbedding(x, wires=[0, 1])  # one circuit for all rows of x
    qml.StronglyEntanglingLayers(weights, wires=[0, 1])
    return qml.expval(qml.PauliZ(0))


def cost(weights, bias):
    return pnp.mean((circuit(weights, x) + bias - y) ** 2)


def trained(swapped):
    rng = np.random.default_rng(0)
    weights = pnp.array(rng.uniform(-0.5, 0.5, (2, 2, 3)), requires_grad=True)
    bias = pnp.array(0.0, requires_grad=True)
    if swapped:
        options = {"lr": 0.02, "eps_in_sqrt": True}
        opt = fastrms.RMSProp([weights, bias], in_place=True, **options)  # changed
        for _ in range(60):
            opt.step(qml.grad(cost)(weights, bias))  # changed
    else:
        opt = qml.RMSPropOptimizer(0.02)
        for _ in range(60):
            weights, bias = opt.step(cost, weights, bias)
    right = np.sign(circuit(weights, x) + bias) == y
    return np.append(weights, bias), right.mean()


theirs, _ = trained(swapped=False)
ours, accuracy = trained(swapped=True)
apart = np.abs(theirs - ours).max()
print(f"60 steps, at most {apart:.0e} apart, accuracy {accuracy:.3f}")
assert apart < 1e-9
