"""What the first step costs: `python -m pytest benchmarks/bench_start.py` prints it beside `import numba` alone.

Each process imports, makes an optimizer, takes a step and ends. "Cold" is one process with an empty cache of compiled
code, "warm" the median of processes that find it filled. Where SciPy is installed, Numba imports part of it when
it first compiles or loads something, which takes half as long as `import numba`; the last line, a function of one
addition that is not cached, shows what is its own.
"""

import os
import statistics
import subprocess
import sys
import time

GRADS = "grads = [np.ones((100, 100), np.float32), np.ones(100, np.float32)]"
PROGRAMS = {
    "import numba": "import numba",
    "import fastrms": "import fastrms",
    "first step(list)": f"import numpy as np, fastrms; {GRADS}; fastrms.RMSProp(grads).step(grads)",
    "first step()": f"import numpy as np, fastrms; {GRADS}; fastrms.RMSProp(grads).step()",
    "njit of x + 1": "import numba; numba.njit(lambda x: x + 1)(1)",
}
WARM = 3


def seconds(program, folder):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"NUMBA_CACHE_DIR": str(folder)}, check=True)
    return time.perf_counter() - start


def test_first_step(tmp_path, capsys):
    python = statistics.median(seconds("pass", tmp_path) for _ in range(WARM))
    cold = {name: seconds(program, tmp_path / name) - python for name, program in PROGRAMS.items()}
    warm = {name: [] for name in PROGRAMS}
    for _ in range(WARM):
        for name, program in PROGRAMS.items():
            warm[name].append(seconds(program, tmp_path / name) - python)
    base = statistics.median(warm["import numba"])
    with capsys.disabled():
        print(f"\n\n{'':18} {'cold':>8} {'warm':>8}   warm, times `import numba` (all without Python's own start)")
        for name in PROGRAMS:
            first, later = cold[name], statistics.median(warm[name])
            print(f"{name:18} {first:6.2f} s {later:6.3f} s   {later / base:.2f}")
