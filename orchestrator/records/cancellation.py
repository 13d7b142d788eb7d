"""Requests to cancel a trial or a sweep: files beside their records."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Literal

from orchestrator.records.events import Cancelled, Event, Resumed, Step
from orchestrator.records.json_files import DamagedFile, expect_fields
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord

logger = logging.getLogger(__name__)


# Between looks for a request. In an object store each is a call that is paid for.
POLL_S, STORE_POLL_S = 0.5, 2.0


def request(storage: Storage, what: str, by: str) -> None:
    """Asks for the end of ``what``: ``trials/<fingerprint>`` or ``sweeps/<name>``."""
    storage.write(f"{what}/cancel.json", {"by": by, "time": time.time()})


def pending_request(storage: Storage, what: str) -> dict[str, Any] | None:
    """The request's fields, by and time; None if there is no request. A damaged one is a request too."""
    try:
        content = storage.read(f"{what}/cancel.json")
        return None if content is None else expect_fields(content, "cancel.json", by=str)
    except DamagedFile:
        return {"by": "somebody"}


def withdraw(storage: Storage, what: str) -> None:
    """Removes a request."""
    storage.remove(f"{what}/cancel.json")


def cancel_before_start(storage: Storage, folder: TrialFolder) -> bool:
    """Whether a request keeps a trial from starting, which is then written to its journal."""
    asked = pending_request(storage, folder.name)
    if asked is None:
        return False
    record = TrialRecord.of(folder.journal)
    if record.state not in ("finished", "cancelled"):
        folder.journal.append(Cancelled(step=record.saved_step, by=asked["by"]))
    return True


class Cancellation:
    """Watches for a request while a trial trains, in its own thread: a slow storage delays no step.

    ``on_event`` takes every event of the trial; the training loop calls ``poll_request`` between steps.
    """

    def __init__(self, storage: Storage, fingerprint: str) -> None:
        self.storage, self.what = storage, f"trials/{fingerprint}"
        self.request: dict[str, Any] | None = None
        self.step = 0
        self.poll_s = STORE_POLL_S if storage.store else POLL_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="cancellation", daemon=True)

    def __enter__(self) -> Cancellation:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()

    def on_event(self, event: Event) -> None:
        """Notes the step that the trial is at."""
        if isinstance(event, Resumed | Step):
            self.step = event.step

    def poll_request(self) -> Literal["stop"] | None:
        """Asks the training loop to stop once a request was found."""
        return "stop" if self.request else None

    def _look(self) -> None:
        while not (self.request or self._stop.wait(self.poll_s)):
            try:
                self.request = pending_request(self.storage, self.what)
            except Exception as error:  # an unreachable storage, or a request being written
                logger.debug("requests to cancel cannot be read: %s", error)
