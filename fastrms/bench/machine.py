"""The machine and software of a measurement: processor, threads, versions, and settings in the environment."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import numba
import numpy as np

import fastrms
from fastrms.kernels.threads import max_threads
from fastrms.optimizer import RMSProp

__all__ = ["blas", "describe", "environment", "processor", "processors", "threading_layer", "versions"]

# Prefixes of variables that control threads and caches of the libraries involved.
_PREFIXES = ("OMP_", "GOMP_", "KMP_", "OPENBLAS_", "GOTO_", "MKL_", "BLIS_", "VECLIB_", "NUMBA_", "FASTRMS_")

_PEERS = ("torch", "jax", "optax", "numexpr")


def processor() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def processors() -> int:
    """Return the number of processors on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threading_layer() -> str:
    """Return Numba's threading layer, which is known after a parallel kernel has run."""
    RMSProp([np.zeros(1)], kernel="parallel").step()
    try:
        return str(numba.threading_layer())  # type: ignore[attr-defined] # pyright: ignore[reportPrivateImportUsage] # numba has no types
    except ValueError:  # nothing is compiled
        return "none, the JIT is off"


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


def describe() -> dict[str, object]:
    """Return all of this for a file of results."""
    # Read first, because libraries set variables when they are imported. A path says nothing to others.
    variables = {name: value for name, value in environment().items() if name != "NUMBA_CACHE_DIR"}
    return {
        "processor": processor(),
        "processors": processors(),
        "system": f"{platform.system()} {platform.machine()}",
        "numba_threads": max_threads(),
        "threading_layer": threading_layer(),
        "blas": blas(),
        "versions": versions(),
        "environment": variables,
    }
