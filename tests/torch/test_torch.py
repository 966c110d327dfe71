"""fastrms.torch.RMSprop beside torch.optim.RMSprop: the same numbers in every situation that training gets into."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings

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


def test_closures_and_hooks():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([weight])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["before", "closure", "after"]
    assert isinstance(optimizer, torch.optim.RMSprop)


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


def test_a_model_in_another_dtype_after_the_optimizer_was_made():
    both = []
    for kind in (RMSprop, torch.optim.RMSprop):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = kind(model.parameters())
        model.double()
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(4, 3, dtype=torch.float64)) ** 2).sum().backward()
            optimizer.step()
        both.append(model)
    for a, b in zip(both[0].parameters(), both[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


PYTORCHS_OWN = """
import sys, warnings
import torch
from torch.testing._internal.common_optimizers import optim_error_inputs_func_rmsprop, optim_inputs_func_rmsprop
from fastrms.torch import RMSprop

def train(kind, options, dtype):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((10, 5), (10,), (1,))]
    optimizer = kind(params, **options)
    for _ in range(20):
        optimizer.zero_grad()
        (sum((p**2).sum() for p in params)).backward()
        optimizer.step()
    return params, optimizer.state_dict()

for dtype in (torch.float32, torch.float64):
    for given in optim_inputs_func_rmsprop("cpu", dtype):
        for more in ({}, {"foreach": True}, {"foreach": False}):
            ours, theirs = (train(kind, {**given.kwargs, **more}, dtype) for kind in (RMSprop, torch.optim.RMSprop))
            torch.testing.assert_close(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1])
            print("like torch.optim:", given.desc)
    for wrong in optim_error_inputs_func_rmsprop("cpu", dtype):
        given = wrong.optimizer_error_input
        params = torch.nn.Parameter(torch.ones(2, dtype=dtype)) if given.params is None else given.params
        params = [params] if given.params is None else params
        for kind in (RMSprop, torch.optim.RMSprop):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    kind(params, **given.kwargs)
            except wrong.error_type as error:
                import re
                assert re.search(wrong.error_regex, str(error)), error
                print("refused:", given.desc)
            else:
                sys.exit(f"{kind.__module__} took {given.desc}")
"""


def test_pytorchs_own_configurations_and_wrong_inputs():
    """Those that are in its wheel for its tests, in a process of their own: importing them changes many settings."""
    pytest.importorskip("expecttest", reason="PyTorch's tests need it: python -m pip install expecttest")
    run = subprocess.run([sys.executable, "-c", PYTORCHS_OWN], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len([line for line in lines if line.startswith("like")]) >= 48
    assert len([line for line in lines if line.startswith("refused")]) >= 24


@pytest.mark.parametrize("how", ["nothing", "None", "closure", "keyword"])
def test_hooks_get_the_arguments_that_step_got(how):
    given = {
        "nothing": ((), {}), "None": ((None,), {}), "closure": ((lambda: 1.0,), {}),
        "keyword": ((), {"closure": lambda: 2.0}),
    }[how]  # fmt: skip
    seen = []
    for kind in (RMSprop, torch.optim.RMSprop):
        optimizer = kind([torch.nn.Parameter(torch.ones(3))])
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append((opt is args[0], args[1:], kwargs)))
        optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append((opt is args[0], args[1:], kwargs)))
        seen.append(optimizer.step(*given[0], **given[1]))
    assert seen[:3] == seen[3:] == [(True, *given), (True, *given), seen[2]]


def test_hooks_that_give_other_arguments():
    for kind in (RMSprop, torch.optim.RMSprop):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([weight])
        weight.grad = torch.ones(3)
        for returned, loss in ((((optimizer,), {}), None), (((optimizer, lambda: 3.0), {}), 3.0)):
            handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs, returned=returned: returned)
            assert optimizer.step(lambda: 2.0) == loss
            handle.remove()
        optimizer.register_step_pre_hook(lambda *_: 7)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\)"):
            optimizer.step()
        assert optimizer.state[weight]["step"] == 2


def test_hooks_are_called_once_for_a_subclass_with_a_step_of_its_own():
    RMSprop([torch.nn.Parameter(torch.ones(3))])

    class Own(RMSprop):
        def step(self, closure=None):
            return super().step(closure)

    optimizer, seen = Own([torch.nn.Parameter(torch.ones(3))]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.step()
    assert seen == ["before"]


def test_the_step_below_its_hooks_can_be_reached_and_its_signature_is_pytorchs():
    assert str(inspect.signature(RMSprop.step).replace(return_annotation=None)).startswith("(self, closure:")
    for kind in (RMSprop, torch.optim.RMSprop):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = kind([weight])
        optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook was called"))
        weight.grad = torch.ones(3)
        optimizer.step.__wrapped__(optimizer)
        with torch.no_grad():
            optimizer.step.__wrapped__.__wrapped__(optimizer)
        assert optimizer.state[weight]["step"] == 2


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


@PYTORCHS_STEP
def test_explain_says_which_parameters_take_which_step_and_why():
    values = torch.ones(8)
    params = {
        "usual": torch.nn.Parameter(torch.ones(9)),
        "bfloat16": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "half": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "strided": torch.nn.Parameter(torch.ones(3, 2).t()),
        "part": torch.nn.Parameter(values[:4]),
        "moved": torch.nn.Parameter(torch.ones(2)),
        "state": torch.nn.Parameter(torch.ones(2)),
        "gradient": torch.nn.Parameter(torch.ones(2)),
        "meta": torch.nn.Parameter(torch.ones(2, device="meta")),
    }
    optimizer = RMSprop(params.items(), kernel="serial")
    params["moved"].data = values[4:6]
    params["gradient"].grad = torch.ones(2, 2)[:, 0]
    params["state"].grad = torch.ones(2)
    optimizer.step()
    optimizer.state[params["state"]]["square_avg"] = values[6:8]
    wrong = "its state cannot be moved: it is incomplete, of another shape or dtype, or others share its memory"
    assert optimizer.explain() == [
        "group 0, 1 of 9 parameters (usual): the compiled pass (serial, as asked for)",
        "group 0, 2 of 9 parameters (bfloat16, half): PyTorch's step; its dtype is torch.bfloat16",
        "group 0, 1 of 9 parameters (strided): PyTorch's step; its elements do not lie one after another",
        "group 0, 2 of 9 parameters (part, moved): PyTorch's step; others share its memory",
        f"group 0, 1 of 9 parameters (state): PyTorch's step; {wrong}",
        "group 0, 1 of 9 parameters (gradient): PyTorch's step; its last gradient is not a dense tensor of its dtype "
        "and shape",
        "group 0, 1 of 9 parameters (meta): PyTorch's step; it is on the device meta",
    ]
    optimizer.param_groups[0]["eps"] = 0
    assert "cannot take the options of its group (epsilon: " in optimizer.explain()[0]
    asked = RMSprop([torch.nn.Parameter(torch.ones(1)) for _ in range(7)], capturable=True)
    assert asked.explain() == [
        "group 0, 7 of 7 parameters (0, 1, 2, 3, 4, ...): PyTorch's step; differentiable=True or capturable=True asks "
        "for it"
    ]


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((7, 6), {}, "7 of 13 elements, mainly because its dtype is torch.bfloat16"),
        ((6, 6), {}, None),
        ((7, 6), {"differentiable": True}, None),
        ((0, 6), {"eps": 0}, "6 of 6 elements, mainly because the compiled pass cannot take the options"),
    ],
    ids=["most", "half", "asked for", "options"],
)
def test_one_warning_where_most_of_a_model_takes_pytorchs_step(sizes, options, expected):
    params = [
        torch.nn.Parameter(torch.ones(n).to(d)) for n, d in zip(sizes, (torch.bfloat16, torch.float32), strict=True)
    ]
    for p in params:
        p.requires_grad_(False)  # with differentiable=True, PyTorch refuses to write to what autograd watches
    optimizer = RMSprop(params, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (expected is not None)
    if expected is not None:
        assert f"PyTorch's own step is taken for {expected}" in messages[0]
        assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler warns of what it does itself
def test_a_compiled_model_and_a_compiled_training_step():
    both = []
    for kind in (RMSprop, torch.optim.RMSprop):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
        optimizer = kind(model.parameters())
        # Without a compiler of C++, which not every machine has; the rest is as with the default one.
        compiled = torch.compile(model, backend="aot_eager")
        x = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(10, 3)

        def train(optimizer=optimizer, compiled=compiled, x=x):
            optimizer.zero_grad()
            loss = ((compiled(x) - x.sum(1, keepdim=True)) ** 2).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses = [train() for _ in range(5)] + [torch.compile(train, backend="aot_eager")() for _ in range(5)]
        assert losses[-1] < losses[0]
        both.append((list(model.parameters()), losses))
    assert_near(*[params for params, _ in both])
    torch.testing.assert_close(both[0][1], both[1][1])


def test_tied_layers_are_one_parameter():
    both = []
    for kind in (RMSprop, torch.optim.RMSprop):
        torch.manual_seed(0)
        first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        second.weight = first.weight
        model = torch.nn.Sequential(first, torch.nn.Tanh(), second)
        optimizer = kind(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            (model(torch.ones(2, 4)) ** 2).sum().backward()
            optimizer.step()
        assert second.weight is first.weight
        both.append(list(model.parameters()))
    assert len(both[0]) == 3
    assert_near(*both, torch.float32)


@pytest.mark.skipif(not JIT, reason="compiled code finds the tensors")
def test_the_compiled_way_is_there():
    assert dlpack.exchange_function(torch.Tensor) != 0
    assert dlpack.exchange_function(np.ndarray) == 0
    assert pointers.available()
    mine, ours, *_ = pair()
    give(mine, 0)
    ours.step()
    assert ours._packs[0].moved.locator.compiled


def test_models_from_files():
    model = torch.nn.Linear(3, 2)
    saved, whole = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), saved)
    torch.save(model, whole)
    saved.seek(0)
    whole.seek(0)
    model.load_state_dict(torch.load(saved))
    loaded = torch.load(whole, weights_only=False)
    assert "the compiled pass" in RMSprop(model.parameters()).explain()[0]
    (line,) = RMSprop(loaded.parameters()).explain()
    assert line.endswith("from torch.load of a whole model (copy.deepcopy of it helps)")
    assert "the compiled pass" in RMSprop(copy.deepcopy(loaded).parameters()).explain()[0]
