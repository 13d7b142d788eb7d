"""Shared by the command lines of this package: flags from a function's signature, errors and exit codes."""

from __future__ import annotations

import io
import os
import select
import sys
import warnings
from collections.abc import Callable

import tyro

from workloads.errors import InputError, one_error
from workloads.terminal import make_console

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130
EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def run_command(command: Callable[..., int | None], prog: str, arguments: list[str] | None = None) -> int:
    """Reads ``command``'s parameters from the command line, runs it, and returns the exit status."""
    return exit_status(lambda: tyro.cli(command, prog=prog, args=arguments))


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status: its own, 0 if it has none.

    An InputError is one line on stderr and status 2, as for an unknown flag. Ctrl-C is status 130, with what the
    interruption's notes (``add_note``) say. A reader of the output that has gone, such as ``head``, is status 141.
    """
    _print_any_text()

    def print_line(line: str, style: str | None = None) -> None:
        make_console(stderr=True).print(line, style=style, soft_wrap=True)

    try:
        try:
            return command() or 0
        finally:
            sys.stdout.flush()  # here, where an error can still be handled, and not at exit
    except BrokenPipeError:
        if not _stdout_is_gone():  # it was another connection
            raise
        return EXIT_BROKEN_PIPE
    except InputError as error:
        print_line(f"error: {error}", "bold red")
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interruption:
        print_line("\ninterrupted.")
        for note in getattr(interruption, "__notes__", ()):
            print_line(note)
        return EXIT_INTERRUPTED


def _print_any_text() -> None:
    """Escapes what the terminal's encoding lacks, where Python would raise (in ASCII: half of what is printed)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def argument_text(text: str, name: str) -> str:
    """An argument that is text, as UTF-8 also where this Python reads arguments in an encoding without its letters.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        with one_error(f"{name} {text!r} is not UTF-8", "Give it as UTF-8."):
            return os.fsencode(text).decode("utf-8")


def _stdout_is_gone() -> bool:
    """Whether nobody reads stdout any more; what is still buffered then goes to the null device."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported without asking for them
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def quiet_transformers() -> None:
    """Limits transformers' output to errors: no progress bars, no deprecation warnings of libraries."""
    import torch
    from transformers.utils import logging

    # transformers imports DeepSpeed if installed, which would log its choice of device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
