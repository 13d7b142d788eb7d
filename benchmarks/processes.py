"""A separate process for each measurement: memory, compiled code, patched classes and crashes of one affect no other.

Starting Python with torch and transformers takes about ten seconds, so the next process does that while this one works.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

# Time for a process to exit after sending its result: it frees tens of gigabytes.
LAST_SECONDS = 5.0
START_METHOD = "spawn"  # a fork of a process that uses CUDA cannot use it


class Failed(RuntimeError):
    """The function raised, its process died, or it ran out of time."""


class Worker:
    """A process that waits to call ``function`` once; it must be importable, as ``multiprocessing`` requires."""

    def __init__(self, function: Callable[..., Any]) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(function, theirs))
        self._process.start()
        theirs.close()

    def call(self, *arguments: Any, seconds: float) -> Any:
        """Returns what the function returns. The process has ended afterwards.

        Raises:
            Failed: the message is the reason in one line; a traceback went to stderr.
        """
        self.begin(*arguments)
        return self.result(seconds)

    def begin(self, *arguments: Any) -> None:
        """Makes the process call the function; :meth:`result` reports a process that has already died."""
        with contextlib.suppress(ConnectionError):
            self._connection.send(arguments)

    def result(self, seconds: float) -> Any:
        """Waits for the result, as :meth:`call`."""
        try:
            if not self._connection.poll(seconds):
                self._process.kill()
                raise Failed(f"stopped after {seconds:.0f} s, its time limit")
            result, failure = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise Failed(f"its process ended with {self._process.exitcode}") from error
        finally:
            self.close()
        if failure:
            raise Failed(failure)
        return result

    def close(self) -> None:
        """Ends the process, also one that was never called."""
        self._connection.close()
        self._process.join(LAST_SECONDS)
        self._process.kill()
        self._process.join()


def _serve(function: Callable[..., Any], connection: Any) -> None:
    try:
        arguments = connection.recv()
    except EOFError:  # not needed after all
        return
    try:
        answer = function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        answer = None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    connection.send(answer)
