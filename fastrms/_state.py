"""The data of an optimizer: buffers of parameters and state, parameter groups, options of the whole, and counts."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray  # noqa: TC002 # a dataclass has its annotations at run time

from fastrms._checks import GROUP_DEFAULTS, NONFINITE, check_cache_dtype, check_one_of, check_option, check_threads
from fastrms._types import CacheDType, Kernel, NonFinite, Options
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.buffers.held import HeldArrays
from fastrms.buffers.joined import JoinedBuffer
from fastrms.buffers.pytree import Params
from fastrms.errors import DtypeError
from fastrms.kernels import threads
from fastrms.options import ParamGroup, ParamGroups, parameter_groups

__all__ = ["STATE_OPTIONS", "Counts", "OptimizerState", "Settings", "optional_state"]

# The state buffers beside the cache, and the option that needs each of them.
STATE_OPTIONS = {"momentum_buffer": "momentum", "grad_avg": "centered"}


def optional_state(groups: Iterable[Options]) -> list[str]:
    """Return the names of the buffers that these groups need: of "momentum_buffer" and "grad_avg"."""
    groups = list(groups)
    return [name for name, option in STATE_OPTIONS.items() if any(group[option] for group in groups)]


class Counts:
    """The counts of steps, and whether a write is in progress."""

    __slots__ = ("absent", "last_norms", "last_skipped", "memory", "skipped_steps", "updated", "writing")

    def __init__(self, parameters: int) -> None:
        # `steps`, and the ticket of the `backends.at_once.AtOnce` whose calls may take a step now, or 0. Compiled code
        # reads and writes both.
        self.memory: NDArray[np.int64] = np.zeros(2, np.int64)
        self.skipped_steps = 0
        # For each parameter the number of steps in which it had no gradient.
        self.absent: NDArray[np.int64] = np.zeros(parameters, np.int64)
        # While parameters, state and counts are written, they may belong to different steps.
        self.writing = False
        # Which parameters a step of one parameter at a time has already updated; None between two steps.
        self.updated: NDArray[np.bool_] | None = None
        # Whether the last step was skipped, and the norms of its gradients if it computed them.
        self.last_skipped = False
        self.last_norms: NDArray[np.float64] | None = None

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        # The arrays of a pickle may be read-only, as from joblib.
        for name, value in state[1].items():
            setattr(self, name, value.copy() if isinstance(value, np.ndarray) else value)

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return int(self.memory[0])

    @steps.setter
    def steps(self, value: int) -> None:
        self.memory[0] = value

    def admit(self, ticket: int) -> None:
        """Let the calls with this ticket take steps; 0 for none."""
        self.memory[1] = ticket

    def take_over(self, other: "Counts") -> None:
        """Copy the counts of another optimizer with the same parameters."""
        self.steps, self.skipped_steps, self.absent = other.steps, other.skipped_steps, other.absent.copy()


@dataclass
class Settings:
    """All arguments of an optimizer except its parameters."""

    defaults: Options  # for groups without values of their own
    kernel: Kernel
    num_threads: int | None
    cache_dtype: CacheDType | None
    nonfinite: NonFinite
    global_clip_norm: float | None

    @classmethod
    def of(cls, options: Options) -> Self:
        """Return settings from keyword arguments of `fastrms.RMSProp`. Missing ones have their defaults."""
        whole = {
            "kernel": "auto", "num_threads": None, "cache_dtype": None, "nonfinite": "propagate",
            "global_clip_norm": None,
        }  # fmt: skip
        of_groups = {name: value for name, value in options.items() if name not in whole}
        for name in of_groups.keys() - GROUP_DEFAULTS.keys():
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        return cls(GROUP_DEFAULTS | of_groups, **{name: options.get(name, value) for name, value in whole.items()})

    def check(self) -> None:
        """Check `global_clip_norm`, `nonfinite` and `num_threads`, and replace each by its checked form."""
        self.global_clip_norm = check_option("global_clip_norm", self.global_clip_norm)
        self.nonfinite = check_one_of("nonfinite", self.nonfinite, NONFINITE)
        self.num_threads = check_threads(self.num_threads, threads.max_threads())


class OptimizerState:
    """All that determines the next steps of an optimizer.

    The constructor checks the parameters and the options of groups; `settings` are checked. A backend makes the
    buffers, in its own memory. If the state has a group that will be added to another optimizer, `added_as` is the
    number of the group there; otherwise it is None.
    """

    kernel: Kernel
    nonfinite: NonFinite
    cache_dtype: CacheDType | None

    def __init__(self, params: Params, settings: Settings, in_place: bool = False, added_as: int | None = None) -> None:
        name = "params" if added_as is None else f"params[{added_as}]"
        self.kernel, self.num_threads = settings.kernel, settings.num_threads
        self.name, self.in_place, self.defaults = name, in_place, settings.defaults
        self.nonfinite, self.global_clip_norm = settings.nonfinite, settings.global_clip_norm
        groups = parameter_groups(params)
        self.grouped = groups is not None  # otherwise one group has all parameters
        # The initial values without the options of groups; None after `forget_arrays`.
        self.arrays: Any = params if groups is None else [group["params"] for group in groups]
        self.layout = layout = Layout(self.arrays, name)
        for leaf in layout.leaves:
            if (dtype := layout.dtype_of(leaf)) not in (np.float32, np.float64):
                raise DtypeError(
                    f"{name}{leaf.path}: expected float32 or float64, got {dtype}; convert it with .astype(np.float32)"
                )
        refuse_overlap(layout, self.arrays, name)
        self.cache_dtype = check_cache_dtype(settings.cache_dtype, {segment.dtype for segment in layout.segments})
        # With groups, the outermost list of the structure is the list of groups.
        sizes = layout.child_sizes() if self.grouped else [len(layout.leaves)]
        # The number of each parameter's group.
        self.group_of: NDArray[np.intp] = np.repeat(np.arange(len(sizes)), sizes)
        made, leaves = [], iter(layout.leaves)
        for number, (group, size) in enumerate(zip(groups or [{}], sizes, strict=True), added_as or 0):
            options = {name: value for name, value in {**settings.defaults, **group}.items() if name != "params"}
            dtypes = {layout.dtype_of(leaf) for leaf in islice(leaves, size)}
            made.append(ParamGroup(options, f"param_groups[{number}]", dtypes, self.cache_dtype))
        self.param_groups = ParamGroups(made)
        # "params", "grads", "cache", and if options need them "momentum_buffer" and "grad_avg".
        self.buffers: dict[str, FlatBuffer] = {}
        self.counts = Counts(len(layout.leaves))

    def forget_arrays(self) -> None:
        """Drop the references to the initial values, after they were copied to the buffers."""
        self.arrays = None

    def take_in(
        self, new: "OptimizerState", made: Mapping[str, FlatBuffer], join: Callable[..., FlatBuffer] = JoinedBuffer
    ) -> None:
        """Append the only group of another optimizer, with its buffers. The new parameters have taken no step.

        `made` has the state buffers of the present parameters that only the new group needs. `join` makes a buffer of
        two, as `JoinedBuffer`.
        """

        def joined(own: Any, more: Any) -> list[Any]:
            return [*(own if self.grouped else [own]), more]

        layout, buffers = Layout(joined(self.layout.zeros(), new.layout.zeros()), "params"), {**self.buffers, **made}
        layout.hint = "; since add_param_group was called, there is one item for each group"
        for name, buffer in buffers.items():
            more = new.buffers[name]
            views = joined(buffer.views, more.views)
            if isinstance(buffer, HeldArrays):
                buffers[name] = buffer.joined(layout, more, views)
            else:
                placed = layout.of_parts([buffer.layout, more.layout])
                buffers[name] = join(placed, [buffer, more], views)
        counts, groups, group = self.counts, self.param_groups, new.param_groups[0]
        absent = np.append(counts.absent, new.counts.absent + counts.steps)
        group_of = np.append(self.group_of, new.group_of + len(groups))
        group.bind_as(groups[0], new.buffers["params"].views)
        # Neither statement has a call of Python, so that Ctrl-C leaves all of it or nothing.
        self.buffers, self.layout, self.group_of, self.grouped, counts.absent = buffers, layout, group_of, True, absent
        list.append(groups, group)

    def undo(self) -> Callable[[], None]:
        """Return a function that takes out the groups that are taken in from now on."""
        before = self.buffers, self.layout, self.group_of, self.grouped, self.counts.absent
        first = slice(len(self.param_groups), None)

        def undo() -> None:
            self.buffers, self.layout, self.group_of, self.grouped, self.counts.absent = before
            list.__delitem__(self.param_groups, first)

        return undo

    def add_buffers(self, names: Iterable[str], new_buffer: Callable[[str], FlatBuffer]) -> None:
        """Make the named state buffers that do not exist yet; none of them after an error."""
        self.buffers.update({name: new_buffer(name) for name in names if name not in self.buffers})

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate of a group is a function."""
        return any(callable(group["lr"]) for group in self.param_groups)

    @property
    def clips_by_norm(self) -> bool:
        """Whether gradients are clipped by a norm, of each parameter or of all."""
        return self.global_clip_norm is not None or any(group["clip_norm"] is not None for group in self.param_groups)

    @property
    def state_in_use(self) -> list[tuple[bool, bool]]:
        """For each group whether it uses the momentum buffer, and whether it uses the mean gradient."""
        return [(group["momentum"] > 0, group["centered"]) for group in self.param_groups]

    def state_layout(self, layout: Layout) -> Layout:
        """Return the layout of a state buffer for parameters of `layout`. The elements of bfloat16 state are uint16."""
        return layout if self.cache_dtype is None else layout.with_dtype(np.uint16)
