"""`fastrms.torch`: closures and hooks of steps."""

import inspect

import pytest
from helpers import need_torch

torch = need_torch()
pytestmark = pytest.mark.torch


from fastrms.torch import RMSprop  # noqa: E402

# Where most of a model takes PyTorch's step, the first step says so.
PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


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
