"""The check that parameters which are updated in place are still the original arrays."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastrms._state import OptimizerState
from fastrms.backends.base import Memory
from fastrms.backends.plan import HostRun, split_runs
from fastrms.buffers import FlatBuffer
from fastrms.buffers.replaced import changed_views
from fastrms.errors import StructureError
from fastrms.kernels import cpu

if TYPE_CHECKING:
    from fastrms.backends.host import HostBackend

__all__ = ["HeldCheck"]


class HeldCheck:
    """The check of a host backend before each step.

    Compiled code reads the fields of the arrays, as it does for gradients. In Python this would take microseconds for
    each array. The runs that update the arrays also check them. On several ranks, runs update a flat copy of this
    rank's shard, so other runs check the arrays.
    """

    def __init__(
        self, state: OptimizerState, own: Mapping[str, FlatBuffer], runs: Sequence[HostRun], memory: Memory
    ) -> None:
        self._whole = {name: state.buffers[name] for name in ("params", "grads")}
        self._runs, self._prepared = runs, own["params"] is self._whole["params"]
        if not self._prepared:
            layout, groups = self._whole["grads"].layout, state.param_groups
            parts = split_runs(layout, state.group_of)
            self._runs = [HostRun(k, groups[k], layout, numbers, memory) for k, numbers in parts]

    def refuse_changed(self, backend: "HostBackend") -> None:
        """Raise StructureError if a parameter can no longer be updated in place."""
        backend.use_options()
        if backend.reads_in_place and not self._prepared:  # once, because the check does not depend on options
            self._whole["params"].segments  # noqa: B018 - raises if an array was moved before: runs keep what they find
            for run in self._runs:
                backend.prepare(run, self._whole)
            self._prepared = True
        unchanged = backend.reads_in_place and all(run.locate(0) == cpu.FOUND for run in self._runs)
        if not unchanged and (problems := changed_views(self._whole["params"], "params")):
            raise StructureError(problems[0])
        if backend.reads_in_place and not unchanged:
            raise StructureError("params: expected the original arrays, got one that was changed")
