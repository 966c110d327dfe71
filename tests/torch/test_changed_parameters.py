"""`fastrms.torch`: parameters that grow, are swapped, replaced, pruned or listed twice."""

import pytest
from helpers import need_torch

torch = need_torch()
pytestmark = pytest.mark.torch

from torch_pairs import assert_near, assert_same_state, give  # noqa: E402 - both need torch

from fastrms.torch import RMSprop  # noqa: E402

PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


def test_parameters_that_grow(way):
    """As by hand where neurons or points are added: with state that grows with them, or that begins anew."""
    for anew in (True, False):
        both = []
        for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
            params = [torch.nn.Parameter(torch.arange(6.0).reshape(3, 2)), torch.nn.Parameter(torch.ones(4))]
            optimizer = kind(params, momentum=0.9, **options)
            for step in range(9):
                if step % 3 == 2:
                    more = torch.full((step, 2), 0.5)
                    params[0].data = torch.cat([params[0].data, more])
                    state = optimizer.state[params[0]]
                    if anew:
                        del optimizer.state[params[0]]
                    else:
                        for name in ("square_avg", "momentum_buffer"):
                            state[name] = torch.cat([state[name], more])
                optimizer.zero_grad()
                sum((p**2).sum() for p in params).backward()
                optimizer.step()
            both.append((params, optimizer))
        (mine, ours), (theirs, other) = both
        assert_near(mine, theirs, torch.float32)
        assert_same_state(ours, other, torch.float32)
        give(mine, 0)
        ours.step()  # after the step in which it was noticed, the compiled pass takes them again
        assert ours.explain()[0].startswith("group 0, 2 of 2 parameters (0, 1): the compiled pass")


def test_resizing_a_parameter_in_place_is_refused_by_pytorch_and_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = RMSprop([weight])
    with pytest.raises(RuntimeError, match="resize storage that is not resizable"):
        weight.data.resize_(6)
    assert weight.tolist() == [1.0] * 3
    weight.grad = torch.ones(3)
    optimizer.step()


def test_a_pruned_model_with_parameters_and_state_replaced_by_hand(way):
    """How programs for Gaussian splatting add and remove points."""
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        points = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
        optimizer = kind([{"params": [points], "name": "xyz"}], **options)
        for step in range(9):
            if step % 3 == 2:
                (group,) = optimizer.param_groups
                stored = optimizer.state.get(group["params"][0])
                rows = [0, 1, 2, 0, 1][: 3 + step % 2]
                stored["square_avg"] = stored["square_avg"][rows]
                del optimizer.state[group["params"][0]]
                group["params"][0] = points = torch.nn.Parameter(group["params"][0][rows].requires_grad_(True))
                optimizer.state[group["params"][0]] = stored
            optimizer.zero_grad()
            (points**2).sum().backward()
            optimizer.step()
        both.append(([points], optimizer))
    (mine, ours), (theirs, other) = both
    assert_near(mine, theirs, torch.float32)
    assert_same_state(ours, other, torch.float32)


@pytest.mark.parametrize("when", ["before", "after"])
def test_modules_whose_parameters_are_swapped_when_they_are_converted(when, way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        try:
            torch.__future__.set_swap_module_params_on_conversion(when == "before")
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 2)
            optimizer = kind(model.parameters(), **options)
            torch.__future__.set_swap_module_params_on_conversion(True)
            for step in range(6):
                if step == 2:
                    optimizer.zero_grad()
                    model.double()
                x = torch.ones(4, 3, dtype=model.weight.dtype)
                optimizer.zero_grad()
                loss = (model(x) ** 2).sum()
                loss.backward()
                optimizer.step()
            versions = [p._version for p in model.parameters()]
            optimizer.step()
            assert [p._version for p in model.parameters()] == [version + 1 for version in versions]
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        both.append(list(model.parameters()))
    assert both[0][0].dtype == torch.float64
    assert_near(*both, torch.float32)


def test_parameters_that_are_swapped_with_one_another(way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        params = [torch.nn.Parameter(torch.ones(3) * k) for k in range(1, 4)]
        optimizer = kind(params, **options)
        for step in range(6):
            give(params, step)
            optimizer.step()
            if step == 2:
                for p in params:
                    p.grad = None
                torch.utils.swap_tensors(params[0], params[2])
        versions = [p._version for p in params]
        optimizer.step()
        assert [p._version for p in params] == [version + 1 for version in versions]
        both.append(params)
    assert_near(*both, torch.float32)


def test_a_parameter_that_is_listed_twice(way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        params = [torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(2))]
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = kind([*params, params[1]], momentum=0.5, **options)
        for step in range(5):
            give(params, step)
            optimizer.step()
        both.append((params, optimizer))
    (mine, ours), (theirs, other) = both
    assert_near(mine, theirs, torch.float32)
    assert_same_state(ours, other, torch.float32)
    assert "group 0, 2 of 3 parameters (1, 2): PyTorch's step; it is listed twice" in ours.explain()


def test_a_storage_that_somebody_holds_stays_that_of_the_parameter(way):
    both = []
    for kind, options in ((RMSprop, way), (torch.optim.RMSprop, {})):
        params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(9))]
        storage = params[0].untyped_storage()
        optimizer = kind(params, **options)
        give(params, 0)
        optimizer.step()
        assert params[0].untyped_storage().data_ptr() == storage.data_ptr()
        both.append(params)
    assert_near(*both, torch.float32)
