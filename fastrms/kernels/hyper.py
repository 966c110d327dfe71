"""The numbers that a kernel gets for the options of a parameter group."""

import math
from functools import cache

import numpy as np

from fastrms._types import DType, Options

__all__ = ["HYPER_FIELDS", "hyper_values", "needs_extended_rule"]

# In this order and in the dtype of the arrays. docs/options.md has the equations.
HYPER_FIELDS = (
    "lr_inside",  # multiplies the gradient, before the momentum buffer if there is one
    "lr_outside",  # multiplies the momentum buffer
    "decay",
    "rest",  # 1 - decay, rounded once from float64 as NumPy does
    "eps_inside",  # added under the root
    "eps_outside",  # added to the root
    "l2",  # weight decay added to the gradient
    "decoupled",  # lr times weight decay, taken off the parameter
    "momentum",
    "nesterov",  # 1 or 0
    "clip",  # bound on the absolute gradient, inf for none
    "gradient_floor",  # below this, a gradient's weighted square would be subnormal; it squares to 0
    "mean_floor",  # below this, a mean gradient's square would be subnormal; it squares to 0
    "state_floor",  # state below this is 0: the smallest normal number
    "zero",  # 0 in the dtype of the arrays: a literal 0.0 would turn a float32 loop into float64 arithmetic
)


def hyper_values(options: Options, lr: float, dtype: DType) -> list[float]:
    """Return the values of `HYPER_FIELDS` for the options of a group, and the learning rate and dtype of a step."""
    eps = options["epsilon"]
    rest = 1.0 - options["decay_rate"]
    lr_goes_outside = options["momentum"] > 0 and not options["lr_in_momentum"]
    flush = options["flush_subnormals"]
    decoupled = options["decoupled_weight_decay"]
    return [
        1.0 if lr_goes_outside else lr,
        lr if lr_goes_outside else 1.0,
        options["decay_rate"],
        rest,
        eps if options["eps_in_sqrt"] else 0.0,
        0.0 if options["eps_in_sqrt"] else eps,
        0.0 if decoupled else options["weight_decay"],
        lr * options["weight_decay"] if decoupled else 0.0,
        options["momentum"],
        float(options["nesterov"]),
        math.inf if options["clip_value"] is None else options["clip_value"],
        _smallest_with_normal_square(dtype, rest) if flush else 0.0,
        _smallest_with_normal_square(dtype, 1.0) if flush else 0.0,
        float(np.finfo(dtype).tiny) if flush else 0.0,
        0.0,
    ]


def needs_extended_rule(options: Options) -> bool:
    """Tell whether `options` use a term that the short form of the compiled rule omits."""
    return bool(
        options["weight_decay"] > 0
        or options["maximize"]
        or options["eps_in_sqrt"]
        or options["bias_correction"]
        or options["clip_value"] is not None
    )


@cache
def _smallest_with_normal_square(dtype: DType, weight: float) -> float:
    """Return the smallest positive x for which ``weight * (x * x)``, rounded twice in `dtype`, is a normal number.

    The product grows with x. So x is below this bound if and only if the product would be subnormal.
    """
    tiny = np.finfo(dtype).tiny
    factor = dtype.type(weight)
    x = dtype.type(math.sqrt(float(tiny) / float(factor)))
    zero, infinity = dtype.type(0), dtype.type(math.inf)
    with np.errstate(under="ignore"):
        while factor * (x * x) >= tiny:
            x = np.nextafter(x, zero)
        while factor * (x * x) < tiny:
            x = np.nextafter(x, infinity)
    return float(x)
