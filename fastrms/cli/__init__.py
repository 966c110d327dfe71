"""The program ``fastrms``: reads the command line and runs one of the subcommands."""

import argparse
import atexit
import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, NoReturn

__all__ = ["main"]

# 128 and the number of the signal, as shells report programs that a signal ended.
_INTERRUPTED, _BROKEN_PIPE = 130, 141

# What writing to standard output can end with; errors about files are told by whoever writes these.
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fastrms`` with the arguments `argv` (None: those of the process) and return the exit status.

    Returns
    -------
    status : int
        0 for success, 1 where the command failed, 130 after Ctrl-C, 141 where nobody reads standard output any more
        (``fastrms info | head -1``). Errors are one line on standard error, and none for 141.

    Raises
    ------
    SystemExit
        From argparse: status 2 for bad usage, 0 after ``--help`` and ``--version``.
    """
    words = ["fastrms"]
    if own_process := argv is None:
        _prepare_streams()
        _quit_at_once(words)
    try:
        try:
            return _run(argv, words)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # an error of output that waits in the buffer shows here
    except KeyboardInterrupt as interrupt:
        if own_process:
            _quit(words, str(interrupt))
        _complain(words, f"interrupted {interrupt}".strip())
        return _INTERRUPTED
    except BrokenPipeError:
        if own_process:
            _discard_output()
        return _BROKEN_PIPE
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
            return _fail(words, str(error))
        if own_process:
            _discard_output()
        return _fail(words, f"standard output: {error.strerror}")


def _run(argv: Sequence[str] | None, words: list[str]) -> int:
    """Do as `main`, apart from interrupts and errors of output; the subcommand's name is added to `words`."""
    # Imported here because importing Numba takes most of a second, in which an interrupt has to be caught too.
    from fastrms.cli.common import CommandError, load_numba, remember_start
    from fastrms.errors import FastrmsError

    try:
        remember_start()
        load_numba()
        args = _parser().parse_args(argv)
        words.append(args.command)
        if sys.stdout is None and not getattr(args, "quiet", False):
            raise CommandError("standard output: expected an open one, got a closed one")
        if argv is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status: int = args.run(args)
    except (CommandError, FastrmsError) as error:
        return _fail(words, str(error))
    except MemoryError as error:
        return _fail(words, f"not enough memory: {error}" if str(error) else "not enough memory")
    return status


def _fail(words: Sequence[str], message: str) -> int:
    _complain(words, f"error: {message}")
    return 1


def _complain(words: Sequence[str], text: str) -> None:
    if sys.stderr is not None:  # with None, print() would take standard output
        with suppress(OSError, RuntimeError):  # the latter where a handler interrupts other output
            print(f"{' '.join(words)}: {text}", file=sys.stderr, flush=True)


def _quit_at_once(words: Sequence[str]) -> None:
    """End the process at Ctrl-C from here on, where nothing is begun yet but imports, which can swallow exceptions."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: _quit(words))


def _quit(words: Sequence[str], where: str = "") -> NoReturn:
    """End the process after Ctrl-C.

    Not by `sys.exit`, which waits for a thread that compiles, and after which Python ends with the signal itself where
    the exception passed code that was run from a string.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would interrupt this
    _complain(words, f"interrupted {where}".strip())
    atexit._run_exitfuncs()
    os._exit(_INTERRUPTED)


class _Parser(argparse.ArgumentParser):
    """A parser that does not hide errors of output."""

    def _print_message(self, message: str, file: IO[str] | Any = None) -> None:
        if message and (file := file or sys.stderr) is not None:
            file.write(message)


def _prepare_streams() -> None:
    """Have a null device where a standard stream is closed, and escapes for what standard output cannot encode."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a file that is opened later would get this number, and with it what libraries write there
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:  # or argparse would print errors to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Send what waits in the buffer of standard output to the null device, or Python would try again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _parser() -> argparse.ArgumentParser:
    import fastrms
    from fastrms.cli import bench, demo, info, path

    # A fixed name, so that `python -m fastrms` says the same.
    parser: argparse.ArgumentParser = _Parser(
        prog="fastrms", description="RMSProp for people who train with plain NumPy."
    )
    parser.add_argument("--version", action="version", version=f"fastrms {fastrms.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo.add_command(commands)
    bench.add_command(commands)
    info.add_command(commands)
    path.add_command(commands)
    return parser
