"""The workers in which implementations run: this process, or a process for each library.

Thread pools of different libraries in one process compete for the cores, and the import order decides which pool wins.
Therefore a library with threads of its own gets a process, which idles while others are timed.
"""

import contextlib
import gc
import logging
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from fastrms.bench.cases import Case
from fastrms.bench.errors import BenchmarkError, PeerError
from fastrms.bench.implementations import IMPLEMENTATIONS, ROOFLINES, Implementation
from fastrms.bench.peers import limit_processors
from fastrms.bench.problem import Problem, Runner, check

__all__ = ["SETTLE_FROM", "LocalWorker", "RemoteWorker", "Worker", "first_line", "settle"]

# "auto" tries variants from this many elements on, after 2 s of training, for 0.4 s or some hundred steps.
SETTLE_FROM, SETTLE_SECONDS, SETTLE_STEPS = 65_536, 3.0, 128

# Seconds of warm-up in each turn.
WARM_SECONDS = 0.02


class Worker(Protocol):
    """A place where implementations are checked and timed, each by its name."""

    def open(self, name: str, case: Case) -> str:
        """Make an implementation ready for a case, and return how its result compares with the reference's."""
        ...

    def time(self, name: str, calls: int) -> float:
        """Return the mean seconds of a step, over `calls` steps."""
        ...

    def close(self) -> None:
        """Free the memory of the case."""
        ...


class LocalWorker:
    """The `Worker` of this process; it knows `more` implementations besides `IMPLEMENTATIONS`, by name."""

    def __init__(self, threads: int, more: Mapping[str, Implementation] | None = None) -> None:
        self._threads = threads
        self._implementations = IMPLEMENTATIONS | ROOFLINES | dict(more or {})
        self._problem: Problem | None = None
        self._runners: dict[str, Runner] = {}
        # glibc returns the memory of a large array to the system until a still larger one has been freed. Until then
        # each new array costs page faults, and the reference class is three times slower at 1e5. A program that trains
        # has freed larger arrays. The effect of freeing ends at 32 MiB.
        large = np.empty(31 << 20, np.uint8)
        del large

    def open(self, name: str, case: Case) -> str:
        """Do as `Worker.open`; for a roofline, return "". Raise BenchmarkError for a failure or a wrong result."""
        if self._problem is None or self._problem.case != case:
            self.close()
            self._problem = Problem(case, self._threads)
        problem, implementation = self._problem, self._implementations[name]
        runner = implementation.make(problem)
        verdict = ""
        if name not in ROOFLINES:
            try:
                verdict = check(runner, problem, implementation.exact, implementation.oracle)
            except BenchmarkError:
                raise
            except Exception as error:  # whatever the user's kernel or another library raises
                text = (str(error).strip() or "no message").splitlines()[0]
                raise BenchmarkError(f"it raised {type(error).__name__}: {text}") from error
        if name in ("auto", "auto-list") and case.params >= SETTLE_FROM and self._threads > 1:
            settle(runner.step)
        self._runners[name] = runner
        return verdict

    def runner(self, name: str) -> Runner:
        """Return the runner of an implementation that was opened."""
        return self._runners[name]

    def time(self, name: str, calls: int) -> float:
        """Do as `Worker.time`, after warm-up steps."""
        runner = self._runners[name]
        runner.prepare()
        step = runner.step
        # The first steps find the processor's cache full of other arrays, and threads asleep. Two threads that wake on
        # one core are spread over two by the system within some milliseconds.
        end = time.perf_counter() + WARM_SECONDS
        step()
        while time.perf_counter() < end:
            step()
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in repeat(None, calls):
                step()
            return (time.perf_counter() - start) / calls
        finally:
            if collecting:
                gc.enable()

    def close(self) -> None:
        """Do as `Worker.close`."""
        self._problem = None
        self._runners.clear()
        gc.collect()


def settle(step: Callable[[], object]) -> None:
    """Call `step` until "auto" has chosen its kernel."""
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        step()
    for _ in range(SETTLE_STEPS):
        step()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RemoteWorker:
    """A `LocalWorker` in a process of its own, for the library `name`; its methods may raise `PeerError`.

    After `timeout` seconds without an answer a request has failed, and the process is ended.
    """

    def __init__(self, name: str, threads: int, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # A daemon ends with this process, however this one ends.
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        # Ctrl-C reaches all processes of a terminal. Only the one that prints results handles it; the workers block it
        # from their first instruction on.
        with _interrupts_blocked():
            self._process.start()
        theirs.close()

    def open(self, name: str, case: Case) -> str:
        """Do as `Worker.open`."""
        return str(self._ask("open", name, case))

    def time(self, name: str, calls: int) -> float:
        """Do as `Worker.time`."""
        return float(self._ask("time", name, calls))

    def close(self) -> None:
        """Do as `Worker.close`."""
        self._ask("close")

    def end(self, patience: float = 2) -> None:
        """End the process, by a signal if it has not ended by itself within `patience` seconds."""
        self._pipe.close()
        # An idle process ends when its pipe is closed, and its libraries clean up. A busy one has to be stopped.
        self._process.join(patience)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(self._timeout):
                self.end()
                raise PeerError(f"no answer within {self._timeout:g} s")
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise PeerError(f"the process for {self._name} has ended") from None
        if not good:
            raise PeerError(answer)
        return answer


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for this thread and for processes that it starts; on Windows do nothing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started here, because its start together with that of the first process would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, threads: int) -> None:
    """Answer requests of a `RemoteWorker`, in its process, until the pipe is closed."""
    # Windows has no mask to block it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Warnings and logs of other libraries are noise beside the results.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    limit_processors(threads)
    worker = LocalWorker(threads)
    methods: dict[str, Callable[..., Any]] = {"open": worker.open, "time": worker.time, "close": worker.close}
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = pipe.recv()
            try:
                answer = True, methods[method](*arguments)
            except Exception as error:  # whatever a library raises leaves out its rows
                answer = False, first_line(error)[:300]
            pipe.send(answer)
