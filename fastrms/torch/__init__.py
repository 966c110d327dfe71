"""``RMSprop`` for PyTorch: a `torch.optim.RMSprop` whose steps are taken by compiled kernels.

PyTorch has no fused RMSprop: on the CPU, it runs several operations for each parameter in each step. Here, the
parameters of a group are views of one buffer, and one compiled pass updates them in place. The pass reads gradients
where autograd left them. Parameters that it cannot update fall back to PyTorch's own functions, with the same state.

    from fastrms.torch import RMSprop
    optimizer = RMSprop(model.parameters(), lr=1e-3)

This package needs PyTorch, as installed with the extra ``torch``. ``import fastrms`` does not import this package.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError('PyTorch is not installed; install with: python -m pip install "fastrms[torch]"') from error

from fastrms.torch.optimizer import RMSprop

__all__ = ["RMSprop"]
