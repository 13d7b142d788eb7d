"""The command's own process: signals, logs of libraries, garbage collection."""

from __future__ import annotations

import gc
import logging
import signal
from pathlib import Path


def stop_on_sigterm() -> None:
    """SIGTERM (a stopped job) ends as Ctrl-C does; and a shell that starts a command in the background has it ignore
    Ctrl-C unless it says otherwise.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)


def log_libraries_to(path: Path) -> None:
    """What Ray and MLflow say in this process goes to a file: what it means for the sweep is said by the sweep."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.raiseExceptions = False  # a full disk must not fill the terminal
    for name in ("ray", "ray.tune", "ray.train", "mlflow"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


def enable_gc() -> None:
    """From here on, and not among what there is by now."""
    gc.freeze()
    gc.enable()
