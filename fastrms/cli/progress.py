"""The progress bar of `fastrms bench`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CaseProgress", "show_progress"]

# Seconds between two updates of the progress bar.
REFRESH = 0.1


class CaseProgress:
    """Passes on how far the measurement of a case is, as its share of all cases; without a bar, to nowhere."""

    def __init__(self, show: Callable[[float, str], None] | None = None) -> None:
        self._show = show
        self._done = 0
        self._due = 0.0

    def __call__(self, share: float, what: str) -> None:
        """Show that `share` of the present case is done, from 0 to 1, and what is done now."""
        if self._show is not None and (now := perf_counter()) >= self._due:
            self._show(self._done + share, what)
            self._due = now + REFRESH

    def case_done(self) -> None:
        """Count one more case as done."""
        self._done += 1


@contextmanager
def show_progress(console: "Console", total: int) -> Iterator[CaseProgress]:
    """Show a progress bar on a terminal."""
    if not console.is_interactive:
        yield CaseProgress()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)  # "[32]" is no markup
    columns = [BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn(), text]
    # Drawn between measurements, and not by a thread of its own, which would run in their time.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        yield CaseProgress(lambda done, what: progress.update(task, completed=done, description=what, refresh=True))
