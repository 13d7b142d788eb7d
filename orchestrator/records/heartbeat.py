"""Whether a sweep's command runs, for other terminals: a file that it renews, ``sweeps/<name>/command.json``.

Its fields: owner (see orchestrator/records/leases.py), settings (the sweep's digest), began, beat (both Unix seconds),
doing, and once there is a plan concurrency and tokens_to_come; at the end ended and outcome. A reader on the same
machine checks the process; elsewhere the command counts as dead once its heartbeat is a minute old.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.records import leases
from orchestrator.records.json_files import expect_fields
from orchestrator.records.storage import Storage

logger = logging.getLogger(__name__)

BEAT_S = 10.0
# Much more than the seconds by which the clocks of two machines differ.
LIMIT_S = 60.0


class Heartbeat:
    """A context in which a sweep's command reports that it runs. An unreachable or full storage is no error."""

    def __init__(
        self, storage: Storage, sweep: str, describe: Callable[[], dict[str, Any]], settings: str | None = None
    ) -> None:
        self.storage, self.sweep, self.describe = storage, sweep, describe
        self.content = {"owner": leases.owner("", sweep), "settings": settings, "began": time.time()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

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
            logger.debug("the sweep's command could not report that it runs: %s", error)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._beat()
        self._beat()


def read_command(storage: Storage, sweep: str) -> dict[str, Any] | None:
    """The file of the command that runs the sweep, or ran it last.

    Raises:
        DamagedFile: it is damaged.
    """
    file = f"sweeps/{sweep}/command.json"
    content = storage.read(file)
    if content is not None:
        name = f"{storage.location}/{file}"
        expect_fields(content, name, owner=dict)
        expect_fields(content["owner"], name, host=str, pid=int)
        times = {field: content[field] for field in ("began", "beat", "ended") if field in content}
        expect_fields(times, name, **dict.fromkeys(times, float))
    return content


def is_alive(command: dict[str, Any] | None, now: float) -> bool:
    """Whether the command of :func:`read_command` still runs, as far as is known."""
    if command is None or "ended" in command or leases.is_dead(command["owner"]):
        return False
    return leases.is_here(command["owner"]) or now - command.get("beat", 0.0) < LIMIT_S
