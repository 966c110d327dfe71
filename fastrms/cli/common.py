"""Tools that the commands share: requirements, output files, terminal output, and types of arguments."""

import argparse
import importlib
import importlib.util
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")

__all__ = [
    "CommandError", "find_object", "is_plain", "load_numba", "make_console", "make_folder", "make_table",
    "number", "one_line", "positive", "print_table", "remember_start", "require", "save_figure", "say", "start_threads",
    "whole_number", "writing",
]  # fmt: skip

# Modules whose distribution has another name.
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}

# More threads than any machine has. Numba reserves stack for each, and without a limit the process would end.
MAX_THREADS = 4096


class CommandError(Exception):
    """A command fails; the message is one line and gives the reason."""


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# Requirements.


def require(extra: str, *modules: str) -> None:
    """Import `modules`, which the optional dependencies `extra` install, or raise CommandError.

    Missing packages are found first, before the others are imported, which takes seconds.
    """
    missing = [_DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
        verb = "is" if len(missing) == 1 else "are"
        raise CommandError(f'{names} {verb} not installed; install with: python -m pip install "fastrms[{extra}]"')
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # matplotlib's for a wrong MPLBACKEND, for instance
            backend = os.environ.get("MPLBACKEND")
            where = f" (MPLBACKEND={backend})" if name == "matplotlib" and backend else ""
            text = f"{_DISTRIBUTIONS.get(name, name)} cannot be imported{where}: {one_line(error)}"
            raise CommandError(text) from None


def load_numba() -> None:
    """Import Numba, or raise CommandError about an environment variable that Numba or fastrms cannot use."""
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    if wrong := [each for each in features.split(",") if each.strip() and each.strip()[0] not in "+-"]:
        # LLVM would end the process.
        raise CommandError(f"NUMBA_CPU_FEATURES: expected names that begin with + or -, got {wrong[0]!r}")
    for name in ("FASTRMS_ZERO_COPY", "FASTRMS_TUNE"):
        if (value := os.environ.get(name, "1")) not in ("0", "1"):
            raise CommandError(f"{name}: expected 0 or 1, got {value!r}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            import numba
        except Exception as error:
            settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_")]
            where = f" (environment: {', '.join(settings)})" if settings else ""
            raise CommandError(f"Numba cannot be imported: {one_line(error)}{where}") from None
    for warning in caught:
        text = str(warning.message)
        if text.startswith("Environment variable"):
            raise CommandError(text.splitlines()[0])
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    threads = int(
        numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined] # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue] # no types
    )
    if not 1 <= threads <= MAX_THREADS:
        raise CommandError(f"NUMBA_NUM_THREADS: expected a whole number from 1 to {MAX_THREADS}, got {threads}")


def start_threads() -> None:
    """Start Numba's threads, or raise CommandError about a threading layer that is missing."""
    from fastrms.kernels import threads

    try:
        threads.start_threads()
    except (ImportError, ValueError) as error:
        raise CommandError(f"Numba's threads cannot be started: {one_line(error)}") from None


def find_object(option: str, name: str) -> Any:
    """Import the object `name`, ``module:object``, the value of `option`; the current folder is searched too."""
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise CommandError(f"{option}: expected module:function, got {name!r}")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # an installed program does not search there
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of the module's own code, too
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise CommandError(f"{option}: {name}: the module cannot be imported: {why}") from None
    finally:
        sys.path.remove(folder)
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise CommandError(f"{option}: {name}: expected a function of this name in {module}, found none") from None


# Output files.

_start = Path()


def remember_start() -> None:
    """Remember the current folder for `writing`; the user's modules may change folders."""
    global _start
    try:
        _start = Path.cwd()
    except OSError:  # it was removed
        _start = Path()


@contextmanager
def writing(path: Path, failure: str = "cannot be written") -> Iterator[Path]:
    """Provide the path from the folder of the start, and turn an OSError into a CommandError about ``--output``."""
    try:
        yield _start / path
    except OSError as error:
        raise CommandError(f"--output: {path}: {failure}: {error.strerror or error}") from None


def make_folder(folder: Path, *names: str) -> None:
    """Make the folder of ``--output``, and check before the work that files of these names can be written there."""
    with writing(folder, "expected a folder to write to") as place:
        place.mkdir(parents=True, exist_ok=True)
    with writing(folder, "no file can be written in it") as place, tempfile.TemporaryFile(dir=place) as file:
        file.write(b"x")
    for name in names:
        with writing(folder / name) as place:
            if place.exists():
                place.open("ab").close()


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure to a file in the folder of ``--output``."""
    with writing(path) as place:
        figure.savefig(place)


# Terminal output.


def make_console(quiet: bool = False) -> "Console":
    """Return a rich console for standard output that prints text verbatim, or nothing if `quiet`."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise

    # "[0]" in a path is no markup.
    console = PlainConsole(markup=False, emoji=False, highlight=False, quiet=quiet)
    if not console.is_terminal:
        # A file has no edge, and a squeezed table is not aligned.
        console.width = max(console.width, 120)
    return console


def is_plain(console: "Console") -> bool:
    """Return whether output has to be plain ASCII: for a file, a pipe, or a terminal without Unicode."""
    return not console.is_terminal or not console.encoding.lower().startswith("utf")


def make_table(console: "Console", *headers: str) -> "Table":
    """Return an empty table: the first column flush left, the others, with numbers, flush right."""
    from rich import box
    from rich.table import Table

    plain = is_plain(console)
    table = Table(box=None if plain else box.SIMPLE_HEAD, padding=(0, 2, 0, 0) if plain else (0, 1), pad_edge=not plain)
    # A narrow terminal folds labels; numbers stay whole.
    table.add_column(headers[0], overflow="fold", min_width=12)
    for header in headers[1:]:
        table.add_column(header, overflow="fold", justify="right", no_wrap=True, min_width=0)
    return table


def print_table(console: "Console", table: "Table") -> None:
    """Print a table whole: on a narrow terminal first labels are folded, then lines, and numbers never."""
    from rich.measure import Measurement

    def width() -> int:
        return Measurement.get(console, console.options.update(max_width=10_000), table).maximum

    before = console.width
    if width() > before:
        table.columns[0].width = 12
    console.width = max(before, width())
    console.print(table)
    console.width = before


def say(console: "Console", text: str = "", style: str | None = None) -> None:
    """Print one line, however long; characters outside the output's encoding become escapes."""
    safe = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(safe, style=style, soft_wrap=True)


# Types of arguments.


def number(convert: Callable[[str], T], is_good: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """Return a parser for argparse; `convert` raises ValueError for a text that is no number."""

    def parse(text: str) -> T:
        with suppress(ValueError):
            if is_good(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser for argparse of whole numbers from `low` to `high`, both included."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return number(int, lambda value: low <= value <= (value if high is None else high), f"a whole number {limits}")


positive = number(float, lambda value: 0 < value < math.inf, "a finite number above 0")
