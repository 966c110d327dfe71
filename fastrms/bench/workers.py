"""Where the ways of `fastrms bench` run: in this process, or in one of their own.

Thread pools of different libraries in one process compete for the cores, and which was loaded first decides who wins.
So every library that brings threads of its own has a process, which does nothing while others are measured.
"""

import contextlib
import gc
import logging
import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator
from itertools import repeat
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from fastrms.bench import roofline
from fastrms.bench.cases import Case
from fastrms.bench.implementations import CONTENDERS, load_kernel
from fastrms.bench.problem import Problem, Runner, check
from fastrms.cli.common import CommandError
from fastrms.kernels import threads
from fastrms.optimizer import RMSProp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LIMIT_PARALLEL", "LIMIT_SERIAL", "Remote", "Session"]

# Names of the machine's limit, which is timed like a way.
LIMIT_SERIAL, LIMIT_PARALLEL = "limit, 1 thread", "limit, all threads"

# "auto" looks for the first time after 2 s of training, at no fewer elements than this, and then tries for 0.2 s or
# some tens of steps.
SETTLE_FROM, SETTLE_SECONDS, SETTLE_STEPS = 65_536, 2.4, 64

# How often each way to fetch memory is timed, of which the fastest is the machine's limit.
FETCH_TRIALS = 9

# How long a way runs in each turn ahead of being timed.
WARM_SECONDS = 0.02


class Session:
    """Makes, checks and times ways in this process."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._problem: Problem | None = None
        self._runners: dict[str, Runner] = {}
        # glibc gives memory of large arrays back to the system at once, until an even larger one was freed: before that
        # each new array is paid for page by page, which makes the reference class three times slower at 1e5. A program
        # that trains has freed larger arrays. 31 MiB is just below where that stops.
        large = np.empty(31 << 20, np.uint8)
        del large

    def open(self, name: str, case: Case) -> str:
        """Make a way ready for a case and return how its result compares with the reference's.

        Raises
        ------
        CommandError
            It computes something else.
        """
        problem = self._problem_of(case)
        if name in (LIMIT_SERIAL, LIMIT_PARALLEL):
            self._runners[name] = _limit(problem, name == LIMIT_PARALLEL)
            return ""
        contender = CONTENDERS[name] if name in CONTENDERS else load_kernel(name)
        runner = contender.make(problem)
        try:
            verdict = check(runner, problem, contender.exact, contender.cache_dtype)
        except CommandError:
            raise
        except Exception as error:  # the user's kernel or another library: whatever it raises is its own
            text = (str(error).strip() or "no message").splitlines()[0]
            raise CommandError(f"it raised {type(error).__name__}: {text}") from error
        if name.startswith("auto") and case.params >= SETTLE_FROM and self._threads > 1:
            _settle(runner)
        self._runners[name] = runner
        return verdict

    def runner(self, name: str) -> Runner:
        """A way that was made ready."""
        return self._runners[name]

    def time(self, name: str, calls: int) -> float:
        """Seconds a step, over `calls` steps after some that are not timed."""
        runner = self._runners[name]
        if self._problem is not None:
            self._problem.forget_expected()
        runner.prepare()
        step = runner.step
        # The first find the processor's cache full of what others left there, threads asleep, and when these wake, two
        # of them on one core: it takes the system some milliseconds to spread them.
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
        """Give back the memory of the case."""
        self._problem = None
        self._runners.clear()
        gc.collect()

    def _problem_of(self, case: Case) -> Problem:
        if self._problem is None or self._problem.case != case:
            self.close()
            self._problem = Problem(case, self._threads)
        return self._problem


def _limit(problem: Problem, parallel: bool) -> Runner:
    # fastrms starts Numba's threads in its own way (waiting without spinning), and has to be the first to do so.
    RMSProp([np.zeros(1)], kernel="parallel", num_threads=problem.threads).step()
    optimizer = problem.optimizer()  # the same memory as what is compared with the limit
    p, g, c = (optimizer.buffers[name].segments[0] for name in ("params", "grads", "cache"))
    touch = roofline.touch_parallel if parallel else roofline.touch_serial
    half = problem.scalar(0.5)

    def taken(fetch: tuple[int, int]) -> float:
        start = time.perf_counter()
        touch(p, g, c, half, *fetch)
        return time.perf_counter() - start

    with threads.limit_threads(problem.threads):
        trials = [[taken(fetch) for fetch in roofline.FETCHES] for _ in range(FETCH_TRIALS)]
    fetch = roofline.FETCHES[int(np.argmin(np.median(trials, axis=0)))]

    def step() -> None:
        touch(p, g, c, half, *fetch)

    def limited() -> None:
        before = numba.get_num_threads()
        numba.set_num_threads(problem.threads)
        step()
        numba.set_num_threads(before)

    all_threads = not parallel or problem.threads == numba.get_num_threads()
    return Runner(step if all_threads else limited, lambda: ((), ()))


def _settle(runner: Runner) -> None:
    end = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < end:
        runner.step()
    for _ in range(SETTLE_STEPS):
        runner.step()


class Remote:
    """A `Session` in a process of its own, with the same methods.

    Parameters
    ----------
    name : str
        For messages.
    threads : int
    timeout : float
        Seconds after which a request counts as failed and the process is ended.
    """

    def __init__(self, name: str, threads: int, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # A daemon ends with this process, however that ends.
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        # Ctrl-C goes to all processes of a terminal. The one that prints results decides, and the others have it
        # blocked from their first line on.
        with _interrupts_blocked():
            self._process.start()
        theirs.close()

    def open(self, name: str, case: Case) -> str:
        """As `Session.open`."""
        return str(self._ask("open", name, case))

    def time(self, name: str, calls: int) -> float:
        """As `Session.time`."""
        return float(self._ask("time", name, calls))

    def close(self) -> None:
        """As `Session.close`."""
        self._ask("close")

    def end(self, patience: float = 2) -> None:
        """End the process, by a signal where it does not end by itself within so many seconds."""
        self._pipe.close()
        # Without the pipe it ends by itself, and libraries clean up behind them; if it is busy, it has to be stopped.
        self._process.join(patience)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(self._timeout):
                self.end()
                raise CommandError(f"no answer within {self._timeout:g} s")
            good, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise CommandError(f"the process for {self._name} has ended") from None
        if not good:
            raise CommandError(answer)
        return answer


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for this thread and for processes that it starts; on Windows do nothing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # whose start, with that of the first process, would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, threads: int) -> None:
    """Answer requests until the other side is gone; what runs in the process of a `Remote`."""
    # On Windows too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Standard output is for results, and what other libraries have to say about themselves is not ours to print.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from fastrms.bench.peers import limit_processors

    limit_processors(threads)
    session = Session(threads)
    methods: dict[str, Callable[..., Any]] = {"open": session.open, "time": session.time, "close": session.close}
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, arguments = pipe.recv()
            try:
                answer = True, methods[method](*arguments)
            except Exception as error:  # whatever a library raises, it is this library's row that is left out
                text = str(error).strip() or type(error).__name__
                answer = False, text.splitlines()[0][:300]
            pipe.send(answer)
