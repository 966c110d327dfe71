"""Where fastrms.torch.RMSprop finds gradients and leaves them, beside torch.optim.RMSprop."""

import numpy as np
import pytest
from helpers import JIT, need_torch

torch = need_torch()
pytestmark = pytest.mark.torch

from torch_pairs import assert_near, assert_same_state, give, pair, parameters  # noqa: E402 - both need torch

from fastrms.kernels import pointers  # noqa: E402
from fastrms.torch import RMSprop  # noqa: E402


def negative(gradient):
    """The same, by way of memory that has the negative."""
    return torch.complex(gradient, -gradient).conj().imag


def forms(gradient):
    """A gradient in the forms that somebody may give it, all of the same value."""
    spaced = torch.zeros(*gradient.shape, 2, dtype=gradient.dtype)
    spaced[..., 0] = gradient
    return {
        "same": gradient,
        "transposed": gradient.t().contiguous().t(),
        "spaced": spaced[..., 0],
        "negative": negative(gradient),
        "parameter": torch.nn.Parameter(gradient),
        "part": torch.cat([gradient, gradient])[: len(gradient)],
        "expanded": gradient.sum().expand(gradient.shape),
    }


@pytest.mark.parametrize("form", forms(torch.ones(2, 2)))
def test_gradients_in_any_form(form, way):
    mine, ours, theirs, other = pair(way)
    for step in range(6):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step)
            if step % 3:
                params[0].grad = forms(params[0].grad)[form]
                if form == "negative":  # of one element they are contiguous
                    params[1].grad = negative(params[1].grad)
                    assert params[1].grad.is_neg()
                    assert params[1].grad.is_contiguous()
            optimizer.step()
    assert_near(mine, theirs)
    assert_same_state(ours, other)


@pytest.mark.parametrize("where", ["itself", "another", "state"])
def test_a_gradient_in_memory_that_the_step_writes(where, way):
    both = []
    for make in (lambda p: RMSprop(p, **way), lambda p: torch.optim.RMSprop(p, foreach=False)):
        params = [torch.nn.Parameter(torch.arange(1.0, 7.0) * k) for k in (1, 2, 3)]
        optimizer = make(params)
        for p in params:
            p.grad = torch.ones(6)
        optimizer.step()
        source = {"itself": params[1], "another": params[0], "state": optimizer.state[params[0]]["square_avg"]}[where]
        params[1].grad = source.detach()
        optimizer.step()
        both.append(params)
    # With the gradient in something else's memory, the result depends on who comes first, in PyTorch too.
    compared = slice(None) if where == "itself" else slice(0, 3, 2)
    assert_near(both[0][compared], both[1][compared], torch.float32)


def test_none_gradients_are_skipped_and_have_no_state(way):
    mine, ours, theirs, other = pair(way, momentum=0.9)
    for step, skip in enumerate([(0, 1, 2, 3, 4), (1, 4), (1,), (), (0,)]):
        for params, optimizer in ((mine, ours), (theirs, other)):
            give(params, step, skip)
            optimizer.step()
        assert_same_state(ours, other)
    assert_near(mine, theirs)


def test_gradients_that_autograd_adds_to_or_replaces(way):
    mine, ours, theirs, other = pair(way)
    for step in range(8):
        for params, optimizer in ((mine, ours), (theirs, other)):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            sum(((p - step) ** 3).sum() for p in params).backward()
            optimizer.step()
    assert_near(mine, theirs)


def test_gradients_set_to_0_are_views_of_one_buffer_and_the_same_tensors(way):
    mine, ours, theirs, other = pair(way, momentum=0.5)
    for step in range(12):
        for params, optimizer in ((mine, ours), (theirs, other)):
            if step == 6:  # one is replaced, as by a user
                params[0].grad = torch.ones_like(params[0])
            before = [p.grad for p in params]
            versions = [0 if g is None else g._version for g in before]
            optimizer.zero_grad(set_to_none=False)
            for p, gradient, version in zip(params, before, versions, strict=True):
                assert p.grad is gradient
                assert p.grad is None or (p.grad._version > version and not p.grad.any())
            used = params if step % 3 else params[1:]
            sum(((p - step) ** 3).sum() for p in used).backward()
            optimizer.step()
    assert_near(mine, theirs)
    assert_same_state(ours, other)
    if not ours._packs[
        0
    ].moved.reads_tensors:  # Tensor.numpy() leaves a mark for good that somebody else has the memory
        return
    flat = ours._packs[0].moved._gradient_buffer
    for k in (0, 1, 2, 4):
        assert mine[k].grad.data_ptr() == flat.leaves[k].ctypes.data
        assert flat.leaves[k].tolist() == mine[k].grad.tolist()


def test_gradients_in_one_buffer_are_read_as_one():
    mine = parameters()[:3]
    ours = RMSprop(mine, alpha=0.0)
    for p in mine:
        p.grad = torch.ones_like(p)
    versions = [p.grad._version for p in mine]
    ours.zero_grad(set_to_none=False)
    assert [p.grad._version for p in mine] == [version + 1 for version in versions]
    for k, p in enumerate(mine):
        p.grad += k + 1
    inner = ours._packs[0].moved.optimizer
    inner.buffers["grads"].flat[:] = np.nan  # where they would be gathered
    ours.step()
    assert np.isnan(inner.buffers["grads"].flat).all() == (JIT and pointers.available())
    for p in mine:
        p.grad = -p.grad
    before = [p.detach().clone() for p in mine]
    ours.step()
    assert all((p > q).all() for p, q in zip(mine, before, strict=True))


@pytest.mark.parametrize("kind", ["seen", "kept", "differentiable", "strided", "parameter", "bfloat16"])
def test_a_gradient_that_others_would_notice_is_set_to_0_where_it_lies(kind, way):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float64
    weights = [torch.nn.Parameter(torch.ones(2, 2, dtype=dtype)) for _ in range(2)]
    ours = RMSprop(weights, **way)
    for p in weights:
        p.grad = torch.ones(2, 2, dtype=dtype)
    if kind == "seen":
        seen = weights[0].grad.numpy()
    elif kind == "kept":  # two steps later, after autograd has put another one there
        ours.zero_grad(set_to_none=False)
        seen = weights[0].grad
        weights[0].grad = None
        for p in weights:
            p.grad = torch.full((2, 2), 3.0, dtype=dtype) if p.grad is None else p.grad
        seen += 7
        ours.step()
        assert seen.tolist() == [[7.0] * 2] * 2
        ours.zero_grad(set_to_none=False)
    elif kind == "differentiable":
        (weights[0].grad,) = torch.autograd.grad((weights[0] ** 3).sum(), weights[:1], create_graph=True)
        assert weights[0].grad.requires_grad
    elif kind == "strided":
        weights[0].grad = torch.ones(2, 2, dtype=dtype).t()
    elif kind == "parameter":
        weights[0].grad = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    held = weights[0].grad
    ours.zero_grad(set_to_none=False)
    assert weights[0].grad is held
    assert held.tolist() == [[0.0] * 2] * 2
    assert not held.requires_grad
    if kind == "seen":
        assert seen.tolist() == [[0.0] * 2] * 2
    if kind == "kept":
        assert seen.tolist() == [[7.0] * 2] * 2
    assert weights[1].grad.tolist() == [[0.0] * 2] * 2
