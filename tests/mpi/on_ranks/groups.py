"""Groups that are added: bits, shards, checkpoints, and errors that all ranks raise."""

import numpy as np
import pytest
from helpers import assert_same_bits, leaves
from on_ranks.shared import (
    COMM,
    LAST,
    LAYOUTS,
    RANK,
    SIZE,
    STEPS,
    ShardedRMSProp,
    add,
    assert_same,
    folder,
    gradients_of,
    gradients_of_all,
    params_of,
    raises,
    raises_on,
)

import fastrms
from fastrms import RMSProp, StructureError
from fastrms.backends.host import HostBackend
from fastrms.mpi import buckets
from fastrms.mpi.shards import Shards

BODY, HEAD, LAST_GROUP = LAYOUTS["mixed"], LAYOUTS["odd"], LAYOUTS["fewer than ranks"]
OPTIONS = {"bias_correction": True, "weight_decay": 0.1}
HEADS = [{"momentum": 0.9, "lr": 0.1}, {"clip_norm": 3.0}]


def grouped(layouts, step):
    """Return this rank's gradients for groups with these layouts, and the sums over all ranks."""
    drawn = [gradients_of(layout, 10 * step + k) for k, layout in enumerate(layouts)]
    if step % 2:
        for each in drawn[-1]:
            each["a"] = None
    return [each[RANK] for each in drawn], [add(each) for each in drawn]


def have_the_bits_of_one_process():
    """With views and in place; state that other groups lack, or that is made later; gradients passed one by one."""
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 20, 2
    for in_place in (False, True):
        start = params_of(BODY)
        opt, alone = ShardedRMSProp(start, in_place=in_place, **OPTIONS), RMSProp(params_of(BODY), **OPTIONS)
        views, layouts = opt.params, [BODY]
        gradients = gradients_of(BODY, 99)
        opt.step(gradients[RANK])
        alone.step(add(gradients))
        for layout, options in zip((HEAD, LAST_GROUP), HEADS, strict=True):
            more = params_of(layout, seed=1)
            for each, params in ((opt, more), (alone, params_of(layout, seed=1))):
                each.add_param_group({"params": params} | options)
            layouts.append(layout)
            assert opt.params[0] is views
            assert not in_place or all(opt.params[-1][key] is array for key, array in more.items())
            for step in range(STEPS):
                mine, total = grouped(layouts, step)
                if step == 2:
                    opt.step(mine)
                else:
                    for k, group in enumerate(mine):
                        for key, gradient in group.items():
                            opt.ready((k, key), gradient)
                    opt.step()
                alone.step(total)
                assert_same(opt, alone, f"{in_place}, {len(layouts)} groups, step {step}")
            for each in (opt, alone):
                each.param_groups[0]["centered"] = not each.param_groups[0]["centered"]
                each.global_clip_norm = 20.0
        assert opt.check() == []
        assert opt._ranks.channel.requests == []
    buckets.BUCKET_SIZE, buckets.FEW_RANKS = 1 << 20, 4


def have_shards_of_their_own():
    opt = ShardedRMSProp([np.ones(320)], momentum=0.9)
    opt.add_param_group({"params": [np.ones(64, np.float32), np.ones(640)], "centered": True})
    opt.step([[np.ones(320)], [np.ones(64), np.ones(640)]])
    sizes = [segment.size for segment in opt.buffers["grads"].segments]
    assert sizes == [320, 64, 640]
    own = [part.stop - part.start for part in opt.shard]
    for name in ("cache", "momentum_buffer", "grad_avg"):
        assert [segment.size for segment in opt.buffers[name].segments] == own
    assert [COMM.allreduce(size) for size in own] == sizes
    assert all(size / SIZE - 16 * SIZE <= mine <= size / SIZE + 16 for mine, size in zip(own, sizes, strict=True))


def have_state_in_16_bits():
    """The views of the state stay valid."""
    layout = LAYOUTS["one"]
    options = {"momentum": 0.9, "cache_dtype": "bfloat16"}
    opt, alone = ShardedRMSProp(params_of(layout), **options), RMSProp(params_of(layout), **options)
    cache = opt.cache["a"]
    for each in (opt, alone):
        each.add_param_group({"params": params_of(layout, seed=1), "centered": True})
    for step in range(STEPS):
        mine, total = grouped((layout, layout), 2 * step)
        opt.step(mine)
        alone.step(total)
        assert_same(opt, alone)
    assert np.shares_memory(opt.cache[0]["a"], cache)
    assert opt.check() == []


def start_from_the_values_of_rank_0_or_must_be_equal():
    """Only the new parameters are sent."""
    opt = ShardedRMSProp(params_of(BODY))
    opt.params["W"][...] = RANK
    opt.add_param_group({"params": params_of(HEAD, seed=RANK)})
    assert (opt.params[0]["W"] == RANK).all()
    for key, array in params_of(HEAD).items():
        assert_same_bits(opt.params[1][key], array, key)
    if SIZE == 1:
        return
    strict = ShardedRMSProp(params_of(BODY), check_params="raise")
    strict.add_param_group({"params": params_of(HEAD)})
    different = params_of(HEAD)
    different["b"][3] += RANK == LAST
    strict.params[0]["W"][...] = RANK  # the parameters that were there are not compared
    raises(StructureError, f"params[2]['b']: expected the same values on all ranks, got different ones on rank {LAST}",
           strict.add_param_group, {"params": different})  # fmt: skip
    assert len(strict.param_groups) == len(strict.params) == 2


def errors_on_one_rank_raise_on_all_and_nothing_is_half_made():
    """After each error the optimizer has the groups, the state and the bits of before, and can go on."""
    for in_place in (False, True):
        add_wrong_groups(ShardedRMSProp(params_of(BODY), in_place=in_place, **OPTIONS))


def add_wrong_groups(opt):
    alone = RMSProp(params_of(BODY), **OPTIONS)
    numbers, given = iter(range(100)), np.ones(40)

    def go_on():
        assert (len(opt.param_groups), sorted(opt.buffers)) == (1, ["cache", "grads", "params"])
        assert (given == 1).all()
        assert_same(opt, alone)
        gradients = gradients_of(BODY, next(numbers))
        for key, gradient in gradients[RANK].items():
            opt.ready(key, gradient)
        opt.step()
        alone.step(add(gradients))
        assert_same(opt, alone)

    def group(**options):
        return {"params": [given]} | options

    last = RANK == LAST
    for kind, message, wrong in [
        (fastrms.OptionError, "lr: expected", group(lr=-1.0, momentum=0.5)),
        (fastrms.DtypeError, "params[1][0]: expected float32 or float64, got int64", {"params": [np.ones(40, int)]}),
        (StructureError, "group: expected a dict with the key 'params'", [np.ones(40)]),
        (StructureError, "params[1]: expected new parameters", {"params": [opt.params["W"]]}),
    ]:
        raises_on(LAST, kind, message, opt.add_param_group, wrong if last else group(momentum=0.5))
        go_on()
    # The memory ends after the group was taken in, while the shards are made.
    for place in ("shard_of", "run_with"):
        real, failed = getattr(Shards, place), []

        def fails_once(self, argument, real=real, failed=failed):
            if last and self is opt._shards and not failed:
                failed.append(self)
                raise MemoryError("no memory on this rank")
            return real(self, argument)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Shards, place, fails_once)
            raises_on(LAST, MemoryError, "no memory on this rank", opt.add_param_group, group(momentum=0.5))
        assert len(failed) == last
        go_on()
    if SIZE == 1:
        return
    others = f"expected the same on all ranks, got different ones on rank {LAST} than on rank 0; nothing was changed"
    raises(fastrms.OptionError, f"options: {others}", opt.add_param_group, group(momentum=0.5 * last))
    go_on()
    raises(fastrms.OptionError, f"lr: {others}", opt.add_param_group, group(lr=0.5 * last))
    go_on()
    raises(StructureError, f"and in_place on all ranks, got different ones on rank {LAST} than on rank 0",
           opt.add_param_group, {"params": [np.ones(40 + last)]})  # fmt: skip
    go_on()


def an_interrupt_takes_the_group_out():
    """On one rank. Ctrl-C ends several ranks."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    opt = ShardedRMSProp([np.ones(2)])
    places = ((HostBackend, "new_run"), (HostBackend, "settle_parameters"), (Shards, "prepare_meet"))
    for owner, name in places if SIZE == 1 else ():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                opt.add_param_group({"params": [np.ones(3)]})
        assert len(opt.param_groups) == 1
        opt.ready(0, np.ones(2))
        opt.step()
        opt.load_state_dict(opt.state_dict())
    opt.add_param_group({"params": [np.ones(3)], "lr": 0.5})
    opt.step([[np.ones(2)], [np.ones(3)]])
    assert opt.params[1][0][0] < 0


def are_refused_after_ready_and_the_gradients_are_kept():
    opt, alone = ShardedRMSProp(params_of(BODY)), RMSProp(params_of(BODY))
    gradients = gradients_of(BODY, 0)
    keys = list(BODY)
    for key in keys[:2] if RANK == LAST else []:  # one rank is enough
        opt.ready(key, gradients[RANK][key])
    raises(fastrms.StepInProgressError, "add_param_group: expected a call between two steps, got one after gradients",
           opt.add_param_group, {"params": [np.ones(3)]})  # fmt: skip
    for key in keys[2:] if RANK == LAST else keys:
        opt.ready(key, gradients[RANK][key])
    opt.step()
    alone.step(add(gradients))
    assert_same(opt, alone)


def checkpoints_fit_optimizers_that_were_made_with_all_groups():
    path = folder() / f"groups-{SIZE}.npz"
    groups = [{"params": params_of(layout)} for layout in (BODY, HEAD)]
    added, alone = ShardedRMSProp(params_of(BODY), momentum=0.5), RMSProp(groups, momentum=0.5)
    added.add_param_group({"params": params_of(HEAD)})
    made = ShardedRMSProp(groups)
    for step in range(3):
        mine, total = grouped((BODY, HEAD), step)
        for opt in (added, made):
            opt.step(mine)
        alone.step(total)
        added.save(path)
        made.load(path)
        assert_same(made, alone)
        added.load_state_dict(made.state_dict())
        assert_same(added, alone)
        again = ShardedRMSProp.from_checkpoint(path, reduction="sum")
        assert_same(again, alone)
    again.add_param_group({"params": [np.ones(3)], "momentum": 0.5})
    alone.add_param_group({"params": [np.ones(3)]})
    again.step([*mine, [np.ones(3)]])
    alone.step([*total, [np.full(3, float(SIZE))]])
    assert_same(again, alone)
    assert len(leaves(again.params)) == len(BODY) + len(HEAD) + 1


# A run that goes on with another number of ranks: `save` and `resume` are programs of their own.


def steps_of_a_run(opt, steps):
    """Take steps with gradients of one rank."""
    layouts = LAYOUTS["odd"], LAYOUTS["one"]
    for step in steps:
        own = [gradients_of_all(layout, step) for layout in layouts]
        opt.step(own if RANK == LAST else [dict.fromkeys(each) for each in own])


def save():
    opt = ShardedRMSProp(params_of(LAYOUTS["odd"]), momentum=0.9)
    opt.add_param_group({"params": params_of(LAYOUTS["one"]), "centered": True})
    steps_of_a_run(opt, range(3))
    opt.save(folder() / "across.npz")


def resume():
    """Once in an optimizer made from the file, once in an optimizer with an added group."""
    made = ShardedRMSProp.from_checkpoint(folder() / "across.npz", reduction="sum")
    added = ShardedRMSProp(params_of(LAYOUTS["odd"], seed=5), in_place=True)
    added.add_param_group({"params": params_of(LAYOUTS["one"], seed=5)})
    added.load(folder() / "across.npz")
    for name, opt in (("made", made), ("added", added)):
        steps_of_a_run(opt, range(3, 6))
        opt.save(folder() / f"resumed-{SIZE}-{name}.npz")
