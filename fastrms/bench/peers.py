"""The RMSProp of other libraries, each at its best, as implementations of `fastrms bench`.

A worker process imports its library when it makes the runner. No library is needed to install fastrms or to
check its types.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR
from fastrms.bench.problem import Problem, Runner, State

__all__ = [
    "bitsandbytes", "limit_processors", "numexpr", "optax", "tensorplay", "torch", "torch_adagrad", "torch_compiled",
]  # fmt: skip


def limit_processors(threads: int) -> None:
    """Limit libraries that are imported later to `threads` threads; XLA starts one for each allowed processor."""
    for name in ("OMP_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS"):
        os.environ[name] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if threads < len(allowed):
            os.sched_setaffinity(0, allowed[:threads])


def _on_tensors(problem: Problem, library: str, make: Callable[[list[Any]], Any], squares: str) -> Runner:
    """Run the optimizer that `make` makes of parameters, which are tensors of `library`; `squares` names its cache."""
    tensors = importlib.import_module(library)
    tensors.set_num_threads(problem.threads)
    params = [tensors.nn.Parameter(tensors.from_numpy(param.copy())) for param in problem.params]
    for param, grad in zip(params, problem.grads, strict=True):
        param.grad = tensors.from_numpy(grad)
    optimizer = make(params)

    def state() -> State:
        values = [param.detach().numpy() for param in params]
        return values, [optimizer.state[param][squares].numpy() for param in params]

    return Runner(optimizer.step, state)


# The numbers of the rule, as PyTorch and its kin name them.
_NUMBERS = {"lr": LR, "alpha": DECAY_RATE, "eps": EPSILON}


def torch(problem: Problem, foreach: bool) -> Runner:
    """Run torch.optim.RMSprop: with `foreach` operation after operation over all arrays, else array after array."""
    optim = importlib.import_module("torch.optim")
    return _on_tensors(problem, "torch", lambda p: optim.RMSprop(p, foreach=foreach, **_NUMBERS), "square_avg")


def torch_adagrad(problem: Problem) -> Runner:
    """Run torch.optim.Adagrad, fused: the nearest to a fused RMSprop that PyTorch has on the CPU."""
    optim = importlib.import_module("torch.optim")
    return _on_tensors(problem, "torch", lambda p: optim.Adagrad(p, lr=LR, eps=EPSILON, fused=True), "sum")


def torch_compiled(problem: Problem) -> Runner:
    """Run torch.optim.RMSprop with its whole step compiled, which needs a C++ compiler."""
    library = importlib.import_module("torch")
    runner = torch(problem, True)
    # Shapes and dtypes of an earlier case would count as recompilations, and after some of them torch gives up.
    library.compiler.reset()

    def uncompiled() -> None:
        runner.step()

    return Runner(library.compile(uncompiled), runner.state)


def tensorplay(problem: Problem) -> Runner:
    """Run tensorplay.optim.RMSprop, which is fused."""
    optim = importlib.import_module("tensorplay.optim")
    return _on_tensors(problem, "tensorplay", lambda p: optim.RMSprop(p, **_NUMBERS), "square_avg")


def bitsandbytes(problem: Problem) -> Runner:
    """Run bitsandbytes.optim.RMSprop with 32-bit state."""
    optim = importlib.import_module("bitsandbytes.optim")
    return _on_tensors(problem, "torch", lambda p: optim.RMSprop(p, **_NUMBERS), "state1")


def optax(problem: Problem) -> Runner:
    """Run optax.rmsprop under jit, with parameters and state donated, so that the update is in place."""
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", problem.case.dtype == "float64")
    library = importlib.import_module("optax")
    transform = library.rmsprop(LR, decay=DECAY_RATE, eps=EPSILON, eps_in_sqrt=False)

    def update(params: Any, state: Any, grads: Any) -> Any:
        changes, state = transform.update(grads, state, params)
        return library.apply_updates(params, changes), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    # Copies, because NumPy's memory must not be donated.
    params = [jax.numpy.array(param, copy=True) for param in problem.params]
    grads = [jax.numpy.array(grad, copy=True) for grad in problem.grads]
    now = [params, transform.init(params)]

    def step() -> None:
        now[:] = compiled(*now, grads)
        jax.block_until_ready(now)

    def state() -> State:
        # The only arrays in optax's state are the mean squares, in the order of the parameters.
        squares = [leaf for leaf in jax.tree_util.tree_leaves(now[1]) if np.ndim(leaf) or np.shape(params[0]) == ()]
        return [np.asarray(param) for param in now[0]], [np.asarray(square) for square in squares]

    return Runner(step, state)


def numexpr(problem: Problem) -> Runner:
    """Run two expressions of numexpr, in place."""
    library = importlib.import_module("numexpr")
    library.set_num_threads(problem.threads)
    params, cache = problem.copies()
    numbers = {"d": DECAY_RATE, "r": 1 - DECAY_RATE, "lr": LR, "eps": EPSILON}
    # Scalars of the arrays' dtype: one float64 number would make numexpr compute everything in float64.
    scalars = {name: problem.scalar(value) for name, value in numbers.items()}
    operands = [
        ({"p": p, "g": g, "c": c} | scalars, p, c) for p, g, c in zip(params, problem.grads, cache, strict=True)
    ]

    def step() -> None:
        for names, p, c in operands:
            library.evaluate("d * c + r * (g * g)", local_dict=names, global_dict={}, out=c)
            library.evaluate("p - lr * g / (sqrt(c) + eps)", local_dict=names, global_dict={}, out=p)

    return Runner(step, lambda: (params, cache))
