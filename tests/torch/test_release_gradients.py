"""`fastrms.torch`: gradients that are dropped within `backward()`, as soon as their parameters are updated."""

import copy
import gc
import pickle
import weakref

import pytest
from helpers import JIT, count_calls, need_torch

torch = need_torch()
pytestmark = pytest.mark.torch

from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402 - all need torch
from torch_pairs import CONFIGS, give, parameters  # noqa: E402

from fastrms import OptionError, StepInProgressError  # noqa: E402
from fastrms.torch import RMSprop  # noqa: E402
from fastrms.torch.release import Released  # noqa: E402

PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")
BOTH = pytest.mark.parametrize("release", [False, True])


def backward(params, step, skip=(), **options):
    """Give parameters random gradients by autograd, with an error for each other element."""
    losses = []
    for k, p in enumerate(params):
        if k not in skip and p.requires_grad:
            generator = torch.Generator().manual_seed(1000 * step + k)
            weights = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            losses.append((p * weights).sum().abs())
    sum(losses).backward(**options)


def assert_same_bits(first, second, versions=True):
    """Compare (parameters, optimizer) of two runs."""
    for a, b in zip(first[0], second[0], strict=True):
        assert not versions or a._version == b._version
        assert torch.equal(a, b)
    one, other = (optimizer.state_dict() for _, optimizer in (first, second))
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == other["state"][key].keys()
        assert all(torch.equal(value, other["state"][key][name]) for name, value in state.items())


def made(release, params=None, **options):
    params = parameters(torch.float32) if params is None else params
    optimizer = RMSprop(params, **options)
    if release:
        optimizer.release_gradients()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_a_released_step_has_the_bits_of_a_whole_step(options, dtype, way):
    runs = []
    for release in (False, True):
        params, optimizer = made(release, parameters(dtype), **options, **way)
        for step in range(6):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            backward(params, step, skip=(2,) if step < 2 else (0, 4) if step == 4 else ())
            optimizer.step()
            assert not release or all(p.grad is None for p in params)
        runs.append((params, optimizer))
    assert_same_bits(*runs)


def test_groups_schedulers_state_and_options_that_change_between_steps(way):
    runs = []
    for release in (False, True):
        params = parameters()
        groups = [{"params": params[:2], "momentum": 0.9}, {"params": params[2:3], "lr": 0.01}]
        _, optimizer = made(release, groups, lr=0.1, **way)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        for step in range(16):
            if step == 3:
                optimizer.add_param_group({"params": params[3:4], "centered": True})
            if step == 4:  # by hand, which no hook can see before a step has
                optimizer.param_groups[0]["params"].append(params[4])
            if step == 5:
                optimizer.param_groups[0].update(alpha=0.5, eps=1e-3, weight_decay=0.1, maximize=True)
            if step == 6:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 7:
                del optimizer.state[params[1]]
            if step == 8:
                params[0].data = params[0].detach().clone()
            if step == 9:
                optimizer.state[params[0]]["square_avg"] = torch.ones_like(params[0])
            if step == 10:
                optimizer.param_groups[0]["eps"] = 0.0  # which the compiled pass cannot take
            if step == 12:
                optimizer.param_groups[0]["eps"] = 1e-8
            if step == 13:
                params[1].data = torch.ones(4, dtype=torch.float64)
                del optimizer.state[params[1]]
            optimizer.zero_grad()
            backward(params, step, skip=(3,) if step == 9 else ())
            if release and step != 4:
                listed = [p for group in optimizer.param_groups for p in group["params"]]
                assert all(p.grad is None or type(p.grad) is Released for p in listed)
            optimizer.step()
            scheduler.step()
        runs.append((params, optimizer))
    assert_same_bits(*runs)


KINDS = {
    "bfloat16": lambda first: torch.ones(3, 2, dtype=torch.bfloat16),
    "complex": lambda first: torch.ones(3, 2, dtype=torch.complex64),
    "strided": lambda first: torch.arange(6.0).reshape(2, 3).t(),
    "in the memory of another": lambda first: first.data,
    "listed twice": lambda first: torch.ones(3),
    "with strided gradients": lambda first: torch.arange(6.0).reshape(3, 2),
    "empty": lambda first: torch.ones(0, 3),
    "scalar": lambda first: torch.tensor(2.0),
}


@PYTORCHS_STEP
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_every_kind(kind):
    runs = []
    for release in (False, True):
        first = torch.nn.Parameter(torch.ones(4))
        params = [first, torch.nn.Parameter(KINDS[kind](first))]
        if kind == "with strided gradients":
            params[1].register_hook(lambda gradient: gradient.t().contiguous().t())
        _, optimizer = made(release, params * 2 if kind == "listed twice" else params, momentum=0.5)
        for step in range(4):
            optimizer.zero_grad()
            backward(params, step, create_graph=step == 2)
            optimizer.step()
        runs.append((params, optimizer))
    assert runs[0][1].explain() == runs[1][1].explain()
    if kind == "in the memory of another":  # autograd's order of the two is another one
        torch.testing.assert_close(runs[0][0], runs[1][0])
    else:
        assert_same_bits(*runs)


def test_no_gradient_is_left_after_backward():
    model = torch.nn.Sequential(*[torch.nn.Linear(9, 9) for _ in range(5)], torch.nn.Linear(9, 2).bfloat16())
    _, optimizer = made(True, list(model.parameters()))
    gradients, alive, dropped = [], [], []

    def follow(gradient):
        gradients.append(StorageWeakRef(gradient.untyped_storage()))
        alive.append(sum(not each.expired() for each in gradients))

    for p in model.parameters():
        p.register_hook(follow)
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        model[5](model[:5](torch.ones(3, 9)).bfloat16()).sum().backward()
        assert len(gradients) == 12
        assert all(each.expired() for each in gradients)
        assert max(alive) <= 2  # weight and bias of a layer
        dropped.append([p.grad for p in model.parameters()])
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.step()
        gradients.clear()
    # The allocator can give memory back if no small objects are made within backward().
    assert all(first is second for first, second in zip(*dropped, strict=True))


def test_nothing_that_stays_is_made_within_backward(monkeypatch):
    model, optimizer = model_and_optimizer(momentum=0.9, centered=True)
    for name in ("fastrms.torch.state.view_of", "fastrms.torch.release.Released.__new__"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("the allocator cannot give memory back"))
    model(X).sum().backward()
    monkeypatch.undo()
    optimizer.step()
    assert len(optimizer.state) == 4


def test_other_hooks_of_a_parameter():
    """One that takes the gradient away before ours, and one that puts the parameter elsewhere."""
    runs = []
    for release in (False, True):
        model, optimizer = model_and_optimizer(momentum=0.9)
        optimizer.release_gradients(False)
        params = list(model.parameters())

        def take_away(p):
            p.grad = None

        def put_elsewhere(p):
            p.data = p.data.clone()

        handles = [params[0].register_post_accumulate_grad_hook(take_away)]
        for step in range(4):
            if step == 2:
                handles.pop().remove()
                handles.append(params[1].register_post_accumulate_grad_hook(put_elsewhere))
            optimizer.release_gradients(False)  # so that ours come last
            optimizer.release_gradients(release)
            optimizer.zero_grad()
            model(X).sum().backward()
            optimizer.step()
            assert (params[0] in optimizer.state) == (step >= 2)
        runs.append((params, optimizer))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    assert runs[0][1].state_dict()["state"].keys() == runs[1][1].state_dict()["state"].keys()


def model_and_optimizer(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    _, optimizer = made(True, list(model.parameters()), **options)
    return model, optimizer


X = torch.linspace(-1.0, 1.0, 15).reshape(5, 3)
MISUSES = {
    "a second backward": lambda model, optimizer: model(X).sum().backward(),
    "a second backward after zero_grad of the model": lambda model, optimizer: (
        model.zero_grad(), model(X).sum().backward()
    ),
    "zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "zero_grad to 0": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "zero_grad of the model to 0": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "clipping by norm": lambda model, optimizer: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "clipping by value": lambda model, optimizer: torch.nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "reading": lambda model, optimizer: [float(p.grad.norm()) for p in model.parameters() if p.grad is not None],
    "another optimizer": lambda model, optimizer: torch.optim.SGD(model.parameters()).step(),
    "our optimizer": lambda model, optimizer: RMSprop(model.parameters()).step(),
    "a copy": lambda model, optimizer: copy.deepcopy(model[0].weight.grad),
}  # fmt: skip


@PYTORCHS_STEP
@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises(misuse):
    model, optimizer = model_and_optimizer()
    for _ in range(2):  # the step after an error is possible
        model(X).sum().backward()
        assert "release_gradients" in repr(model[0].weight.grad)
        with pytest.raises(StepInProgressError, match=r"release_gradients\(\)"):
            MISUSES[misuse](model, optimizer)
        try:
            optimizer.step()
        except StepInProgressError:
            model.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_gradscaler_raises():
    model, optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(X).sum()).backward()
    with pytest.raises(StepInProgressError, match="unscale"):
        scaler.step(optimizer)


def test_options_that_are_set_after_backward_raise():
    model, optimizer = model_and_optimizer()
    model(X).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(OptionError, match=r"same options from backward\(\) to step\(\)"):
        optimizer.step()
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()


@PYTORCHS_STEP
@pytest.mark.parametrize("name", ["differentiable", "capturable"])
def test_options_that_need_gradients_raise(name):
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(OptionError, match=f"{name}: expected False with release_gradients"):
        RMSprop([weight], **{name: True}).release_gradients()
    _, optimizer = made(True, [weight])
    optimizer.param_groups[0][name] = True
    with pytest.raises(OptionError, match=f"{name}: expected False with release_gradients"):
        weight.sum().backward()
    assert weight.tolist() == [1.0] * 3


def test_a_graph_that_is_kept_is_refused_by_autograd():
    weight = torch.nn.Parameter(torch.ones(3))
    _, optimizer = made(True, [weight])
    loss = (weight**2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_is_used_twice_is_updated_once():
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        table = torch.nn.Embedding(7, 3)
        _, optimizer = made(release, list(table.parameters()))
        for _ in range(3):
            (torch.tanh(table(torch.tensor([1, 2, 2]))) @ table.weight.t()).logsumexp(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((list(table.parameters()), optimizer))
    assert_same_bits(*runs)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_frozen_parameters_and_other_gradients_than_those_of_backward():
    runs = []
    for release in (False, True):
        model, optimizer = model_and_optimizer(lr=0.1)
        optimizer.release_gradients(release)
        params = list(model.parameters())
        for step in range(8):
            model[0].requires_grad_(step in (2, 3, 4))
            optimizer.zero_grad()
            if step == 6:
                give(params, step, skip=(1,))
            else:
                model(X).sum().backward(create_graph=step == 7, inputs=params[2:3] if step == 5 else None)
            if release and step == 3:
                assert all(type(p.grad) is Released for p in params)
            optimizer.step()
        runs.append((params, optimizer))
    assert_same_bits(*runs)


def test_release_can_begin_and_end_between_any_two_calls():
    runs = []
    for release in (False, True):
        model, optimizer = model_and_optimizer()
        for step in range(6):
            if step != 2:
                optimizer.release_gradients(release)
            optimizer.zero_grad()
            model(X).sum().backward()
            if step == 2:  # it begins: the step takes the gradients that are there
                optimizer.release_gradients(release)
            if step == 4 and release:  # it ends: this ends the step too
                optimizer.release_gradients(False)
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            if step in (1, 4):
                optimizer.release_gradients(False)
        runs.append((list(model.parameters()), optimizer))
    assert_same_bits(*runs)


def test_changes_between_backward_and_step():
    runs = []
    for release in (False, True):
        params = parameters()
        _, optimizer = made(release, params[:3], momentum=0.9)
        for step in range(4):
            optimizer.zero_grad()
            backward(params, step)
            if step == 1:  # parameters that have gradients already
                optimizer.add_param_group({"params": params[3:4], "lr": 0.1})
                optimizer.param_groups[0]["params"].append(params[4])
            optimizer.step()
        runs.append((params, optimizer))
    assert_same_bits(*runs)


def test_a_state_that_is_loaded_after_backward_ends_the_step():
    model, optimizer = model_and_optimizer(momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    model(X).sum().backward()
    optimizer.load_state_dict(saved)
    assert all(p.grad is None for p in model.parameters())
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_an_end_of_release_leaves_no_hooks():
    model, optimizer = model_and_optimizer()
    assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer.release_gradients()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    del optimizer.param_groups[0]["params"][0]
    optimizer.step()
    optimizer.release_gradients(False)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_closures_and_hooks_of_steps():
    runs = []
    for release in (False, True):
        model, optimizer = model_and_optimizer()
        optimizer.release_gradients(release)
        seen = []
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(X).sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert seen == ["before", "after"] * 3
        assert losses[2] < losses[0]
        runs.append((list(model.parameters()), optimizer))
    assert_same_bits(*runs)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_copies_keep_their_gradients(again):
    model, optimizer = model_and_optimizer()
    model(X).sum().backward()
    optimizer.step()
    other, copied = again((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    other(X).sum().backward()
    assert all(type(p.grad) is torch.Tensor for p in other.parameters())
    copied.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    model(X).sum().backward()
    optimizer.step()
    assert_same_bits((list(model.parameters()), optimizer), (list(other.parameters()), copied), versions=False)


def test_an_optimizer_that_nobody_has_any_more_updates_nothing():
    model, optimizer = model_and_optimizer()
    gone = weakref.ref(optimizer)
    model(X).sum().backward()
    optimizer.step()
    gc.disable()
    try:
        del optimizer
        assert gone() is None  # without a search for cycles
    finally:
        gc.enable()
    before = [p.detach().clone() for p in model.parameters()]
    model(X).sum().backward()
    assert all(type(p.grad) is torch.Tensor for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_calls_for_a_parameter_do_not_depend_on_the_number_of_parameters():
    calls = {}
    for count in (10, 200):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
        _, optimizer = made(True, params)
        for step in range(2):  # the first step makes the state
            loss = sum(p.sum() for p in params)
            calls[count, step] = count_calls(loss.backward, ("call", "c_call")) / count
            optimizer.step()
    assert calls[200, 0] <= calls[10, 0]
    assert calls[200, 1] <= calls[10, 1]


@pytest.mark.skipif(not JIT, reason="PyTorch's compiler is slow")
@pytest.mark.parametrize("autograd", [False, True], ids=["model", "model and autograd"])
def test_a_compiled_model(autograd):
    runs = []
    for release in (False, True):
        model, optimizer = model_and_optimizer()
        optimizer.release_gradients(release)
        backward = torch.compile(lambda model=model: model(X).sum().backward(), backend="aot_eager")
        for _ in range(3):
            optimizer.zero_grad()
            with torch._dynamo.config.patch(compiled_autograd=autograd):
                backward()
            assert all((type(p.grad) is Released) == release for p in model.parameters())
            optimizer.step()
        runs.append((list(model.parameters()), optimizer))
    assert_same_bits(*runs)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_gradients_that_are_exchanged_between_processes_raise(tmp_path):
    model, optimizer = model_and_optimizer()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(StepInProgressError, match=r"release_gradients\(\)"):
            parallel(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    optimizer.step()
