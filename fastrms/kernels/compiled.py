"""The JIT and its cache on disk, which any number of processes may read and write at once.

Numba's own cache is safe for one process at a time. Its index names data files by number. Two processes that start on
an empty cache can both take the first number, and a third process then loads code for other types: here, another update
rule without any error (Numba issue 4807). Numba's cache does not notice an edit in another file than the function's
own, or settings such as NUMBA_BOUNDSCHECK. And it unpickles, thus runs, the files of all who can write to its folder.

So the name of a file here identifies its contents: function, source of all kernels, versions, types of the arguments,
processor and settings. There is no index. Two processes that write the same name write the same code, and each file
appears whole. A file has a checksum, its name included, and counts only if its owner could change the source too.

Compiling runs on a thread of its own. An exception of a signal handler (Ctrl-C; SystemExit on SIGTERM) reaches the main
thread, at any line of Python, and amid a compilation would leave Numba's tables of types and functions half filled for
the rest of the process. The thread goes on compiling after the exception, and the next step finds the result. Profilers
and tracers of the calling thread do not see the compiler either.
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
import numpy as np
from numba import config
from numba.core import caching
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.options import DefaultOptions
from numba.core.serialize import dumps

__all__ = ["ALLOCATES", "entry_point", "in_background", "inner", "inner_options", "jit"]

# Settings from the environment that change compiled code.
_SETTINGS = ("BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "OPT", "SLP_VECTORIZE")

# Kernels do not count references to the owners of arrays: counting takes longer than to update a small array, and the
# threads of a parallel loop would count at one address. Such functions cannot make new arrays; those that do have the
# options `ALLOCATES`. Numba's option is private; without it kernels would count, and have the same results.
_HAS_OPTION = hasattr(DefaultOptions, "_nrt")
_options: Any = {"error_model": "numpy"} | ({"_nrt": False} if _HAS_OPTION else {})
ALLOCATES: Any = {"_nrt": True} if _HAS_OPTION else {}

# For functions that only compiled code calls; they are cached inside their callers. Without wrappers for Python and for
# C, compiling takes a quarter less time. A call from Python would crash.
inner_options: Any = _options | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner: Callable[[Callable[..., Any]], Any] = numba.njit(**inner_options)


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return ``numba.njit`` with these options for functions that Python calls, cached on disk.

    Without a place for files (a read-only installation without a home folder, a cache folder of another user) each
    process compiles for itself, and warns once with a RuntimeWarning.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**_options | options)(function)
        if isinstance(compiled, Dispatcher):  # otherwise the JIT is off
            try:
                compiled._cache = _Cache(function)
            except _NoPlaceError as error:
                compiled._cache = _NoCache(str(error))
            compiled.compile = _on_a_thread(compiled.compile)  # type: ignore[assignment, method-assign]
        return compiled

    return decorate


def entry_point(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Return the form of a `jit` function for arguments of these types, compiled if need be.

    Call it with these types only, and with contiguous, writable arrays. It does not check types, which takes half of
    the time of a call with ten arguments. With the JIT off the form is the function.
    """
    if not isinstance(function, Dispatcher):
        return function
    kinds = tuple((a.dtype, a.ndim) if isinstance(a, np.ndarray) else type(a) for a in arguments)
    signature = _signatures.get(kinds)
    if signature is None:
        signature = _signatures[kinds] = tuple(numba.typeof(argument) for argument in arguments)
    if signature not in function.overloads:
        function.compile(signature)
    entry: Callable[..., Any] = function.overloads[signature].entry_point
    return entry


# Numba's type of each argument, by what is quick to look up: 0.5 ms are saved in the first step of each optimizer.
_signatures: dict[tuple[object, ...], tuple[Any, ...]] = {}


def _on_a_thread(compile_: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that runs `compile_` on another thread, and waits. An interrupt ends only the wait."""

    def compile_on_a_thread(signature: Any) -> Any:
        if global_compiler_lock.is_locked():  # this thread is compiling a caller of this function
            return compile_(signature)
        outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            sys.setprofile(None)  # a profiler of threading.setprofile would see each call of the compiler
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
            interrupt.add_note("fastrms: a kernel is still being compiled; the process ends after the compilation")
            raise
        if error is None:
            return result
        try:
            _raise(error)
        finally:
            del error  # its traceback holds this frame

    return compile_on_a_thread


# The last thread of `in_background`, while it runs.
_background: threading.Thread | None = None


def in_background(work: Callable[[], object]) -> Callable[[], bool]:
    """Run a function that compiles, on another thread. Return a function that tells whether it has ended.

    Errors are dropped: whoever needs the compiled code compiles it then, and gets the error. A fork waits for the end,
    because the child would never get Numba's lock. So does the end of the process.
    """
    global _background
    before = _background

    def run() -> None:
        global _background
        sys.setprofile(None)
        if before is not None:
            before.join()
        with suppress(BaseException):
            work()
        if _background is thread:
            _background = None

    thread = threading.Thread(target=run, name="fastrms compiles ahead")
    _background = thread
    try:
        thread.start()
    except RuntimeError:  # as in `_on_a_thread`
        _background = before
    return lambda: not thread.is_alive()


def _wait_for_background() -> None:
    thread = _background
    if thread is not None and thread is not threading.current_thread():
        thread.join()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_background)

_first_failure = ""


def _raise(error: BaseException) -> NoReturn:
    """Raise the error of a compilation; after an earlier error, say that this error may follow from that one."""
    global _first_failure
    if _first_failure and not isinstance(error, MemoryError | Warning):
        raise RuntimeError(
            f"fastrms: a kernel cannot be compiled: {type(error).__name__}. An earlier compilation in this process "
            f"ended with {_first_failure}, which can leave Numba half set up: restart Python"
        ) from error
    if not isinstance(error, Warning):  # raised as an error, though the code was compiled
        _first_failure = f"{type(error).__name__}: {error}".strip(": ")
    raise error


class _Files:
    """The files of one function in the cache, ``name-stamp-key.nbc``.

    `stamp` identifies source and versions: files with another stamp are out of date. `trusted` has the owners whose
    files count; None if files have no owners.
    """

    def __init__(self, folder: Path, name: str, stamp: str, trusted: set[int] | None) -> None:
        self._folder = folder
        self._name = name
        self._stamp = stamp
        self._trusted = trusted

    def load(self, key: object) -> Any:
        """Return the data saved under this key, or None."""
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
        """Write the data, and remove files of other stamps."""
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
    """The folder of NUMBA_CACHE_DIR, relative to the folder of the import: os.chdir() does not change the cache."""

    def __init__(self, py_func: Any, py_file: Any) -> None:
        super().__init__(py_func, py_file)
        self._cache_path = os.path.abspath(self._cache_path)


class _UserWide(caching.UserWideCacheLocator):
    """The user's cache folder; without a home folder none, instead of "~" in the current folder."""

    def ensure_cache_path(self) -> None:
        if not os.path.isabs(self.get_cache_path()):
            raise OSError("there is no home folder")
        super().ensure_cache_path()


class _Results(caching.CompileResultCacheImpl):
    _locator_classes = [  # noqa: RUF012 - as its base class has it
        _UserProvided, caching.InTreeCacheLocator, _UserWide, caching.ZipCacheLocator
    ]  # fmt: skip


class _Cache(caching.FunctionCache):
    """Numba's cache of a function, with `_Files`."""

    _impl_class = _Results

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            super().__init__(function)
        except RuntimeError:
            raise _NoPlaceError("no folder for them is writable") from None
        folder = Path(self.cache_path)
        trusted = _trusted(Path(function.__code__.co_filename))
        if trusted is not None and (owner := folder.stat().st_uid) not in trusted:
            raise _NoPlaceError(f"{folder} belongs to another user (number {owner}), whose files would be executed")
        name = f"{function.__module__}.{function.__qualname__}-{sys.implementation.cache_tag}{_abi}"
        stamp = _digest(_SOURCE + repr(self._impl.locator.get_source_stamp()).encode())
        self._cache_file: Any = _Files(folder, name, stamp, trusted)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Every error of a file is a cache miss.
        with suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:  # a full disk, or a folder that has become read-only
            _say_that_it_is_not_kept(str(error))


class _NoCache(caching.NullCache):
    """The cache without a place for files. It warns once."""

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
            f"fastrms: compiled kernels are not cached on disk ({reason}), so each process compiles them again, "
            "which takes seconds; set the environment variable NUMBA_CACHE_DIR to a folder of yours",
            RuntimeWarning,
            stacklevel=2,
        )


def _trusted(source: Path) -> set[int] | None:
    """Return the users who can run code here anyway: this one, the superuser, the source's owner. None: no users."""
    if not hasattr(os, "geteuid"):
        return None
    owners = {os.geteuid(), 0}
    with suppress(OSError):
        owners.add(source.stat().st_uid)
    return owners


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


_abi = getattr(sys, "abiflags", "")
# Read at import, as the source on disk may change while this process runs. (A zip archive has no such files; Numba's
# own stamp of the function's file has to do there.)
_SOURCE = b"".join(
    [numba.__version__.encode(), *(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))]
)
