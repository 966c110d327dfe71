"""`fastrms.torch` in the configurations that PyTorch tests its own optimizer in."""

import subprocess
import sys

import pytest
from helpers import need_torch

torch = need_torch()
pytestmark = pytest.mark.torch


# Where most of a model takes PyTorch's step, the first step says so.
PYTORCHS_STEP = pytest.mark.filterwarnings("ignore:fastrms.torch.RMSprop. PyTorch's own step:RuntimeWarning")


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
