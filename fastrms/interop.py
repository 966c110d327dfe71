"""Conversion of optimizer state from and to the RMSprop of PyTorch and Keras; only `to_torch` imports either."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastrms._checks import GROUP_DEFAULTS
from fastrms._state import STATE_OPTIONS, optional_state
from fastrms._types import Array, Metadata, Options
from fastrms.buffers.bfloat16 import from_bfloat16, to_bfloat16
from fastrms.buffers.flat import as_arrays
from fastrms.checkpoints.metadata import MOST_STEPS, not_steps
from fastrms.dialects import DIALECTS, dialect
from fastrms.errors import CheckpointError, OptionError
from fastrms.optimizer import RMSProp
from fastrms.options import parameter_groups, resolve_lr

__all__ = ["from_keras", "from_torch", "to_keras", "to_torch"]

State = dict[str, Any]  # of `RMSProp.state_dict`
_TORCH, _KERAS = DIALECTS["torch"].state, DIALECTS["keras"].state  # the projects' names of our buffers
# Options that need no counterpart: the state has them, or they matter to subnormal numbers only.
_OURS_ALONE = ("initial_scale", "flush_subnormals", "lr_in_momentum")
# Arguments of Keras' optimizer that add state or change gradients.
_KERAS_ONLY = ("use_ema", "gradient_accumulation_steps", "loss_scale_factor")


def from_torch(state_dict: Metadata, params: object, **options: Any) -> RMSProp:
    """Make an optimizer that continues from the state of ``torch.optim.RMSprop``.

    Parameters
    ----------
    state_dict : dict
        ``torch.optim.RMSprop.state_dict()``, with tensors on any device, or arrays.
    params : list, tuple, dict, array or tensor, or any nesting of these
        The present parameters, in the order of the torch optimizer. They are copied. With several groups, a list of
        dicts with parameters under ``"params"``, such as ``optimizer.param_groups``. Other entries are ignored.
    **options
        Options of `RMSProp` that replace those of the state, such as a schedule as ``lr``, clipping, or the kernel.

    Returns
    -------
    optimizer : RMSProp
        Has the options of ``dialect("torch")`` and the structure of `params`. The state of a parameter that never had a
        gradient starts from 0, as in torch. With ``lr_in_momentum=True``, the momentum buffer is multiplied by lr.

    Raises
    ------
    CheckpointError
        `state_dict` is not from RMSprop of torch, or `params` has a different number of parameters or groups.
    StructureError, DtypeError
        An array and its parameter have different shapes, or an array does not contain numbers.
    OptionError, OptionTypeError
        `RMSProp` rejects an option, such as ``eps=0``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import interop
    >>> group = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "params": [0]}
    >>> state = {"state": {0: {"step": 1.0, "square_avg": np.array([0.04])}}, "param_groups": [group]}
    >>> optimizer = interop.from_torch(state, [np.array([1.0])])
    >>> optimizer.steps, optimizer.decay_rate, optimizer.cache
    (1, 0.99, [array([0.04])])
    """
    arguments, sizes, entries, counts = _read_torch(state_dict)
    opt = _with_groups(params, [dialect("torch", **group) for group in arguments], options)
    state = opt.state_dict()
    found = np.bincount([p["group"] for p in state["parameters"]], minlength=len(sizes)).tolist()
    if found != sizes:
        raise CheckpointError(f"params: expected {sizes} parameters in the groups, as in state_dict; got {found}")
    buffers = {name: [entry.get(theirs) for entry in entries] for name, theirs in _TORCH.items()}
    _load(opt, state, counts, buffers, "torch")
    return opt


def to_torch(optimizer: RMSProp) -> dict[str, Any]:
    """Return the state with which ``torch.optim.RMSprop`` continues from `optimizer`. Needs torch.

    Parameters
    ----------
    optimizer : RMSProp
        The optimizer, which is not changed.

    Returns
    -------
    state_dict : dict
        The argument for ``load_state_dict`` of a ``torch.optim.RMSprop`` with the same parameters in the same order and
        groups. It contains the options (the rate of the next step if lr is a function), and copies of the buffers as
        tensors on the CPU. It does not contain the parameters: copy ``optimizer.params``.

    Raises
    ------
    OptionError
        RMSprop of torch lacks an option that is set. Or a momentum buffer would be divided by a rate of 0.
    ImportError
        torch is not installed.

    Examples
    --------
    ``docs/interop.md`` has an example with a PyTorch model.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ImportError("torch is not installed; install with: python -m pip install torch") from None
    ours, rates, groups = _export(optimizer, "torch")
    # torch counts in its default dtype. In float16 the count would stop at 2,048.
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    counts = ours["steps"] - ours["arrays"]["skipped"]
    state: dict[int, dict[str, Any]] = {i: {"step": torch.tensor(float(n), dtype=dtype)} for i, n in enumerate(counts)}
    for name, theirs in _TORCH.items():
        for i, array in enumerate(_read(ours, name, rates, "torch")):
            if array is not None:
                state[i][theirs] = torch.as_tensor(array)
    group_of = np.array([parameter["group"] for parameter in ours["parameters"]])
    for k, group in enumerate(groups):
        group["params"] = np.flatnonzero(group_of == k).tolist()
    return {"state": state, "param_groups": groups}


def from_keras(config: Metadata, variables: object, params: object, **options: Any) -> RMSProp:
    """Make an optimizer that continues from the state of ``keras.optimizers.RMSprop`` of Keras 3.

    Parameters
    ----------
    config : dict
        ``optimizer.get_config()``.
    variables : list or dict
        ``optimizer.variables``, or the dict that ``optimizer.save_own_variables`` filled.
    params : list, tuple, dict, array or Keras variable, or any nesting of these
        The present parameters in the order of ``optimizer.build``, usually ``model.trainable_variables``; copied. Or
        parameter groups. Variables that Keras excludes from weight decay need a group with ``"weight_decay": 0.0``.
    **options
        Options of `RMSProp` that replace those of `config`. If the learning rate is a schedule, pass it as ``lr``: a
        function of the step, such as ``lambda k: float(schedule(k))``.

    Returns
    -------
    optimizer : RMSProp
        Has the options of ``dialect("keras")`` and the structure of `params`. With ``lr_in_momentum=False``, the
        momentum buffer is divided by lr. Constraints of variables are not applied; apply them after each step.

    Raises
    ------
    CheckpointError
        `config` is not from RMSprop of Keras, or `variables` and `params` do not fit together.
    OptionError, OptionTypeError
        `config` has a moving average of the weights, accumulated gradients or a loss scale. Or it has a schedule, and
        ``lr`` is missing. Or `RMSProp` rejects an option.
    StructureError, DtypeError
        An array and its parameter have different shapes, or an array does not contain numbers.

    Examples
    --------
    ``docs/interop.md`` has an example with a Keras model.
    """
    variables = _check_keras(config, variables)
    scheduled = isinstance(config["learning_rate"], Mapping) or callable(config["learning_rate"])
    if scheduled and "lr" not in options:
        raise OptionError("lr: the learning rate is a schedule; pass it as a function of the step: lr=...")
    arguments = {name: value for name, value in config.items() if name in DIALECTS["keras"].names}
    # Keras ignores bounds of 0 and less.
    arguments |= {n: None for n in ("clipnorm", "clipvalue", "global_clipnorm") if not (config.get(n) or 0) > 0}
    if scheduled:
        del arguments["learning_rate"]
    elif len(variables) > 1:
        arguments["learning_rate"] = _number("learning_rate", variables[1])  # newer than that of the config
    groups = parameter_groups(params)
    given = _arrays(params) if groups is None else [{**group, "params": _arrays(group["params"])} for group in groups]
    opt = RMSProp(given, **(dialect("keras", **arguments) | options))
    state = opt.state_dict()
    heads = ["iteration"] if scheduled else ["iteration", "learning_rate"]
    names = ["cache"] + [name for name, option in STATE_OPTIONS.items() if config.get(option)]
    count = len(state["parameters"])
    if len(variables) != (expected := len(heads) + len(names) * count):
        kinds = ", ".join(heads + [_KERAS[name] for name in names])
        raise CheckpointError(f"variables: expected {expected} for {count} parameters ({kinds}), got {len(variables)}")
    rest = variables[len(heads) :]
    buffers = {name: rest[k * count : (k + 1) * count] for k, name in enumerate(names)}
    _load(opt, state, [_count("iteration", variables[0])] * count, buffers, "keras")
    return opt


def to_keras(optimizer: RMSProp) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return config and variables with which ``keras.optimizers.RMSprop`` of Keras 3 continues from `optimizer`.

    Parameters
    ----------
    optimizer : RMSProp
        The optimizer, which is not changed.

    Returns
    -------
    config : dict
        The argument for ``keras.optimizers.RMSprop.from_config``, with the rate of the next step if lr is a function.
    variables : dict of str to ndarray
        The argument for ``load_own_variables`` of that optimizer, after ``build(model.trainable_variables)``. It does
        not contain the parameters: assign ``optimizer.params``.

    Raises
    ------
    OptionError
        RMSprop of Keras lacks an option that is set, or needs one (``eps_in_sqrt``), or groups differ in an option.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp, dialect, interop
    >>> config, variables = interop.to_keras(RMSProp([np.ones(2)], **dialect("keras", learning_rate=0.5)))
    >>> config["learning_rate"], sorted(variables)
    (0.5, ['0', '1', '2'])
    """
    state, rates, configs = _export(optimizer, "keras")
    config = configs[0]
    for argument in config:
        values = [each[argument] for each in configs]
        if any(value != values[0] for value in values):
            raise OptionError(f"{argument}: expected one value for all groups, as keras has no groups; got {values}")
    config["weight_decay"] = config["weight_decay"] or None
    arrays: list[Any] = [np.array(state["steps"], np.int32), np.array(config["learning_rate"])]
    for name in ["cache", *optional_state(state["param_groups"])]:
        arrays += _read(state, name, rates, "keras")
    return config, {str(number): array for number, array in enumerate(arrays)}


def _with_groups(params: object, own: Sequence[Options], options: Options) -> RMSProp:
    """Return an optimizer with the `own` options of each group; `options` take precedence."""
    groups = parameter_groups(params)
    if len(own) != (1 if groups is None else len(groups)):
        got = "no groups" if groups is None else f"{len(groups)} groups"
        raise CheckpointError(f"params: expected {len(own)} groups with 'params', as in state_dict; got {got}")
    if groups is None:
        return RMSProp(_arrays(params), **{**own[0], **options})
    of_groups = {name: value for name, value in options.items() if name in GROUP_DEFAULTS}
    given = [{"params": _arrays(g["params"]), **o, **of_groups} for g, o in zip(groups, own, strict=True)]
    return RMSProp(given, **options)


def _read_torch(state_dict: Any) -> tuple[list[dict[str, Any]], list[int], list[Metadata], list[int]]:
    """Return torch's arguments and number of parameters for each group, and state and steps for each parameter."""
    try:
        packed, state = state_dict["param_groups"], state_dict["state"]
        groups = [{name: _number(name, g[name]) for name in DIALECTS["torch"].names if name in g} for g in packed]
        # No other optimizer of torch has all three.
        _ = [(group["lr"], group["alpha"], group["eps"]) for group in groups]
        entries: list[Metadata] = [state.get(number, {}) for group in packed for number in group["params"]]
        steps = [_count("step", entry["step"]) if entry else 0 for entry in entries]  # no state before a gradient
        _ = [entry["square_avg"] for entry in entries if entry]
        return groups, [len(group["params"]) for group in packed], entries, steps
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"state_dict: expected what torch.optim.RMSprop.state_dict() returns, got {_named(state_dict)}; "
            f"{type(error).__name__}: {error}"
        ) from None


def _check_keras(config: object, variables: object) -> Sequence[Any]:
    """Return `variables` as a sequence, or raise if Keras' RMSprop has no such config or variables."""
    if not isinstance(config, Mapping) or not {"rho", "epsilon", "learning_rate"} <= config.keys():
        raise CheckpointError(
            f"config: expected what get_config() of keras.optimizers.RMSprop returns, got {_named(config)}"
        )
    for name in _KERAS_ONLY:
        if value := config.get(name):
            raise OptionError(f"{name}: expected an optimizer without it, got {value!r}; fastrms has no such option")
    if isinstance(variables, Mapping):
        names = [str(number) for number in range(len(variables))]
        if variables.keys() != set(names):
            raise CheckpointError(f"variables: expected the names '0' to '{len(names) - 1}', got {_named(variables)}")
        return [variables[name] for name in names]
    if not isinstance(variables, list | tuple):
        raise CheckpointError(f"variables: expected optimizer.variables, or a dict of them, got {_named(variables)}")
    return variables


def _export(optimizer: RMSProp, project: str) -> tuple[State, list[float], list[dict[str, Any]]]:
    """Return the state, and for each group the rate of the next step and the options as arguments of `project`."""
    state, peer = optimizer.state_dict(), DIALECTS[project]
    rates = [resolve_lr(group, state["steps"]) for group in optimizer.param_groups]
    arguments = []
    for group, lr in zip(state["param_groups"], rates, strict=True):
        values = {**group, "lr": lr, "global_clip_norm": state["global_clip_norm"]}
        for option, default in (GROUP_DEFAULTS | {"global_clip_norm": None}).items():
            expected = peer.fixed.get(option, default)
            converted = option in peer.names.values() or option in _OURS_ALONE
            unused = option == "decoupled_weight_decay" and not values["weight_decay"]
            if values[option] != expected and not converted and not unused:
                other = f"expected {expected!r}, because {project} has no other choice, got {values[option]!r}"
                raise OptionError(f"{option}: {other}; set it to {expected!r} first, if training may change")
        arguments.append({argument: values[option] for argument, option in peer.names.items()})
    return state, rates, arguments


def _load(
    opt: RMSProp, state: State, counts: Sequence[int], buffers: Mapping[str, Sequence[object]], project: str
) -> None:
    """Write step counts and buffers of `project` to a state of `opt`, and load it; an item of None changes nothing."""
    steps, layout, peer = max(counts), opt.buffers["params"].layout, DIALECTS[project]
    lr_in_theirs = "lr_in_momentum" in peer.fixed
    state["steps"] = steps
    state["arrays"]["skipped"][...] = steps - np.array(counts)
    for name, items in buffers.items():
        if not (views := _views(state, name)):
            continue
        # Parameters have the shapes and dtypes to compare with, even if state has 16 bits.
        arrays = as_arrays([_array(item) for item in items], layout, peer.state[name], allow_none=True)
        for view, array, parameter in zip(views, arrays, state["parameters"], strict=True):
            if array is None:
                continue
            group = opt.param_groups[parameter["group"]]
            lr_in_ours = group["lr_in_momentum"]
            if name == "momentum_buffer" and group["momentum"] and lr_in_ours != lr_in_theirs:
                array = _convert_momentum(array, resolve_lr(group, steps), multiply=lr_in_ours)
            with np.errstate(all="ignore"):  # a number too large for the dtype becomes inf
                view[...] = array if state["cache_dtype"] is None else to_bfloat16(array)
    opt.load_state_dict(state)


def _read(state: State, name: str, rates: Sequence[float], project: str) -> list[Array | None]:
    """Return a copy of buffer `name` for each parameter, or None for a parameter whose group does not use it."""
    arrays: list[Array | None] = [None] * len(state["parameters"])
    lr_in_theirs = "lr_in_momentum" in DIALECTS[project].fixed
    for i, view in enumerate(_views(state, name)):
        k = state["parameters"][i]["group"]
        group = state["param_groups"][k]
        if name in STATE_OPTIONS and not group[STATE_OPTIONS[name]]:
            continue
        array = view.copy() if state["cache_dtype"] is None else from_bfloat16(view)
        if name == "momentum_buffer" and group["lr_in_momentum"] != lr_in_theirs:
            array = _convert_momentum(array, rates[k], multiply=lr_in_theirs)
        arrays[i] = array
    return arrays


def _views(state: State, name: str) -> list[Array]:
    """Return a view of buffer `name` in `state` for each parameter; an empty list without the buffer."""
    views, starts = [], dict.fromkeys(("float32", "float64", "uint16"), 0)
    for parameter in state["parameters"]:
        dtype = parameter["dtype"] if state["cache_dtype"] is None else "uint16"
        if (dense := state["arrays"].get(f"{name}/{dtype}")) is None:
            return []
        start = starts[dtype]
        starts[dtype] += math.prod(parameter["shape"])
        views.append(dense[start : starts[dtype]].reshape(parameter["shape"]))
    return views


def _convert_momentum(array: Array, lr: float, multiply: bool) -> Array:
    """Return a momentum buffer multiplied by lr, or divided by lr."""
    if not multiply and lr <= 0:
        raise OptionError("lr: expected a number > 0, because the momentum buffer is divided by lr; got 0")
    return array * lr if multiply else array / lr


def _arrays(tree: object) -> Any:
    """Return the same nesting with arrays in the place of tensors and variables."""
    try:
        return _map(tree)
    except RecursionError:  # RMSProp raises an error with a better message
        return tree


def _map(tree: object) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_map(item) for item in tree]
        return items if isinstance(tree, list) else type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return _array(tree)


def _array(item: Any) -> Any:
    """Return an object that NumPy can read; a tensor is detached and copied to the CPU."""
    return item.detach().cpu() if hasattr(item, "detach") else item


def _number(name: str, value: object) -> Any:
    """Return the number in an array, a tensor or a variable as a number of Python."""
    array = np.asarray(_array(value))
    if array.size != 1:
        raise CheckpointError(f"{name}: expected one number, got shape {array.shape}")
    return array.item()


def _count(name: str, value: object) -> int:
    number = _number(name, value)
    if not isinstance(number, int | float) or not 0 <= number <= MOST_STEPS or number != int(number):
        raise not_steps(name, number)
    return int(number)


def _named(thing: object) -> str:
    if isinstance(thing, Mapping):
        return f"a dict with {', '.join(map(repr, list(thing)[:8])) or 'nothing'}"
    return f"a {type(thing).__name__}"
