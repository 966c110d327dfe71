"""The optimizers of PyTorch and Keras, each with the same few methods: make one, step, say where it stands."""

import sys
from types import MappingProxyType

from fastrms import interop

TORCH = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "lr": 0.02},
    "centered": {"centered": True, "eps": 1e-3},
    "weight decay": {"weight_decay": 0.1, "maximize": True},
    "all": {"lr": 0.03, "alpha": 0.9, "eps": 1e-4, "momentum": 0.8, "centered": True, "weight_decay": 0.01},
}
KERAS = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "learning_rate": 0.02},
    "centered": {"centered": True, "epsilon": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "all": {
        "learning_rate": 0.03, "rho": 0.8, "epsilon": 1e-4, "momentum": 0.8, "centered": True, "weight_decay": 0.01,
    },
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.5, "momentum": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
}  # fmt: skip

# The real optimizers, each with the same few methods: make one, step, say where it stands.


class Torch:
    """`torch.optim.RMSprop` over parameters in some groups."""

    settings = TORCH
    # Ours with momentum as others have it.
    other = MappingProxyType({"lr_in_momentum": True})

    def __init__(self, start, arguments, cuts=None):
        import torch

        self.torch = torch
        self.params = [self.torch.nn.Parameter(self.torch.tensor(p)) for p in start]
        self.cuts = cuts
        groups = self.params
        if cuts is not None:
            parts = [self.params[i:j] for i, j in zip([0, *cuts], [*cuts, None], strict=True)]
            groups = [{"params": part, "lr": 0.01 * (k + 1)} for k, part in enumerate(parts)]
            groups[-1]["weight_decay"] = 0.05
            groups[0]["momentum"] = 0.5
        self.optimizer = self.torch.optim.RMSprop(groups, **arguments)

    def step(self, gradients):
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad = None if gradient is None else self.torch.tensor(gradient)
        self.optimizer.step()

    def values(self):
        return [parameter.detach().numpy().copy() for parameter in self.params]

    def ours(self, **options):
        params = self.params if self.cuts is None else self.optimizer.param_groups
        return interop.from_torch(self.optimizer.state_dict(), params, **options)

    def take_over(self, opt):
        with self.torch.no_grad():
            for parameter, array in zip(self.params, opt.buffers["params"].leaves, strict=True):
                parameter.copy_(self.torch.from_numpy(array))
        self.optimizer.load_state_dict(interop.to_torch(opt))


class Keras:
    """`keras.optimizers.RMSprop` over variables."""

    settings = KERAS
    other = MappingProxyType({"lr_in_momentum": False})

    def __init__(self, start, arguments, cuts=None):
        self.keras = sys.modules["keras"]
        self.params = [self.keras.Variable(p, dtype=str(p.dtype)) for p in start]
        self.optimizer = self.keras.optimizers.RMSprop(**arguments)
        self.optimizer.build(self.params)

    def step(self, gradients):
        self.optimizer.apply([self.keras.ops.convert_to_tensor(g) for g in gradients], self.params)

    def values(self):
        return [variable.numpy().copy() for variable in self.params]

    def ours(self, **options):
        return interop.from_keras(self.optimizer.get_config(), self.optimizer.variables, self.params, **options)

    def take_over(self, opt):
        for variable, array in zip(self.params, opt.buffers["params"].leaves, strict=True):
            variable.assign(array)
        config, variables = interop.to_keras(opt)
        self.optimizer = self.keras.optimizers.RMSprop.from_config(config)
        self.optimizer.build(self.params)
        self.optimizer.load_own_variables(variables)
