"""``python -m orchestrator.cancel TRIAL|SWEEP``: ends trials from another terminal, each with a checkpoint.

A request is a small file, ``trials/<fingerprint>/cancel.json``; a whole sweep's is ``sweeps/<name>/cancel.json`` beside
those of its trials. The worker that trains the trial finds it within two seconds and ends it after the step it is in;
a trial that waits does not begin. The other trials of the sweep go on. A request holds for all who would train the
trial, until a command adds it anew: the same sweep command takes it up where it stopped.
"""

from __future__ import annotations

import getpass
import logging
import socket
import sys
import threading
import time
from typing import Annotated, Any, Literal

import tyro

from orchestrator.records.journal import TrialRecord
from orchestrator.records.storage import Storage, TrialFolder
from workloads.command import run_command
from workloads.errors import InputError

logger = logging.getLogger(__name__)

POLL_S = 2.0


def request(storage: Storage, what: str, by: str) -> None:
    """``what``: ``trials/<fingerprint>`` or ``sweeps/<name>``."""
    storage.write(f"{what}/cancel.json", {"by": by, "time": time.time()})


def requested(storage: Storage, what: str) -> dict[str, Any] | None:
    """by, time; or None where nobody has asked."""
    return storage.read(f"{what}/cancel.json")


def withdraw(storage: Storage, what: str) -> None:
    storage.remove(f"{what}/cancel.json")


def cancelled_before_its_start(storage: Storage, folder: TrialFolder) -> bool:
    """Whether a trial is not to begin, which its journal is then told."""
    asked = requested(storage, folder.name)
    if asked is None:
        return False
    record = TrialRecord.of(folder.journal)
    if record.state not in ("finished", "cancelled"):
        folder.journal.append("cancelled", step=record.saved_step, by=asked["by"])
    return True


class Cancellation:
    """Looks for a request while a trial trains, in a thread of its own: a storage that is slow delays no step.

    ``event`` is told all that the trial tells; ``asked`` is :func:`workloads.training.loop.run`'s.
    """

    def __init__(self, storage: Storage, fingerprint: str) -> None:
        self.storage, self.what = storage, f"trials/{fingerprint}"
        self.request: dict[str, Any] | None = None
        self.step = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="cancellation", daemon=True)

    def __enter__(self) -> Cancellation:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event in ("resume", "step"):
            self.step = fields["step"]

    def asked(self) -> Literal["stop"] | None:
        return "stop" if self.request else None

    def _look(self) -> None:
        while not (self.request or self._stop.wait(POLL_S)):
            try:
                self.request = requested(self.storage, self.what)
            except Exception as error:  # a storage that is away, or a request that is just being written
                logger.debug("no request to cancel can be read: %s", error)


def main(
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TRIAL|SWEEP")],
    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs",
) -> None:
    """Cancels a trial, or all of a sweep, from another terminal: it stops with a checkpoint, and the same sweep command
    takes it up again.

    Args:
        what: A fingerprint or the first digits of one, SWEEP/LABEL such as 'convergence/lora 2048', or a sweep's name.
        storage: The sweep's storage root.
    """
    # What a worker imports of this module does without what a command shows.
    from orchestrator.reporting.overview import Overview

    opened = Storage.at(storage)
    overview = Overview(opened)
    by = f"{getpass.getuser()} on {socket.gethostname()}"
    if what in opened.sweeps():
        sweep = overview.sweep(what)
        if not sweep.runs:
            raise InputError(f"the sweep {what} does not run; nothing is cancelled")
        request(opened, f"sweeps/{what}", by)
        trials = [trial for trial in sweep.trials if trial.is_to_do]
    else:
        trials = [overview.find(what)]
        if not trials[0].is_to_do:
            raise InputError(f"{trials[0].label} ({trials[0].fingerprint}) is {trials[0].state}; nothing is cancelled")
    for trial in trials:
        request(opened, f"trials/{trial.fingerprint}", by)
        then = "does not begin" if trial.state == "waiting" else "stops with a checkpoint"
        print(f"cancelled: {trial.label} ({trial.fingerprint}), {trial.state}: it {then}")
    print("The same sweep command goes on with what is cancelled.")


if __name__ == "__main__":
    sys.exit(run_command(main, "orchestrator.cancel"))
