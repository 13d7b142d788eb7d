"""Shared by the command lines of this package: flags from a function's signature, errors and exit codes."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable

import tyro

from workloads.errors import InputError, one_error
from workloads.terminal import make_console

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def run_command(main: Callable[..., None], module: str, arguments: list[str] | None = None) -> int:
    """Reads ``main``'s parameters from the command line, runs it, and returns the exit status."""
    return exit_status(lambda: tyro.cli(main, prog=f"python -m {module}", args=arguments))


def exit_status(command: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit status: its own, 0 if it has none.

    An InputError is one line on stderr and status 2, as for an unknown flag. Ctrl-C is status 130, with what the
    interruption's notes (``add_note``) say.
    """
    _print_any_text()

    def print_line(line: str, style: str | None = None) -> None:
        make_console(stderr=True).print(line, style=style, soft_wrap=True)

    try:
        return command() or 0
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


def quiet_transformers() -> None:
    """Limits transformers' output to errors: no progress bars, no deprecation warnings of libraries."""
    import torch
    from transformers.utils import logging

    # transformers imports DeepSpeed if installed, which would log its choice of device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
