"""The ways to take a step that `fastrms bench` compares; what needs another library is in `peers`."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR
from fastrms.bench.problem import Problem, Runner, numbers
from fastrms.cli.common import CommandError, find_object
from fastrms.kernels.reference import ReferenceRMSProp

__all__ = ["CONTENDERS", "Contender", "load_kernel", "missing"]


@dataclass(frozen=True)
class Contender:
    """A way to take a step: what it is called, where it runs, on how many threads, and how it is made.

    `process` is "here", or the name of a process of its own, in which `modules` are imported. `exact` asks for the
    reference's bits; `in_quick` and `for_one` say whether it is measured unasked with ``--quick`` and on one array.
    `cache_dtype` is that of `fastrms.RMSProp`: state in 16 bits, for float32 only, compared with the same in NumPy.
    """

    label: str
    make: Callable[[Problem], Runner]
    many_threads: bool = False
    process: str = "here"
    modules: tuple[str, ...] = ()
    exact: bool = True
    in_quick: bool = True
    for_one: bool = True
    cache_dtype: str | None = None

    def takes(self, dtype: str) -> bool:
        """Whether this way can be run on parameters of this dtype."""
        return self.cache_dtype is None or dtype == "float32"


def missing(contender: Contender) -> list[str]:
    """The modules that this way needs and that are not installed."""
    return [name for name in contender.modules if importlib.util.find_spec(name) is None]


def _ours(kernel: str) -> Callable[[Problem], Runner]:
    def make(problem: Problem) -> Runner:
        optimizer = problem.optimizer()

        def prepare() -> None:
            optimizer.kernel = kernel

        return Runner(optimizer.step, lambda: (optimizer.params, optimizer.cache), prepare)

    return make


def _own(kernel: str, cache_dtype: str | None = None) -> Callable[[Problem], Runner]:
    """An optimizer of its own: "auto" keeps what it found out, and other state takes other memory."""

    def make(problem: Problem) -> Runner:
        optimizer = problem.new_optimizer(kernel, cache_dtype)
        for own, grad in zip(optimizer.grads, problem.grads, strict=True):
            own[...] = grad
        return Runner(optimizer.step, lambda: (optimizer.params, numbers(optimizer.cache)))

    return make


def _auto_list(problem: Problem) -> Runner:
    optimizer, grads = problem.new_optimizer("auto"), problem.grads
    return Runner(lambda: optimizer.step(grads), lambda: (optimizer.params, optimizer.cache))


def _reference(problem: Problem) -> Runner:
    reference, grads = ReferenceRMSProp(problem.params, LR, DECAY_RATE, EPSILON), problem.grads
    return Runner(lambda: reference.step(grads), lambda: (reference.params, reference.cache))


# Elements that the NumPy loop works on at a time, so that what is computed in between stays in the processor's cache.
_PART = 16_384


def _numpy_in_place(problem: Problem) -> Runner:
    params, cache = problem.copies()
    scratch, other = np.empty((2, _PART), problem.scalar)
    parts = []
    for arrays in zip(params, problem.grads, cache, strict=True):
        p, g, c = (array.reshape(-1) for array in arrays)
        for start in range(0, p.size, _PART):
            part = slice(start, start + _PART)
            size = len(p[part])
            parts.append((p[part], g[part], c[part], scratch[:size], other[:size]))
    rest = 1 - DECAY_RATE

    def step() -> None:
        for p, g, c, a, b in parts:
            np.multiply(g, g, out=a)
            np.multiply(a, rest, out=a)
            np.multiply(c, DECAY_RATE, out=c)
            np.add(c, a, out=c)
            np.sqrt(c, out=a)
            np.add(a, EPSILON, out=a)
            np.multiply(g, LR, out=b)
            np.divide(b, a, out=b)
            np.subtract(p, b, out=p)

    return Runner(step, lambda: (params, cache))


def load_kernel(name: str) -> Contender:
    """A way that calls the user's own function, once for each array, as ``f(params, grads, cache, lr, d, eps)``."""
    update = find_object("--kernel", name)
    if not callable(update):
        raise CommandError(f"--kernel: {name}: expected a function, got {type(update).__name__}")

    def make(problem: Problem) -> Runner:
        params, cache = problem.copies()
        arrays = list(zip(params, problem.grads, cache, strict=True))

        def step() -> None:
            for p, g, c in arrays:
                update(p, g, c, LR, DECAY_RATE, EPSILON)

        return Runner(step, lambda: (params, cache))

    return Contender(name, make, many_threads=True, exact=False)


def _peer(function: str) -> Callable[[Problem], Runner]:
    def make(problem: Problem) -> Runner:
        # Imported with the first of them, in the process that runs them.
        peers = importlib.import_module("fastrms.bench.peers")
        runner: Runner = getattr(peers, function)(problem)
        return runner

    return make


# By the name that --kernels takes, in the order of the table.
CONTENDERS: dict[str, Contender] = {
    "auto": Contender("fastrms auto", _own("auto"), many_threads=True),
    "auto-list": Contender("fastrms auto, step(list)", _auto_list, many_threads=True, for_one=False),
    "serial": Contender("fastrms serial", _ours("serial")),
    "parallel": Contender("fastrms parallel", _ours("parallel"), many_threads=True),
    "parallel-bfloat16": Contender(
        "fastrms parallel, bfloat16", _own("parallel", "bfloat16"), many_threads=True, cache_dtype="bfloat16"
    ),
    "numpy": Contender("fastrms numpy", _ours("numpy")),
    "numpy-in-place": Contender("NumPy in place", _numpy_in_place),
    "reference": Contender("reference class", _reference),
    "numexpr": Contender(
        "numexpr", _peer("numexpr"), many_threads=True, process="numexpr", modules=("numexpr",), exact=False
    ),
    "torch": Contender(
        "torch.optim", _peer("torch_loop"), many_threads=True, process="torch", modules=("torch",), exact=False
    ),
    "torch-foreach": Contender(
        "torch.optim, foreach",
        _peer("torch_foreach"),
        many_threads=True,
        process="torch",
        modules=("torch",),
        exact=False,
    ),
    "torch-compile": Contender(
        "torch.compile of the step",
        _peer("torch_compiled"),
        many_threads=True,
        process="torch.compile",
        modules=("torch",),
        exact=False,
        in_quick=False,
    ),
    "optax": Contender(
        "optax, jit, donated", _peer("optax"), many_threads=True, process="jax", modules=("jax", "optax"), exact=False
    ),
}
