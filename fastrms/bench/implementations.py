"""The implementations of a step that `fastrms bench` compares; `peers` has those of other libraries."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fastrms._types import CacheDType, Kernel
from fastrms.bench import peers, roofline
from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Array
from fastrms.bench.problem import Problem, Runner, to_float
from fastrms.kernels.reference import ReferenceRMSProp

__all__ = ["IMPLEMENTATIONS", "ROOFLINES", "Implementation", "of_function"]


@dataclass(frozen=True)
class Implementation:
    """An implementation of a step: its label, a function that makes its runner, and its conditions."""

    label: str
    make: Callable[[Problem], Runner]
    many_threads: bool = False
    process: str = "here"  # or the name of a worker process
    modules: tuple[str, ...] = ()  # that have to be installed
    exact: bool = True  # the bits have to be the reference's
    in_quick: bool = True  # timed by default with --quick
    for_one: bool = True  # timed by default on one array
    cache_dtype: CacheDType | None = None  # of the optimizer: 16-bit state, compared with the NumPy kernel's

    def takes(self, dtype: str) -> bool:
        """Return whether parameters can have this dtype."""
        return self.cache_dtype is None or dtype == "float32"

    @property
    def moves(self) -> float:
        """Return the share of `Case.traffic` that it moves: 16-bit state is 2 bytes less to read and write, of 20."""
        return 1.0 if self.cache_dtype is None else 0.8

    def missing(self) -> list[str]:
        """Return the names of its packages that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


def _shared(kernel: Kernel) -> Callable[[Problem], Runner]:
    """Run a kernel of fastrms on the problem's shared optimizer."""

    def make(problem: Problem) -> Runner:
        optimizer = problem.optimizer()

        def prepare() -> None:
            optimizer.kernel = kernel

        return Runner(optimizer.step, lambda: (optimizer.params, optimizer.cache), prepare)

    return make


def _own(kernel: Kernel, cache_dtype: CacheDType | None = None) -> Callable[[Problem], Runner]:
    """Run a kernel on an optimizer of its own: "auto" keeps its choice, and bfloat16 state has other memory."""

    def make(problem: Problem) -> Runner:
        optimizer = problem.new_optimizer(kernel, cache_dtype)
        for own, grad in zip(optimizer.grads, problem.grads, strict=True):
            own[...] = grad
        return Runner(optimizer.step, lambda: (optimizer.params, to_float(optimizer.cache)))

    return make


def _auto_list(problem: Problem) -> Runner:
    optimizer, grads = problem.new_optimizer("auto"), problem.grads
    return Runner(lambda: optimizer.step(grads), lambda: (optimizer.params, optimizer.cache))


def _reference(problem: Problem) -> Runner:
    reference, grads = ReferenceRMSProp(problem.params, LR, DECAY_RATE, EPSILON), problem.grads
    return Runner(lambda: reference.step(grads), lambda: (reference.params, reference.cache))


# Elements of a part in the NumPy loop, so that intermediate results stay in the processor's cache.
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


def of_function(label: str, update: Callable[[Array, Array, Array, float, float, float], object]) -> Implementation:
    """Return an implementation that calls ``update(params, grads, cache, lr, decay_rate, epsilon)`` for each array."""

    def make(problem: Problem) -> Runner:
        params, cache = problem.copies()
        arrays = list(zip(params, problem.grads, cache, strict=True))

        def step() -> None:
            for p, g, c in arrays:
                update(p, g, c, LR, DECAY_RATE, EPSILON)

        return Runner(step, lambda: (params, cache))

    return Implementation(label, make, many_threads=True, exact=False)


def _peer(
    label: str, make: Callable[[Problem], Runner], process: str, *modules: str, in_quick: bool = True
) -> Implementation:
    return Implementation(
        label, make, many_threads=True, process=process, modules=modules, exact=False, in_quick=in_quick
    )


# By the name that --kernels takes, in the order of the table.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "auto": Implementation("fastrms auto", _own("auto"), many_threads=True),
    "auto-list": Implementation("fastrms auto, step(list)", _auto_list, many_threads=True, for_one=False),
    "serial": Implementation("fastrms serial", _shared("serial")),
    "parallel": Implementation("fastrms parallel", _shared("parallel"), many_threads=True),
    "parallel-bfloat16": Implementation(
        "fastrms parallel, bfloat16", _own("parallel", "bfloat16"), many_threads=True, cache_dtype="bfloat16"
    ),
    "numpy": Implementation("fastrms numpy", _shared("numpy")),
    "numpy-in-place": Implementation("NumPy in place", _numpy_in_place),
    "reference": Implementation("reference class", _reference),
    "numexpr": _peer("numexpr", peers.numexpr, "numexpr", "numexpr"),
    "torch": _peer("torch.optim", partial(peers.torch, foreach=False), "torch", "torch"),
    "torch-foreach": _peer("torch.optim, foreach", partial(peers.torch, foreach=True), "torch", "torch"),
    "torch-compile": _peer("torch.compile of the step", peers.torch_compiled, "torch.compile", "torch", in_quick=False),
    "optax": _peer("optax, jit, donated", peers.optax, "jax", "jax", "optax"),
}

# Timed like an implementation; nothing is compared.
ROOFLINES: dict[str, Implementation] = {
    "roofline, 1 thread": Implementation("limit of this machine", partial(roofline.make_runner, parallel=False)),
    "roofline, all threads": Implementation(
        "limit of this machine", partial(roofline.make_runner, parallel=True), many_threads=True
    ),
}
