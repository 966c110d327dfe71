"""The launches of kernels that measure the gradients of a run, and that update it."""

from collections.abc import Iterator

import numpy as np

from fastrms.backends.base import Call
from fastrms.backends.cuda.arrays import DeviceArray, Stream
from fastrms.backends.cuda.tables import NO_BOUND, DeviceRun
from fastrms.kernels import cuda as kernels
from fastrms.kernels.hyper import needs_extended_rule

__all__ = ["Pass", "Spans", "norm_passes", "squares", "update"]

# The number of chunks, and for each span its bounds, its first chunk, and the source of its gradient, as for
# `kernels.update_kernel`.
Spans = tuple[int, DeviceArray, DeviceArray, DeviceArray]

# A pass over gradients: which gradients, the scale of values, and their bound, as for `kernels.square_chunks`.
Pass = tuple[int, float, float]


def norm_passes(run: DeviceRun) -> list[Pass]:
    """Return the passes over the gradients of a run that compute their norms."""
    bound = NO_BOUND if run.group["clip_value"] is None else run.group["clip_value"]
    passes = [(kernels.EVERY, 1.0, bound)]
    if run.dtype == np.float64:
        passes.append((kernels.TOO_SMALL, kernels.PRESCALE, bound))
        passes.append((kernels.TOO_LARGE, 1 / kernels.PRESCALE, bound))
    return passes


def squares(
    run: DeviceRun,
    grads: DeviceArray,
    spans: Spans,
    results: tuple[DeviceArray, DeviceArray, DeviceArray],
    partials: DeviceArray,
    passes: list[Pass],
    stream: Stream,
) -> Iterator[Call]:
    """Iterate over the launches of passes over gradients. They write `results`: sums, norms, and whether finite."""
    chunks, bounds, first_chunk, sources = spans
    sums, norms, finite = results
    for which, prescale, bound in passes:
        if chunks:
            yield (
                kernels.launch, kernels.square_chunks, chunks, kernels.LANES, stream, grads, bounds, first_chunk,
                sources, run.dtype.type(bound), prescale, which, sums, norms, partials,
            )  # fmt: skip
        yield (
            kernels.launch, kernels.add_partials, sources.size, kernels.THREADS, stream, first_chunk, sources, which,
            prescale, partials, sums, norms, finite,
        )  # fmt: skip


def update(
    run: DeviceRun,
    grads: DeviceArray,
    spans: Spans,
    factors: DeviceArray,
    go: DeviceArray,
    stream: Stream,
    *,
    factored: bool,
    guarded: bool = False,
    correction: float = 1.0,
    threads: int | None = None,
) -> Call:
    """Return the launch that updates spans of a run. See `kernels.update_kernel`."""
    chunks, *tables = spans
    group, number = run.group, run.dtype.type
    extended = factored or needs_extended_rule(group)
    kernel = kernels.update_kernel(
        run.dtype, group["momentum"] > 0, group["centered"], extended, factored, guarded, run.held
    )
    params, _, *state = run.arrays
    return (
        kernels.launch, kernel, chunks, threads or kernels.THREADS, stream, params, grads, *state, run.hyper,
        number(-1 if group["maximize"] else 1), number(correction), *tables, factors, go,
    )  # fmt: skip
