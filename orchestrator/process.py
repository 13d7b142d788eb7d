"""The command's own process: exit status, signals, logs of libraries, garbage collection, background calls."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from workloads.command import EXIT_INTERRUPTED
from workloads.files.safe import PlainFileHandler

T = TypeVar("T")


def exit_without_gc(main: Callable[[], int]) -> NoReturn:
    """Ends the process with ``main``'s exit status; garbage collection is off until ``main`` calls ``enable_gc``.

    GC over the many objects that imports leave took a third of start-up and exit time.
    """
    gc.disable()
    status = main()
    gc.freeze()  # nothing to collect at exit either
    sys.exit(status)


def enable_gc() -> None:
    """Turns garbage collection on for objects made from here on."""
    gc.freeze()
    gc.enable()


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Garbage collection is off inside, and afterwards leaves alone what was made inside: for heavy imports."""
    gc.disable()
    try:
        yield
    finally:
        enable_gc()


def stop_on_signals() -> None:
    """Makes SIGTERM (a stopped job) act as Ctrl-C, and Ctrl-C work where a shell has a background command ignore it."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)


@contextlib.contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """What a program does on Ctrl-C and SIGTERM is afterwards as it was before."""
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for stop, handler in before.items():
            if handler is not None:  # None: set from outside Python
                signal.signal(stop, handler)


@contextlib.contextmanager
def end_on_signal(seconds: float = 4.0) -> Iterator[None]:
    """Ctrl-C or SIGTERM inside ends the process, at the latest after ``seconds``.

    Python's handlers run between two of its own instructions: they do not interrupt C++ that waits, as Ray's does.
    """
    inside, outside = socket.socketpair()
    inside.setblocking(False)
    left = threading.Event()

    def end() -> None:
        while number := outside.recv(1):  # empty once the other end is closed
            if number[0] in (signal.SIGINT, signal.SIGTERM) and not left.wait(seconds):
                os.write(2, b"\ninterrupted.\n")
                os._exit(EXIT_INTERRUPTED)

    thread = threading.Thread(target=end, name="end on signal", daemon=True)
    before = signal.set_wakeup_fd(inside.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        inside.close()
        thread.join()
        outside.close()


def log_libraries_to(path: Path) -> None:
    """Sends what Ray and MLflow log in this process to a file: the sweep itself reports what matters of it."""
    handler = PlainFileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.raiseExceptions = False  # a full disk must not fill the terminal
    for name in ("ray", "ray.tune", "ray.train", "mlflow", "orchestrator.planning.budget_watch"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


class BackgroundCall(threading.Thread, Generic[T]):
    """A call in a daemon thread: Ctrl-C never waits for it."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self._results: list[T] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """The thread's own part."""
        try:
            self._results.append(self.function())
        except BaseException as error:
            self._error = error

    def result(self, every: float, meanwhile: Callable[[], None]) -> T:
        """Waits for the call; returns its value, or raises what it raised.

        Args:
            every: seconds between calls of ``meanwhile`` while it waits.
        """
        while self.is_alive():
            self.join(every)
            if self.is_alive():
                meanwhile()
        if self._error is not None:
            raise self._error
        return self._results[0]
