"""The data of an optimizer: parameters and state in buffers, parameter groups, options of all groups, and counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray  # noqa: TC002 # a dataclass has its annotations at run time

from fastrms._checks import GROUP_DEFAULTS, NONFINITE, check_cache_dtype, check_one_of, check_option, check_threads
from fastrms.buffers import FlatBuffer, Layout
from fastrms.buffers.aliasing import refuse_overlap
from fastrms.errors import DtypeError
from fastrms.kernels import threads
from fastrms.options import ParamGroup, ParamGroups, parameter_groups

__all__ = ["STATE_OPTIONS", "Counts", "OptimizerState", "Settings"]

# State buffers beside the cache, and the option that asks for each.
STATE_OPTIONS = {"momentum_buffer": "momentum", "grad_avg": "centered"}


class Counts:
    """The numbers of steps, and whether parameters, state and counts belong to the same step.

    Attributes
    ----------
    steps : int
        Steps taken.
    skipped_steps : int
        Steps not taken because a gradient was not finite.
    absent : ndarray of int64, shape (parameters,)
        For each parameter the number of steps in which it had no gradient.
    writing : bool
        Whether parameters, state and counts are of different steps at the moment.
    """

    __slots__ = ("absent", "skipped_steps", "steps", "writing")

    def __init__(self, parameters: int) -> None:
        self.steps = self.skipped_steps = 0
        self.absent: NDArray[np.int64] = np.zeros(parameters, np.int64)
        self.writing = False

    def take_over(self, other: "Counts") -> None:
        """Copy the numbers of another optimizer with the same parameters."""
        self.steps, self.skipped_steps, self.absent = other.steps, other.skipped_steps, other.absent.copy()


@dataclass
class Settings:
    """The arguments of an optimizer beside its parameters.

    Attributes
    ----------
    defaults : mapping of str to option
        Options of the groups that have no value of their own.
    kernel, num_threads, cache_dtype, nonfinite, global_clip_norm
        As for `fastrms.RMSProp`. `check` checks them.
    """

    defaults: Mapping[str, Any]
    kernel: str
    num_threads: int | None
    cache_dtype: str | None
    nonfinite: str
    global_clip_norm: float | None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Return the settings that arguments of `fastrms.RMSProp` say; the others have their defaults."""
        whole = {
            "kernel": "auto", "num_threads": None, "cache_dtype": None, "nonfinite": "propagate",
            "global_clip_norm": None,
        }  # fmt: skip
        of_groups = {name: value for name, value in options.items() if name not in whole}
        for name in of_groups.keys() - GROUP_DEFAULTS.keys():
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        return cls(GROUP_DEFAULTS | of_groups, **{name: options.get(name, value) for name, value in whole.items()})

    def check(self) -> None:
        """Check the options of all groups, and replace each by its checked form.

        Raises
        ------
        OptionError, OptionTypeError
            An option is out of range, or of the wrong kind.
        """
        self.global_clip_norm = check_option("global_clip_norm", self.global_clip_norm)
        self.nonfinite = check_one_of("nonfinite", self.nonfinite, NONFINITE)
        self.num_threads = check_threads(self.num_threads, threads.max_threads())


class OptimizerState:
    """Everything that decides the next steps of an optimizer.

    The constructor checks parameters and options. Its `buffers` are empty: a backend makes them where they belong.

    Parameters
    ----------
    params : as for `fastrms.RMSProp`
    settings : Settings
        Checked.

    Attributes
    ----------
    arrays : the structure of `params`
        The arrays that were given, without options of groups. `forget_arrays` lets them go.
    layout : Layout
        Of all parameters.
    buffers : dict of str to FlatBuffer
        "params" and "grads", "cache", and where an option asked for it "momentum_buffer" and "grad_avg".
    param_groups : ParamGroups
    grouped : bool
        Whether groups were given; otherwise there is one, of all parameters.
    group_of : ndarray of int, shape (parameters,)
        The number of each parameter's group.
    counts : Counts
    kernel, num_threads, cache_dtype, nonfinite, global_clip_norm
        As for `fastrms.RMSProp`.

    Raises
    ------
    StructureError, DtypeError, OptionError, OptionTypeError
        As for `fastrms.RMSProp`.
    """

    def __init__(self, params: Any, settings: Settings) -> None:
        self.kernel, self.num_threads = settings.kernel, settings.num_threads
        self.nonfinite, self.global_clip_norm = settings.nonfinite, settings.global_clip_norm
        groups = parameter_groups(params)
        self.grouped = groups is not None
        self.arrays: Any = params if groups is None else [group["params"] for group in groups]
        self.layout = layout = Layout(self.arrays, "params")
        for leaf in layout.leaves:
            if (dtype := layout.dtype_of(leaf)) not in (np.float32, np.float64):
                raise DtypeError(
                    f"params{leaf.path}: expected float32 or float64, got {dtype}; convert it with .astype(np.float32)"
                )
        refuse_overlap(layout, self.arrays)
        self.cache_dtype = check_cache_dtype(settings.cache_dtype, {segment.dtype for segment in layout.segments})
        # With groups, the outermost list of the structure is the list of groups.
        sizes = layout.child_sizes() if self.grouped else [len(layout.leaves)]
        self.group_of: NDArray[np.intp] = np.repeat(np.arange(len(sizes)), sizes)
        made = []
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        for number, group in enumerate(groups or [{}]):
            own = {name: value for name, value in group.items() if name != "params"}
            dtypes = {layout.dtype_of(leaf) for leaf in layout.leaves[bounds[number] : bounds[number + 1]]}
            made.append(ParamGroup({**settings.defaults, **own}, f"param_groups[{number}]", dtypes, self.cache_dtype))
        self.param_groups = ParamGroups(made)
        self.buffers: dict[str, FlatBuffer] = {}
        self.counts = Counts(len(layout.leaves))

    def forget_arrays(self) -> None:
        """Let the arrays go that were given: their values are in the buffers."""
        self.arrays = None

    def state_layout(self, layout: Layout) -> Layout:
        """Return the layout of a state buffer for parameters of `layout`: in bfloat16, its elements are uint16."""
        return layout if self.cache_dtype is None else layout.with_dtype(np.uint16)
