"""The RMSProp of other projects in terms of this one's options: their argument names, defaults and conventions."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastrms.errors import OptionError

__all__ = ["DIALECTS", "dialect", "meant"]


@dataclass(frozen=True)
class _Dialect:
    """One peer.

    `names` maps its arguments to options, `defaults` are its defaults (where it has none here, ours is the same),
    `fixed` is what its update rule implies, `required` arguments have no default there, None turns those of
    `none_is_off` off, and `ignored` ones change nothing in the numbers. `state` maps our buffers to what it calls them.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    required: tuple[str, ...] = ()
    none_is_off: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    state: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


# eps under the root, and the learning rate inside the momentum buffer: TensorFlow's form, which many follow.
_INSIDE = {"eps_in_sqrt": True, "lr_in_momentum": True}

# docs/options.md names the source of each.
DIALECTS: Mapping[str, _Dialect] = {
    "reference": _Dialect(
        {"lr": "lr", "decay_rate": "decay_rate", "epsilon": "epsilon"},
        {"lr": 1e-3, "decay_rate": 0.9, "epsilon": 1e-8},
    ),
    "sorix": _Dialect(
        # `decay` is the older name of `alpha`, and goes ahead of it.
        {"lr": "lr", "alpha": "decay_rate", "decay": "decay_rate", "eps": "epsilon", "weight_decay": "weight_decay"},
        {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8},
        none_is_off=("decay",),
    ),
    "torch": _Dialect(
        {
            "lr": "lr",
            "alpha": "decay_rate",
            "eps": "epsilon",
            "weight_decay": "weight_decay",
            "momentum": "momentum",
            "centered": "centered",
            "maximize": "maximize",
        },
        {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8},
        ignored=("foreach", "capturable", "differentiable"),
        state={"cache": "square_avg", "momentum_buffer": "momentum_buffer", "grad_avg": "grad_avg"},
    ),
    "keras": _Dialect(
        {
            "learning_rate": "lr",
            "rho": "decay_rate",
            "momentum": "momentum",
            "epsilon": "epsilon",
            "centered": "centered",
            "weight_decay": "weight_decay",
            "clipnorm": "clip_norm",
            "clipvalue": "clip_value",
            "global_clipnorm": "global_clip_norm",
        },
        {"learning_rate": 1e-3, "rho": 0.9, "epsilon": 1e-7},
        fixed=_INSIDE | {"decoupled_weight_decay": True},
        none_is_off=("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"),
        ignored=("name",),
        state={"cache": "velocity", "momentum_buffer": "momentum", "grad_avg": "average_gradient"},
    ),
    "tensorflow": _Dialect(
        {
            "learning_rate": "lr",
            "decay": "decay_rate",
            "momentum": "momentum",
            "epsilon": "epsilon",
            "centered": "centered",
        },
        {"decay": 0.9, "epsilon": 1e-10},
        fixed=_INSIDE | {"initial_scale": 1.0},
        required=("learning_rate",),
        ignored=("use_locking", "name"),
    ),
    "optax": _Dialect(
        {
            "learning_rate": "lr",
            "decay": "decay_rate",
            "eps": "epsilon",
            "initial_scale": "initial_scale",
            "eps_in_sqrt": "eps_in_sqrt",
            "centered": "centered",
            "momentum": "momentum",
            "nesterov": "nesterov",
            "bias_correction": "bias_correction",
        },
        {"decay": 0.9, "eps": 1e-8, "eps_in_sqrt": True},
        fixed={"lr_in_momentum": True},
        required=("learning_rate",),
        none_is_off=("momentum",),
    ),
    "mlx": _Dialect(
        {"learning_rate": "lr", "alpha": "decay_rate", "eps": "epsilon"},
        {"alpha": 0.99, "eps": 1e-8},
        required=("learning_rate",),
    ),
    "lasagne": _Dialect(
        {"learning_rate": "lr", "rho": "decay_rate", "epsilon": "epsilon"},
        {"learning_rate": 1.0, "rho": 0.9, "epsilon": 1e-6},
        fixed={"eps_in_sqrt": True},
    ),
    "graves": _Dialect(
        {"lr": "lr", "alpha": "decay_rate", "momentum": "momentum", "eps": "epsilon"},
        {"lr": 1e-4, "alpha": 0.95, "momentum": 0.9, "eps": 1e-4},
        fixed=_INSIDE | {"centered": True},
    ),
}


def dialect(name: str, /, **arguments: Any) -> dict[str, Any]:
    """Keyword arguments with which `RMSProp` behaves as another project's optimizer does.

    Parameters
    ----------
    name : {"reference", "sorix", "torch", "keras", "tensorflow", "optax", "mlx", "lasagne", "graves"}
        The project, or for "graves" the variant of A. Graves (2013) as Chainer has it. "tensorflow" is the optimizer
        of TensorFlow 1, "keras" that of Keras 3.
    **arguments
        That project's own arguments under its own names. What is not given has that project's default. None where
        that project takes None for "off" (optax's momentum, Keras' weight_decay and clipping).

    Returns
    -------
    options : dict
        For ``RMSProp(params, **options)``, or for one parameter group (Keras' ``global_clipnorm`` excepted).

    Raises
    ------
    OptionError
        Unknown project or argument, or one missing that has no default there.

    Notes
    -----
    PyTorch's ``foreach``, ``capturable`` and ``differentiable`` and others that do not change the numbers are
    accepted and dropped. A learning rate may be a function of the step, as optax has it; those of Keras and TensorFlow
    1 take no argument and need a wrapper. What `RMSProp` refuses stays refused, such as PyTorch's ``eps=0``.

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
            raise OptionError(f"{name}: unknown argument {argument!r}; it takes {', '.join(peer.names)}")
    for argument in peer.required:
        if argument not in arguments:
            raise OptionError(f"{name}: {argument!r} is required, as it is there")
    options: dict[str, Any] = {}
    for argument, option in peer.names.items():
        if argument in arguments:
            if arguments[argument] is not None or argument not in peer.none_is_off:
                options[option] = arguments[argument]
        elif argument in peer.defaults:
            options[option] = peer.defaults[argument]
    options |= peer.fixed
    if not options.get("momentum"):
        # Ignored there without momentum; here it is an error, which someone bringing their settings has no use for.
        options.pop("nesterov", None)
    return options


def meant(name: str, known: Iterable[str]) -> str:
    """Say which option somebody may have meant who wrote an unknown name.

    Parameters
    ----------
    name : str
        The unknown name.
    known : iterable of str
        The names of the options.

    Returns
    -------
    text : str
        The option of that meaning, with the projects that call it `name`; or the nearest name; or all names.
    """
    projects = [project for project, peer in DIALECTS.items() if name in peer.names]
    projects.sort(key=("torch", "keras", "optax", *DIALECTS).index)  # the best known first
    if projects:
        options = dict.fromkeys(repr(DIALECTS[project].names[name]) for project in projects)
        return (
            f"expected {' or '.join(options)}, which {', '.join(projects)} call{'s' * (len(projects) == 1)} {name!r}; "
            f"fastrms.dialect({projects[0]!r}, {name}=...) takes the names of {projects[0]}"
        )
    names = list(known)
    if near := difflib.get_close_matches(str(name), names, 1, 0.7):
        return f"did you mean {near[0]!r}? The options are {', '.join(names)}"
    return f"the options are {', '.join(names)}"
