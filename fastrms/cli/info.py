"""``fastrms info``: facts about this machine, the choice of "auto" and its reason, and settings to consider."""

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

# Enough for "auto" to begin its first trial. Training continues until the trial has ended.
TRAIN_SECONDS = 2.5

_DESCRIPTION = """
Print versions, processor, threads, the folder of compiled kernels, relevant environment variables, and the kernel that
"auto" chooses in a short training run, with the reason.
"""

# A setting that can make training faster: variable, value.
_TIMEOUT = ("OPENBLAS_THREAD_TIMEOUT", "20")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``info`` and its options to the subcommands."""
    parser = commands.add_parser(
        "info",
        help="print versions, the kernel that auto chooses and why, and settings to consider",
        description=_DESCRIPTION,
    )
    seconds = "seconds of training, and longer until auto has chosen (default: %(default)s)"
    parser.add_argument("--seconds", type=positive, default=TRAIN_SECONDS, metavar="S", help=seconds)
    measure = "measure the effect of a setting on this machine; takes half a minute"
    parser.add_argument("--measure", action="store_true", help=measure)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``fastrms info`` and return 0."""
    if args.measure and importlib.util.find_spec("rich") is None:
        raise CommandError('--measure: rich is not installed; install with: python -m pip install "fastrms[bench]"')
    start_threads()
    label = ""
    for name, text in _facts():
        print(f"{name if name != label else '':18}{text}", flush=True)
        label = name
    print(f'\nkernel="auto" after at least {args.seconds:g} s of training a {NETWORK} network in float32:')
    for line in _explain(args.seconds):
        print(f"  {line}")
    print("\nSettings to consider (environment variables, set before Python starts):")
    for line in _advice():
        print(f"  {line}")
    if args.measure:
        print(
            f"\nMeasured now: a training step of {NETWORK} in float32, with {_TIMEOUT[0]} unset and ={_TIMEOUT[1]}:",
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
    yield "processor", f"{machine.processor()}, {machine.processors()} available"
    yield "Numba threads", str(max_threads())
    yield "threading layer", layer
    # Only a compiled kernel has statistics.
    path = getattr(getattr(cpu.serial, "stats", None), "cache_path", None)
    yield "kernel cache", str(path or "none: no folder is writable, or the JIT is disabled")
    yield from device.facts()
    off = " (FASTRMS_ZERO_COPY=0)" if os.environ.get("FASTRMS_ZERO_COPY") == "0" else ""
    yield (
        "step(list)",
        f"{'reads contiguous gradients in place' if pointers.available() else 'copies every gradient'}{off}",
    )
    for name, value in variables.items():
        yield "environment", f"{name}={value}"
    if not variables:
        yield "environment", "no relevant variables set"


def _explain(seconds: float) -> list[str]:
    """Train for `seconds`, and return the optimizer's explanation and the times."""
    training, optimizer = in_situ.train_with_auto(Network(NETWORK, NETWORKS[NETWORK], "float32"), seconds)
    time = (
        f"{1e3 * training.step_time:.3g} ms per step, of which {1e3 * training.optimizer_time:.3g} ms for the optimizer"
    )
    return [*optimizer.explain(), f"{len(training.losses):,} steps, {time}"]


def _advice() -> Iterator[str]:
    name, value = _TIMEOUT
    if not any("openblas" in line.lower() for line in machine.blas()):
        yield "None: NumPy does not use OpenBLAS for matrix products here."
    elif name in os.environ:
        yield f"None: {name} is already set."
    elif machine.processors() == 1:
        yield "None: there is only one processor, so no threads compete."
    else:
        yield f"{name}={value}"
        yield "  After each matrix product, the threads of OpenBLAS spin for tens of milliseconds on cores that the"
        yield "  optimizer's threads need. With this setting they sleep sooner. `fastrms info --measure` measures"
        yield "  the effect."
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        yield 'OMP_WAIT_POLICY: a value other than "active". Spinning threads make the next matrix product slower.'
    if not importlib.util.find_spec("threadpoolctl"):
        yield "(Install the package threadpoolctl to see here which BLAS is in use, and its threads.)"


def _measured() -> Iterator[str]:
    """Train in processes with and without the setting, in turns, and yield the times of each kernel."""
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
