"""The program ``fastrms``: read the command line, run a command, and turn errors into exit statuses."""

import argparse
import atexit
import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["main"]

# 128 plus the number of the signal, as shells report it.
_INTERRUPTED, _BROKEN_PIPE = 130, 141

# Errors of writing to standard output. Errors of writing to files have a file name.
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fastrms`` with the arguments `argv`, by default those of the process, and return the exit status.

    0 stands for success, 1 for a failed command, 130 for Ctrl-C, 141 for standard output without a reader (``fastrms
    info | head -1``). An error is one line on standard error; there is none for 141. Wrong usage, ``--help`` and
    ``--version`` raise argparse's SystemExit.
    """
    words = ["fastrms"]
    if own_process := argv is None:
        _prepare_streams()
        # During imports, which can swallow exceptions, Ctrl-C ends the process at once.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda number, frame: _quit(words))
        sys.unraisablehook = _interrupt_again
    try:
        try:
            return _run(argv, words)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # raises the errors of buffered output here
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
    """Run a command and return the exit status; append the command's name to `words`."""
    # Importing Numba takes most of a second, and an interrupt has to be caught during that time too.
    from fastrms.cli.common import CommandError, load_numba, remember_start
    from fastrms.errors import FastrmsError

    try:
        remember_start()
        load_numba()
        args = _parser().parse_args(argv)
        words.append(args.command)
        if sys.stdout is None and not getattr(args, "quiet", False):
            raise CommandError("standard output: expected an open stream, got a closed one")
        if argv is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status: int = args.run(args)
    except (CommandError, FastrmsError) as error:
        return _fail(words, str(error))
    except MemoryError as error:
        return _fail(words, f"not enough memory: {error}" if str(error) else "not enough memory")
    return status


def _parser() -> argparse.ArgumentParser:
    import fastrms
    from fastrms.cli import bench, demo, info, path

    # A fixed name, for `python -m fastrms`.
    parser: argparse.ArgumentParser = _Parser(
        prog="fastrms",
        description="RMSProp for training in plain NumPy: a demo, a benchmark, facts about this machine, and pictures.",
    )
    parser.add_argument("--version", action="version", version=f"fastrms {fastrms.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (demo, bench, info, path):
        command.add_command(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser that raises errors of output; argparse ignores them."""

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        if message and (file := file or sys.stderr) is not None:
            file.write(message)


def _fail(words: Sequence[str], message: str) -> int:
    _complain(words, f"error: {message}")
    return 1


def _complain(words: Sequence[str], text: str) -> None:
    if sys.stderr is not None:  # or print() would take standard output
        with suppress(OSError, RuntimeError):  # RuntimeError: a signal handler interrupts other output
            print(f"{' '.join(words)}: {text}", file=sys.stderr, flush=True)


def _quit(words: Sequence[str], where: str = "") -> NoReturn:
    """End the process after Ctrl-C.

    `sys.exit` would wait for a thread that compiles. After an exception from code in a string, Python would end with
    the signal in place of the status.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt this
    _complain(words, f"interrupted {where}".strip())
    atexit._run_exitfuncs()
    os._exit(_INTERRUPTED)


def _interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Repeat Ctrl-C that Python has ignored; it reports and ignores all exceptions in finalizers and callbacks."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(0.01, _interrupt_main_thread)  # when the callback has ended
    timer.daemon = True
    timer.start()


def _interrupt_main_thread() -> None:
    if hasattr(signal, "pthread_kill"):  # it also ends a wait of that thread
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _prepare_streams() -> None:
    """Open the null device for closed standard streams, and escape characters outside standard output's encoding."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a file opened later would get this number, and the output that libraries write to it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:  # or argparse would print errors to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Redirect standard output to the null device, because Python writes its buffer again at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
