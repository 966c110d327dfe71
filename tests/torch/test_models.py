"""`fastrms.torch` with models: compiled, tied, converted, from files."""

import copy
import io

import pytest
from helpers import need_torch

torch = need_torch()
pytestmark = pytest.mark.torch

from torch_pairs import assert_near  # noqa: E402 - all need torch

from fastrms.torch import RMSprop  # noqa: E402

# Where most of a model takes PyTorch's step, the first step says so.
PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


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


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what it does itself
def test_distributed_data_parallel_and_autocast(tmp_path):
    both = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for kind in (RMSprop, torch.optim.RMSprop):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            parallel = torch.nn.parallel.DistributedDataParallel(model)
            optimizer = kind(parallel.parameters())
            x = torch.linspace(-1, 1, 30).reshape(10, 3)
            for _ in range(5):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = ((parallel(x) - x.sum(1, keepdim=True)) ** 2).mean()
                loss.backward()
                optimizer.step()
            both.append(list(model.parameters()))
            if kind is RMSprop:
                assert "the compiled pass" in optimizer.explain()[0]
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*both)


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
