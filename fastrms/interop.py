"""Training that began with the RMSprop of PyTorch or Keras goes on here, and the other way round.

Only plain dicts and arrays are read, or what has the methods of tensors: neither torch nor keras is imported, except by
`to_torch`, which makes tensors.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrms._checks import GROUP_DEFAULTS
from fastrms.buffers.flat import as_arrays
from fastrms.checkpoints.metadata import MOST_STEPS
from fastrms.dialects import DIALECTS, dialect
from fastrms.errors import CheckpointError, OptionError
from fastrms.kernels.reference import from_bfloat16, to_bfloat16
from fastrms.optimizer import RMSProp
from fastrms.options import parameter_groups, resolve_lr

__all__ = ["from_keras", "from_torch", "to_keras", "to_torch"]

Array = NDArray[Any]

# What our state is called there, and the option that asks for it.
_TORCH, _KERAS = DIALECTS["torch"].state, DIALECTS["keras"].state
_OPTION_OF = {"momentum_buffer": "momentum", "grad_avg": "centered"}

# Options that no other project needs to know: where state started from, and subnormal numbers.
_OURS_ALONE = ("initial_scale", "flush_subnormals")
# Arguments of Keras' optimizer that keep state of their own, or change what a gradient is.
_KERAS_ONLY = ("use_ema", "gradient_accumulation_steps", "loss_scale_factor")


def from_torch(state_dict: Mapping[str, Any], params: Any, **options: Any) -> RMSProp:
    """Make the optimizer that goes on where a ``torch.optim.RMSprop`` stands.

    Parameters
    ----------
    state_dict : dict
        Of ``torch.optim.RMSprop.state_dict()``, with tensors on any device, or arrays.
    params : list, tuple, dict, array or tensor, or any nesting of these
        The parameters as they are now, in the order in which that optimizer has them; copied. With several parameter
        groups a list of dicts with each group's under ``"params"``; their other entries are not looked at, so that
        ``optimizer.param_groups`` can be given.
    **options
        Of `RMSProp`, instead of what the state has: a schedule as ``lr``, clipping, the kernel.

    Returns
    -------
    optimizer : RMSProp
        With the options of ``dialect("torch")`` and the parameters in the structure of `params`. With
        ``lr_in_momentum=True`` the momentum buffer is multiplied by lr.

    Raises
    ------
    CheckpointError
        No state of torch's RMSprop, or another number of parameters or groups than `params` has.
    StructureError, DtypeError
        An array of another shape than its parameter, or of another kind than numbers.
    OptionError, OptionTypeError
        An option that `RMSProp` refuses, such as ``eps=0``.

    Notes
    -----
    A parameter without state, which has not had a gradient yet, starts from 0, as it does there. Where torch's centered
    form takes the root of a number that rounding made negative, which gives NaN, ours takes that of 0.

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
    groups, numbers, entries, steps = _read_torch(state_dict)
    own = [dialect("torch", **group) for group in groups]
    grouped = parameter_groups(params)
    if len(groups) != (1 if grouped is None else len(grouped)):
        got = "no groups" if grouped is None else f"{len(grouped)} groups"
        raise CheckpointError(f"params: expected {len(groups)} groups with 'params', as in state_dict; got {got}")
    if grouped is None:
        opt = RMSProp(_arrays(params), **(own[0] | options))
    else:
        for_groups = {name: value for name, value in options.items() if name in GROUP_DEFAULTS}
        given = [
            {"params": _arrays(group["params"])} | values | for_groups
            for group, values in zip(grouped, own, strict=True)
        ]
        opt = RMSProp(given, **options)
    sizes = np.bincount(opt._group_of, minlength=len(groups)).tolist()
    if sizes != numbers:
        raise CheckpointError(f"params: expected {numbers} parameters in the groups, as in state_dict; got {sizes}")

    opt.steps = max(steps)
    opt._skipped[...] = opt.steps - np.array(steps)
    for name, theirs in _TORCH.items():
        _put(opt, name, theirs, [entry.get(theirs) for entry in entries], lr_in_momentum=False)
    return opt


def to_torch(optimizer: RMSProp) -> dict[str, Any]:
    """The state with which a ``torch.optim.RMSprop`` goes on where `optimizer` stands. Needs torch.

    Parameters
    ----------
    optimizer : RMSProp
        Is not changed.

    Returns
    -------
    state_dict : dict
        For ``torch.optim.RMSprop.load_state_dict``, which takes over the options too; tensors on the CPU, copied. The
        optimizer there has to have as many parameters in the same order and groups. Their values are not in it: copy
        ``optimizer.params``.

    Raises
    ------
    OptionError
        An option that torch's RMSprop does not have. Where it is the momentum buffer that includes lr, the buffer is
        divided by lr, which must not be 0.
    ImportError
        torch is not installed.

    Notes
    -----
    A function as lr is there the rate of the next step.

    Examples
    --------
    ``docs/interop.md`` has one, which runs a model of PyTorch.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise ImportError("torch is not installed; install with: python -m pip install torch") from None
    with optimizer._between_steps("to_torch", changes=False):
        groups = [_arguments(optimizer, k, "torch") for k in range(len(optimizer.param_groups))]
        steps = optimizer.steps - optimizer._skipped
        # As torch counts. In float16, which may be its default, counting would stop at 2,048.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        state: dict[int, dict[str, Any]] = {
            i: {"step": torch.tensor(float(n), dtype=dtype)} for i, n in enumerate(steps)
        }
        for name, theirs in _TORCH.items():
            for i, array in enumerate(_take(optimizer, name, lr_in_momentum=False)):
                if array is not None:
                    state[i][theirs] = torch.as_tensor(array)
        for k, group in enumerate(groups):
            group["params"] = np.flatnonzero(optimizer._group_of == k).tolist()
    return {"state": state, "param_groups": groups}


def from_keras(config: Mapping[str, Any], variables: Any, params: Any, **options: Any) -> RMSProp:
    """Make the optimizer that goes on where a ``keras.optimizers.RMSprop`` of Keras 3 stands.

    Parameters
    ----------
    config : dict
        Of ``optimizer.get_config()``.
    variables : list or dict
        ``optimizer.variables``, or the dict that ``optimizer.save_own_variables`` filled.
    params : list, tuple, dict, array or Keras variable, or any nesting of these
        The parameters as they are now, in the order in which that optimizer was built with them, which is that of
        ``model.trainable_variables``; copied. Or parameter groups with options of their own: Keras does not say in
        `config` what ``exclude_from_weight_decay`` excluded, and groups with ``"weight_decay": 0.0`` do.
    **options
        Of `RMSProp`, instead of what `config` has. ``lr`` is needed where the learning rate is a schedule: a function
        of the step, such as ``lambda k: float(schedule(k))``.

    Returns
    -------
    optimizer : RMSProp
        With the options of ``dialect("keras")`` and the parameters in the structure of `params`. With
        ``lr_in_momentum=False`` the momentum buffer is divided by lr.

    Raises
    ------
    CheckpointError
        No config of Keras' RMSprop, or another number of variables than `params` needs.
    OptionError, OptionTypeError
        A moving average of the weights, accumulated gradients or a loss scale, which there is no counterpart of here;
        a schedule without ``lr``; an option that `RMSProp` refuses.
    StructureError, DtypeError
        An array of another shape than its parameter, or of another kind than numbers.

    Notes
    -----
    Keras keeps its learning rate as a float32, and that is taken over. Constraints of variables are not part of the
    optimizer; apply them after each step.

    Examples
    --------
    ``docs/interop.md`` has one, which runs a model of Keras.
    """
    if not isinstance(config, Mapping) or not {"rho", "epsilon", "learning_rate"} <= config.keys():
        raise CheckpointError(
            f"config: expected what get_config() of keras.optimizers.RMSprop returns, got {_named(config)}"
        )
    for name in _KERAS_ONLY:
        if config.get(name):
            raise OptionError(
                f"{name}: expected an optimizer without, got {config[name]!r}; there is no such thing here"
            )
    if isinstance(variables, Mapping):
        if variables.keys() != (names := {str(number) for number in range(len(variables))}):
            raise CheckpointError(f"variables: expected the names '0' to '{len(names) - 1}', got {_named(variables)}")
        variables = [variables[str(number)] for number in range(len(variables))]
    elif not isinstance(variables, list | tuple):
        raise CheckpointError(f"variables: expected optimizer.variables, or a dict of them, got {_named(variables)}")

    arguments = {name: value for name, value in config.items() if name in DIALECTS["keras"].names}
    for name in ("clipnorm", "clipvalue", "global_clipnorm"):
        if not (arguments.get(name) or 0) > 0:  # off there, too
            arguments[name] = None
    scheduled = isinstance(config["learning_rate"], Mapping) or callable(config["learning_rate"])
    if scheduled and "lr" not in options:
        raise OptionError("lr: the learning rate is a schedule; give it as a function of the step: lr=...")
    if scheduled:
        del arguments["learning_rate"]
    elif len(variables) > 1:
        arguments["learning_rate"] = _number("learning_rate", variables[1])  # the config may be older
    groups = parameter_groups(params)
    given = _arrays(params) if groups is None else [{**group, "params": _arrays(group["params"])} for group in groups]
    opt = RMSProp(given, **(dialect("keras", **arguments) | options))

    leaves = opt.buffers["params"].layout.leaves
    parts = ["cache"] + [name for name, option in _OPTION_OF.items() if config.get(option)]
    first = 1 if scheduled else 2
    if len(variables) != first + len(parts) * len(leaves):
        kinds = ", ".join(["iteration"] + ["learning_rate"] * (not scheduled) + [_KERAS[name] for name in parts])
        raise CheckpointError(
            f"variables: expected {first + len(parts) * len(leaves)} for {len(leaves)} parameters ({kinds}), "
            f"got {len(variables)}"
        )
    opt.steps = _count("iteration", variables[0])
    for k, name in enumerate(parts):
        items = variables[first + k * len(leaves) : first + (k + 1) * len(leaves)]
        _put(opt, name, _KERAS[name], items, lr_in_momentum=True)
    return opt


def to_keras(optimizer: RMSProp) -> tuple[dict[str, Any], dict[str, Array]]:
    """Config and variables with which a ``keras.optimizers.RMSprop`` of Keras 3 goes on where `optimizer` stands.

    Parameters
    ----------
    optimizer : RMSProp
        Is not changed.

    Returns
    -------
    config : dict
        For ``keras.optimizers.RMSprop.from_config``.
    variables : dict of str to ndarray
        For the ``load_own_variables`` of that optimizer, after its ``build(model.trainable_variables)``. The values of
        parameters are not in it: assign ``optimizer.params``.

    Raises
    ------
    OptionError
        An option that Keras' RMSprop does not have (it needs ``eps_in_sqrt``), or that differs between groups. Where it
        is the momentum buffer that does not include lr, the buffer is multiplied by lr.

    Notes
    -----
    A function as lr is there the rate of the next step. Keras rounds the rate to float32, unless its floatx is float64.

    Examples
    --------
    >>> import numpy as np
    >>> from fastrms import RMSProp, dialect, interop
    >>> config, variables = interop.to_keras(RMSProp([np.ones(2)], **dialect("keras", learning_rate=0.5)))
    >>> config["learning_rate"], sorted(variables)
    (0.5, ['0', '1', '2'])
    """
    with optimizer._between_steps("to_keras", changes=False):
        configs = [_arguments(optimizer, k, "keras") for k in range(len(optimizer.param_groups))]
        config = configs[0]
        for argument, value in config.items():
            if any(other[argument] != value for other in configs):
                values = [other[argument] for other in configs]
                raise OptionError(f"{argument}: expected the same in all groups, as keras has no groups; got {values}")
        config["weight_decay"] = config["weight_decay"] or None
        names = ["cache"] + [name for name, option in _OPTION_OF.items() if optimizer.param_groups[0][option]]
        arrays: list[Any] = [np.array(optimizer.steps, np.int32), np.array(config["learning_rate"])]
        for name in names:
            arrays += _take(optimizer, name, lr_in_momentum=True)
    return config, {str(number): array for number, array in enumerate(arrays)}


def _arguments(opt: RMSProp, k: int, project: str) -> dict[str, Any]:
    """The options of group `k` as arguments of `project`, or OptionError where it has nothing like one of them."""
    group, peer = opt.param_groups[k], DIALECTS[project]
    values = {**group, "lr": resolve_lr(group, opt.steps), "global_clip_norm": opt.global_clip_norm}
    for option, default in (GROUP_DEFAULTS | {"global_clip_norm": None}).items():
        expected = peer.fixed.get(option, default)
        converted = option in peer.names.values() or option in _OURS_ALONE or option == "lr_in_momentum"
        unused = option == "decoupled_weight_decay" and not values["weight_decay"]
        if values[option] != expected and not converted and not unused:
            raise OptionError(
                f"{option}: expected {expected!r}, as {project} has nothing else, got {values[option]!r}; set it to "
                "that first, if the training may change"
            )
    return {argument: values[option] for argument, option in peer.names.items()}


def _read_torch(state_dict: Any) -> tuple[list[dict[str, Any]], list[int], list[Mapping[str, Any]], list[int]]:
    """Of each group torch's arguments and its number of parameters; of each parameter its state, and its steps."""
    try:
        packed, state = state_dict["param_groups"], state_dict["state"]
        groups = [
            {name: _number(name, group[name]) for name in DIALECTS["torch"].names if name in group} for group in packed
        ]
        for group in groups:
            group["lr"], group["alpha"], group["eps"]  # these together only its RMSprop has
        entries: list[Mapping[str, Any]] = [state.get(number, {}) for group in packed for number in group["params"]]
        # No state: no gradient yet.
        steps = [_count("step", entry["step"]) if entry else 0 for entry in entries]
        for entry in entries:
            if entry:
                entry["square_avg"]
        return groups, [len(group["params"]) for group in packed], entries, steps
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"state_dict: expected what torch.optim.RMSprop.state_dict() returns, got {_named(state_dict)}; "
            f"{type(error).__name__}: {error}"
        ) from None


def _put(opt: RMSProp, name: str, theirs: str, items: Iterable[Any], lr_in_momentum: bool) -> None:
    """Copy their state into buffer `name`, where there is one; an item that is None leaves its place as it is."""
    if name not in opt.buffers:
        return
    # The parameters' own buffer knows shapes and dtypes, also where state has 16 bits.
    arrays = as_arrays([_array(item) for item in items], opt.buffers["params"].layout, theirs, allow_none=True)
    if name == "momentum_buffer":
        arrays = _rescaled(opt, arrays, lr_in_momentum, outward=False)
    if opt.cache_dtype is not None:
        arrays = [None if array is None else to_bfloat16(array) for array in arrays]
    opt.buffers[name].store(arrays)


def _take(opt: RMSProp, name: str, lr_in_momentum: bool) -> list[Array | None]:
    """Copies of the state in buffer `name`, one for each parameter, or None where its group does not use it."""
    option = _OPTION_OF.get(name)
    if option is not None and name not in opt.buffers:
        return [None] * len(opt._group_of)
    read = np.copy if opt.cache_dtype is None else from_bfloat16
    arrays: list[Array | None] = [
        read(leaf) if option is None or opt.param_groups[k][option] else None
        for k, leaf in zip(opt._group_of, opt.buffers[name].leaves, strict=True)
    ]
    return _rescaled(opt, arrays, lr_in_momentum, outward=True) if name == "momentum_buffer" else arrays


def _rescaled(opt: RMSProp, arrays: Iterable[Any], theirs: bool, outward: bool) -> list[Any]:
    """Momentum buffers with lr in them, or without, as the other side has it: `theirs` says whether they have it there.

    A buffer b without lr moves a parameter by lr b, one with lr by b: at the lr of the next step, both by the same.
    """
    rescaled = []
    for k, array in zip(opt._group_of, arrays, strict=True):
        group = opt.param_groups[k]
        ours = group["lr_in_momentum"]
        if array is not None and ours != theirs and group["momentum"]:
            lr = resolve_lr(group, opt.steps)
            if theirs if outward else ours:
                array = array * lr
            elif lr > 0:
                array = array / lr
            else:
                raise OptionError("lr: expected more than 0, by which the momentum buffer is divided; got 0")
        rescaled.append(array)
    return rescaled


def _arrays(tree: Any) -> Any:
    """The same nesting with arrays for tensors and variables."""
    try:
        return _map(tree)
    except RecursionError:
        return tree  # RMSProp says what is wrong with it


def _map(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _map(item) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_map(item) for item in tree]
        return items if isinstance(tree, list) else type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return _array(tree)


def _array(item: Any) -> Any:
    """What NumPy can read of a tensor, also of one that requires a gradient or is on a GPU."""
    return item.detach().cpu() if hasattr(item, "detach") else item


def _number(name: str, value: Any) -> Any:
    """A plain number where it is in an array, a tensor or a variable."""
    array = np.asarray(_array(value))
    if array.size != 1:
        raise CheckpointError(f"{name}: expected one number, got shape {array.shape}")
    return array.item()


def _count(name: str, value: Any) -> int:
    number = _number(name, value)
    if not isinstance(number, int | float) or not 0 <= number <= MOST_STEPS or number != int(number):
        raise CheckpointError(
            f"{name}: expected a number of steps, got {number!r}, which is not a whole number from 0 to 2**53"
        )
    return int(number)


def _named(thing: Any) -> str:
    if isinstance(thing, Mapping):
        return f"a dict with {', '.join(map(repr, list(thing)[:8])) or 'nothing'}"
    return f"a {type(thing).__name__}"
