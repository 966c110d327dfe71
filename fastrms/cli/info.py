"""``fastrms info``: what is installed, what fastrms found on this machine, which kernel it chooses and why."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from fastrms.bench.cases import BATCH_SIZE, NETWORKS
from fastrms.cli.common import CommandError, positive, start_threads

__all__ = ["add_command", "run"]

NETWORK = "784-512-512-10"

# After 2 s of training "auto" begins to try kernels, and needs some tens of steps.
TRAIN_SECONDS, TRIED_STEPS = 2.5, 50

_DESCRIPTION = """
Print versions, processor, threads, the folder of compiled kernels, settings in the environment, and which kernel
"auto" chooses in a short training, and why.
"""

# What can be set to gain more: variable, value, why.
_TIMEOUT = ("OPENBLAS_THREAD_TIMEOUT", "20")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``info`` and its options to the subcommands."""
    parser = commands.add_parser(
        "info", help="what is installed, what auto chooses and why, and what you could set", description=_DESCRIPTION
    )
    add = parser.add_argument
    add(
        "--seconds",
        type=positive,
        default=TRAIN_SECONDS,
        metavar="S",
        help="of training, from which the choice of auto is seen (default: %(default)s)",
    )
    add("--measure", action="store_true", help="measure here what a setting would bring; takes half a minute")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``fastrms info`` and return 0."""
    if args.measure and importlib.util.find_spec("rich") is None:
        raise CommandError('--measure: rich is not installed; install with: python -m pip install "fastrms[bench]"')
    start_threads()
    for line in _facts():
        print(line, flush=True)
    print(f'\nkernel="auto" after {args.seconds:g} s of training a network of {NETWORK}, float32:')
    for line in _explain(args.seconds):
        print(f"  {line}")
    print("\nWhat you could set, before Python starts:")
    for line in _advice():
        print(f"  {line}")
    if args.measure:
        print(
            f"\nMeasured now, {_TIMEOUT[0]} unset and {_TIMEOUT[1]} (a training step of {NETWORK}, float32):",
            flush=True,
        )
        for line in _measured():
            print(f"  {line}", flush=True)
    return 0


def _facts() -> Iterator[str]:
    import numba

    from fastrms.bench import device, machine
    from fastrms.kernels import cpu, pointers

    variables = machine.environment()  # ahead of libraries that set some for themselves
    layer = machine.threading_layer()
    for name, version in machine.versions().items():
        yield f"{name:18}{version}"
    for k, library in enumerate(machine.blas()):
        yield f"{'' if k else 'BLAS':18}{library}"
    yield f"{'processor':18}{machine.processor()}, {machine.processors()} to run on"
    yield f"{'Numba threads':18}{numba.config.NUMBA_NUM_THREADS}"  # type: ignore[attr-defined]
    yield f"{'threading layer':18}{layer}"
    yield f"{'kernels cached in':18}{_cache_folder(cpu.serial)}"
    reads = "yes" if pointers.available() else "no"
    why = " (FASTRMS_ZERO_COPY=0)" if os.environ.get("FASTRMS_ZERO_COPY") == "0" else ""
    for name, text in device.facts():
        yield f"{name:18}{text}"
    yield f"{'step(list) copies':18}{'nothing, as a rule' if reads == 'yes' else 'every gradient'}{why}"
    for k, (name, value) in enumerate(variables.items()):
        yield f"{'' if k else 'environment':18}{name}={value}"
    if not variables:
        yield f"{'environment':18}nothing set that steers threads or caches"


def _cache_folder(kernel: Any) -> str:
    """Where Numba keeps compiled code of this function."""
    stats = getattr(kernel, "stats", None)
    path = getattr(stats, "cache_path", None)
    return str(path) if path else "nothing is cached: no folder is writable, or the JIT is off"


def _explain(seconds: float) -> list[str]:
    """Train for some seconds, and let the optimizer say what it chose."""
    import numpy as np

    from fastrms.demo.mlp import init_params
    from fastrms.demo.training import Training
    from fastrms.optimizer import RMSProp

    rng = np.random.default_rng(0)
    sizes = NETWORKS[NETWORK]
    x = rng.standard_normal((BATCH_SIZE, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], BATCH_SIZE).astype(np.intp)
    optimizer = RMSProp(init_params(sizes, np.float32, rng))
    training = Training(optimizer)
    end = perf_counter() + seconds
    late = 0
    # On a busy machine few steps fit into that time, and "auto" counts steps once it has begun to try.
    while (now := perf_counter()) < end or (late < TRIED_STEPS and now < end + 3 * seconds):
        training.step(x, y)
        late += now > end
    lines = optimizer.explain()
    time = f"{1e3 * training.step_time:.3g} ms a step, of which optimizer {1e3 * training.optimizer_time:.3g} ms"
    return [*lines, f"{len(training.losses):,} steps, {time}"]


def _advice() -> Iterator[str]:
    from fastrms.bench import machine

    name, value = _TIMEOUT
    if not any("openblas" in line.lower() for line in machine.blas()):
        yield "Nothing that is known to help: NumPy's matrix products are not computed by OpenBLAS here."
    elif name in os.environ:
        yield f"Nothing more: {name} is set."
    elif machine.processors() == 1:
        yield "Nothing that is known to help: there is one processor, and no thread to wait for."
    else:
        yield f"{name}={value}"
        yield "  OpenBLAS' threads go on spinning for tens of milliseconds after each matrix product, on the cores"
        yield "  that the optimizer's threads need then; with this they soon sleep. `fastrms info --measure` shows"
        yield "  the effect."
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        yield 'OMP_WAIT_POLICY without "active": spinning threads make the next matrix product slower.'
    if not importlib.util.find_spec("threadpoolctl"):
        yield "(With the package threadpoolctl installed, this page can tell which BLAS is in use, and its threads.)"


def _measured() -> Iterator[str]:
    """Train in processes with and without the setting, in turn."""
    name, value = _TIMEOUT
    times: dict[str, list[dict[str, float]]] = {"unset": [], f"={value}": []}
    for _ in range(2):
        for setting, found in times.items():
            environment = {key: text for key, text in os.environ.items() if key != name}
            if setting != "unset":
                environment[name] = value
            found.append(_train_in_process(environment))
    for kernel in ("reference", "auto", "serial", "parallel"):
        medians = [min(each[kernel] for each in found) for found in times.values()]
        texts = [f"{setting}: {1e3 * time:.3g} ms" for setting, time in zip(times, medians, strict=True)]
        yield f"{kernel:10}{', '.join(texts)}, {medians[0] / medians[1]:.2f}x"


def _train_in_process(environment: dict[str, str]) -> dict[str, float]:
    """Seconds of a training step by kernel, gradients as lists, in a process with this environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastrms", "bench", "--in-situ", "--networks", NETWORK, "--quick"]
        done = subprocess.run(
            [*command, "--output", folder], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CommandError(f"--measure: fastrms bench --in-situ failed: {done.stderr.strip()}")
        text = (Path(folder) / "fastrms-bench-in-situ.json").read_text(encoding="utf-8")
    rows = json.loads(text)["results"]
    return {row["kernel"]: row["step_seconds"] for row in rows if row["gradients"] == "list"}
