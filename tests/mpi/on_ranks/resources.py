"""Attributes, memory, cores and communicators of an optimizer on several ranks."""

import gc
import os

import numpy as np
import pytest
from mpi4py import MPI
from on_ranks.shared import COMM, LAYOUTS, RANK, SIZE, ShardedRMSProp, add, assert_same, gradients_of, params_of

import fastrms
from fastrms import RMSProp, mpi
from fastrms.mpi.channels import pool_of


def unknown_attributes_and_arguments_are_refused():
    opt = mpi.ShardedRMSProp([np.ones(3)])
    for name in ("learning_rate", "momentun", "reductions", "time_out", "world_size"):
        with pytest.raises(AttributeError, match=name):
            setattr(opt, name, 1)
    for name in ("reduction", "rank", "size", "shard", "buffers"):
        with pytest.raises(AttributeError):
            setattr(opt, name, getattr(opt, name))
    opt.momentum, opt.weight_decay, opt.clip_norm, opt.timeout = 0.9, 0.1, 1.0, 30
    assert [opt.param_groups[0][name] for name in ("momentum", "weight_decay", "clip_norm")] == [0.9, 0.1, 1.0]
    for name, meant in (("learning_rate", "lr"), ("alpha", "decay_rate"), ("tiemout", "timeout")):
        with pytest.raises(fastrms.OptionTypeError, match=f"{name}: .*{meant}"):
            mpi.ShardedRMSProp([np.ones(3)], **{name: 0.1})


def each_of_p_ranks_has_1_p_of_the_state():
    opt = ShardedRMSProp([np.ones((300, 111), np.float32), np.ones(5000)], momentum=0.9, centered=True)
    opt.step([np.ones((300, 111)), np.ones(5000)])
    for name in ("cache", "momentum_buffer", "grad_avg"):
        for segment, size in zip(opt.buffers[name].segments, (33300, 5000), strict=True):
            assert size / SIZE - 16 * SIZE <= segment.size <= size / SIZE + 16
            assert COMM.allreduce(segment.size) == size
        assert opt.buffers[name].nbytes <= (33300 * 4 + 5000 * 8) / SIZE + 400
    assert [part.stop - part.start for part in opt.shard] == [s.size for s in opt.buffers["cache"].segments]
    assert SIZE == 1 or all(view.ndim == 1 for view in opt.cache)
    assert f"rank={RANK} of {SIZE})" in repr(opt)
    if SIZE > 1:  # the sum of gradients is a shard, the parameters of the shard are views of all parameters
        assert opt._shards._own["grads"].size == opt.buffers["cache"].size
        assert np.shares_memory(opt._shards._own["params"].segments[0], opt.buffers["params"].segments[0])
    assert opt.check() == []
    assert len(opt.explain()) == 2


def threads_are_the_cores_of_a_rank_divided_by_the_ranks_that_share_them():
    count = len(os.sched_getaffinity(0))
    most = fastrms.kernels.threads.max_threads()
    assert ShardedRMSProp(np.ones(3)).num_threads == min(most, max(1, count // SIZE))
    assert ShardedRMSProp(np.ones(3), num_threads=1).num_threads == 1
    COMM.Barrier()
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(own)[RANK % len(own)]})  # as Open MPI does
    half = COMM.Dup()
    assert ShardedRMSProp(np.ones(3), comm=half).num_threads == 1
    COMM.Barrier()
    os.sched_setaffinity(0, own)


def some_ranks_among_themselves_and_messages_of_the_user():
    part = COMM.Split(RANK % 2)
    params = params_of(LAYOUTS["odd"])
    opt, alone = ShardedRMSProp(params, comm=part), RMSProp(params)
    assert (opt.size, opt.rank) == (part.size, part.rank)
    mail = np.zeros(1)
    request = COMM.Irecv(mail, source=(RANK + 1) % SIZE, tag=MPI.ANY_TAG)
    gradients = gradients_of(LAYOUTS["odd"], 0)
    opt.step(gradients[RANK])
    COMM.Send(np.full(1, RANK + 1.0), dest=(RANK - 1) % SIZE)
    request.Wait()
    assert mail[0] == (RANK + 1) % SIZE + 1
    alone.step(add(gradients[RANK % 2 :: 2]))
    assert_same(opt, alone)


def more_optimizers_than_mpi_has_communicators():
    pool = pool_of(COMM).channels
    gc.collect()
    before = len(pool)
    for k in range(1500 if SIZE == 2 else 10):
        one = ShardedRMSProp(np.ones(3), kernel="numpy")
        if k == 5:
            one.ready((), np.ones(3))  # and no step
    assert len(pool) <= before + 3
