"""The GPU in `fastrms bench` and `fastrms info`: its facts, and the times of a step and of a device copy."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Case, make_arrays
from fastrms.bench.errors import BenchmarkError
from fastrms.bench.measure import Entry, StepRow, measure, seconds_of
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["can_measure", "facts", "measure_device", "why_not"]

COPY, STEP = "device copy", "cuda"


def why_not() -> str | None:
    """Return the reason why no GPU can be used, or None."""
    try:
        from fastrms import cuda
    except ImportError as error:
        return f"numba-cuda cannot be imported ({error})"
    return cuda.why_not()


def can_measure() -> bool:
    """Return whether there is a GPU that is not simulated."""
    if why_not():
        return False
    from fastrms.kernels.cuda import SIMULATED

    return not SIMULATED


def facts() -> Iterator[tuple[str, str]]:
    """Yield names and values of the GPU's properties, or one line if there is no GPU."""
    if reason := why_not():
        yield "GPU", f"none: {reason}"
        return
    from fastrms.kernels import cuda as kernels

    cuda: Any = kernels.cuda
    if kernels.SIMULATED:
        yield "GPU", "Numba's simulator (NUMBA_ENABLE_CUDASIM=1)"
        return
    context = cuda.current_context()
    device, memory = context.device, context.get_memory_info()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    major, minor = device.compute_capability
    yield "GPU", f"{name}, compute capability {major}.{minor}"
    yield "GPU memory", f"{memory.total / 2**30:.1f} GiB, {memory.free / 2**30:.1f} free"
    versions: dict[str, Callable[[], tuple[int, int]]] = {
        "CUDA runtime": lambda: cuda.runtime.get_version(),
        "CUDA driver": lambda: kernels.driver_version(),
    }
    for what, ask in versions.items():
        try:
            yield what, ".".join(map(str, ask()))
        except Exception as error:  # of a part of CUDA that kernels do not need
            yield what, f"unknown ({type(error).__name__})"


class _DeviceWorker:
    """A `fastrms.bench.workers.Worker` for steps on a stream, which are checked already."""

    def __init__(self, steps: Mapping[str, Callable[[], object]], stream: Any) -> None:
        self._steps, self._stream = steps, stream

    def open(self, name: str, case: Case) -> str:
        return "" if name == COPY else "equal"

    def time(self, name: str, calls: int) -> float:
        return seconds_of(self._steps[name], calls, self._stream.synchronize)

    def close(self) -> None:
        pass


def measure_device(case: Case, min_time: float, rows: list[StepRow]) -> None:
    """Time a step, and a device copy of the same number of bytes, in turns; append both rows to `rows`.

    Raise BenchmarkError if the step has other bits than the reference.
    """
    from fastrms.backends.cuda.arrays import cuda

    params, gradients = make_arrays(case)
    reference = ReferenceRMSProp(params, LR, DECAY_RATE, EPSILON)
    optimizer: Any = RMSProp(params, LR, DECAY_RATE, EPSILON, kernel="cuda")
    there = [cuda.to_device(gradient) for gradient in gradients]
    for _ in range(2):
        reference.step(gradients)
        optimizer.step(there)
    if any(ours.copy_to_host().tobytes() != theirs.tobytes()
           for ours, theirs in zip(optimizer.params, reference.params, strict=True)):  # fmt: skip
        raise BenchmarkError("cuda: expected the same bits as the reference after two steps, got different ones")

    # A copy reads and writes each byte.
    source, target = (cuda.device_array(case.traffic // 2, np.uint8) for _ in range(2))
    stream = optimizer.stream
    steps = {COPY: lambda: target.copy_to_device(source, stream=stream), STEP: lambda: optimizer.step(there)}
    worker = _DeviceWorker(steps, stream)
    roofline, step = Entry("limit of the GPU (a copy)", 0, worker, bound="copy"), Entry("fastrms cuda", 0, worker)
    measure(case, {STEP: step}, {COPY: roofline}, min_time, rows=rows)
