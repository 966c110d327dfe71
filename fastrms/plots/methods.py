"""Gradient descent, momentum, AdaGrad and Adam, for comparison with RMSProp, and the rate of each method."""

from types import MappingProxyType
from typing import SupportsFloat

import numpy as np

from fastrms._checks import check_option
from fastrms.errors import OptionError, OptionTypeError
from fastrms.optimizer import RMSProp
from fastrms.options import resolve_lr
from fastrms.plots.functions import Array

__all__ = ["DEFAULT_METHODS", "METHODS", "AdaGrad", "Adam", "GradientDescent", "Momentum", "rmsprop_rate"]


class GradientDescent:
    """Plain gradient descent from a copy of `params`: ``p = p - lr * g``.

    (A. Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847.)
    """

    def __init__(self, params: Array, lr: SupportsFloat) -> None:
        if callable(lr):
            raise OptionTypeError(f"lr: expected a number, got {lr!r}; only RMSProp accepts a function of the step")
        self.params = np.array(params, np.float64)
        self.lr: float = check_option("lr", lr)

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.params = self.params - self.lr * gradient
        return self.params

    @property
    def rate(self) -> Array:
        """The factor of each element of the last gradient."""
        return np.full_like(self.params, self.lr)


class Momentum(GradientDescent):
    """Gradient descent with momentum: ``b = momentum * b + g``, then ``p = p - lr * b``; b starts from 0.

    (B. Polyak, Some methods of speeding up the convergence of iteration methods, 1964, in PyTorch's form.) The rate is
    the factor of a gradient in its own step.
    """

    def __init__(self, params: Array, lr: SupportsFloat, momentum: float = 0.9) -> None:
        super().__init__(params, lr)
        self.momentum: float = check_option("momentum", momentum)
        self.buffer = np.zeros_like(self.params)

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.buffer = self.momentum * self.buffer + gradient
        return super().step(self.buffer)


class AdaGrad(GradientDescent):
    """AdaGrad: ``s = s + g**2``, then ``p = p - lr * g / (sqrt(s) + epsilon)``; s starts from 0.

    (J. Duchi, E. Hazan and Y. Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization,
    2011.) The sum s never forgets, so the rate only falls. RMSProp replaces the sum by a running mean.
    """

    def __init__(self, params: Array, lr: SupportsFloat, epsilon: float = 1e-8) -> None:
        super().__init__(params, lr)
        self.epsilon: float = check_option("epsilon", epsilon)
        self.sum = np.zeros_like(self.params)

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.sum = self.sum + gradient**2
        self.params = self.params - self.lr * gradient / (np.sqrt(self.sum) + self.epsilon)
        return self.params

    @property
    def rate(self) -> Array:
        """The factor of each element of the last gradient."""
        rate: Array = self.lr / (np.sqrt(self.sum) + self.epsilon)
        return rate


class Adam(GradientDescent):
    """Adam: running means of gradients and of their squares, both corrected for their start from 0.

    ``m = beta1 * m + (1 - beta1) * g``, ``v = beta2 * v + (1 - beta2) * g**2``, then in step t
    ``p = p - lr * m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + epsilon)``.

    (D. Kingma and J. Ba, Adam: A Method for Stochastic Optimization, 2015.) The rate is the factor of the corrected
    mean gradient.
    """

    def __init__(
        self, params: Array, lr: SupportsFloat, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
    ) -> None:
        super().__init__(params, lr)
        self.beta1, self.beta2 = _check_beta("beta1", beta1), _check_beta("beta2", beta2)
        self.epsilon: float = check_option("epsilon", epsilon)
        self.mean, self.square = np.zeros_like(self.params), np.zeros_like(self.params)
        self.steps = 0

    def step(self, gradient: Array) -> Array:
        """Take one step and return the new parameters, a new array."""
        self.steps += 1
        self.mean = self.beta1 * self.mean + (1 - self.beta1) * gradient
        self.square = self.beta2 * self.square + (1 - self.beta2) * gradient**2
        self.params = self.params - self.rate * self.mean / (1 - self.beta1**self.steps)
        return self.params

    @property
    def rate(self) -> Array:
        """The factor of each element of the corrected mean gradient."""
        rate: Array = self.lr / (np.sqrt(self.square / (1 - self.beta2**self.steps)) + self.epsilon)
        return rate


def _check_beta(name: str, value: object) -> float:
    """Return a decay rate of Adam, which has the range of `momentum`; raise OptionError or OptionTypeError."""
    try:
        beta: float = check_option("momentum", value)
    except (OptionError, OptionTypeError) as error:
        raise type(error)(str(error).replace("momentum", name, 2)) from None
    return beta


# By the names that `descend` takes: the names in figures, and the classes.
METHODS = MappingProxyType(
    {
        "gradient-descent": ("gradient descent", GradientDescent),
        "momentum": ("momentum", Momentum),
        "adagrad": ("AdaGrad", AdaGrad),
        "adam": ("Adam", Adam),
    }
)
# More paths by default would hide each other.
DEFAULT_METHODS = ("gradient-descent", "momentum", "adagrad")


def rmsprop_rate(optimizer: RMSProp[Array]) -> Array:
    """Return the factor of each element of the last gradient, from the state and options of an optimizer.

    The optimizer has one array of float64 and has taken a step. The factor is lr/D in the equations of
    ``docs/options.md``, before momentum is applied; the gradient is the one after clipping and weight decay.

    >>> import numpy as np
    >>> from fastrms import RMSProp
    >>> from fastrms.plots.methods import rmsprop_rate
    >>> opt = RMSProp(np.zeros(2), lr=0.1)
    >>> opt.step(np.array([1.0, 2.0]))
    array([-0.31622776, -0.31622776])
    >>> rmsprop_rate(opt)
    array([0.31622776, 0.15811388])
    """
    group = optimizer.param_groups[0]
    decay, epsilon = group["decay_rate"], group["epsilon"]
    correction = 1 / (1 - decay**optimizer.steps) if group["bias_correction"] else 1.0
    square = optimizer.cache * correction
    if group["centered"]:
        assert optimizer.grad_avg is not None
        square = np.maximum(square - (optimizer.grad_avg * correction) ** 2, 0)
    root = np.sqrt(square + epsilon) if group["eps_in_sqrt"] else np.sqrt(square) + epsilon
    rate: Array = resolve_lr(group, optimizer.steps - 1) / root
    return rate
