"""Whether a sweep's command runs, told to other terminals by a file that it renews: ``sweeps/<name>/command.json``.

Its fields: owner (see orchestrator/records/leases.py), began, beat (both Unix seconds), doing, and once there is a plan
concurrency and tokens_to_come; in the end ended and outcome. Whoever reads it on the same machine looks for the
process; elsewhere a beat that is a minute old counts as the last one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.records import leases
from orchestrator.records.storage import Storage

logger = logging.getLogger(__name__)

BEAT_S = 10.0
# Clocks of two machines differ by seconds.
LIMIT_S = 60.0


class Heartbeat:
    """A context in which a sweep's command says that it runs. A storage that is away, or full, disturbs nobody."""

    def __init__(self, storage: Storage, sweep: str, describe: Callable[[], dict[str, Any]]) -> None:
        self.storage, self.sweep, self.describe = storage, sweep, describe
        self.content = {"owner": leases.owner("", sweep), "began": time.time()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="presence", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        outcome = "ended" if kind is None else "interrupted" if kind is KeyboardInterrupt else kind.__name__
        self.content |= {"ended": time.time(), "outcome": outcome}
        self._stop.set()
        self._thread.join(BEAT_S)

    def _beat(self) -> None:
        content = {**self.content, "beat": time.time(), **self.describe()}
        try:
            self.storage.write(f"sweeps/{self.sweep}/command.json", content)
        except Exception as error:
            logger.debug("the sweep's command could not say that it runs: %s", error)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()
        self._beat()


def read_command(storage: Storage, sweep: str) -> dict[str, Any] | None:
    """What the command that runs the sweep, or ran it last, has said."""
    return storage.read(f"sweeps/{sweep}/command.json")


def is_alive(command: dict[str, Any] | None, now: float) -> bool:
    if command is None or "ended" in command or leases.is_dead(command["owner"]):
        return False
    return leases.is_here(command["owner"]) or now - command["beat"] < LIMIT_S
