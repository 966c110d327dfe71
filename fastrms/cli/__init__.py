"""The program ``fastrms``: reads the command line and runs one of the subcommands."""

import argparse
import sys
from collections.abc import Sequence

import fastrms
from fastrms.cli import bench, demo, info, path
from fastrms.cli.common import CommandError
from fastrms.errors import FastrmsError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fastrms`` with the arguments `argv` (None: those of the process) and return the exit status.

    Returns
    -------
    status : int
        0 for success, 1 where the command failed, 130 after Ctrl-C. Errors are one line on standard error.

    Raises
    ------
    SystemExit
        From argparse: status 2 for bad usage, 0 after ``--help`` and ``--version``.
    """
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (CommandError, FastrmsError) as error:
        return _fail(args.command, str(error))
    except MemoryError as error:
        return _fail(args.command, f"not enough memory: {error}" if str(error) else "not enough memory")
    except KeyboardInterrupt:
        print(f"fastrms {args.command}: interrupted", file=sys.stderr)
        return 130
    return status


def _fail(command: str, message: str) -> int:
    print(f"fastrms {command}: error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    # A fixed name, so that `python -m fastrms` says the same.
    parser = argparse.ArgumentParser(prog="fastrms", description="RMSProp for people who train with plain NumPy.")
    parser.add_argument("--version", action="version", version=f"fastrms {fastrms.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo.add_command(commands)
    bench.add_command(commands)
    info.add_command(commands)
    path.add_command(commands)
    return parser
