"""The lock of an optimizer: one step, save or load at a time, between threads and within one thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastrms._state import Counts
from fastrms.errors import StepInProgressError

__all__ = ["Turns"]


class Turns:
    """The lock of an optimizer, and whether a call is in progress on the thread that holds it.

    Parameters
    ----------
    counts : Counts
        Its `writing` tells whether the call in progress is writing.

    Attributes
    ----------
    lock : threading.RLock
        Held during each call. Other threads wait for it.
    in_progress : threading.Lock
        Held during each call by the thread that holds `lock`. A second call on the same thread, as from a signal
        handler, finds it locked.
    """

    __slots__ = ("__weakref__", "_counts", "in_progress", "lock")

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self.lock = threading.RLock()
        self.in_progress = threading.Lock()

    @contextmanager
    def between_steps(self, name: str, *, changes: bool = True) -> Iterator[None]:
        """Return a context in which no step runs, on other threads or on this one.

        Parameters
        ----------
        name : str
            The name of the call, for error messages.
        changes : bool, default True
            Whether the call writes parameters, state or counts.
        """
        with self.lock:
            self.admit(name, changes)
            if self.in_progress.locked():  # a read within a step or a save
                yield
                return
            with self.in_progress:
                self._counts.admit(0)
                self._counts.writing = changes
                yield
                self._counts.writing = False

    def admit(self, name: str, changes: bool) -> None:
        """Raise where a call in progress on this very thread does not allow `name` now.

        A signal handler, or a user's function that a step calls, may call any method in the midst of the step. Reading
        the state is allowed before the first write of the step and after the last. All else is refused.

        Raises
        ------
        StepInProgressError
            The call is refused.
        """
        if not self.in_progress.locked():
            self._counts.writing = False  # a step was broken off, as by Ctrl-C
        elif changes or self._counts.writing:
            raise StepInProgressError(
                f"{name}: expected a call between two steps, got one in the midst of a step, save or load on the same "
                "thread, made by a signal handler or by a function that the step calls; set a flag there, and check it "
                "after step()"
            )

    def after_fork(self) -> None:
        """Make new locks in a child process, where the thread that held the old ones does not exist."""
        self.lock, self.in_progress = threading.RLock(), threading.Lock()
        self._counts.writing = False
