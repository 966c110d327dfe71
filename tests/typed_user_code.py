"""Programs of users as type checkers see them. Read by mypy and pyright, never run.

Each mistake is marked for both. A mark that is not needed is an error too, so that a type that accepts everything is
found here.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self, assert_type

import numpy as np
from numpy.typing import NDArray

from fastrms import FlatBuffer, Layout, ParamGroup, RMSProp, from_bfloat16, rmsprop_update, warmup
from fastrms.cuda import CudaRMSProp
from fastrms.mpi import ShardedRMSProp
from fastrms.options import Group  # noqa: TC001 # as users write it

Vector = NDArray[np.float64]


class Layer(NamedTuple):
    w: Vector
    b: Vector


def structures(w: Vector, b: Vector) -> None:
    of_list = RMSProp([w, b], lr=0.1)
    assert_type(of_list, RMSProp[list[Vector]])
    assert_type(of_list.params, list[Vector])
    assert_type(of_list.grads, list[Vector])
    assert_type(of_list.cache, list[Vector])
    assert_type(of_list.momentum_buffer, list[Vector] | None)
    assert_type(of_list.step([w, b]), list[Vector])
    of_list.grads[0][...] = of_list.params[1] * 2

    of_dict = RMSProp({"w": w, "b": b})
    assert_type(of_dict.params, dict[str, Vector])
    assert_type(of_dict.step({"w": w, "b": None})["w"], Vector)

    assert_type(RMSProp(w).params, Vector)
    assert_type(RMSProp((w, b)).params, tuple[Vector, Vector])
    assert_type(RMSProp(Layer(w, b)).params.b, Vector)
    assert_type(RMSProp([{"w": w}, {"w": b}]).params[0]["w"], Vector)

    nothing_is_promised = RMSProp([1.0, 2.0])
    assert_type(nothing_is_promised.params, Any)


def parts(w: Vector, b: Vector) -> None:
    opt = RMSProp({"w": w, "b": b}, in_place=True)
    assert_type(opt.params, dict[str, Vector])
    opt.step_parameter("w", w)
    opt.step_parameter(("w",), None)
    opt.step_rows("b", [0, 1], b).sum()
    opt.finish_step()
    opt.add_param_group({"params": [w], "lr": 0.1})
    assert_type(opt.current_lr, list[float])
    assert_type(opt.last_grad_norm, float | None)
    assert_type(opt.last_skipped, bool)


def parts_that_are_wrong(w: Vector, b: Vector) -> None:
    opt = RMSProp([w, b], in_place=1)  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    opt.step_parameter([0], w)  # pyright: ignore[reportArgumentType] # mypy takes a list for hashable
    opt.add_param_group({"lr": 0.1})  # pyright: ignore[reportArgumentType] # mypy knows no type of opt any more


def structures_that_are_wrong(w: Vector, b: Vector) -> None:
    opt = RMSProp([w, b])
    opt.params["w"]  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    opt.step(object())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    RMSProp(object())  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    takes_dict(opt)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    takes_any(opt)


def takes_dict(opt: RMSProp[dict[str, Vector]]) -> None: ...


def takes_any(opt: RMSProp) -> None: ...


def groups(w: Vector, b: Vector) -> None:
    opt = RMSProp([{"params": [w], "lr": 0.1}, {"params": [b], "momentum": 0.9, "nesterov": True}])
    assert_type(opt.params, list[Any])
    given: list[Group] = [{"params": w, "weight_decay": 0.1}]
    assert_type(RMSProp(given).param_groups[0], ParamGroup)
    opt.param_groups[0]["lr"] = 0.01
    wrong: Group = {"params": w, "weight_decay": "0.1"}  # type: ignore[typeddict-item] # pyright: ignore[reportAssignmentType]
    RMSProp([wrong])


def options(w: Vector, kernel: Literal["serial", "parallel"]) -> None:
    opt = RMSProp([w], 0.1, 0.9, 1e-8, kernel=kernel, nonfinite="skip", clip_norm=None, num_threads=2)
    opt.lr *= 0.5
    opt.lr = lambda step: 0.1 / (1 + step)
    opt.momentum, opt.nesterov, opt.clip_value = 0.9, True, None
    assert_type(opt.momentum, float)
    assert_type(opt.global_clip_norm, float | None)
    assert_type(opt.nonfinite, Literal["propagate", "raise", "skip"])
    assert_type(opt.kernel, Literal["auto", "numpy", "serial", "parallel", "cuda"])
    assert_type(opt.steps, int)
    opt.kernel = "numpy"


def options_that_are_wrong(w: Vector) -> None:
    RMSProp([w], kernel="sreial")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    RMSProp([w], learning_rate=0.1)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    RMSProp([w], lr="0.1")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    RMSProp([w], cache_dtype="float16")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    opt = RMSProp([w])
    opt.nonfinite = "ignore"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    opt.kernel = "gpu"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    opt.lr = "0.1"  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    opt.momentum = None  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    opt.steps = 1.5  # type: ignore[assignment] # pyright: ignore[reportAttributeAccessIssue]
    opt.learning_rate = 0.1  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue]


def saved(w: Vector) -> None:
    opt = RMSProp([w], storage="folder")
    opt.save("file.npz")
    opt.load_state_dict(opt.state_dict())
    assert_type(RMSProp[list[Vector]].from_checkpoint("file.npz"), RMSProp[list[Vector]])
    assert_type(RMSProp[list[Vector]].reopen("folder", after_crash="use").params, list[Vector])
    assert_type(RMSProp.from_checkpoint("file.npz", kernel="parallel").params, Any)
    RMSProp.reopen("folder", after_crash="ignore")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    RMSProp.reopen("folder", kernel="cuda")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with opt as entered:
        assert_type(entered, RMSProp[list[Vector]])


class Logged(RMSProp[list[Vector]]):
    """A class of the user's own, with a fixed structure."""

    def __init__(self, params: Sequence[Vector], lr: float) -> None:
        super().__init__(list(params), lr)
        self._norms: list[float] = []

    def log(self) -> Self:
        self._norms += [float(np.linalg.norm(view)) for view in self.params]
        return self


def derived(w: Vector) -> None:
    opt = Logged([w], 0.1)
    assert_type(opt.log().step([w]), list[Vector])
    assert_type(Logged.from_checkpoint("file.npz"), Logged)


def elsewhere(w: Vector, single: NDArray[np.float32]) -> None:
    on_gpu = RMSProp([w], kernel="cuda", stream=3, in_place=True)
    assert_type(on_gpu.params, Any)  # arrays of Numba, which have no types
    assert_type(CudaRMSProp([w], momentum=0.9).params, Any)
    CudaRMSProp([w], kernel="serial")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]

    half = RMSProp([single], cache_dtype="bfloat16")
    assert_type(half.cache, Any)  # arrays of bfloat16 or uint16, not of the dtype of the parameters
    from_bfloat16(half.cache[0])

    sharded = ShardedRMSProp({"w": w}, reduction="sum", kernel="serial")
    held = ShardedRMSProp({"w": w}, in_place=True)
    assert_type(held.params, dict[str, Vector])
    held.add_param_group({"params": [w], "lr": 0.1})
    assert_type(sharded.params, dict[str, Vector])
    assert_type(sharded.step({"w": w}), dict[str, Vector])
    assert_type(sharded.reduction, Literal["mean", "sum"])
    assert_type(ShardedRMSProp[list[Vector]].from_checkpoint("file.npz").params, list[Vector])
    ShardedRMSProp([w], reduction="max")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]
    ShardedRMSProp([w], nonfinite="never")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType, reportCallIssue]


def functions(w: Vector) -> None:
    assert_type(rmsprop_update({"w": w}, {"w": w}, None), tuple[dict[str, Vector], dict[str, Vector]])
    warmup(["float32"], ["serial"], momentum=0.9)
    warmup(kernels=["cereal"])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]


def buffers(w: Vector) -> None:
    buffer = FlatBuffer({"w": w})
    assert_type(buffer.views["w"], Vector)
    assert_type(buffer.layout, Layout)
    buffer.flat *= 2
    assert_type(buffer.like().views, dict[str, Vector])
    assert_type(buffer.like(dtype=np.float32).views, Any)
