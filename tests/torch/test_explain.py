"""`fastrms.torch`: `explain` and a warning say which parameters take PyTorch's step."""

import warnings

import pytest
from helpers import need_torch

torch = need_torch()
pytestmark = pytest.mark.torch


from fastrms.torch import RMSprop  # noqa: E402

# Where most of a model takes PyTorch's step, the first step says so.
PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


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
    wrong = (
        "its state cannot be moved: it is incomplete, has another shape or dtype, or shares memory with other objects"
    )
    assert optimizer.explain() == [
        "group 0, 1 of 9 parameters (usual): the compiled pass (serial, as requested)",
        "group 0, 2 of 9 parameters (bfloat16, half): PyTorch's step; its dtype is torch.bfloat16",
        "group 0, 1 of 9 parameters (strided): PyTorch's step; it is not contiguous",
        "group 0, 2 of 9 parameters (part, moved): PyTorch's step; other objects share its memory",
        f"group 0, 1 of 9 parameters (state): PyTorch's step; {wrong}",
        "group 0, 1 of 9 parameters (gradient): PyTorch's step; its last gradient is not a dense tensor of its dtype "
        "and shape",
        "group 0, 1 of 9 parameters (meta): PyTorch's step; it is on the device meta",
    ]
    optimizer.param_groups[0]["eps"] = 0
    assert "cannot take the options of its group (epsilon: " in optimizer.explain()[0]
    asked = RMSprop([torch.nn.Parameter(torch.ones(1)) for _ in range(7)], capturable=True)
    assert asked.explain() == [
        "group 0, 7 of 7 parameters (0, 1, 2, 3, 4, ...): PyTorch's step; differentiable=True or capturable=True "
        "requires it"
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
        assert f"PyTorch's own step is used for {expected}" in messages[0]
        assert caught[0].filename == __file__
