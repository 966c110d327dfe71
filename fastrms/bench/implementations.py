"""The implementations of a step that `fastrms bench` compares; `peers` has those of other libraries."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastrms._types import CacheDType, Kernel
from fastrms.bench import peers, roofline
from fastrms.bench.cases import DECAY_RATE, DTYPES, EPSILON, LR, Array
from fastrms.bench.plain import NaiveLoop, NumpyInPlace
from fastrms.bench.problem import Oracle, Problem, Runner, adagrad, bfloat16_state, rmsprop, to_float
from fastrms.kernels.reference import ReferenceRMSProp

__all__ = ["IMPLEMENTATIONS", "OURS", "ROOFLINES", "Implementation", "of_function"]


@dataclass(frozen=True)
class Implementation:
    """An implementation of a step: its label, a function that makes its runner, and its conditions."""

    label: str
    make: Callable[[Problem], Runner]
    many_threads: bool = False
    process: str = "here"  # or the name of a worker process
    modules: tuple[str, ...] = ()  # that have to be installed
    exact: bool = True  # the bits have to be the oracle's
    in_quick: bool = True  # timed by default with --quick
    dtypes: tuple[str, ...] = DTYPES  # of the parameters
    oracle: Oracle = rmsprop
    moves: float = 1.0  # the share of `Case.traffic` that it moves
    bound: str = ""  # of a roofline: "memory" or "divider"

    def missing(self) -> list[str]:
        """Return the names of its packages that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


def _shared(kernel: Kernel, lists: bool = False) -> Callable[[Problem], Runner]:
    """Run a kernel of fastrms on the problem's shared optimizer, with gradients in its buffer or in a list."""

    def make(problem: Problem) -> Runner:
        optimizer, grads = problem.optimizer(), problem.grads

        def prepare() -> None:
            optimizer.kernel = kernel

        step = (lambda: optimizer.step(grads)) if lists else optimizer.step
        return Runner(step, lambda: (optimizer.params, optimizer.cache), prepare)

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


def _numpy_in_place(problem: Problem) -> Runner:
    arrays = problem.arrays()
    return Runner(NumpyInPlace(*arrays).bind(problem.grads), lambda: arrays)


def _naive(problem: Problem, parallel: bool) -> Runner:
    arrays = problem.arrays()
    step = NaiveLoop(*arrays, parallel=parallel).bind(problem.grads)
    return Runner(problem.limited(step) if parallel else step, lambda: arrays)


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


# An optimizer of another library, in a process of its own; rounding may differ.
_peer = partial(Implementation, many_threads=True, exact=False)
_torch = partial(_peer, process="torch", modules=("torch",))

# By the name that --kernels takes, in the order of the table.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "auto": Implementation("fastrms auto", _own("auto"), many_threads=True),
    "auto-list": Implementation("fastrms auto, step(list)", _auto_list, many_threads=True),
    "serial": Implementation("fastrms serial", _shared("serial")),
    "serial-list": Implementation("fastrms serial, step(list)", _shared("serial", lists=True)),
    "parallel": Implementation("fastrms parallel", _shared("parallel"), many_threads=True),
    "parallel-list": Implementation(
        "fastrms parallel, step(list)", _shared("parallel", lists=True), many_threads=True
    ),
    # 2 bytes of state less to read and to write, of 20.
    "parallel-bfloat16": Implementation(
        "fastrms parallel, bfloat16", _own("parallel", "bfloat16"), many_threads=True, dtypes=("float32",),
        oracle=bfloat16_state, moves=0.8,
    ),
    "numpy": Implementation("fastrms numpy", _shared("numpy")),
    "naive": Implementation("naive loop", partial(_naive, parallel=False)),
    "naive-parallel": Implementation("naive loop, prange", partial(_naive, parallel=True), many_threads=True),
    "numpy-in-place": Implementation("NumPy in place", _numpy_in_place),
    "reference": Implementation("reference class", _reference),
    "numexpr": _peer("numexpr", peers.numexpr, process="numexpr", modules=("numexpr",)),
    "torch": _torch("torch.optim", partial(peers.torch, foreach=False)),
    "torch-foreach": _torch("torch.optim, foreach", partial(peers.torch, foreach=True)),
    "torch-adagrad": _torch(
        "torch fused Adagrad (another rule)", peers.torch_adagrad, oracle=adagrad
    ),
    "torch-compile": _torch(
        "torch.compile of the step", peers.torch_compiled, process="torch.compile", in_quick=False
    ),
    "tensorplay": _peer("TensorPlay", peers.tensorplay, process="tensorplay", modules=("tensorplay",)),
    # With float64 it computes in float32.
    "bitsandbytes": _peer(
        "bitsandbytes", peers.bitsandbytes, process="bitsandbytes", modules=("torch", "bitsandbytes"),
        dtypes=("float32",),
    ),
    "optax": _peer("optax, jit, donated", peers.optax, process="jax", modules=("jax", "optax")),
}  # fmt: skip

# The kernels of fastrms.
OURS = tuple(name for name, each in IMPLEMENTATIONS.items() if each.label.startswith("fastrms"))


def _limits() -> dict[str, Implementation]:
    found = {}
    for bound, make in (("memory", roofline.memory), ("divider", roofline.divider)):
        for parallel in (False, True):
            name = f"{bound}, {'all threads' if parallel else '1 thread'}"
            label = f"limit: {bound}"
            found[name] = Implementation(label, partial(make, parallel=parallel), parallel, bound=bound)
    return found


# Timed like an implementation; nothing is compared.
ROOFLINES = _limits()
