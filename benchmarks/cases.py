"""What `python -m pytest benchmarks` and `tables.py` measure: the table of `fastrms bench`, which is the only one."""

from fastrms.bench.cases import MANY_ARRAYS, QUICK_SIZES, Case

__all__ = ["CASES"]

# What a pytest-benchmark table has room for; `fastrms bench` has more sizes, dtypes and the other libraries.
CASES = {
    case.name: case
    for case in [
        *(Case(1, (size,), "float32") for size in QUICK_SIZES),
        Case(MANY_ARRAYS[0], MANY_ARRAYS[1], "float32"),
    ]
}
