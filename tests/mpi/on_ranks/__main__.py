"""Run cases on the ranks of an MPI program: ``mpiexec -n P python -m on_ranks MODULE.FUNCTION...``.

Rank 0 prints "ok MODULE.FUNCTION" after each of them. An uncaught exception on any rank ends all.
"""

import sys
from importlib import import_module

import numpy as np
from helpers import JIT
from on_ranks.shared import COMM, RANK

if not JIT:
    np.seterr(all="ignore")  # the kernels run on NumPy's scalars, which warn where compiled code does not
for case in sys.argv[1:]:
    module, _, function = case.partition(".")
    getattr(import_module(f"on_ranks.{module}"), function)()
    COMM.Barrier()
    if RANK == 0:
        print("ok", case, flush=True)
