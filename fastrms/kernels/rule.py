"""The update rule of one element, written once: compiled for processors and for GPUs.

Options with state of their own are decided at compile time: the momentum buffer and the mean gradient are each an array
or ``None`` (Numba prunes ``is not None`` branches). So is `extended`: the terms that default options do not need are
there all together, or not at all. Every other option is a number in `h`. The number for "off" leaves the bits as they
are: a factor of 1, a bound of inf, a threshold of 0. So a change of a number compiles nothing.

The bits are equal to NumPy's, because ``fastmath`` is off, nothing is contracted into fused multiply-adds, every scalar
has the dtype of the arrays, and the operations stand in the reference's order. ``error_model="numpy"`` is needed for
speed: Python's check for division by zero keeps the loop from being vectorised.
"""

import numpy as np

__all__ = ["rule"]


def rule(p, g, c, b, m, h, scale, correction, extended):
    """Update one element: take parameter, gradient and state, return parameter and state, ``(p, c, b, m)``.

    `c` is the cache, `b` the momentum buffer and `m` the mean gradient; `b` and `m` stay None if unused. `h` is the
    tuple of `hyper.HYPER_FIELDS`. `scale` multiplies the gradient (norm clipping, and -1 to maximize), `correction` is
    1/(1 - decay^t) or 1. `extended` is None to omit all terms that default options do not need. `docs/options.md` has
    the equations; `reference.update` is the same in plain NumPy.

    Selections are written ``0 if x < bound else x`` so that NaN falls through unchanged.
    """
    (lr_inside, lr_outside, decay, rest, eps_inside, eps_outside, l2, decoupled, momentum, nesterov, clip,
     gradient_floor, mean_floor, state_floor, zero) = h  # fmt: skip

    if extended is not None:
        g = clip if g > clip else g
        g = -clip if g < -clip else g
        g = g * scale
        g = g + l2 * p if l2 != zero else g  # not `g + 0 * p`, which is NaN where p is inf

    # Subnormal numbers make a vector of arithmetic up to 30 times slower, so the rule keeps them from arising, not only
    # from being stored. The floors are 0, hence without effect, when flush_subnormals is off.
    g_squarable = zero if abs(g) < gradient_floor else g
    c = decay * c + rest * (g_squarable * g_squarable)
    c = zero if c < state_floor else c

    v = c * correction if extended is not None else c
    if m is not None:
        m = decay * m + rest * g
        m = zero if abs(m) < state_floor else m
        mean = m * correction if extended is not None else m
        mean = zero if abs(mean) < mean_floor else mean
        square = mean * mean
        # Rounding can make the variance negative, and its root NaN: clamp it at 0. A subnormal variance becomes 0 too,
        # as v - v: computing the subnormal difference and dropping it afterwards would be as slow as keeping it.
        square = v if v < square + state_floor else square
        v = v - square

    if extended is not None:
        step = lr_inside * g / (np.sqrt(v + eps_inside) + eps_outside)
        p = p - decoupled * p if decoupled != zero else p
    else:
        step = lr_inside * g / (np.sqrt(v) + eps_outside)

    if b is not None:
        b = momentum * b + step
        b = zero if abs(b) < state_floor else b
        step = step + momentum * b if nesterov != zero else b
        step = lr_outside * step
    return p - step, c, b, m
