"""What fastrms changes for the whole process: nothing, but for what docs/determinism.md lists."""

import json
import os
import subprocess
import sys

import pytest
from backends import mpiexec
from helpers import JIT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it asks for settings that only Linux has")
needs_jit = pytest.mark.skipif(not JIT, reason="it needs the JIT")

# A program that does something and prints what is different afterwards. What it compares with is how the process was
# once NumPy, Numba and the libraries in `first` were imported, which have effects of their own.
PROGRAM = """
import atexit, ctypes, decimal, faulthandler, gc, importlib, json, locale, logging, multiprocessing, os, random
import resource, signal, socket, sys, tempfile, threading, warnings

registered = {"at exit": [], "at fork": []}

def recording(register, names):
    def record(*functions, **named):
        for function in (*functions[:1], *named.values()):
            names.append(f"{function.__module__}.{getattr(function, '__qualname__', function)}")
        return register(*functions, **named)
    return record

atexit.register = recording(atexit.register, registered["at exit"])
os.register_at_fork = recording(os.register_at_fork, registered["at fork"])

import numpy as np, numba

first, actions = sys.argv[1].split(), sys.argv[2].split()
modules = {name: importlib.import_module(name) for name in first}
os.chdir(tempfile.mkdtemp())

def settings():
    umask = os.umask(0o077)
    os.umask(umask)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    found = {
        "environment": dict(os.environ),
        "signal handlers": {s.name: str(signal.getsignal(s)) for s in signal.valid_signals() if hasattr(s, "name")},
        "blocked signals": sorted(map(int, mask)),
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "excepthooks": [sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook],
        "functions at exit": list(registered["at exit"]), "functions at fork": list(registered["at fork"]),
        "np.geterr": np.geterr(), "np.geterrcall": np.geterrcall(),
        "np.printoptions": {name: str(value) for name, value in np.get_printoptions().items()},
        "warning filters": [str(entry) for entry in warnings.filters], "showwarning": warnings.showwarning,
        "umask": umask, "locale": locale.setlocale(locale.LC_ALL), "folder": os.getcwd(), "niceness": os.nice(0),
        "processors": sorted(os.sched_getaffinity(0)), "limits": [resource.getrlimit(k) for k in range(16)],
        "random": hash(random.getstate()), "np.random": [str(item) for item in np.random.get_state()],
        "decimal": str(decimal.getcontext()), "recursion": sys.getrecursionlimit(),
        "switching": sys.getswitchinterval(),
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.get_freeze_count(), len(gc.callbacks)],
        "profile": [sys.getprofile(), sys.gettrace(), threading.getprofile(), threading.gettrace()],
        "sys.path": list(sys.path), "sys.argv": list(sys.argv), "meta_path": list(map(str, sys.meta_path)),
        "streams": [sys.stdin, sys.stdout, sys.stderr], "faulthandler": faulthandler.is_enabled(),
        "logging": [logging.root.level, list(logging.root.handlers), logging.root.manager.disable],
        "start method": multiprocessing.get_start_method(allow_none=True), "socket": socket.getdefaulttimeout(),
        "threads of Python": sorted(thread.name for thread in threading.enumerate()),
        "subnormals": [float(np.float32(1e-40) * np.float32(0.5)), 5e-324 * 1.0 / 1.0],
        "numba": [numba.get_num_threads() if numba_runs() else numba.config.NUMBA_NUM_THREADS,
                  str(numba.config.THREADING_LAYER)],
    }
    if "threadpoolctl" in modules:
        known = modules["threadpoolctl"].threadpool_info()
        found["threads"] = {entry["filepath"]: entry["num_threads"] for entry in known}
        found["threads"].update(openmp_of(known))
    if "torch" in modules:
        torch = modules["torch"]
        found["torch"] = [
            torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
            torch.is_grad_enabled(), torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), str(torch.get_default_device()), torch.is_inference_mode_enabled(),
            torch.__future__.get_swap_module_params_on_conversion(), torch.is_anomaly_enabled(),
            str(torch.optim.RMSprop.step), str(torch.optim.Optimizer.zero_grad), torch.Tensor.__hash__.__qualname__,
        ]
    if "matplotlib" in modules:
        found["matplotlib"] = {name: str(value) for name, value in modules["matplotlib"].rcParams.items()}
    return found

def openmp_of(known):
    openmp = [ctypes.CDLL(entry["filepath"]) for entry in known if entry["user_api"] == "openmp"]
    # GNU OpenMP supports 255 levels, and has 2**31 - 1 until somebody sets them.
    return {f"{library._name} nested": min(library.omp_get_max_active_levels(), 255) for library in openmp}

def numba_runs():
    try:
        return bool(numba.threading_layer())
    except ValueError:
        return False

def importing():
    import fastrms, fastrms.cuda, fastrms.functional, fastrms.interop, fastrms.cli
    for name in ("torch", "scipy", "matplotlib"):
        if name in modules:
            importlib.import_module("fastrms." + {"matplotlib": "plots"}.get(name, name))

def parameters():
    return [np.ones(300 if numba.config.DISABLE_JIT else 300_000), np.ones((3, 4), np.float32)]

def stepping():
    from fastrms import RMSProp
    for kernel in ("auto", "numpy", "serial", "parallel"):
        for options in ({}, {"num_threads": 1}, {"global_clip_norm": 1.0, "nonfinite": "skip"}):
            optimizer = RMSProp(parameters(), kernel=kernel, momentum=0.5, **options)
            for value in (1.0, 1e-30, np.inf):
                optimizer.step([value * p for p in parameters()])
                optimizer.step([None, np.ones((3, 4), np.int64)])

def trying():
    from fastrms import RMSProp
    from fastrms.backends.tuner import Tuner
    Tuner.FIRST_LOOK = 0.0
    optimizer = RMSProp(parameters())
    while optimizer.backend._tuner.reason.startswith("after"):
        optimizer.step()

def saving():
    from fastrms import RMSProp
    optimizer = RMSProp(parameters(), lr=0.1)
    for path in ("some.npz", "some.safetensors"):
        optimizer.step()
        optimizer.save(path)
        RMSProp(parameters()).load(path)
        RMSProp.from_checkpoint(path).step()

def storing():
    from fastrms import RMSProp
    with RMSProp(parameters(), storage="folder") as optimizer:
        optimizer.step()
    RMSProp.reopen("folder").close()

def failing():
    from fastrms import FastrmsError, RMSProp
    optimizer = RMSProp(parameters(), nonfinite="raise", kernel="parallel", num_threads=1)
    for wrong in (
        lambda: RMSProp([np.ones(3, complex)]), lambda: RMSProp(parameters(), lr=-1), lambda: optimizer.load("none"),
        lambda: optimizer.step([1]), lambda: optimizer.step([np.nan * p for p in parameters()]),
        lambda: optimizer.save("no/such/folder/file.npz"), lambda: optimizer.step([np.ones(2), "?"]),
    ):
        try:
            wrong()
        except (FastrmsError, OSError):
            continue
        raise SystemExit("that was no error")

def benchmarking():
    from fastrms.cli import main
    assert main(["bench", "--sizes", "70000", "--kernels", "auto", "parallel", "numpy", "reference", *FEW]) == 0

def benchmarking_in_situ():
    from fastrms.cli import main
    assert main(["bench", "--in-situ", "--networks", "8-4-2", *FEW]) == 0
    assert main(["info"]) == 0

FEW = ["--dtypes", "float32", "--min-time", "0.01", "--output", "bench"]

def minimizing():
    import scipy.optimize
    import fastrms.scipy
    scipy.optimize.minimize(lambda x: (x @ x, 2 * x), np.ones(3), jac=True, method=fastrms.scipy.rmsprop,
                            options={"maxiter": 9})

def drawing():
    from fastrms.cli import main
    assert main(["demo", "--epochs", "1", "--hidden", "9", "--output", "demo"]) == 0
    assert main(["path", "--steps", "9", "--output", "path.png"]) == 0

def sharding():
    from fastrms.mpi import ShardedRMSProp
    optimizer = ShardedRMSProp(parameters())
    optimizer.step(parameters())
    optimizer.save("sharded.npz")

def training():
    torch = modules["torch"]
    from fastrms.torch import RMSprop
    for kernel in ("serial", "parallel"):
        weight = torch.nn.Parameter(torch.ones(300_000))
        optimizer = RMSprop([weight], kernel=kernel)
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        weight.grad = torch.ones(300_000).to_sparse()
        try:
            optimizer.step()
        except RuntimeError:
            pass

if "torch" in modules:
    torch = modules["torch"]
    torch.set_num_threads(1)
    x = torch.ones(500, 500)
    (x @ x).sum()
    torch.optim.RMSprop([torch.nn.Parameter(x)])  # which puts a wrapper around its `step`
before = settings()
for action in actions:
    globals()[action]()
after = settings()
different = {}
for name, value in before.items():
    if name == "threads":  # a library that came later has what it begins with
        now = {path: after[name][path] for path in value}
    else:
        now = after[name]
    if name.startswith("functions") and now != value:
        now = now[len(value):]
    if now != value:
        if isinstance(value, dict):
            now = {k: v for k, v in now.items() if v != value.get(k)} | {k: None for k in value.keys() - now.keys()}
        different[name] = now if isinstance(now, (list, dict)) else str(now)
print("\\nchanged: " + json.dumps(different, default=str), file=sys.stderr, flush=True)
"""


AT_EXIT = {
    "functions at exit": ["fastrms._persistence._close_all"],
    "functions at fork": ["fastrms.kernels.compiled._wait_for_background", "fastrms.kernels.threads._in_child"],
}


def changes(actions, first="", command=(), **environment):
    """What `actions` have changed in a process that has imported `first`: a list with an item for each process."""
    run = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, f"threadpoolctl {first}", actions],
        capture_output=True,
        text=True,
        env={name: text for name, text in os.environ.items() if name != "NUMBA_THREADING_LAYER"} | environment,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line.removeprefix("changed: ")) for line in run.stderr.splitlines() if line[:8] == "changed:"]
    for one in found:  # other libraries have some, which they register when they are needed
        for name in AT_EXIT:
            one[name] = [function for function in one.get(name, ()) if function.startswith("fastrms")]
    return found


@pytest.mark.parametrize(
    ("first", "actions"),
    [
        ("scipy.optimize matplotlib.figure", "importing"),
        ("", "importing stepping failing"),
        ("safetensors.numpy scipy.optimize", "importing saving storing minimizing"),
        pytest.param("matplotlib.figure rich.progress sklearn.datasets", "importing drawing", marks=needs_jit),
        pytest.param("matplotlib.figure rich.progress", "importing benchmarking benchmarking_in_situ", marks=needs_jit),
        ("mpi4py.MPI", "importing sharding"),
    ],
)
def test_nothing_is_changed_for_the_whole_process(first, actions):
    assert changes(actions, first) == [AT_EXIT]


@needs_jit
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_a_trial_of_the_parallel_kernel_changes_nothing(layer):
    assert changes("importing trying", NUMBA_THREADING_LAYER=layer) == [AT_EXIT]


@pytest.mark.torch
def test_pytorchs_threads_stay_as_they_were_set():
    """Numba's layer has the same OpenMP as PyTorch, which had one thread before the first parallel kernel."""
    layer = {"NUMBA_THREADING_LAYER": "omp"} if JIT else {}
    assert changes("importing training stepping trying" if JIT else "importing training", "torch", **layer) == [AT_EXIT]


def test_several_ranks_have_a_hook_for_uncaught_exceptions():
    """It ends the other ranks, which would wait for ever."""
    for found in changes("importing sharding", "mpi4py.MPI", command=mpiexec(2)):
        assert found.pop("excepthooks")[0].startswith("<function install_excepthook.<locals>.hook")
        assert found == AT_EXIT
