"""A steady step as one call of compiled code.

The call updates, and counts the step in `Counts.memory`: no signal handler sees an update without its count. The call
begins only if its ticket is in `Counts.memory`. Each save, load, other step and change of an option withdraws the
ticket first. Then the call does nothing, and the step is taken in the general way.

With one thread the call holds the GIL from its first to its last instruction. So no other thread sees an update without
its count either, and the step needs no lock.
"""

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from fastrms._state import OptimizerState
from fastrms.backends.base import Call
from fastrms.backends.tuner import Tuner
from fastrms.backends.turns import Turns
from fastrms.buffers.replaced import Watch, are_intact
from fastrms.kernels import cpu, pointers

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AtOnce"]

_tickets = count(1)


class AtOnce:
    """The steady steps of a backend, with the options of one moment. Users hold the views in `params` and `grads`."""

    def __init__(self, params: Watch, grads: Watch, turns: Turns, state: OptimizerState, tuner: Tuner | None) -> None:
        self._params, self._grads, self._counts = params, grads, state.counts
        self._plain_items = grads.buffer.layout.plain_items
        self._kernel, self._tuner = state.kernel, tuner
        # Threads of a parallel loop run without the GIL, and the tuner is not made for several threads.
        self._turns = turns if tuner is not None or state.kernel == "parallel" else None
        self._ticket = next(_tickets)
        # By variant. Each call takes the address of the gradients as `cpu.serial_from` does.
        self._from_buffer: dict[str, Callable[[int], int]] = {}
        self._in_place: dict[str, Callable[[int], int]] = {}

    def add(self, in_place: bool, variant: str, call: Call) -> None:
        """Add the steps of a variant with gradients in place, or in the gradient buffer.

        `call` is a call of a function in `plan.FROM_TABLE` that does not count the step.
        """
        update, table, *state, _ = call
        table = table.copy()
        table["control_at"], table["ticket"] = self._counts.memory.ctypes.data, self._ticket
        calls = self._in_place if in_place else self._from_buffer
        calls[variant] = partial(update, table, *state)

    def admit(self) -> None:
        """Let `step` take steps until the ticket is withdrawn."""
        self._counts.admit(self._ticket)

    def step(self, gradients: Any) -> bool:
        """Take and count a step, and return whether that was possible. `gradients` is as for `Backend.step`."""
        if gradients is None:
            calls, grads, address = self._from_buffer, self._grads, 0
        else:
            items = self._plain_items(gradients)  # keeps the arrays alive until they are read
            if items is None:
                return False
            calls, grads, address = self._in_place, None, pointers.items_of(items)
        if not are_intact(self._params, grads):
            return False
        turns = self._turns
        if turns is None:
            call = calls.get(self._kernel)
            return call is not None and call(address) == cpu.FOUND
        with turns.lock:
            if turns.in_progress.locked():  # a call in progress on this thread
                return False
            with turns.in_progress:
                tuner = self._tuner
                call = calls.get(self._kernel if tuner is None else tuner.variant)
                taken = call is not None and call(address) == cpu.FOUND
                if taken and tuner is not None:
                    tuner.step_done()
        return taken
