"""What the subcommands share: their error, a check for optional packages, types of arguments, and output."""

import argparse
import importlib
import importlib.util
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "CommandError",
    "find_object",
    "from_start",
    "is_plain",
    "load_numba",
    "make_console",
    "make_folder",
    "make_table",
    "one_line",
    "positive",
    "print_table",
    "remember_start",
    "require",
    "save_figure",
    "say",
    "start_threads",
    "whole_number",
]

# Where the name to install is not the name to import.
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class CommandError(Exception):
    """A command cannot go on, for a reason that its message tells in one line."""


def require(extra: str, *modules: str) -> None:
    """Import `modules`, which the optional dependencies `extra` bring, or raise CommandError.

    A missing package shows at once, ahead of seconds of importing the others.
    """
    missing = [_DISTRIBUTIONS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
        verb = "is" if len(missing) == 1 else "are"
        raise CommandError(f'{names} {verb} not installed; install with: python -m pip install "fastrms[{extra}]"')
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # such as matplotlib's about MPLBACKEND
            backend = os.environ.get("MPLBACKEND")
            where = f" (MPLBACKEND={backend})" if name == "matplotlib" and backend else ""
            text = f"{_DISTRIBUTIONS.get(name, name)} cannot be imported{where}: {one_line(error)}"
            raise CommandError(text) from None


# More threads than any machine has, and fewer than what ends the process: Numba takes stack for each.
MAX_THREADS = 4096


def load_numba() -> None:
    """Import Numba, or raise CommandError where the environment has something for it that it cannot use."""
    features = os.environ.get("NUMBA_CPU_FEATURES", "")
    if wrong := [each for each in features.split(",") if each.strip() and each.strip()[0] not in "+-"]:
        # LLVM would end the process.
        raise CommandError(f"NUMBA_CPU_FEATURES: expected names that begin with + or -, got {wrong[0]!r}")
    zero_copy = os.environ.get("FASTRMS_ZERO_COPY", "1")
    if zero_copy not in ("0", "1"):
        raise CommandError(f"FASTRMS_ZERO_COPY: expected 0 or 1, got {zero_copy!r}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            import numba
        except Exception as error:
            settings = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("NUMBA_")]
            where = f" (environment: {', '.join(settings)})" if settings else ""
            raise CommandError(f"Numba cannot be imported: {one_line(error)}{where}") from None
    for warning in said:
        text = str(warning.message)
        if text.startswith("Environment variable"):
            raise CommandError(text.splitlines()[0])
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    threads = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if not 1 <= threads <= MAX_THREADS:
        raise CommandError(f"NUMBA_NUM_THREADS: expected a whole number from 1 to {MAX_THREADS}, got {threads}")


def start_threads() -> None:
    """Start Numba's threads, or raise CommandError where the environment asks for a threading layer that is missing."""
    from fastrms.kernels import threads

    try:
        threads.start_threads()
    except (ImportError, ValueError) as error:
        raise CommandError(f"Numba's threads cannot be started: {one_line(error)}") from None


def find_object(option: str, name: str) -> Any:
    """What `name`, ``module:object``, given as `option`, stands for; a module may lie in the current folder."""
    module, colon, attribute = name.partition(":")
    if not (colon and module and attribute):
        raise CommandError(f"{option}: expected module:function, got {name!r}")
    folder = os.getcwd()
    sys.path.insert(0, folder)  # an installed program does not look there by itself
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module runs when it is imported
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise CommandError(f"{option}: {name}: the module cannot be imported: {why}") from None
    finally:
        sys.path.remove(folder)
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise CommandError(f"{option}: {name}: expected a function of that name in {module}, found none") from None


_start = Path()


def remember_start() -> None:
    """Remember the current folder for `from_start`."""
    global _start
    try:
        _start = Path.cwd()
    except OSError:  # it was removed
        _start = Path()


def from_start(path: Path) -> Path:
    """The path, seen from the folder that the program was started in: modules of the user's may have left it."""
    return _start / path


def make_folder(folder: Path, *names: str) -> None:
    """Make the folder that ``--output`` names, and check ahead of the work that files of these names can be written."""
    try:
        from_start(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output: {folder}: expected a folder to write to: {error.strerror or error}") from None
    try:
        with tempfile.TemporaryFile(dir=from_start(folder)) as file:
            file.write(b"x")
    except OSError as error:
        raise CommandError(f"--output: {folder}: no file can be written there: {error.strerror or error}") from None
    for name in names:
        path = folder / name
        try:
            if from_start(path).exists():
                from_start(path).open("ab").close()
        except OSError as error:
            raise CommandError(f"--output: {path}: cannot be written: {error.strerror or error}") from None


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a picture to a file in the folder that ``--output`` names."""
    try:
        figure.savefig(from_start(path))
    except OSError as error:
        raise CommandError(f"--output: {path}: cannot be written: {error.strerror or error}") from None


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def make_console() -> "Console":
    """A rich console for standard output that prints text as it is given."""
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise

    # Paths and numbers are no markup: "[0]" has to stay "[0]".
    console = PlainConsole(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        # A file has no edge, and a table that is squeezed is no longer aligned.
        console.width = max(console.width, 120)
    return console


def is_plain(console: "Console") -> bool:
    """Whether output has to be plain ASCII: it goes to a file or pipe, or to a terminal that knows no Unicode."""
    return not console.is_terminal or not console.encoding.lower().startswith("utf")


def make_table(console: "Console", *headers: str) -> "Table":
    """An empty table: the first column flush left, the others, which hold numbers, flush right."""
    from rich import box
    from rich.table import Table

    plain = is_plain(console)
    table = Table(box=None if plain else box.SIMPLE_HEAD, padding=(0, 2, 0, 0) if plain else (0, 1), pad_edge=not plain)
    for k, header in enumerate(headers):
        # Labels are folded where a terminal is narrow, and numbers stay whole.
        table.add_column(
            header, justify="right" if k else "left", overflow="fold", no_wrap=k > 0, min_width=0 if k else 12
        )
    return table


def print_table(console: "Console", table: "Table") -> None:
    """Print a table whole. Where it is too wide for a terminal, labels are folded, and then lines are; numbers stay."""
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
    """Print one line, however long; characters that the output cannot encode come as escapes."""
    safe = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(safe, style=style, soft_wrap=True)


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `low` to `high`, both included."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected a whole number {limits}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """A type for argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value
