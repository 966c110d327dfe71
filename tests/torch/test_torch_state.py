"""fastrms.torch.RMSprop beside torch.optim.RMSprop where somebody works on parameters and `optimizer.state` by hand."""

import copy
import subprocess
import sys
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
from helpers import need_torch

torch = need_torch()
pytestmark = pytest.mark.torch

from torch_pairs import assert_near, assert_same_state, give, pair, parameters  # noqa: E402 - both need torch

from fastrms.torch import RMSprop  # noqa: E402

PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


def swap(state, p, q):
    state[p], state[q] = state[q], state[p]


def put(name, make):
    """Change one item of the state of the first parameter."""

    def change(optimizer, params, kept):
        optimizer.state[params[0]][name] = make(optimizer.state[params[0]][name])

    return change


def new_state(optimizer, params, kept):
    optimizer.state = defaultdict(dict)


def plain_dict(optimizer, params, kept):
    optimizer.state = dict(optimizer.state)


def forget_one(optimizer, params, kept):
    kept.append(optimizer.state.pop(params[0]))


def forget_and_restore(optimizer, params, kept):
    kept.append(optimizer.state.pop(params[0]))
    give(params, 77)
    optimizer.step()
    optimizer.state[params[0]] = kept.pop()


def copies(optimizer, params, kept):
    for p in params:
        kept.append(optimizer.state[p])
        optimizer.state[p] = copy.deepcopy(optimizer.state[p])


def set_data(optimizer, params, kept):
    optimizer.state[params[0]]["square_avg"].data = torch.full_like(params[0], 0.25)


def of_another(optimizer, params, kept):
    """Somebody else's tensor, of which the state is a part: PyTorch writes there."""
    kept.append(torch.full((100,), 0.5, dtype=torch.float64))
    optimizer.state[params[0]]["square_avg"] = kept[-1][:50].view(10, 5)


def from_numpy(optimizer, params, kept):
    kept.append(np.full((10, 5), 0.5))
    optimizer.state[params[0]]["square_avg"] = torch.from_numpy(kept[-1])


def held(optimizer, params, kept):
    kept.append(torch.full((10, 5), 0.5, dtype=torch.float64))
    optimizer.state[params[0]]["square_avg"] = kept[-1]


def one_for_two(optimizer, params, kept):
    """A tensor that two parameters share."""
    other = torch.nn.Parameter(torch.ones(10, 5, dtype=torch.float64))
    optimizer.add_param_group({"params": [other]})
    optimizer.state[other] = optimizer.state[params[0]]
    params.append(other)


CHANGES = {
    "clear": lambda optimizer, params, kept: optimizer.state.clear(),
    "new state": new_state,
    "plain dict": plain_dict,
    "pop": forget_one,
    "pop and restore": forget_and_restore,
    "empty": lambda optimizer, params, kept: optimizer.state[params[0]].clear(),
    "empty dict": lambda optimizer, params, kept: optimizer.state.__setitem__(params[0], {}),
    "copies": copies,
    "in place": lambda optimizer, params, kept: optimizer.state[params[0]]["square_avg"].fill_(9.0),
    "square_avg": put("square_avg", lambda old: torch.full_like(old, 0.25)),
    "momentum_buffer": put("momentum_buffer", lambda old: torch.full_like(old, 0.25)),
    "grad_avg": put("grad_avg", lambda old: old * 0.5),
    "same": put("square_avg", lambda old: old.detach()),
    "transposed": put("square_avg", lambda old: old.t().contiguous().t()),
    "float32": put("square_avg", lambda old: old.float()),
    "parameter": put("square_avg", lambda old: torch.nn.Parameter(old.clone(), requires_grad=False)),
    "data": set_data,
    "part of another": of_another,
    "from numpy": from_numpy,
    "held": held,
    "one for two": one_for_two,
    "swapped": lambda optimizer, params, kept: swap(optimizer.state, params[0], params[-1]),
    "step": put("step", lambda old: torch.tensor(50.0, dtype=old.dtype)),
    "step in place": lambda optimizer, params, kept: optimizer.state[params[0]]["step"].fill_(7.0),
    "step of int64": put("step", lambda old: torch.tensor(50)),
    "step of shape (1,)": put("step", lambda old: torch.tensor([50.0], dtype=old.dtype)),
    "ordered": lambda optimizer, params, kept: optimizer.state.__setitem__(
        params[0], OrderedDict(optimizer.state[params[0]])
    ),
    "more": lambda optimizer, params, kept: optimizer.state[params[0]].update(note="mine"),
    "around the methods": lambda optimizer, params, kept: dict.__setitem__(
        optimizer.state[params[0]], "square_avg", torch.full_like(params[0], 0.25)
    ),
    "another key": lambda optimizer, params, kept: optimizer.state.__setitem__("mine", {"note": 1}),
}


@PYTORCHS_STEP
@pytest.mark.parametrize("change", CHANGES)
def test_state_that_somebody_changes(change, way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        params = [*parameters(), torch.nn.Parameter(torch.full((10, 5), 2.0, dtype=torch.float64))]
        optimizer, kept = kind(params, momentum=0.9, centered=True, **options), []
        for step in range(9):
            if step == 4:
                CHANGES[change](optimizer, params, kept)
            give(params, step, skip=(2,) if step == 4 else ())
            optimizer.step()
        both.append((params, optimizer, kept))
    (mine, ours, kept), (theirs, other, others) = both
    assert_near(mine, theirs)
    for a, b in zip(kept, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for one in (ours, other):  # what the state has beside that of parameters is as it was given
        assert one.state.pop("mine", {"note": 1}) == {"note": 1}
        assert {state.pop("note", "mine") for state in one.state.values()} == {"mine"}
    assert_same_state(ours, other)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("step", [2, torch.zeros(1), torch.tensor(0.0)], ids=str)
@PYTORCHS_STEP
def test_state_that_is_there_before_the_first_step(step, shared, way):
    """What a SharedRMSprop does, as examples of asynchronous reinforcement learning have it."""
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):

        class SharedRMSprop(kind):
            def __init__(self, params, step, **options):
                super().__init__(params, **options)
                for group in self.param_groups:
                    for p in group["params"]:
                        state = self.state[p]
                        state["step"] = copy.deepcopy(step)
                        state["square_avg"] = p.data.new().resize_as_(p.data).fill_(0.5)
                        state["momentum_buffer"] = torch.zeros_like(p)

            def share_memory(self):
                for state in self.state.values():
                    state["square_avg"].share_memory_()
                    state["momentum_buffer"].share_memory_()

        params = parameters()
        # A number as count is an error in newer versions of PyTorch.
        count = step if kind is RMSprop else torch.as_tensor(step * 1.0)
        optimizer = SharedRMSprop(params, count, momentum=0.5, **options)
        square_avg = optimizer.state[params[0]]["square_avg"]
        if shared:
            optimizer.share_memory()
        for number in range(5):
            give(params, number)
            optimizer.step()
        assert optimizer.state[params[0]]["square_avg"] is square_avg
        assert square_avg.is_shared() == shared
        both.append((params, optimizer))
    (mine, ours), (theirs, other) = both
    assert_near(mine, theirs)
    assert_same_state(ours, other)
    ((_, reasons),) = ours._reasons()
    assert (reasons[0] is None) == (not shared)


def test_momentum_that_begins_later_goes_on_with_what_the_state_has(way):
    mine, ours, theirs, other = pair(way, momentum=0.9)
    for step in range(12):
        for params, optimizer in ((mine, ours), (theirs, other)):
            if step in (3, 6):
                optimizer.param_groups[0]["momentum"] = 0.9 * (step == 6)
            if step == 5:
                optimizer.state[params[0]]["momentum_buffer"] = torch.ones_like(params[0])
            give(params, step)
            optimizer.step()
    assert_near(mine, theirs)
    assert_same_state(ours, other)


def test_momentum_that_is_taken_out_begins_anew(way):
    """For which PyTorch's step has an error. Nothing of what was there before comes back."""
    both = []
    for take_out in (lambda state: state.pop("momentum_buffer"), lambda state: state["momentum_buffer"].zero_()):
        params = parameters()
        optimizer = RMSprop(params, momentum=0.9, **way)
        for step in range(6):
            if step == 3:
                take_out(optimizer.state[params[0]])
            give(params, step)
            optimizer.step()
        both.append((params, optimizer))
    (mine, ours), (theirs, other) = both
    assert_near(mine, theirs)
    assert_same_state(ours, other)


@PYTORCHS_STEP
def test_two_optimizers_with_one_state(way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        params = parameters()
        one, two = kind(params, **options), kind(params, **options)
        two.state = one.state
        for step in range(8):
            give(params, step)
            (one, two)[step // 2 % 2].step()
        both.append((params, one, two))
    (mine, ours, ours_too), (theirs, other, other_too) = both
    assert_near(mine, theirs)
    assert_same_state(ours, other)
    assert_same_state(ours_too, other_too)


def test_a_saved_state_dict_stays_as_it_was_when_the_state_is_cleared_or_loaded():
    for change in (lambda opt: opt.state.clear(), lambda opt: opt.load_state_dict(copy.deepcopy(opt.state_dict()))):
        mine, ours, *_ = pair(momentum=0.9)
        for step in range(3):
            give(mine, step)
            ours.step()
        saved = ours.state_dict()["state"]
        before = copy.deepcopy(saved)
        change(ours)
        for step in range(3):
            give(mine, step)
            ours.step()
        for k, state in before.items():
            for name, value in state.items():
                assert torch.equal(saved[k][name], value)


@pytest.mark.parametrize("given", [{"note": 1}, {"step": torch.tensor(0.0)}], ids=["note", "step"])
def test_incomplete_state_is_an_error_as_there(given):
    for kind in (RMSprop, torch.optim.RMSprop):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([weight])
        weight.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[weight] = dict(given)
        before = weight.tolist()
        with pytest.raises(KeyError, match="square_avg"):
            optimizer.step()
        assert weight.tolist() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_counts_have_pytorchs_dtype_whatever_the_default_is(dtype, way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        try:
            torch.set_default_dtype(dtype)
            weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))
            optimizer = kind([weight], lr=1e-6, **options)
            weight.grad = torch.ones(2, dtype=torch.float32)
            for _ in range(3):
                optimizer.step()
            optimizer.state[weight]["step"].fill_(2048)
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        both.append(optimizer.state[weight]["step"])
    assert both[0] == 2049
    assert both[0].dtype == both[1].dtype


def test_a_pytorch_that_cannot_tell_who_shares_memory_takes_its_own_step(monkeypatch):
    """As in PyTorch 2.6 and 2.7 built for the CPU."""
    monkeypatch.setattr("fastrms.torch.placement._use_count", None)
    mine, ours, theirs, other = pair()
    for step in range(3):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step)
            if optimizer is ours and step == 0:
                with pytest.warns(
                    RuntimeWarning, match=r"cannot tell whether other objects share its memory \(2.8 can\)"
                ):
                    optimizer.step()
            else:
                optimizer.step()
    assert_near(mine, theirs, torch.float64)
    assert_same_state(ours, other)


def test_it_imports_with_a_pytorch_that_cannot_tell_who_shares_memory():
    program = """if True:
        import torch
        del torch._C._storage_Use_Count
        from fastrms.torch import RMSprop
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        optimizer = RMSprop([weight], lr=0.01)
        optimizer.step()
        print(round(weight[0].item(), 4))
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "0.9\n"
    assert run.stderr.count("RuntimeWarning") == 1


def test_what_a_failing_step_leaves():
    """A sparse gradient that PyTorch's step refuses changes no parameter of its group."""
    for kind in (RMSprop, torch.optim.RMSprop):
        first, table = torch.nn.Parameter(torch.ones(9)), torch.nn.Embedding(3, 2, sparse=True)
        optimizer = kind([first, table.weight])
        first.grad = torch.ones(9)
        table(torch.tensor([1])).sum().backward()
        before = [first.tolist(), table.weight.tolist()]
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
        assert [first.tolist(), table.weight.tolist()] == before


def test_options_whose_memory_cannot_be_had_are_tried_again(monkeypatch):
    mine, ours, theirs, other = pair()
    for params, optimizer in ((mine, ours), (theirs, other)):
        give(params, 0)
        optimizer.step()
    inner = ours._packs[0].moved.optimizer
    monkeypatch.setattr(type(inner.param_groups[0]), "__setitem__", lambda *_: (_ for _ in ()).throw(MemoryError))
    for optimizer in (ours, other):
        optimizer.param_groups[0].update(lr=0.5, alpha=0.5)
    with pytest.raises(MemoryError):
        ours.step()
    monkeypatch.undo()
    for params, optimizer in ((mine, ours), (theirs, other)):
        give(params, 1)
        optimizer.step()
    assert_near(mine, theirs)


@pytest.mark.parametrize("take_out", ["clear", "del", "new", "pop", "empty"])
def test_state_that_is_taken_out_right_after_it_was_made(take_out):
    def train(cls):
        p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = cls([p, q], lr=0.01)
        for step in range(5):
            if step == 0 and take_out == "empty":
                optimizer.state[p]
                optimizer.step()
            if step in (1, 3):
                if take_out == "empty":
                    optimizer.state[p].clear()
                elif take_out == "clear":
                    optimizer.state.clear()
                elif take_out == "del":
                    del optimizer.state[p]
                elif take_out == "pop":
                    optimizer.state.pop(p)
                else:
                    optimizer.state = defaultdict(dict)
            p.grad, q.grad = torch.ones(3), torch.ones(3) if step > 1 else None
            optimizer.step()
        return p.data, q.data, optimizer

    ours, theirs = train(RMSprop), train(torch.optim.RMSprop)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(one, other)
    assert len(ours[2].state_dict()["state"]) == len(theirs[2].state_dict()["state"])


def test_a_state_dict_has_only_plain_dicts_tensors_and_numbers(way):
    """Which ``torch.load`` takes with ``weights_only``, and every process without fastrms."""
    params = parameters()
    optimizer = RMSprop(params, momentum=0.9, centered=True, **way)
    for step in range(3):
        give(params, step)
        optimizer.step()
    for _ in range(2):
        saved = optimizer.state_dict()
        assert type(optimizer.state) is defaultdict
        assert type(saved) is type(saved["state"]) is dict
        for k, p in enumerate(params):
            assert type(saved["state"][k]) is type(optimizer.state[p]) is dict
            assert {type(value) for value in saved["state"][k].values()} == {torch.Tensor}
        for group in saved["param_groups"]:
            assert type(group) is dict
            assert {type(value) for value in group.values()} <= {float, int, bool, type(None), list}
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.step()
