"""What the command lines of this package share: flags from a function's signature, and how a user's mistake ends."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import tyro

from workloads.errors import InputError

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130


def run_command(main: Callable[..., None], module: str, arguments: list[str] | None = None) -> int:
    """Reads ``main``'s parameters from the command line, runs it, and returns the exit status.

    An InputError is one line on stderr and status 2, as it is for an unknown flag.
    """
    try:
        tyro.cli(main, prog=f"python -m {module}", args=arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def quiet_transformers() -> None:
    """Errors only, no progress bars, no talk of deprecations within a library: a command speaks for itself."""
    import torch
    from transformers.utils import logging

    # transformers imports DeepSpeed where it is installed, which would say how it found its device.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
