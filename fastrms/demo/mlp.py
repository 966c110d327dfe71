"""A multi-layer perceptron in plain NumPy: ReLU layers, softmax, cross-entropy, gradients by back-propagation.

Parameters are a list ``[W1, b1, W2, b2, ...]``: for each layer the weights, shape (inputs, outputs), and the biases,
shape (outputs,). The module knows no optimizer.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Array", "Labels", "count_params", "evaluate", "init_params", "loss_and_gradients"]

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.intp]

# Rows of one forward pass of `evaluate`; they bound its memory.
EVALUATE_ROWS = 4096


def init_params(sizes: Sequence[int], dtype: DTypeLike, rng: np.random.Generator) -> list[Array]:
    """Draw weights by He initialisation, and set biases to 0.

    `sizes` are the inputs, the width of each hidden layer and the outputs: ``[784, 512, 512, 10]``.
    """
    params: list[Array] = []
    for inputs, outputs in pairwise(sizes):
        weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        params += [weights.astype(dtype), np.zeros(outputs, dtype)]
    return params


def count_params(sizes: Sequence[int]) -> int:
    """Return the number of weights and biases of a network of these `sizes`."""
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


def loss_and_gradients(
    params: Sequence[Array], x: Array, y: Labels, out: Sequence[Array] | None = None
) -> tuple[np.floating[Any], Sequence[Array]]:
    """Return the mean cross-entropy of a batch, and its gradients with the shapes of the parameters.

    `x` has shape (rows, inputs) and the dtype of the parameters. `y`, shape (rows,), has the class of each row, counted
    from 0. The gradients are written to the arrays of `out`, which is returned; by default to new arrays.
    """
    outputs = _forward(params, x)
    losses, delta = _cross_entropy(outputs[-1], y)
    # From here on `delta` is the gradient of the mean loss with respect to a layer's output before its ReLU.
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)

    gradients = [np.empty_like(param) for param in params] if out is None else out
    for k in reversed(range(0, len(params), 2)):
        inputs = outputs[k // 2]
        np.matmul(inputs.T, delta, out=gradients[k])
        np.sum(delta, axis=0, out=gradients[k + 1])
        if k > 0:
            delta = delta @ params[k].T
            delta *= inputs > 0  # the derivative of the ReLU
    return losses.mean(), gradients


def evaluate(params: Sequence[Array], x: Array, y: Labels) -> tuple[float, float]:
    """Return the mean cross-entropy over the rows of `x`, and the accuracy, from 0 to 1."""
    loss, correct = 0.0, 0
    for start in range(0, len(y), EVALUATE_ROWS):
        rows = slice(start, start + EVALUATE_ROWS)
        scores = _forward(params, x[rows])[-1]
        correct += int(np.count_nonzero(scores.argmax(axis=1) == y[rows]))
        losses, _ = _cross_entropy(scores, y[rows])
        loss += float(losses.sum(dtype=np.float64))
    return loss / len(y), correct / len(y)


def _forward(params: Sequence[Array], x: Array) -> list[Array]:
    """Return `x`, the output of each hidden layer after its ReLU, and the scores of the classes."""
    outputs = [x]
    for k in range(0, len(params), 2):
        z = outputs[-1] @ params[k]
        z += params[k + 1]
        if k + 2 < len(params):
            np.maximum(z, 0, out=z)
        outputs.append(z)
    return outputs


def _cross_entropy(scores: Array, y: Labels) -> tuple[Array, Array]:
    """Return the cross-entropy of each row, shape (rows,), and the softmax of `scores`."""
    # Softmax is invariant to a shift of a row; with 0 as the largest score, exp cannot overflow.
    shifted = scores - scores.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    sums = exps.sum(axis=1, keepdims=True)
    losses = np.log(sums[:, 0]) - shifted[np.arange(len(y)), y]
    return losses, exps / sums
