"""``ShardedRMSProp``: data-parallel training over MPI, with state and update divided among the ranks.

    from fastrms.mpi import ShardedRMSProp        # mpiexec -n 4 python train.py

Each rank has all parameters and the gradients of its own part of a batch. A step adds up the gradients so that each
rank gets the sum for its shard (reduce-scatter), updates that with the same kernels as `fastrms.RMSProp`, and gives the
new parameters to all (all-gather). So each rank has 1/P of the state and does 1/P of the update, as in stage 1 of ZeRO
(S. Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, SC 2020).

Needs mpi4py and an MPI (``python -m pip install "fastrms[mpi]"``, or ``"fastrms[mpi-bundled]"``, which brings one), and
is not imported by ``import fastrms``.
"""

from fastrms.mpi.sharded import ShardedRMSProp

__all__ = ["ShardedRMSProp"]
