"""The CUDA kernels, compiled for a GPU though there is none: which instructions decide about bits.

What Numba gives to NVIDIA's compiler comes back as PTX. Its ``mul.rn`` and ``add`` cannot become one operation, ``fma``
is one already; ``div.rn`` and ``sqrt.rn`` round correctly, ``approx`` and ``full`` do not; ``ftz`` flushes subnormals.
"""

import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="the compiler is installed by the extra there"
)

PROGRAM = """if True:
    import importlib, json, re, sys
    from collections import Counter
    from types import SimpleNamespace

    import numpy as np
    from numba import cuda, types

    # Numba asks the device what to compile for.
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))

    from fastrms.kernels import cuda as kernels

    integer, double = types.int64, types.float64
    integers, doubles = integer[::1], double[::1]
    found = {}

    def count(name, kernel, *arguments):
        ptx, _ = cuda.compile(kernel.py_func, arguments, cc=(9, 0), output="ptx", device=False, abi="numba")
        found[name] = Counter(re.findall(r"^\\s+(?:@\\S+ )?([a-z][\\w.]+)", ptx, re.MULTILINE))

    for name, number in (("float32", types.float32), ("float64", types.float64)):
        numbers = number[::1]
        arrays, table = (numbers,) * 5, (integer[:, ::1], integers, integers)
        for flags in ((False,) * 5, (True,) * 5, (True, False, True, False, False)):
            for held in (False, True):
                kernel = kernels.update_kernel(np.dtype(name), *flags, held)
                own = (integers, *arrays[1:]) if held else arrays
                hyper = types.UniTuple(number, 15)
                text = f"update {name} {flags}{' held' * held}"
                count(text, kernel, *own, hyper, number, number, *table, double[:, ::1], integers)
        count(f"squares {name}", kernels.square_chunks, numbers, *table, number, double, integer, *(doubles,) * 3)
        shape = types.UniTuple(integer, 2)
        for other in (types.float64, types.float32, types.int32, types.uint8):
            count(f"convert {other} to {name}", kernels.convert_kernel(2), numbers, integer, other, shape, shape)
        count(f"fill {name}", kernels.fill, numbers, number)
        count(f"rows {name}", kernels.add_up_rows, numbers, integers, integers, numbers)
    count("partials", kernels.add_partials, integers, integers, integer, double, doubles, doubles, doubles, integers)
    count("limit", kernels.limit_norm, doubles, double, double, double, double[:, ::1])
    count(
        "decide", kernels.decide, integers, doubles, integers, types.boolean, doubles, double, doubles, integers,
        double[:, ::1], integer, integers, integers, double[:, ::1], integers,
    )
    json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """How often each kernel has which instruction."""
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "0", "NUMBA_DISABLE_JIT": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def floats(instructions, kernel, *names):
    return sum(n for name, n in instructions[kernel].items() if re.fullmatch(rf"({'|'.join(names)})\.f(32|64)", name))


def test_everything_is_compiled(instructions):
    assert len(instructions) == 29


def test_no_product_and_sum_become_one_operation(instructions):
    for kernel, counts in instructions.items():
        assert not any(name.startswith("fma") for name in counts), kernel
        if kernel != "decide":  # whose products are of powers of two
            assert floats(instructions, kernel, "mul") == 0, kernel
    assert floats(instructions, "update float32 (False, False, False, False, False)", r"mul\.rn") >= 4
    assert floats(instructions, "squares float32", r"mul\.rn") >= 2


def test_divisions_and_roots_round_correctly_and_subnormals_are_kept(instructions):
    for kernel, counts in instructions.items():
        assert not any(re.search(r"approx|full|ftz", name) for name in counts), kernel
        if kernel.startswith("update"):
            assert floats(instructions, kernel, r"div\.rn") == floats(instructions, kernel, r"sqrt\.rn") > 0


def test_float32_is_not_computed_in_float64(instructions):
    for flags in ((False,) * 5, (True, False, True, False, False)):
        for held in ("", " held"):
            assert not any(name.endswith(".f64") for name in instructions[f"update float32 {flags}{held}"])
    assert not any(name.endswith(".f64") for name in instructions["rows float32"])
    assert floats(instructions, "rows float32", "add", r"add\.rn") >= 1


def test_elements_in_flight_stay_in_registers(instructions):
    for kernel, counts in instructions.items():
        assert not any(".local" in name for name in counts), kernel
