"""Measure a step of `fastrms.mpi` on this machine, its time and the bytes sent, and fit a model of many ranks.

    python benchmarks/mpi.py                 # measure on 1, 2 and 4 ranks (some minutes), fit, print
    python benchmarks/mpi.py --write         # and put tables into docs/mpi.md and the plot into docs/_static
    python benchmarks/mpi.py --latency 5e-6 --bandwidth 3e9      # the model for another network

It starts mpiexec by itself. tests/mpi/test_mpi.py runs it for a moment and checks the bytes.
"""
# ruff: noqa: RUF001 - a multiplication sign in a table is meant

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from mpi_model import Machine, Times, bytes_of_rank, fit
from pages import fill, markdown, this_machine

sys.path.pop(0)

from fastrms.bench.machine import processors
from fastrms.plots import format_seconds, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mpi4py import MPI

Bytes = Mapping[int, Mapping[int, float]]  # by ranks and size: bytes that a rank sends

ROOT = Path(__file__).parent.parent
PAGE, PLOT = ROOT / "docs" / "mpi.md", ROOT / "docs" / "_static" / "mpi.svg"

RANKS = (1, 2, 4)
SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
BYTES_OF = (100_000, 1_000_000)  # sizes for which bytes are counted

PREDICTED_RANKS = (8, 64, 512, 4096)
PREDICTED_SIZES = (10**6, 10**7, 10**8, 10**9, 10**10)
# A network that this machine does not have: 2 us and 100 Gbit/s a rank, as InfiniBand EDR is sold.
LATENCY, BANDWIDTH = 2e-6, 12.5e9

# MPICH sends through the loopback device, which counts bytes, and not through memory.
OVER_TCP = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "UCX_TLS": "tcp,self"}


# Measurements, in processes of their own.


def mpiexec(ranks: int, *arguments: str, over_tcp: bool = False) -> dict[str, Any]:
    """Run this file on so many ranks, and return the results that rank 0 wrote."""
    program = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise SystemExit('there is no mpiexec; install one with: python -m pip install "fastrms[mpi-bundled]"')
    # Each rank's BLAS would start a thread for each core.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | (OVER_TCP if over_tcp else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [program, "-n", str(ranks), sys.executable, __file__, "--worker", str(path), *arguments]
        subprocess.run(command, env=environment, check=True)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def work(path: Path, sizes: Sequence[int], seconds: float) -> None:
    """Time steps of all sizes in turns, on each rank; rank 0 writes the results to a file."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    timed = {size: Timed(size) for size in sizes}
    for each in timed.values():
        for _ in range(3):
            each.step(comm)
    begin = time.perf_counter()
    rounds = 0
    while comm.bcast(rounds < 5 or time.perf_counter() - begin < seconds):
        rounds += 1
        for size, each in timed.items():
            for _ in range(max(1, min(50, 100_000 // size))):
                each.step(comm)
    found: dict[str, Any] = {"seconds": {}, "flops": flops(comm)}
    for size, each in timed.items():
        # A step takes as long as its slowest rank.
        slowest = np.max(comm.allgather(np.array(each.seconds)), axis=0)
        found["seconds"][size] = [float(x) for x in np.median(slowest, axis=0)]
        before = sent_by_loopback()
        comm.Barrier()
        for _ in range(10):
            each.step(comm, keep=False)
        comm.Barrier()
        after = sent_by_loopback()
        if before is not None and after is not None:
            found.setdefault("bytes", {})[size] = (after - before) / 10 / comm.size
    found["ready"] = overlapped(comm, seconds)
    if comm.rank == 0:
        path.write_text(json.dumps(found), encoding="utf-8")


class Timed:
    """An optimizer whose steps are timed: the whole step, and the communication in it."""

    def __init__(self, size: int) -> None:
        from fastrms.mpi import ShardedRMSProp

        self.opt = ShardedRMSProp([np.ones(size, np.float32)], kernel="serial", reduction="sum")
        self.opt.grads[0][...] = np.linspace(-1, 1, size)
        self.seconds: list[tuple[float, float]] = []
        self._communication = 0.0
        ranks = self.opt._ranks
        for name in ("reduce_scatter", "all_gather", "meet"):
            setattr(ranks, name, self._timed(getattr(ranks, name)))

    def _timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            start = time.perf_counter()
            method(*arguments)
            self._communication += time.perf_counter() - start

        return run

    def step(self, comm: "MPI.Intracomm", keep: bool = True) -> None:
        """Take a step, all ranks at the same time."""
        comm.Barrier()
        self._communication = 0.0
        start = time.perf_counter()
        self.opt.step()
        whole = time.perf_counter() - start
        if keep:
            self.seconds.append((whole, self._communication))


def overlapped(comm: "MPI.Intracomm", seconds: float) -> list[float]:
    """Time a backward pass of twelve matrix products: alone, with a step after it, and with calls of `ready` in it."""
    from fastrms.mpi import ShardedRMSProp

    params = [np.zeros((700, 700), np.float32) for _ in range(12)]
    x = np.ones((400, 700), np.float32)
    after, early = (ShardedRMSProp(params, kernel="serial", reduction="sum") for _ in range(2))
    times: list[list[float]] = [[], [], []]
    begin = time.perf_counter()
    while comm.bcast(len(times[0]) < 5 or time.perf_counter() - begin < seconds / 3):
        for opt in (after, early):
            comm.Barrier()
            start = time.perf_counter()
            for k in reversed(range(len(params))):
                np.matmul(x.T, x, out=opt.grads[k])
                if opt is early:
                    opt.ready(k, opt.grads[k])
            computed = time.perf_counter()
            opt.step()
            times[1 if opt is after else 2].append(time.perf_counter() - start)
            if opt is after:
                times[0].append(computed - start)
    return [float(x) for x in np.max(comm.allgather(np.median(times, axis=1)), axis=0)]


def flops(comm: "MPI.Intracomm") -> float:
    """Return the operations a second of a matrix product of float32, while all ranks compute one."""
    a = np.ones((512, 512), np.float32)
    times = []
    for _ in range(20):
        comm.Barrier()
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 512**3 / statistics.median(times)


def sent_by_loopback() -> int | None:
    """Return the bytes that the loopback device has sent, or None if the system is not Linux."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), None)


# Output.


def tables(
    times: Times, sent: Bytes, ready: Mapping[int, Sequence[float]], here: Machine, network: Machine
) -> dict[str, str]:
    """Return all tables by name, as Markdown."""
    measured = []
    for size in sorted(next(iter(times.values()))):
        for ranks in times:
            whole, communication = times[ranks][size]
            bytes_sent = sent.get(ranks, {}).get(size)
            measured.append(
                [f"{size:,}", str(ranks), format_seconds(whole), format_seconds(whole - communication),
                 format_seconds(communication) if ranks > 1 else "–", format_seconds(here.step(size, ranks)),
                 "–" if bytes_sent is None else f"{bytes_sent:,.0f}", f"{bytes_of_rank(size, ranks):,.0f}"]
            )  # fmt: skip
    header = ["parameters, float32", "ranks", "step", "update", "communication", "step, predicted",
              "bytes sent by a rank", "bytes, predicted"]  # fmt: skip
    inputs = markdown(
        ["", "latency", "bandwidth of a rank", "update of a rank", "overhead of a step", "matrix products of a rank"],
        [[name, format_seconds(m.latency), f"{m.bandwidth / 1e9:.3g} GB/s", f"{m.rate / 1e9:.3g} billion parameters/s",
          format_seconds(m.overhead), f"{m.flops / 1e9:.3g} GFLOP/s"]
         for name, m in (("this machine, fitted", here), ("a network, given", network))],
    )  # fmt: skip
    return {
        "mpi-measured": markdown(header, measured),
        "mpi-ready": markdown(
            ["ranks", "backward pass alone", "backward pass, then `step()`", "with `ready()`, then `step()`"],
            [[str(ranks), *map(format_seconds, found)] for ranks, found in ready.items()],
        ),
        "mpi-inputs": inputs,
        "mpi-here": predicted(here),
        "mpi-network": predicted(network),
    }


def predicted(machine: Machine) -> str:
    """Return a table of predicted steps, with the share of communication in each."""
    rows = []
    for size in PREDICTED_SIZES:
        cells = []
        for ranks in PREDICTED_RANKS:
            step = machine.step(size, ranks)
            cells.append(f"{format_seconds(step)} ({machine.communication(size, ranks) / step:.0%})")
        over = machine.takes_over(size)
        rows.append([f"{size:.0e}".replace("e+", "e"), *cells, "none" if over is None else f"{over:,}"])
    header = ["parameters", *(f"{ranks:,} ranks" for ranks in PREDICTED_RANKS), "communication dominates from"]
    return markdown(header, rows)


def plot(times: Times, here: Machine, network: Machine) -> "Figure":
    """Draw steps over ranks: predictions for both networks, measurements, and where communication takes over."""
    figure = style.new_figure(10, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    ranks = 2 ** np.arange(13)
    colours = (style.BLACK, style.BLUE, style.VERMILION, style.ORANGE, style.GREEN)
    for axes, machine, title in ((panels[0], here, "latency and bandwidth of this machine"),
                                 (panels[1], network, "2 µs and 12.5 GB/s")):  # fmt: skip
        for size, colour in zip(PREDICTED_SIZES, colours, strict=True):
            label = f"$10^{{{round(math.log10(size))}}}$ parameters"
            axes.plot(ranks, [machine.step(size, int(p)) for p in ranks], color=colour, label=label)
            axes.plot(ranks, [machine.update(size, int(p)) for p in ranks], color=colour, linestyle=(0, (1, 1.5)))
            over = machine.takes_over(size)
            if over is not None and over <= ranks[-1]:
                axes.plot(over, machine.step(size, over), color=colour, marker="v", markersize=9)
        axes.set(xscale="log", yscale="log", xlabel="ranks", title=title)
        axes.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4,096"])
        axes.minorticks_off()
        axes.grid(color="#EEEEEE", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    for size, colour in zip(PREDICTED_SIZES, colours, strict=True):
        points = [(p, by_size[size][0]) for p, by_size in times.items() if size in by_size]
        if points:
            panels[0].plot(*zip(*points, strict=True), "o", color=colour, markeredgecolor=style.WHITE)
    panels[0].set_ylabel("seconds of a step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def measure(
    seconds: float, sizes: Sequence[int], ranks: Sequence[int]
) -> tuple[Times, Bytes, Mapping[int, Sequence[float]], float]:
    """Return times, bytes, the results of `overlapped` by ranks, and the operations a second of a rank."""
    times, sent, ready, rates = {}, {}, {}, {}
    for count in ranks:
        found = mpiexec(count, "--sizes", *map(str, sizes), "--seconds", str(seconds))
        times[count] = {int(size): (whole, part) for size, (whole, part) in found["seconds"].items()}
        rates[count], ready[count] = found["flops"], found["ready"]
    for count in ranks:
        if count > 1:
            counted = mpiexec(count, "--sizes", *map(str, set(BYTES_OF) & set(sizes)), "--seconds", "0", over_tcp=True)
            sent[count] = {int(size): value for size, value in counted.get("bytes", {}).items()}
    return times, sent, ready, rates[max(count for count in ranks if count <= max(2, processors()))]


def main() -> int:
    """Measure, fit and print; with --write, write tables and plot into the docs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put tables into docs/mpi.md, the plot into docs/_static")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of ranks (default: 30)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of parameters")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of ranks")
    parser.add_argument("--latency", type=float, default=LATENCY, help="of the network, in seconds (default: 2e-6)")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second of a rank (default: 12.5e9)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.sizes, args.seconds)
        return 0
    about = this_machine()
    times, sent, ready, rate = measure(args.seconds, args.sizes, args.ranks)
    here = fit(times, rate, processors())
    network = Machine(args.latency, args.bandwidth, here.rate, here.overhead, here.alone, here.flops)
    made = tables(times, sent, ready, here, network) | {"machine": about}
    for name, table in made.items():
        print(f"\n{name}\n\n{table}")
    if args.write:
        fill([PAGE], made)
        plot(times, here, network).savefig(PLOT, metadata={"Date": None})
        print(f"\nwritten: {PAGE}, {PLOT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
