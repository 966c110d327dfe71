"""A steady step as one call of compiled code, without a lock.

The call holds the GIL from its first to its last instruction. It updates, and counts the step in `Counts.memory`. No
other thread and no signal handler sees an update without its count. The call begins only if its ticket is in
`Counts.memory`. Each save, load, other step and change of an option withdraws the ticket first. Then the call does
nothing, and the step is taken under the lock.
"""

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

from fastrms._state import Counts
from fastrms.backends.base import Call
from fastrms.buffers.replaced import Watch, are_intact
from fastrms.kernels import cpu, pointers

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AtOnce"]

_tickets = count(1)


class AtOnce:
    """The steady steps of a backend, with the options of one moment. Users hold the views in `params` and `grads`."""

    def __init__(self, counts: Counts, params: Watch, grads: Watch) -> None:
        self._counts, self._params, self._grads = counts, params, grads
        self._plain_items = grads.buffer.layout.plain_items
        self._ticket = next(_tickets)
        # Each takes the address of the gradients as `cpu.serial_from` does.
        self._from_buffer: Callable[[int], int] | None = None
        self._in_place: Callable[[int], int] | None = None

    def add(self, in_place: bool, call: Call) -> None:
        """Add the steps with gradients in place, or in the gradient buffer.

        `call` is a call of `cpu.serial_from` that does not count the step.
        """
        serial_from, table, *state, _ = call
        table = table.copy()
        table["control_at"], table["ticket"] = self._counts.memory.ctypes.data, self._ticket
        if in_place:
            self._in_place = partial(serial_from, table, *state)
        else:
            self._from_buffer = partial(serial_from, table, *state)

    def admit(self) -> None:
        """Let `step` take steps until the ticket is withdrawn."""
        self._counts.admit(self._ticket)

    def step(self, gradients: Any) -> bool:
        """Take and count a step, and return whether that was possible. `gradients` is as for `Backend.step`."""
        if gradients is None:
            call, grads, address = self._from_buffer, self._grads, 0
        else:
            items = self._plain_items(gradients)  # keeps the arrays alive until they are read
            if items is None:
                return False
            call, grads, address = self._in_place, None, pointers.items_of(items)
        return call is not None and are_intact(self._params, grads) and call(address) == cpu.FOUND
