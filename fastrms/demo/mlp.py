"""A multi-layer perceptron in plain NumPy: ReLU layers, softmax and cross-entropy, gradients by back-propagation.

Parameters are a list, ``[W1, b1, W2, b2, ...]``, with weights of shape (inputs, outputs). Nothing here knows of an
optimizer: one takes the gradients and changes or replaces the parameters between two calls.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["count_params", "evaluate", "init_params", "loss_and_gradients"]

Array = NDArray[Any]

# Rows that `evaluate` looks at in one go, which bounds its memory.
EVALUATE_ROWS = 4096


def init_params(sizes: Sequence[int], dtype: DTypeLike, rng: np.random.Generator) -> list[Array]:
    """Draw the parameters of a network (He initialisation); biases start from 0.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, width of each hidden layer, outputs: ``[784, 512, 512, 10]`` has two hidden layers.
    dtype : float32 or float64
    rng : numpy.random.Generator

    Returns
    -------
    params : list of ndarray
        For each layer the weights, of shape (inputs, outputs), and the biases, of shape (outputs,).
    """
    params: list[Array] = []
    for inputs, outputs in pairwise(sizes):
        weights = rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)
        params += [weights.astype(dtype), np.zeros(outputs, dtype)]
    return params


def count_params(sizes: Sequence[int]) -> int:
    """How many numbers the parameters of a network of `sizes` hold."""
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


def loss_and_gradients(
    params: Sequence[Array], x: Array, y: NDArray[np.intp], out: Sequence[Array] | None = None
) -> tuple[np.floating[Any], list[Array]]:
    """The mean cross-entropy of a batch and its gradient for each parameter.

    Parameters
    ----------
    params : sequence of ndarray
        ``[W1, b1, W2, b2, ...]``, as from `init_params`; not changed.
    x : ndarray, shape (rows, inputs), the dtype of the parameters
    y : ndarray of int, shape (rows,)
        The right class of each row, counted from 0.
    out : sequence of ndarray, optional
        Arrays with the shapes and the dtype of the parameters, to which the gradients are written; the bits are those
        of new arrays. Without it, new arrays.

    Returns
    -------
    loss : scalar of the dtype of the parameters
    gradients : list of ndarray
        The arrays of `out`, or new ones.
    """
    outputs = _forward(params, x)
    losses, delta = _cross_entropy(outputs[-1], y)
    # From here on `delta` is the gradient of the mean loss for what a layer puts out, ahead of its ReLU.
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)

    gradients: list[Any] = [None] * len(params) if out is None else list(out)
    for k in reversed(range(0, len(params), 2)):
        inputs = outputs[k // 2]
        gradients[k] = np.matmul(inputs.T, delta, out=gradients[k])
        gradients[k + 1] = np.sum(delta, axis=0, out=gradients[k + 1])
        if k > 0:
            delta = delta @ params[k].T
            delta *= inputs > 0  # the slope of the ReLU that made these inputs
    return losses.mean(), gradients


def evaluate(params: Sequence[Array], x: Array, y: NDArray[np.intp]) -> tuple[float, float]:
    """The mean cross-entropy over the rows of `x`, and the share of rows whose class `y` is found, from 0 to 1."""
    loss, right = 0.0, 0
    for start in range(0, len(y), EVALUATE_ROWS):
        part = slice(start, start + EVALUATE_ROWS)
        scores = _forward(params, x[part])[-1]
        right += int(np.count_nonzero(scores.argmax(axis=1) == y[part]))
        losses, _ = _cross_entropy(scores, y[part])
        loss += float(losses.sum(dtype=np.float64))
    return loss / len(y), right / len(y)


def _forward(params: Sequence[Array], x: Array) -> list[Array]:
    """What each layer puts out: `x` itself, then each hidden layer after its ReLU, then the scores of the classes."""
    outputs = [x]
    for k in range(0, len(params), 2):
        z = outputs[-1] @ params[k]
        z += params[k + 1]
        if k + 2 < len(params):
            np.maximum(z, 0, out=z)
        outputs.append(z)
    return outputs


def _cross_entropy(scores: Array, y: NDArray[np.intp]) -> tuple[Array, Array]:
    """The cross-entropy of each row, shape (rows,), and the softmax of `scores`."""
    # Softmax does not change when a row is shifted, and with 0 as the largest score exp cannot overflow.
    shifted = scores - scores.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    sums = exps.sum(axis=1, keepdims=True)
    losses = np.log(sums[:, 0]) - shifted[np.arange(len(y)), y]
    return losses, exps / sums
