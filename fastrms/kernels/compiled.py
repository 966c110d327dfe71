"""Compiling with Numba, and compiled code on disk: found again by the next process, whoever else writes there.

Numba's own files would do for one process at a time. Its index names data files by number: of two processes that start
on an empty cache, both can take the first number, and a third one then loads code that was compiled for other types,
which for us means another update rule without any error. (Numba issue 4807.) Nor does it notice an edit in another file
than the function's own, or settings such as NUMBA_BOUNDSCHECK; and it runs, as pickles do, what anybody has put into a
folder that it can write to.

So here a file's name says what it holds: which function, source of all kernels, versions, types of the arguments,
processor and settings. There is no index to go wrong; whoever writes the same name writes the same code, in one piece.
A file has a checksum, its name included, and counts only if it belongs to somebody who could change the source too.

Compiling runs on a thread of its own, because an exception that a signal handler raises (Ctrl-C; SystemExit on SIGTERM)
comes to the main thread, at any line of Python. In the midst of a compilation it would leave Numba's tables of types
and functions half filled for the rest of the process. The thread goes on compiling after the exception, and the next
step finds the result. Profilers and tracers of the calling thread do not see the compiler either.
"""

import contextvars
import hashlib
import os
import pickle
import secrets
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import numba
from numba import config
from numba.core import caching
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

__all__ = ["inner", "inner_options", "jit"]

# Settings from the environment that change what is compiled.
_SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")

# For what only compiled code calls: it is cached inside its caller. Files of its own would be made for nothing, and so
# would a way in for Python (which crashes if it calls one of these) and for C, a quarter of the time of compiling.
inner_options: Any = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner: Callable[[Callable[..., Any]], Any] = numba.njit(**inner_options)


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` for what Python calls: cached on disk where there is a place for it.

    Without one (a read-only installation without a home folder, a cache folder of somebody else's) each process
    compiles for itself, and the first time it does, it says so with a RuntimeWarning.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(error_model="numpy", **options)(function)
        if isinstance(compiled, Dispatcher):  # otherwise the JIT is off
            try:
                compiled._cache = _Cache(function)
            except _NoPlaceError as error:
                compiled._cache = _NoCache(str(error))
            compiled.compile = _on_a_thread(compiled.compile)  # type: ignore[assignment, method-assign]
        return compiled

    return decorate


def _on_a_thread(compile_: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`compile_`, run on a thread of its own while the calling thread waits, as long as nothing interrupts the wait."""

    def compile_on_a_thread(signature: Any) -> Any:
        if global_compiler_lock.is_locked():  # by this thread: part of a compilation that another one waits for
            return compile_(signature)
        outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            sys.setprofile(None)  # that of threading.setprofile, which would see each call of the compiler
            try:
                outcome.put((compile_(signature), None))
            except BaseException as error:
                outcome.put((None, error))

        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="fastrms compiles")
        try:
            thread.start()
        except RuntimeError:  # no thread can be started: at exit, under a limit, or on a platform without threads
            return compile_(signature)
        try:
            result, error = outcome.get()
        except BaseException as interrupt:
            interrupt.add_note("fastrms: a kernel is still being compiled; the process ends when that is done")
            raise
        if error is None:
            return result
        try:
            _raise(error)
        finally:
            del error  # which holds this frame

    return compile_on_a_thread


_first_failure = ""


def _raise(error: BaseException) -> NoReturn:
    """Raise what a compilation ended with; after an earlier one, say that it may come of that."""
    global _first_failure
    if _first_failure and not isinstance(error, MemoryError | Warning):
        raise RuntimeError(
            f"fastrms: a kernel cannot be compiled: {type(error).__name__}. An earlier compilation in this process "
            f"ended with {_first_failure}, which can leave Numba half set up: restart Python"
        ) from error
    if not isinstance(error, Warning):  # of code that was compiled, and cannot be kept
        _first_failure = f"{type(error).__name__}: {error}".strip(": ")
    raise error


class _Files:
    """The files of one function: all that begin with `name`; those that count go on with `stamp`.

    Parameters
    ----------
    folder : Path
    name : str
    stamp : str
        Of source and versions.
    trusted : set of int or None
        Whose files count; None where files have no owners.
    """

    def __init__(self, folder: Path, name: str, stamp: str, trusted: set[int] | None) -> None:
        self._folder = folder
        self._name = name
        self._stamp = stamp
        self._trusted = trusted

    def load(self, key: object) -> Any:
        """What was saved under this key, or None."""
        path = self._path(key)
        try:
            with path.open("rb") as stream:
                if self._trusted is not None and os.fstat(stream.fileno()).st_uid not in self._trusted:
                    return None
                content = stream.read()
        except OSError:
            return None
        digest, _, data = content.partition(b"\n")
        return pickle.loads(data) if _digest(path.name.encode() + data).encode() == digest else None

    def save(self, key: object, data: Any) -> None:
        """Write it, and remove what older source or versions have left: who still runs those compiles once more."""
        data = dumps(data)
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.write_bytes(_digest(path.name.encode() + data).encode() + b"\n" + data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for other in self._folder.glob(f"{self._name}-*.nbc"):
            if not other.name.startswith(f"{self._name}-{self._stamp}-"):
                with suppress(OSError):
                    other.unlink()

    def _path(self, key: object) -> Path:
        settings = [getattr(config, name, None) for name in _SETTINGS]
        return self._folder / f"{self._name}-{self._stamp}-{_digest(repr((key, settings)).encode())}.nbc"


class _UserProvided(caching.UserProvidedCacheLocator):
    """The folder that NUMBA_CACHE_DIR names, from where this was imported: os.chdir() does not lead to another one."""

    def __init__(self, py_func: Any, py_file: Any) -> None:
        super().__init__(py_func, py_file)
        self._cache_path = os.path.abspath(self._cache_path)


class _UserWide(caching.UserWideCacheLocator):
    """The user's cache folder; but where there is no home, no folder "~" in the current one."""

    def ensure_cache_path(self) -> None:
        if not os.path.isabs(self.get_cache_path()):
            raise OSError("there is no home folder")
        super().ensure_cache_path()


class _Results(caching.CompileResultCacheImpl):
    _locator_classes = [  # noqa: RUF012 - as its base class has it
        _UserProvided, caching.InTreeCacheLocator, _UserWide, caching.ZipCacheLocator
    ]  # fmt: skip


class _Cache(caching.FunctionCache):
    """Numba's cache of a function, with files of our kind."""

    _impl_class = _Results

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            super().__init__(function)
        except RuntimeError:
            raise _NoPlaceError("no folder for them can be written") from None
        folder = Path(self.cache_path)
        trusted = _trusted(Path(function.__code__.co_filename))
        if trusted is not None and (owner := folder.stat().st_uid) not in trusted:
            raise _NoPlaceError(f"{folder} belongs to another user, number {owner}, and what is in there would be run")
        name = f"{function.__module__}.{function.__qualname__}-{sys.implementation.cache_tag}{_abi}"
        stamp = _digest(_SOURCE + repr(self._impl.locator.get_source_stamp()).encode())
        self._cache_file: Any = _Files(folder, name, stamp, trusted)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Nothing that is wrong with a file is a reason not to compile.
        with suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:  # a full disk, or a folder that has become read-only
            _say_that_it_is_not_kept(str(error))


class _NoCache(caching.NullCache):
    """Where compiled code cannot be kept."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def save_overload(self, sig: Any, cres: Any) -> None:
        _say_that_it_is_not_kept(self._reason)


class _NoPlaceError(Exception):
    """There is no place for compiled code."""


_said = False


def _say_that_it_is_not_kept(reason: str) -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(
            f"fastrms: compiled kernels are not kept on disk ({reason}), so that each process compiles for itself, "
            "for some seconds; the environment variable NUMBA_CACHE_DIR can name a folder of your own",
            RuntimeWarning,
            stacklevel=2,
        )


def _trusted(source: Path) -> set[int] | None:
    """Who could have us run anything without the cache: ourselves, the system, and the owner of the source."""
    if not hasattr(os, "geteuid"):
        return None
    owners = {os.geteuid(), 0}
    with suppress(OSError):
        owners.add(source.stat().st_uid)
    return owners


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


_abi = getattr(sys, "abiflags", "")
# Taken at import: the source on disk may change while this process runs. (In a zip archive there are no such files;
# Numba's own stamp of the function's file then has to do.)
_SOURCE = b"".join(
    [numba.__version__.encode(), *(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))]
)
