"""The lock of an optimizer: one step, save or load at a time, between threads and within one thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastrms._state import Counts
from fastrms.errors import StepInProgressError

__all__ = ["Turns"]


class Turns:
    """The lock of an optimizer. A call that holds it is refused a second call on its own thread.

    `counts.writing` tells whether the call in progress is writing.
    """

    __slots__ = ("__weakref__", "_counts", "in_progress", "lock")

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        # Each call holds both. Other threads wait for the first. The same thread, as in a signal handler, gets the
        # first again, and finds the second locked.
        self.lock = threading.RLock()
        self.in_progress = threading.Lock()

    @contextmanager
    def between_steps(self, name: str, *, changes: bool = True, within_pass: bool = False) -> Iterator[None]:
        """Return a context for the call `name` in which no step runs, on other threads or on this one.

        `changes` tells whether the call writes parameters, state or counts. `within_pass` tells whether the call is
        allowed while a step is taken one parameter at a time.
        """
        with self.lock:
            self.admit(name, changes)
            if self.in_progress.locked():  # a read within a step or a save
                if not within_pass:
                    self.refuse_in_pass(name)
                yield
                return
            with self.in_progress:
                if not within_pass:
                    self.refuse_in_pass(name)
                self._counts.admit(0)
                self._counts.writing = changes
                yield
                self._counts.writing = False

    @contextmanager
    def part_of_step(self, name: str) -> Iterator[None]:
        """Return a context for the call `name`, which takes a part of a step and sets `counts.writing` itself."""
        with self.lock:
            if self.in_progress.locked():
                self.admit(name, changes=True)
            with self.in_progress:
                self._counts.admit(0)
                yield

    def admit(self, name: str, changes: bool) -> None:
        """Raise StepInProgressError if a call in progress on this thread forbids the call `name`.

        A signal handler, or a user's function that a step calls, may call any method in the midst of the step. It may
        read the state before the first write of the step and after the last. All else is refused.
        """
        if not self.in_progress.locked():
            self._counts.writing = False  # a step was broken off, as by Ctrl-C
        elif changes or self._counts.writing:
            raise StepInProgressError(
                f"{name}: expected a call between two steps, got one during a step, save or load on the same thread, "
                "from a signal handler or a function that the step calls; set a flag there, and check the flag after "
                "step()"
            )

    def refuse_in_pass(self, name: str) -> None:
        """Raise StepInProgressError if a step of one parameter at a time has updated only some parameters."""
        updated = self._counts.updated
        if updated is not None:
            raise StepInProgressError(
                f"{name}: expected a call between two steps, got one within a step of one parameter at a time, with "
                f"{int(updated.sum())} of {len(updated)} parameters updated; update the others too "
                "(step_parameter, step_rows), or call finish_step()"
            )

    def after_fork(self) -> None:
        """Make new locks in a child process. The thread that held the old locks does not exist there."""
        self.lock, self.in_progress = threading.RLock(), threading.Lock()
        self._counts.writing = False
