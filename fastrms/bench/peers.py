"""Other libraries' RMSProp as ways of `fastrms bench`, each at its best; imported in a process of its own.

Libraries are imported by name at run time: none is needed to install fastrms or to check its types.
"""

import importlib
import os
from typing import Any

import numpy as np

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR
from fastrms.bench.problem import Problem, Runner

__all__ = ["limit_processors", "numexpr", "optax", "torch_compiled", "torch_foreach", "torch_loop"]


def limit_processors(threads: int) -> None:
    """Let libraries that are loaded from here on use `threads` threads: XLA takes as many as it may run on cores."""
    for name in ("OMP_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if threads < len(allowed):
            os.sched_setaffinity(0, allowed[:threads])


def _torch(problem: Problem, foreach: bool) -> tuple[Any, list[Any], Any]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(problem.threads)
    params = [torch.nn.Parameter(torch.from_numpy(param.copy())) for param in problem.params]
    for param, grad in zip(params, problem.grads, strict=True):
        param.grad = torch.from_numpy(grad)
    optimizer = torch.optim.RMSprop(params, lr=LR, alpha=DECAY_RATE, eps=EPSILON, foreach=foreach)
    return torch, params, optimizer


def _torch_runner(step: Any, params: list[Any], optimizer: Any) -> Runner:
    def state() -> tuple[list[Any], list[Any]]:
        values = [param.detach().numpy() for param in params]
        return values, [optimizer.state[param]["square_avg"].numpy() for param in params]

    return Runner(step, state)


def torch_loop(problem: Problem) -> Runner:
    """torch.optim.RMSprop, array after array."""
    _, params, optimizer = _torch(problem, False)
    return _torch_runner(optimizer.step, params, optimizer)


def torch_foreach(problem: Problem) -> Runner:
    """torch.optim.RMSprop, operation after operation over all arrays."""
    _, params, optimizer = _torch(problem, True)
    return _torch_runner(optimizer.step, params, optimizer)


def torch_compiled(problem: Problem) -> Runner:
    """torch.optim.RMSprop whose whole step is compiled; needs a C++ compiler."""
    torch, params, optimizer = _torch(problem, True)
    # Shapes and dtypes of an earlier case would count as a change, after some of which nothing is compiled any more.
    torch.compiler.reset()

    def uncompiled() -> None:
        optimizer.step()

    return _torch_runner(torch.compile(uncompiled), params, optimizer)


def optax(problem: Problem) -> Runner:
    """optax.rmsprop under jit, with parameters and state donated, so that they are updated in place."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", problem.case.dtype == "float64")
    library = importlib.import_module("optax")
    transform = library.rmsprop(LR, decay=DECAY_RATE, eps=EPSILON, eps_in_sqrt=False)

    def update(params: Any, state: Any, grads: Any) -> Any:
        changes, state = transform.update(grads, state, params)
        return library.apply_updates(params, changes), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    # Copied: what is donated must not be NumPy's memory.
    params = [jax.numpy.array(param, copy=True) for param in problem.params]
    grads = [jax.numpy.array(grad, copy=True) for grad in problem.grads]
    now = [params, transform.init(params)]

    def step() -> None:
        now[:] = compiled(*now, grads)
        jax.block_until_ready(now)

    def state() -> tuple[list[Any], list[Any]]:
        # The only arrays in optax's state are the mean squares, in the order of the parameters.
        squares = [leaf for leaf in jax.tree_util.tree_leaves(now[1]) if np.ndim(leaf) or np.shape(params[0]) == ()]
        return [np.asarray(param) for param in now[0]], [np.asarray(square) for square in squares]

    return Runner(step, state)


def numexpr(problem: Problem) -> Runner:
    """Two expressions for numexpr, in place."""
    library = importlib.import_module("numexpr")
    library.set_num_threads(problem.threads)
    params, cache = problem.copies()
    numbers = {"d": DECAY_RATE, "r": 1 - DECAY_RATE, "lr": LR, "eps": EPSILON}
    # Of the arrays' dtype: with a float64 number all of it would be computed in float64.
    scalars = {name: problem.scalar(value) for name, value in numbers.items()}
    operands = [
        ({"p": p, "g": g, "c": c} | scalars, p, c) for p, g, c in zip(params, problem.grads, cache, strict=True)
    ]

    def step() -> None:
        for names, p, c in operands:
            library.evaluate("d * c + r * (g * g)", local_dict=names, global_dict={}, out=c)
            library.evaluate("p - lr * g / (sqrt(c) + eps)", local_dict=names, global_dict={}, out=p)

    return Runner(step, lambda: (params, cache))
