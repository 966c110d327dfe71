"""State of PyTorch's and Keras' RMSprop: what cannot be taken over is refused, and the error says why."""

import subprocess
import sys

import numpy as np
import pytest

from fastrms import CheckpointError, DtypeError, OptionError, RMSProp, StructureError, dialect, interop
from fastrms.dialects import DIALECTS

# What cannot be taken over.


GROUP = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "momentum": 0.5, "params": [0, 1]}
ADAM = {"lr": 0.1, "eps": 1e-8, "betas": (0.9, 0.99), "params": [0, 1]}
ENTRY = {"step": 1.0, "square_avg": np.ones(2)}
RETURNS = r"expected what torch.optim.RMSprop.state_dict\(\) returns"


def torch_state(group=GROUP, entry=ENTRY):
    return {"state": {0: entry, 1: {"step": 1, "square_avg": np.ones(())}}, "param_groups": [group]}


WRONG_TORCH = {
    "nothing": (None, CheckpointError, f"state_dict: {RETURNS}, got a NoneType"),
    "a model's": ({"weight": np.ones(2)}, CheckpointError, f"{RETURNS}, got a dict with 'weight'"),
    "no dicts": ({"state": {}, "param_groups": [1]}, CheckpointError, f"{RETURNS}, .*TypeError"),
    "Adam's": (torch_state(ADAM), CheckpointError, "'alpha'"),
    "Adam's state": (torch_state(entry={"step": 1, "exp_avg": np.ones(2)}), CheckpointError, "'square_avg'"),
    "no params": (torch_state({"lr": 0.1, "alpha": 0.9, "eps": 0.1}), CheckpointError, "KeyError: 'params'"),
    "half a step": (torch_state(entry=ENTRY | {"step": 0.5}), CheckpointError, "step: expected .* steps, got 0.5"),
    "steps of no run": (torch_state(entry=ENTRY | {"step": 2.0**60}), CheckpointError, "step: expected .*, got 1.15"),
    "less than none": (torch_state(entry=ENTRY | {"step": -1}), CheckpointError, "step: expected .* steps, got -1"),
    "NaN steps": (torch_state(entry=ENTRY | {"step": np.nan}), CheckpointError, "step: expected .* steps, got nan"),
    "steps": (torch_state(entry=ENTRY | {"step": np.ones(2)}), CheckpointError, "step: expected one number, got shape"),
    "more": (torch_state(GROUP | {"params": [0, 1, 2]}), CheckpointError, r"params: expected \[3\] .*; got \[2\]"),
    "groups": (
        {"state": {}, "param_groups": [GROUP, GROUP]}, CheckpointError,
        "params: expected 2 groups with 'params', .* got no groups",
    ),
    "another shape": (
        torch_state(entry=ENTRY | {"square_avg": np.ones(3)}), StructureError,
        r"square_avg\[0\]: expected shape \(2,\), got \(3,\)",
    ),
    "text": (torch_state(entry=ENTRY | {"square_avg": "many"}), DtypeError, r"square_avg\[0\]: expected an array"),
    "momentum 1": (torch_state(GROUP | {"momentum": 1.0}), OptionError, "momentum: expected"),
    "eps 0": (torch_state(GROUP | {"eps": 0}), OptionError, "epsilon: expected"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_TORCH)
def test_wrong_state_of_torch(what):
    state, error, message = WRONG_TORCH[what]
    with pytest.raises(error, match=message):
        interop.from_torch(state, [np.ones(2), 1.0])


@pytest.mark.torch
def test_wrong_parameters_for_torch():
    circular = []
    circular.append(circular)
    with pytest.raises(StructureError, match="contains itself"):
        interop.from_torch(torch_state(), circular)
    groups = [{"params": [np.ones(2)]}, {"params": [1.0]}]
    with pytest.raises(
        CheckpointError, match="params: expected 1 groups with 'params', as in state_dict; got 2 groups"
    ):
        interop.from_torch(torch_state(), groups)
    import torch

    with pytest.raises(DtypeError, match=r"params\[0\]: .* got bfloat16; convert it to float32"):
        interop.from_torch(torch_state(), [torch.ones(2, dtype=torch.bfloat16), 1.0])
    with pytest.raises(DtypeError, match=r"params\[0\]: expected float32 or float64, got float16"):
        interop.from_torch(torch_state(), [torch.ones(2, dtype=torch.float16), 1.0])


CONFIG = {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-7, "momentum": 0.5}
VARIABLES = [3, 0.5, np.ones(2), np.ones(2)]
WRONG_KERAS = {
    "nothing": ({"config": None}, CheckpointError, "config: expected what get_config.. of keras.*, got a NoneType"),
    "SGD's": ({"config": {"learning_rate": 0.5, "momentum": 0.5}}, CheckpointError, "got a dict with 'learning_rate'"),
    "an average": ({"config": CONFIG | {"use_ema": True}}, OptionError, "use_ema: expected .* without it, got True"),
    "accumulates": ({"config": CONFIG | {"gradient_accumulation_steps": 2}}, OptionError, "gradient_accumulation_ste"),
    "scales": ({"config": CONFIG | {"loss_scale_factor": 8.0}}, OptionError, "loss_scale_factor: "),
    "a schedule": ({"config": CONFIG | {"learning_rate": {}}}, OptionError, "lr: the learning rate is a schedule"),
    "too few": (
        {"variables": VARIABLES[:3]}, CheckpointError,
        r"expected 4 for 1 parameters \(iteration, learning_rate, velocity, momentum\), got 3",
    ),
    "no variables": ({"variables": None}, CheckpointError, "variables: expected optimizer.variables, .*got a NoneType"),
    "not built": ({"variables": []}, CheckpointError, "expected 4 for 1 parameters"),
    "names": ({"variables": {"a": 1}}, CheckpointError, "variables: expected the names '0' to '0', got .*'a'"),
    "another shape": ({"variables": [3, 0.5, np.ones(2), np.ones(3)]}, StructureError, r"momentum\[0\]: expected"),
    "no count": ({"variables": [-3, *VARIABLES[1:]]}, CheckpointError, "iteration: expected a number of steps, got -3"),
    "count of no run": ({"variables": [2**63 - 1, *VARIABLES[1:]]}, CheckpointError, "iteration: .*, got 9223"),
    "no rate": ({"variables": [3, np.ones(2), *VARIABLES[2:]]}, CheckpointError, "learning_rate: expected one number"),
    "weight decay": ({"config": CONFIG | {"weight_decay": -1.0}}, OptionError, "weight_decay: expected"),
    "rate 0": (
        {"variables": [3, 0.0, *VARIABLES[2:]], "lr_in_momentum": False}, OptionError, "lr: expected a number > 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_KERAS)
def test_wrong_state_of_keras(what):
    given, error, message = WRONG_KERAS[what]
    with pytest.raises(error, match=message):
        interop.from_keras(**({"config": CONFIG, "variables": VARIABLES, "params": [np.ones(2)]} | given))


# Options that the other project does not have.
NOT_THERE = {
    "torch": {
        "nesterov": {"nesterov": True, "momentum": 0.5}, "eps_in_sqrt": {"eps_in_sqrt": True},
        "bias_correction": {"bias_correction": True}, "clip_value": {"clip_value": 1.0},
        "clip_norm": {"clip_norm": 1.0}, "global_clip_norm": {"global_clip_norm": 1.0},
        "decoupled_weight_decay": {"decoupled_weight_decay": True, "weight_decay": 0.1},
    },
    "keras": {
        "nesterov": {"nesterov": True, "momentum": 0.5}, "eps_in_sqrt": {"eps_in_sqrt": False},
        "bias_correction": {"bias_correction": True}, "maximize": {"maximize": True},
        "decoupled_weight_decay": {"decoupled_weight_decay": False, "weight_decay": 0.1},
    },
}  # fmt: skip
TO = {"torch": interop.to_torch, "keras": interop.to_keras}


@pytest.mark.parametrize(
    ("project", "option"),
    [pytest.param(p, o, marks=[pytest.mark.torch] if p == "torch" else []) for p in NOT_THERE for o in NOT_THERE[p]],
)
def test_options_that_the_other_project_does_not_have(project, option):
    base = dialect(project)
    TO[project](RMSProp([np.ones(2)], **base))
    options = base | NOT_THERE[project][option]
    message = (
        f"{option}: expected {not options[option] if type(options[option]) is bool else None}, because {project} has"
    )
    with pytest.raises(OptionError, match=message):
        TO[project](RMSProp([np.ones(2)], **options))


@pytest.mark.parametrize("project", TO)
def test_every_option_is_carried_over_or_refused_or_of_no_use_there(project):
    carried = set(DIALECTS[project].names.values())
    rest = {"initial_scale", "flush_subnormals", "lr_in_momentum"}
    everything = set(RMSProp([np.ones(1)]).param_groups[0]) | {"global_clip_norm"}
    assert carried | set(NOT_THERE[project]) | rest == everything - {"params"}
    assert not carried & set(NOT_THERE[project])


def test_groups_that_differ_are_not_for_keras():
    groups = [{"params": [np.ones(2)]}, {"params": [np.ones(2)], "lr": 0.5}]
    with pytest.raises(OptionError, match=r"learning_rate: expected one value for all groups, .*; got \[0.001, 0.5\]"):
        interop.to_keras(RMSProp(groups, **dialect("keras")))
    groups[1].pop("lr")
    config, variables = interop.to_keras(RMSProp(groups, **dialect("keras")))
    assert len(variables) == 4
    assert config["weight_decay"] is None  # off, as Keras has it
    groups = [{"params": [np.ones(2)], "momentum": momentum} for momentum in (0.5, 0.9, 0.5)]
    with pytest.raises(OptionError, match=r"momentum: expected one value for all groups, .*; got \[0.5, 0.9, 0.5\]"):
        interop.to_keras(RMSProp(groups, **dialect("keras")))


@pytest.mark.parametrize(
    "to",
    [pytest.param(interop.to_torch, marks=pytest.mark.torch, id="torch"), pytest.param(interop.to_keras, id="keras")],
)
def test_a_rate_of_0_and_momentum_in_the_other_convention(to):
    inside = to is interop.to_torch
    opt = RMSProp([np.ones(2)], lr=0.0, momentum=0.5, lr_in_momentum=inside, eps_in_sqrt=not inside)
    if inside:
        with pytest.raises(OptionError, match="lr: expected a number > 0"):
            to(opt)
    else:
        to(opt)


def test_nothing_is_imported_for_plain_state():
    program = """if True:
        import sys
        sys.modules.update(torch=None, keras=None)
        import numpy as np
        from fastrms import RMSProp, interop
        state = {"state": {0: {"step": 1, "square_avg": [0.5]}},
                 "param_groups": [{"lr": 0.1, "alpha": 0.9, "eps": 1e-8, "params": [0]}]}
        opt = interop.from_torch(state, [np.ones(1)])
        config = {"learning_rate": 0.1, "rho": 0.9, "epsilon": 1e-7}
        config, variables = interop.to_keras(interop.from_keras(config, [1, 0.1, [0.5]], [np.ones(1)]))
        print(opt.cache[0][0], variables["2"][0])
        try:
            interop.to_torch(opt)
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "0.5 0.5", "torch is not installed; install with: python -m pip install torch"
    ]  # fmt: skip
