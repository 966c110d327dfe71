"""``ShardedRMSProp``: data-parallel training with MPI, with the optimizer state sharded over the ranks.

    from fastrms.mpi import ShardedRMSProp        # mpiexec -n 4 python train.py

Each rank has all parameters, and the gradients of its part of the batch. A step reduce-scatters the gradients, updates
this rank's shard with the same kernels as `fastrms.RMSProp`, and all-gathers the parameters. Each of P ranks has 1/P of
the state and computes 1/P of the update, as in stage 1 of ZeRO (S. Rajbhandari et al., `ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models <https://arxiv.org/abs/1910.02054>`_, 2020).

This package needs mpi4py and an MPI library. The extra ``mpi`` installs mpi4py, and the extra ``mpi-bundled`` also
installs an MPI. ``import fastrms`` does not import this package.
"""

from importlib.util import find_spec

try:
    from mpi4py import MPI as MPI  # the modules of this package import it after this check
except (ImportError, RuntimeError) as error:  # RuntimeError where there is no library of MPI to load
    _found = "mpi4py is not installed" if find_spec("mpi4py") is None else "mpi4py finds no MPI"
    raise ImportError(
        f'{_found} ({" ".join(str(error).split())}); install with: python -m pip install "fastrms[mpi]", or '
        '"fastrms[mpi-bundled]", which includes an MPI library'
    ) from None

from fastrms.mpi.sharded import ShardedRMSProp

__all__ = ["ShardedRMSProp"]
