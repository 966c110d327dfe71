"""A run of `scipy.optimize.minimize` with defaults for tests."""

import numpy as np
from scipy.optimize import (
    minimize,
    rosen,
    rosen_der,
)

from fastrms.scipy import rmsprop

START = np.array([1.3, 0.7, 0.8])


def square(x, center=0.0):
    return np.sum((x - center) ** 2)


def square_der(x, center=0.0):
    return 2 * (x - center)


def run(fun=rosen, x0=START, jac=rosen_der, method=rmsprop, maxiter=20, **others):
    options = {"maxiter": maxiter} | others.pop("options", {})
    return minimize(fun, x0, jac=jac, method=method, options=options, **others)
