"""``fastrms path``: draw the paths of RMSProp and other methods on a function of two variables."""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastrms.cli.common import (
    CommandError,
    find_object,
    make_console,
    make_folder,
    make_table,
    positive,
    print_table,
    require,
    save_figure,
    say,
    whole_number,
    writing,
)
from fastrms.cli.progress import show_progress
from fastrms.errors import FastrmsError
from fastrms.plots import PANELS, animate, overview
from fastrms.plots.functions import TEST_FUNCTIONS, Landscape
from fastrms.plots.methods import DEFAULT_METHODS, METHODS
from fastrms.plots.trajectories import Descent, descend

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["STEM", "add_command", "run"]

STEM = "fastrms-path"
FORMATS = ("png", "svg", "pdf")

Value = bool | int | float | str | None
Options = dict[str, Value]

# The options that arguments of `descend` come from.
_OPTIONS_OF = {
    **{name: f"--{name}" for name in ("function", "gradient", "start", "steps")},
    "region": "--x and --y",
    "settings and beside": "--with and --beside",
}

# The formatter keeps these lines as they are, because it would join those of the examples.
_DESCRIPTION = """
Draw how RMSProp minimises a function of two variables: its path from above and
on the surface, the function's value, and the rate of each step (the factor of
the gradient). By default, RMSProp with default options is compared with
gradient descent, momentum and AdaGrad.
"""
_EXAMPLES = """
examples:
  fastrms path
  fastrms path --function rosenbrock --steps 2000 --animate
  fastrms path --with decay_rate=0.5 --with decay_rate=0.99 --with momentum=0.9,centered
  fastrms path --with epsilon=5 --with epsilon=5,eps_in_sqrt --beside adagrad,lr=0.5
  fastrms path --beside adam
  fastrms path --function my_module:f --start 1 2 --x -3 3 --y -3 3
"""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``path`` and its options to the subcommands."""
    parser = commands.add_parser(
        "path",
        help="draw the paths of RMSProp and other methods on a function of two variables",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = ", ".join(TEST_FUNCTIONS)
    add("--function", default="ellipse", metavar="NAME", help=
        f"{names}; or your own function, module:name, called as f(x, y) with two floats "
        "(default: %(default)s)")  # fmt: skip
    add("--gradient", metavar="module:name", help=
        "gradient of your own function, called as g(x, y), returns (df/dx, df/dy) "
        "(default: central differences)")  # fmt: skip
    add("--with", dest="settings", action="append", type=_options, metavar="OPTIONS", help=
        "options of RMSProp, such as decay_rate=0.99,centered; repeat --with to compare several paths")  # fmt: skip
    add("--beside", nargs="*", type=_method, metavar="METHOD", help=
        f"methods to compare with: {', '.join(METHODS)}, each with options if you like, such as adagrad,lr=0.5 "
        f"(default: {', '.join(DEFAULT_METHODS)}; none with --with)")  # fmt: skip
    add("--lr", type=positive, help=
        "learning rate of RMSProp, unless --with sets it (default: one for the function; the picture says how it "
        "was chosen)")  # fmt: skip
    add("--steps", type=whole_number(0), metavar="N", help=
        "number of steps of each path (default: 300; saddle 60, rosenbrock 1000)")  # fmt: skip
    for name, metavar, what in (
        ("--start", ("X", "Y"), "start of all paths"),
        ("--x", ("LOW", "HIGH"), "limits of x in the picture"),
        ("--y", ("LOW", "HIGH"), "limits of y in the picture"),
    ):
        add(name, nargs=2, type=float, metavar=metavar, help=f"{what} (default: set for each function)")
    add("--panels", nargs="+", choices=PANELS, default=PANELS, metavar="PANEL", help=
        f"parts of the picture: {', '.join(PANELS)} (default: all four)")  # fmt: skip
    add("--format", nargs="+", choices=FORMATS, default=["png"], metavar="FORMAT", help=
        f"file formats of the picture: {', '.join(FORMATS)} (default: png)")  # fmt: skip
    add("--animate", action="store_true", help=
        f"also write {STEM}.gif, in which the paths grow step by step; takes about ten seconds")  # fmt: skip
    add("--output", type=Path, default=Path(), metavar="DIR", help=
        f"folder for {STEM}.png, created if it does not exist (default: the current folder)")  # fmt: skip
    add("--quiet", action="store_true", help="print only errors; pictures are still written")
    parser.set_defaults(run=run)


def _options(text: str) -> Options:
    """Parse options for argparse, such as "decay_rate=0.99,centered"; a name alone is True."""
    options: Options = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not name or name in options or bool(equals) != bool(value):
            raise argparse.ArgumentTypeError(
                f"expected options such as decay_rate=0.99,centered, each once, got {text!r}"
            )
        options[name] = _value(value) if equals else True
    return options


def _value(text: str) -> Value:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _method(text: str) -> tuple[str, Options]:
    """Parse a method and its options for argparse, such as "adagrad,lr=0.5"."""
    name, _, options = text.partition(",")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(METHODS)}, got {name!r}")
    return name, _options(options)


def run(args: argparse.Namespace) -> int:
    """Run ``fastrms path`` and return 0."""
    require("plot", "matplotlib", "rich")
    _check_pairs(args)
    landscape = _landscape(args.function, args.gradient)
    formats = list(dict.fromkeys(args.format))
    make_folder(args.output, *(f"{STEM}.{kind}" for kind in [*formats, *(["gif"] if args.animate else [])]))
    with _naming_options(args):
        descent = _descend(args, landscape)
    console = make_console(args.quiet)
    _print_paths(console, descent)
    figure, _ = overview(descent, panels=args.panels)
    for kind in formats:
        path = args.output / f"{STEM}.{kind}"
        save_figure(figure, path)
        say(console, f"Picture: {path}")
    if args.animate:
        path = args.output / f"{STEM}.gif"
        with show_progress(console, 1) as on_progress, writing(path) as place:
            animate(descent, place, panels=args.panels, on_picture=lambda k, total: on_progress(k / total, "animation"))
        say(console, f"Animation: {path}")
    return 0


def _descend(args: argparse.Namespace, landscape: Landscape) -> Descent:
    settings, beside = args.settings, args.beside
    if beside is None:
        beside = () if settings else DEFAULT_METHODS
    if args.lr is not None:
        settings = [{"lr": args.lr, **options} for options in settings or [{}]]
    region = (args.x or landscape.region[0], args.y or landscape.region[1]) if args.x or args.y else None
    descent = descend(landscape, settings, beside, start=args.start, steps=args.steps, region=region)
    descent.grid  # noqa: B018 - raises if the function has no value in the region
    return descent


def _check_pairs(args: argparse.Namespace) -> None:
    """Raise CommandError unless pairs of numbers are points or limits."""
    for name, limits in (("start", ""), ("x", ", LOW below HIGH"), ("y", ", LOW below HIGH")):
        pair = getattr(args, name)
        if pair is not None and not (all(map(math.isfinite, pair)) and (not limits or pair[0] < pair[1])):
            raise CommandError(f"--{name}: expected two finite numbers{limits}, got {pair[0]:g} {pair[1]:g}")


@contextmanager
def _naming_options(args: argparse.Namespace) -> Iterator[None]:
    """Turn errors about arguments of `descend` into errors about options of the command."""
    try:
        yield
    except FastrmsError as error:
        place, colon, rest = str(error).partition(": ")
        found = re.fullmatch(r"(settings|beside)\[(\d+)\]", place)
        if place in _OPTIONS_OF:
            option = _OPTIONS_OF[place]
        elif found is None:
            raise
        elif found[1] == "beside":
            option = "--beside" if not args.beside else f"--beside {args.beside[int(found[2])][0]}"
        elif not args.settings:
            option = "--lr"
        else:
            option = "--with" if len(args.settings) == 1 else f"--with, number {int(found[2]) + 1}"
        raise CommandError(f"{option}{colon}{rest}") from None


def _landscape(name: str, gradient: str | None) -> Landscape:
    """Return the landscape of ``--function`` and ``--gradient``."""
    if name in TEST_FUNCTIONS:
        if gradient is not None:
            raise CommandError(f"--gradient: {name} has a gradient; the option is for functions of your own")
        return TEST_FUNCTIONS[name]
    if ":" not in name:
        raise CommandError(f"--function: expected one of {', '.join(TEST_FUNCTIONS)}, or module:name, got {name!r}")
    found = find_object("--function", name)
    if isinstance(found, Landscape):
        if gradient is not None:
            raise CommandError(f"--gradient: {name} is a Landscape, which can have a gradient itself")
        return found
    derivatives = None if gradient is None else _guarded("--gradient", gradient, find_object("--gradient", gradient))
    return Landscape(_guarded("--function", name, found), derivatives, name=name)


def _guarded(option: str, name: str, function: Any) -> Callable[[float, float], Any]:
    """Return the user's function of `option`, with its errors as CommandError."""
    if not callable(function):
        raise CommandError(f"{option}: {name}: expected a function, got {type(function).__name__}")

    def call(x: float, y: float) -> Any:
        try:
            return function(x, y)
        except (ArithmeticError, ValueError):  # no value there
            raise
        except Exception as error:
            at = f"x={x:g}, y={y:g}"
            raise CommandError(f"{option}: {name}: at {at} it raised {type(error).__name__}: {error}") from None

    return call


def _print_paths(console: "Console", descent: Descent) -> None:
    landscape, first = descent.landscape, descent.traces[0]
    formula = f", f(x, y) = {landscape.formula}" if landscape.formula else ""
    say(console, f"Function: {landscape.name}{formula}")
    say(console, f"Start: x = {first.points[0][0]:g}, y = {first.points[0][1]:g}, f = {first.values[0]:.4g}")
    table = make_table(
        console, "", "steps", "last x", "last y", "last f(x, y)", "to minimum", "first rate", "last rate"
    )
    for trace in descent.traces:
        end = trace.points[-1]
        distance = min((np.hypot(*(end - minimum)) for minimum in landscape.minima), default=None)
        rates = np.sqrt(trace.rates.prod(axis=1))
        numbers = [*end, trace.values[-1], distance, *(rates[[0, -1]] if len(rates) else (None, None))]
        steps = f"{len(rates):,}{'' if trace.lost_at is None else ', diverged'}"
        table.add_row(trace.label, steps, *("" if number is None else f"{number:.3g}" for number in numbers))
    say(console)
    print_table(console, table)
    if descent.note:
        say(console, descent.note)
    say(console)
