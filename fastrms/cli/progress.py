"""The progress bar of the commands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CaseProgress", "show_progress"]

# Seconds between two updates of the bar.
REFRESH = 0.1


class CaseProgress:
    """Progress through a number of cases of equal weight, such as the steps of a training.

    `show` is called at most every `REFRESH` seconds with the number of cases done, fractions included, and a text.
    """

    def __init__(self, show: Callable[[float, str], None] | None = None) -> None:
        self._show = show
        self._done = 0
        self._due = 0.0

    def __call__(self, share: float, text: str) -> None:
        """Show that `share` of the current case is done, from 0 to 1, with a text about the work in progress."""
        if self._show is not None and (now := perf_counter()) >= self._due:
            self._show(self._done + share, text)
            self._due = now + REFRESH

    def case_done(self) -> None:
        """Count one more case as done."""
        self._done += 1


@contextmanager
def show_progress(console: "Console", total: int) -> Iterator[CaseProgress]:
    """Show a progress bar for `total` cases, if the console is a terminal and not quiet."""
    if console.quiet or not console.is_interactive:
        yield CaseProgress()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)  # "[32]" is no markup
    columns = [BarColumn(), TextColumn("{task.percentage:3.0f}%"), TimeRemainingColumn(), text]
    # Drawn between measurements: a thread of its own would run during them.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        yield CaseProgress(lambda done, text: progress.update(task, completed=done, description=text, refresh=True))
