"""The machine and software of a measurement: processor, threads, versions, and settings in the environment."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import time
from pathlib import Path
from typing import Any, TypedDict

import llvmlite.binding
import numba
import numpy as np

import fastrms
from fastrms.kernels.threads import max_threads
from fastrms.optimizer import RMSProp

__all__ = [
    "Description", "blas", "caches", "describe", "environment", "load", "microarchitecture", "others_use", "processor",
    "processors", "threading_layer", "versions",
]  # fmt: skip

# Prefixes of variables that control threads and caches of the libraries involved.
_PREFIXES = ("OMP_", "GOMP_", "KMP_", "OPENBLAS_", "GOTO_", "MKL_", "BLIS_", "VECLIB_", "NUMBA_", "FASTRMS_")

_PEERS = ("torch", "jax", "optax", "numexpr", "tensorplay", "bitsandbytes")


def processor() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def microarchitecture() -> str:
    """Return LLVM's name for the processor's design, such as "znver4"; hypervisors often hide the model."""
    return str(llvmlite.binding.get_host_cpu_name())


def caches() -> dict[str, str]:
    """Return the sizes of the caches of data that the first processor reaches, by level; {} if unknown."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            amount = int(size.removesuffix("K")) if size.endswith("K") else 0
            whole = f"{amount // 1024} MiB" if amount and amount % 1024 == 0 else f"{amount} KiB" if amount else size
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = whole
    return found


def load() -> float | None:
    """Return the mean number of running and waiting programs over the last minute; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def others_use(seconds: float = 0.3) -> float | None:
    """Wait `seconds`, and return how many processors other programs used meanwhile; None if unknown."""

    def ticks() -> float | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        numbers = [int(field) for field in fields]
        return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")  # without idle and iowait

    before, start = ticks(), time.perf_counter()
    time.sleep(seconds)
    after = ticks()
    return None if before is None or after is None else (after - before) / (time.perf_counter() - start)


def processors() -> int:
    """Return the number of processors on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threading_layer() -> str:
    """Return Numba's threading layer, which is known after a parallel kernel has run."""
    RMSProp([np.zeros(1)], kernel="parallel").step()
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined] # pyright: ignore[reportPrivateImportUsage] # numba has no types
    except ValueError:  # nothing is compiled
        return "none, because the JIT is disabled"


def blas() -> list[str]:
    """Return the libraries of NumPy's matrix products, with their threads if threadpoolctl is installed."""
    if importlib.util.find_spec("threadpoolctl"):
        pools = importlib.import_module("threadpoolctl").threadpool_info()
        # Numba imports SciPy if it is installed, which may have a BLAS of its own.
        pools = [pool for pool in pools if "numpy" in pool.get("filepath", "")] or pools
        lines = [
            f"{pool['internal_api']} {pool.get('version') or ''}, {pool['num_threads']} threads"
            f"{', ' + pool['architecture'] if pool.get('architecture') else ''}"
            for pool in pools
            if pool.get("user_api") == "blas"
        ]
        if lines:
            return list(dict.fromkeys(lines))
    built: Any = np.show_config(mode="dicts")
    found = built.get("Build Dependencies", {}).get("blas", {})
    return [f"{found.get('name', 'unknown')} {found.get('version', '')}".strip()]


def versions() -> dict[str, str]:
    """Return versions of fastrms, Python, NumPy and Numba, and of the other libraries that are installed."""
    found = {
        "fastrms": fastrms.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "Numba": numba.__version__,
    }
    for name in _PEERS:
        if importlib.util.find_spec(name):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
    return found


def environment() -> dict[str, str]:
    """Return the variables that are set and that control threads and caches."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)}


class Description(TypedDict):
    """The machine and the software of a measurement."""

    processor: str
    microarchitecture: str
    caches: dict[str, str]
    processors: int
    system: str
    numba_threads: int
    threading_layer: str
    blas: list[str]
    versions: dict[str, str]
    environment: dict[str, str]


def describe() -> Description:
    """Return the description for a file of results."""
    # Read first, because libraries set variables when they are imported. A path says nothing to others.
    variables = {name: value for name, value in environment().items() if name != "NUMBA_CACHE_DIR"}
    return {
        "processor": processor(),
        "microarchitecture": microarchitecture(),
        "caches": caches(),
        "processors": processors(),
        "system": f"{platform.system()} {platform.machine()}",
        "numba_threads": max_threads(),
        "threading_layer": threading_layer(),
        "blas": blas(),
        "versions": versions(),
        "environment": variables,
    }
