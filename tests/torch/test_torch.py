"""fastrms.torch.RMSprop beside torch.optim.RMSprop: the same numbers in every situation that training gets into."""

import copy
import io
import pickle

import numpy as np
import pytest
from helpers import JIT, need_torch

torch = need_torch()
pytestmark = pytest.mark.torch

from torch_pairs import CONFIGS, STEPS, assert_near, assert_same_state, give, pair, parameters  # noqa: E402 - all need torch

from fastrms import OptionError, StructureError  # noqa: E402
from fastrms.kernels import dlpack, pointers  # noqa: E402
from fastrms.torch import RMSprop  # noqa: E402

# Where most of a model takes PyTorch's step, the first step says so.
PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_pytorchs_configurations(options, dtype, way):
    mine, ours, theirs, other = pair(way, dtype, **options)
    for step in range(STEPS):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step)
            optimizer.step()
    assert ours._packs[0].fallback == []
    assert_near(mine, theirs, dtype)
    assert_same_state(ours, other, dtype)


def test_momentum_below_0_is_refused_as_there():
    for kind in (RMSprop, torch.optim.RMSprop):
        with pytest.raises(ValueError, match="Invalid momentum value: -1"):
            kind(parameters(), momentum=-1.0)
    with pytest.raises(OptionError, match="kernel: expected one of"):
        RMSprop(parameters(), kernel="cuda")


def test_a_step_touches_parameters_where_they_are_and_their_versions():
    mine, ours, theirs, other = pair()
    addresses = [p.data_ptr() for p in mine]
    for step in range(3):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step, skip=(1,) if step == 1 else ())
            optimizer.step()
    assert [p.data_ptr() for p in mine] == addresses
    assert [p._version for p in mine] == [p._version for p in theirs]
    flat = ours._packs[0].moved.optimizer.buffers["params"].flat
    assert flat.tolist() == torch.cat([p.detach().reshape(-1) for p in mine]).tolist()


def test_autograd_notices_that_a_parameter_has_changed():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([weight])
    loss = (weight**2).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["another tensor", "part of another", "transposed"])
def test_data_that_was_put_elsewhere_is_noticed(how, way):
    mine, ours, theirs, other = pair(way)
    kept = {}
    for step in range(6):
        for params, optimizer in ((mine, ours), (theirs, other)):
            if step == 3:
                new = torch.arange(50.0, dtype=torch.float64).reshape(10, 5)
                if how == "part of another":
                    new = kept[id(optimizer)] = torch.cat([new, new])[:10]
                params[0].data = new.t().contiguous().t() if how == "transposed" else new
                del new
            give(params, step)
            optimizer.step()
    assert_near(mine, theirs)
    assert_same_state(ours, other)
    if how == "part of another":  # somebody else has it too, so it stays where it is
        assert kept[id(ours)].data_ptr() == mine[0].data_ptr()
    if how == "another tensor":
        assert mine[0].data_ptr() == ours._packs[0].moved.optimizer.params[0].ctypes.data


def not_moved(kind):
    """Two parameters of which the second cannot be moved, and what has to stay true of it."""
    first = torch.nn.Parameter(torch.ones(4))
    values = torch.arange(6.0)
    second = {
        "alias": lambda: torch.nn.Parameter(values),
        "tied": lambda: torch.nn.Parameter(first.data),
        "view": lambda: torch.nn.Parameter(torch.cat([values, values])[:6]),
        "numpy": lambda: torch.nn.Parameter(torch.from_numpy(not_moved.array)),
        "shared": lambda: torch.nn.Parameter(values.clone().share_memory_()),
        "bfloat16": lambda: torch.nn.Parameter(values.to(torch.bfloat16)),
        "half": lambda: torch.nn.Parameter(values.half()),
        "complex": lambda: torch.nn.Parameter(values.to(torch.complex64)),
        "strided": lambda: torch.nn.Parameter(torch.ones(3, 2).t()),
    }[kind]()
    return [first, second], values


@PYTORCHS_STEP
@pytest.mark.parametrize("kind", ["alias", "tied", "view", "numpy", "shared", "bfloat16", "half", "complex", "strided"])
def test_what_others_would_notice_is_not_moved(kind, way):
    both = []
    for make in (lambda p: RMSprop(p, momentum=0.9, **way), lambda p: torch.optim.RMSprop(p, momentum=0.9)):
        not_moved.array = np.arange(6.0)
        params, values = not_moved(kind)
        address = params[1].data_ptr()
        optimizer = make(params)
        assert params[1].data_ptr() == address
        for step in range(4):
            for k, p in enumerate(params):
                p.grad = torch.full_like(p, step + k + 0.5)
            optimizer.step()
        both.append((params, values, not_moved.array, optimizer))
    (mine, ours, array, optimizer), (theirs, other, other_array, plain) = both
    for a, b in ((mine[0], theirs[0]), (mine[1], theirs[1]), (ours, other)):
        torch.testing.assert_close(a, b)
    np.testing.assert_allclose(array, other_array)
    assert len(optimizer._packs[0].fallback) == (2 if kind == "tied" else 1)
    assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


def test_frozen_parameters_stay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    optimizer = RMSprop(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    after = list(model.parameters())
    assert [bool((a == b).all()) for a, b in zip(after, before, strict=True)] == [True, True, False, False]
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not (after[0] == before[0]).all()


def test_sparse_gradients_are_refused_as_there():
    for kind in (RMSprop, torch.optim.RMSprop):
        table = torch.nn.Embedding(5, 3, sparse=True)
        before = table.weight.detach().clone()
        optimizer = kind(table.parameters())
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(RuntimeError, match="RMSprop does not support sparse gradients"):
            optimizer.step()
        assert (table.weight == before).all()


def test_groups_schedulers_and_added_groups(way):
    both = []
    for make in (lambda g: RMSprop(g, lr=0.1, **way), lambda g: torch.optim.RMSprop(g, lr=0.1)):
        params = parameters()
        optimizer = make([{"params": params[:2], "momentum": 0.9}, {"params": params[2:3], "lr": 0.01}])
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        for step in range(8):
            if step == 3:
                optimizer.add_param_group({"params": params[3:], "centered": True})
            if step == 5:
                optimizer.param_groups[0].update(alpha=0.5, eps=1e-3, weight_decay=0.1, maximize=True)
            give(params, step)
            optimizer.step()
            scheduler.step()
        both.append((params, optimizer))
    (mine, ours), (theirs, other) = both
    assert len(ours._packs) == 3
    assert_near(mine, theirs)
    assert_same_state(ours, other)


def test_groups_that_somebody_changes_by_hand(way):
    both = []
    for make in (lambda p: RMSprop(p, momentum=0.9, **way), lambda p: torch.optim.RMSprop(p, momentum=0.9)):
        params = parameters()
        optimizer = make([{"params": params[:2]}, {"params": params[2:3]}])
        extra = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
        for step in range(12):
            groups = optimizer.param_groups
            if step == 2:
                groups[0]["params"].append(params[3])
            if step == 4:
                groups[1]["params"] = [params[4], params[2]]
            if step == 6:
                groups.append({**groups[0], "params": [extra], "lr": 0.5})
            if step == 7:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                groups = optimizer.param_groups
            if step == 8:
                del groups[0]
            if step == 10:
                groups[0]["params"][1] = params[1]
            give([*params, extra], step)
            optimizer.step()
        both.append([*params, extra])
    assert_near(*both)


@PYTORCHS_STEP
@pytest.mark.parametrize(
    "options", [{"eps": 0.0}, {"alpha": 1.0}, {"momentum": 1.5}, {"lr": torch.tensor(0.1)}], ids=str
)
def test_options_that_only_one_of_the_two_has(options, way):
    mine, ours, theirs, other = pair(way, **options)
    for step in range(5):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step)
            optimizer.step()
            if step == 2:  # and back to usual ones
                optimizer.param_groups[0].update(eps=1e-8, alpha=0.9, lr=0.01)
    assert_near(mine, theirs)
    assert_same_state(ours, other)


@pytest.mark.parametrize("name", ["differentiable", "capturable"])
def test_what_needs_pytorchs_own_step_takes_it(name):
    params = parameters()
    addresses = [p.data_ptr() for p in params]
    optimizer = RMSprop(params, **{name: True})
    assert [p.data_ptr() for p in params] == addresses
    if name == "differentiable":
        weight = torch.ones(3, requires_grad=True)
        rate = torch.tensor(0.5, requires_grad=True)
        leaf = weight * rate
        leaf.retain_grad()
        optimizer = RMSprop([leaf], differentiable=True)
        leaf.grad = torch.ones(3)
        optimizer.step()
        leaf.sum().backward()
        assert rate.grad is not None


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_state_goes_there_and_back(options, way):
    mine, ours, theirs, other = pair(way, **options)
    for step in range(5):
        give(mine, step, skip=(2,))
        ours.step()
    saved = io.BytesIO()
    torch.save(ours.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved))
    for a, b in zip(theirs, mine, strict=True):
        a.data.copy_(b.data)
    for step in range(5, 10):
        give(theirs, step)
        other.step()
    back = parameters()
    for a, b in zip(back, theirs, strict=True):
        a.data.copy_(b.data)
    optimizer = RMSprop(back, lr=0.5, **way)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    for step in range(5, 10):
        give(mine, step)
        ours.step()
    assert_near(mine, theirs)
    for step in range(10, 15):
        for params, one in ((mine, ours), (back, optimizer), (theirs, other)):
            give(params, step)
            one.step()
    assert_near(mine, theirs)
    assert_near(back, theirs)
    assert_same_state(optimizer, other)
    # What was loaded is in the buffers, of which the state consists.
    for p, view in zip(back, optimizer._packs[0].moved.optimizer.cache, strict=True):
        assert p.numel() == 0 or optimizer.state[p]["square_avg"].data_ptr() == view.ctypes.data


def test_state_of_other_shapes_changes_nothing():
    mine, ours, *_ = pair()
    give(mine, 0)
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][4]["square_avg"] = torch.zeros(3, 4, 2, dtype=torch.float64)
    wrong["param_groups"][0]["lr"] = 7.0
    with pytest.raises(StructureError, match=r"state: expected square_avg of shape \(2, 3, 4\), got \(3, 4, 2\)"):
        ours.load_state_dict(wrong)
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(after["state"][key][name], value)
    ours.step()


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_with_their_parameters_go_on_alone(again, way):
    mine, ours, theirs, other = pair(way, momentum=0.9)
    for step in range(3):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step)
            optimizer.step()
    new, optimizer = again((mine, ours))
    frozen = [p.detach().clone() for p in mine]
    for step in range(3, 6):
        for params, one in ((new, optimizer), (theirs, other)):
            give(params, step)
            one.step()
    assert_near(new, theirs)
    assert_near(mine, frozen)
    assert_same_state(optimizer, other)


def test_a_second_optimizer_takes_parameters_over():
    mine, ours, theirs, other = pair()
    for step in range(3):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step)
            optimizer.step()
    later, plain = RMSprop(mine), torch.optim.RMSprop(theirs)
    assert later._packs[0].fallback == []
    for step in range(3, 9):
        for params, one in ((mine, ours if step % 2 else later), (theirs, other if step % 2 else plain)):
            give(params, step)
            one.step()
    assert_near(mine, theirs)


def test_gradients_are_skipped_as_gradscaler_does():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([weight])
    scaler.scale((weight * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [1.0] * 3
    optimizer.zero_grad()
    scaler.scale((weight**2).sum()).backward()
    scaler.step(optimizer)
    assert weight.tolist() != [1.0] * 3


def test_a_rate_in_a_tensor_that_is_changed_in_place_is_followed(way):
    mine, ours, theirs, other = pair(way)
    for step in range(6):
        for params, optimizer in ((mine, ours), (theirs, other)):
            if step == 2:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
            if step == 4:
                optimizer.param_groups[0]["lr"].mul_(0.1)
            give(params, step)
            optimizer.step()
    assert_near(mine, theirs)


@pytest.mark.skipif(not JIT, reason="compiled code finds the tensors")
def test_the_compiled_way_is_there():
    assert dlpack.exchange_function(torch.Tensor) != 0
    assert dlpack.exchange_function(np.ndarray) == 0
    assert pointers.available()
    mine, ours, *_ = pair()
    give(mine, 0)
    ours.step()
    assert ours._packs[0].moved.locator.compiled
