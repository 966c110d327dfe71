"""``fastrms info``: the facts about this machine, the choice of "auto" and its reason, and settings to consider."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastrms.bench import device, in_situ, machine
from fastrms.bench.cases import NETWORKS, Network
from fastrms.cli.common import CommandError, positive, start_threads
from fastrms.kernels import cpu, pointers
from fastrms.kernels.threads import max_threads

__all__ = ["add_command", "run"]

NETWORK = "784-512-512-10"

# "auto" begins to try kernels after 2 s of training.
TRAIN_SECONDS = 2.5

_DESCRIPTION = """
Print versions, processor, threads, the folder of compiled kernels, settings in the environment, and which kernel
"auto" chooses in a short training, and why.
"""

# A setting that can make training faster: variable, value.
_TIMEOUT = ("OPENBLAS_THREAD_TIMEOUT", "20")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``info`` and its options to the subcommands."""
    parser = commands.add_parser(
        "info", help="what is installed, what auto chooses and why, and what you could set", description=_DESCRIPTION
    )
    seconds = "of training, from which the choice of auto is seen (default: %(default)s)"
    parser.add_argument("--seconds", type=positive, default=TRAIN_SECONDS, metavar="S", help=seconds)
    measure = "measure here what a setting would bring; takes half a minute"
    parser.add_argument("--measure", action="store_true", help=measure)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``fastrms info`` and return 0."""
    if args.measure and importlib.util.find_spec("rich") is None:
        raise CommandError('--measure: rich is not installed; install with: python -m pip install "fastrms[bench]"')
    start_threads()
    label = ""
    for name, text in _facts():
        print(f"{name if name != label else '':18}{text}", flush=True)
        label = name
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


def _facts() -> Iterator[tuple[str, str]]:
    """Yield labels and texts; lines of one label follow each other."""
    variables = machine.environment()  # read first, because libraries set variables when they are imported
    layer = machine.threading_layer()
    yield from machine.versions().items()
    for library in machine.blas():
        yield "BLAS", library
    yield "processor", f"{machine.processor()}, {machine.processors()} to run on"
    yield "Numba threads", str(max_threads())
    yield "threading layer", layer
    # Only a compiled kernel has statistics.
    path = getattr(getattr(cpu.serial, "stats", None), "cache_path", None)
    yield "kernels cached in", str(path or "nothing is cached: no folder is writable, or the JIT is off")
    yield from device.facts()
    off = " (FASTRMS_ZERO_COPY=0)" if os.environ.get("FASTRMS_ZERO_COPY") == "0" else ""
    yield "step(list) copies", f"{'nothing, as a rule' if pointers.available() else 'every gradient'}{off}"
    for name, value in variables.items():
        yield "environment", f"{name}={value}"
    if not variables:
        yield "environment", "nothing set that steers threads or caches"


def _explain(seconds: float) -> list[str]:
    """Train for some seconds, and return the optimizer's explanation and the times."""
    training, optimizer = in_situ.train_with_auto(Network(NETWORK, NETWORKS[NETWORK], "float32"), seconds)
    time = f"{1e3 * training.step_time:.3g} ms a step, of which optimizer {1e3 * training.optimizer_time:.3g} ms"
    return [*optimizer.explain(), f"{len(training.losses):,} steps, {time}"]


def _advice() -> Iterator[str]:
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
    """Train in processes with and without the setting, in turn, and yield the times of each kernel."""
    name, value = _TIMEOUT
    times: dict[str, list[dict[str, float]]] = {"unset": [], f"={value}": []}
    for _ in range(2):
        for setting, found in times.items():
            environment = {key: text for key, text in os.environ.items() if key != name}
            if setting != "unset":
                environment[name] = value
            found.append(_train_in_process(environment))
    for kernel in ("reference", *in_situ.KERNELS):
        best = [min(each[kernel] for each in found) for found in times.values()]
        texts = [f"{setting}: {1e3 * time:.3g} ms" for setting, time in zip(times, best, strict=True)]
        yield f"{kernel:10}{', '.join(texts)}, {best[0] / best[1]:.2f}x"


def _train_in_process(environment: dict[str, str]) -> dict[str, float]:
    """Return the seconds of a training step by kernel, gradients as lists, in a process with this environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastrms", "bench", "--in-situ", "--networks", NETWORK, "--quick"]
        command += ["--kernels", *in_situ.KERNELS]
        done = subprocess.run(
            [*command, "--output", folder], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CommandError(f"--measure: fastrms bench --in-situ failed: {done.stderr.strip()}")
        text = (Path(folder) / "fastrms-bench-in-situ.json").read_text(encoding="utf-8")
    rows = json.loads(text)["results"]
    return {row["kernel"]: row["step_seconds"] for row in rows if row["gradients"] == "list"}
