"""The GPU, if there is one: what it is, and a step on it beside its own copy."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastrms.bench.cases import DECAY_RATE, EPSILON, LR, Case, make_arrays
from fastrms.bench.measure import Row
from fastrms.bench.roofline import rates
from fastrms.cli.common import CommandError
from fastrms.kernels.reference import ReferenceRMSProp
from fastrms.optimizer import RMSProp

__all__ = ["can_measure", "facts", "measure_device", "why_not"]

ROUNDS, MAX_ROUNDS = 5, 200


def why_not() -> str | None:
    """Why no GPU can be used, or None."""
    try:
        from fastrms import cuda
    except ImportError as error:
        return f"numba-cuda cannot be imported ({error})"
    return cuda.why_not()


def can_measure() -> bool:
    """Whether there is a GPU to measure, not a simulated one."""
    if why_not():
        return False
    from fastrms.kernels.cuda import SIMULATED

    return not SIMULATED


def facts() -> Iterator[tuple[str, str]]:
    """What there is to say about the GPU: name and value; one line if there is none."""
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
        except Exception as error:  # a part of CUDA that kernels do not need
            yield what, f"unknown ({type(error).__name__})"


def measure_device(case: Case, min_time: float, rows: list[Row]) -> None:
    """Time a copy on the device of as many bytes as a step moves, and the step, in turns; append both to `rows`.

    Raises
    ------
    CommandError
        The step has other bits than the reference.
    """
    from fastrms.kernels.cuda import cuda

    params, gradients = make_arrays(case)
    reference = ReferenceRMSProp(params, LR, DECAY_RATE, EPSILON)
    optimizer: Any = RMSProp(params, LR, DECAY_RATE, EPSILON, kernel="cuda")
    there = [cuda.to_device(gradient) for gradient in gradients]
    for _ in range(2):
        reference.step(gradients)
        optimizer.step(there)
    if any(ours.copy_to_host().tobytes() != theirs.tobytes()
           for ours, theirs in zip(optimizer.params, reference.params, strict=True)):  # fmt: skip
        raise CommandError("cuda: expected the bits of the reference after two steps, got others")

    # A copy reads and writes each byte.
    source, target = (cuda.device_array(case.traffic // 2, np.uint8) for _ in range(2))
    stream = optimizer.stream
    ways: dict[str, Any] = {
        "device copy": lambda: target.copy_to_device(source, stream=stream),
        "cuda": lambda: optimizer.step(there),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    counts = {name: max(1, round(0.05 * min_time / _seconds(way, 3, stream))) for name, way in ways.items()}
    begin = time.perf_counter()
    while len(times["cuda"]) < ROUNDS or (
        time.perf_counter() - begin < 2 * min_time and len(times["cuda"]) < MAX_ROUNDS
    ):
        for name, way in ways.items():
            times[name].append(_seconds(way, counts[name], stream))
    limit = float(np.median(times["device copy"]))
    for name, taken in times.items():
        seconds = float(np.median(taken))
        gparam, gbyte = rates(case.params, case.traffic, seconds)
        is_limit = name == "device copy"
        quarter, three_quarters = np.quantile(taken, [0.25, 0.75]).tolist()
        rows.append(
            Row(
                kernel=name,
                label="limit of the GPU (a copy)" if is_limit else "fastrms cuda",
                dtype=case.dtype,
                arrays=case.arrays,
                shape="x".join(map(str, case.shape)),
                params=case.params,
                threads=0,
                seconds=seconds,
                quarter=quarter,
                three_quarters=three_quarters,
                rounds=len(taken),
                steps_in_a_turn=counts[name],
                gparam_per_s=gparam,
                gbyte_per_s=gbyte,
                percent_of_limit=100 * limit / seconds,
                check="" if is_limit else "equal",
            )
        )


def _seconds(way: Any, count: int, stream: Any) -> float:
    """Of one call of `way`: what passes from the first of `count` until the device is done."""
    stream.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        way()
    stream.synchronize()
    return (time.perf_counter() - start) / count
