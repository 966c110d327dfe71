"""The RMSProps of other projects in terms of our options: argument names, defaults and conventions."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastrms._types import Options
from fastrms.errors import OptionError

__all__ = ["DIALECTS", "dialect", "meant"]


@dataclass(frozen=True)
class Dialect:
    """The RMSProp of one project."""

    names: Mapping[str, str]  # our option for each argument of the project
    defaults: Options  # by argument; the default of an argument that is missing here is equal to ours
    fixed: Options = field(default_factory=dict)  # our options that the project's update rule implies
    required: tuple[str, ...] = ()  # arguments without a default
    none_is_off: tuple[str, ...] = ()  # arguments that None turns off
    ignored: tuple[str, ...] = ()  # arguments that change no number
    state: Mapping[str, str] = field(default_factory=dict)  # the project's name for each of our buffers


def _same(*names: str) -> dict[str, str]:
    """Return a mapping of each name to itself."""
    return {name: name for name in names}


# Epsilon under the root, and the learning rate inside the momentum buffer: the form of TensorFlow and its followers.
_INSIDE = {"eps_in_sqrt": True, "lr_in_momentum": True}

# docs/options.md names the source of each.
DIALECTS: Mapping[str, Dialect] = {
    "reference": Dialect(
        _same("lr", "decay_rate", "epsilon"),
        {"lr": 1e-3, "decay_rate": 0.9, "epsilon": 1e-8},
    ),
    "sorix": Dialect(
        # `decay`, the older name of `alpha`, takes precedence.
        {"lr": "lr", "alpha": "decay_rate", "decay": "decay_rate", "eps": "epsilon", "weight_decay": "weight_decay"},
        {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8},
        none_is_off=("decay",),
    ),
    "torch": Dialect(
        {"lr": "lr", "alpha": "decay_rate", "eps": "epsilon"}
        | _same("weight_decay", "momentum", "centered", "maximize"),
        {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8},
        ignored=("foreach", "capturable", "differentiable"),
        state={"cache": "square_avg", "momentum_buffer": "momentum_buffer", "grad_avg": "grad_avg"},
    ),
    "keras": Dialect(
        {"learning_rate": "lr", "rho": "decay_rate"}
        | _same("momentum", "epsilon", "centered", "weight_decay")
        | {"clipnorm": "clip_norm", "clipvalue": "clip_value", "global_clipnorm": "global_clip_norm"},
        {"learning_rate": 1e-3, "rho": 0.9, "epsilon": 1e-7},
        fixed=_INSIDE | {"decoupled_weight_decay": True},
        none_is_off=("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"),
        ignored=("name",),
        state={"cache": "velocity", "momentum_buffer": "momentum", "grad_avg": "average_gradient"},
    ),
    "tensorflow": Dialect(
        {"learning_rate": "lr", "decay": "decay_rate"} | _same("momentum", "epsilon", "centered"),
        {"decay": 0.9, "epsilon": 1e-10},
        fixed=_INSIDE | {"initial_scale": 1.0},
        required=("learning_rate",),
        ignored=("use_locking", "name"),
    ),
    "optax": Dialect(
        {"learning_rate": "lr", "decay": "decay_rate", "eps": "epsilon"}
        | _same("initial_scale", "eps_in_sqrt", "centered", "momentum", "nesterov", "bias_correction"),
        {"decay": 0.9, "eps": 1e-8, "eps_in_sqrt": True},
        fixed={"lr_in_momentum": True},
        required=("learning_rate",),
        none_is_off=("momentum",),
    ),
    "mlx": Dialect(
        {"learning_rate": "lr", "alpha": "decay_rate", "eps": "epsilon"},
        {"alpha": 0.99, "eps": 1e-8},
        required=("learning_rate",),
    ),
    "lasagne": Dialect(
        {"learning_rate": "lr", "rho": "decay_rate", "epsilon": "epsilon"},
        {"learning_rate": 1.0, "rho": 0.9, "epsilon": 1e-6},
        fixed={"eps_in_sqrt": True},
    ),
    "graves": Dialect(
        {"lr": "lr", "alpha": "decay_rate", "momentum": "momentum", "eps": "epsilon"},
        {"lr": 1e-4, "alpha": 0.95, "momentum": 0.9, "eps": 1e-4},
        fixed=_INSIDE | {"centered": True},
    ),
}


def dialect(name: str, /, **arguments: Any) -> dict[str, Any]:
    """Return the options with which `RMSProp` computes the same steps as the RMSProp of another project.

    Parameters
    ----------
    name : {"reference", "sorix", "torch", "keras", "tensorflow", "optax", "mlx", "lasagne", "graves"}
        The project. "tensorflow" is TensorFlow 1, and "keras" is Keras 3. "graves" is the variant of A. Graves (2013,
        https://arxiv.org/abs/1308.0850), as implemented in Chainer.
    **arguments
        The arguments of the project. A missing argument has the default of the project. None means "off" for the
        arguments for which it does so in the project (momentum in optax, weight_decay and clipping in Keras).

    Returns
    -------
    options : dict
        For ``RMSProp(params, **options)``, or for a parameter group (without ``global_clipnorm`` of Keras).

    Raises
    ------
    OptionError
        The project or an argument is unknown, or an argument without a default is missing.

    Notes
    -----
    Arguments that change no number, such as ``foreach`` of PyTorch, are accepted and dropped. A learning rate may be a
    function of the step: a schedule of optax, or a LearningRateSchedule of Keras. The functions without arguments that
    Keras and TensorFlow 1 also accept need a wrapper with one argument. Values that `RMSProp` rejects, such as
    ``eps=0`` of PyTorch, are returned, and then rejected by `RMSProp`.

    Examples
    --------
    >>> import fastrms
    >>> fastrms.dialect("mlx", learning_rate=0.01)
    {'lr': 0.01, 'decay_rate': 0.99, 'epsilon': 1e-08}
    """
    if name not in DIALECTS:
        raise OptionError(f"name: expected one of {', '.join(DIALECTS)}; got {name!r}")
    peer = DIALECTS[name]
    for argument in arguments:
        if argument not in peer.names and argument not in peer.ignored:
            raise OptionError(f"{name}: unknown argument {argument!r}; the arguments are {', '.join(peer.names)}")
    for argument in peer.required:
        if argument not in arguments:
            raise OptionError(f"{name}: {argument!r} is required, as in {name}")
    options: dict[str, Any] = {}
    for argument, option in peer.names.items():
        if argument in arguments:
            if arguments[argument] is not None or argument not in peer.none_is_off:
                options[option] = arguments[argument]
        elif argument in peer.defaults:
            options[option] = peer.defaults[argument]
    options |= peer.fixed
    if not options.get("momentum"):
        # Other projects ignore nesterov without momentum; `RMSProp` would refuse their settings.
        options.pop("nesterov", None)
    return options


def meant(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the option of this name in other projects, or a similar `known` name."""
    projects = [project for project, peer in DIALECTS.items() if name in peer.names]
    projects.sort(key=("torch", "keras", "optax", *DIALECTS).index)  # the best known first
    if projects:
        options = dict.fromkeys(repr(DIALECTS[project].names[name]) for project in projects)
        return (
            f"expected {' or '.join(options)}, which {', '.join(projects)} call{'s' * (len(projects) == 1)} {name!r}; "
            f"fastrms.dialect({projects[0]!r}, {name}=...) accepts the names of {projects[0]}"
        )
    names = list(known)
    if near := difflib.get_close_matches(str(name), names, 1, 0.7):
        return f"did you mean {near[0]!r}? The options are {', '.join(names)}"
    return f"the options are {', '.join(names)}"
