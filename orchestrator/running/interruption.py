"""Ctrl-C and SIGTERM: running trials are asked to stop with a checkpoint, as ``cancel`` asks them, within ten seconds.

What each trial keeps and loses is printed when the command ends (:func:`describe_kept`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable, Iterator

from rich.console import Console

from orchestrator.records import cancellation
from orchestrator.records.object_store import StoreUnavailable
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec

# Job schedulers wait this long or longer between SIGTERM and SIGKILL (ray job stop: docs/aws.md).
LIMIT_S = 10.0
POLL_S = 0.1
BY = "Ctrl-C or SIGTERM"  # who cancelled, in the trial's journal
AT_WORK = ("starting", "running")


def ask_for_checkpoints(storage: Storage, trials: Iterable[TrialSpec], jobs: Collection[str], console: Console) -> None:
    """Asks the running trials to stop with a checkpoint; returns once they have, after LIMIT_S, or on another Ctrl-C.

    Args:
        jobs: ids of the jobs that this command has started: what another sweep trains is left alone.
    """
    asked: list[TrialFolder] = []
    try:
        with contextlib.suppress(OSError, StoreUnavailable):
            for folder in (storage.trial(trial.fingerprint) for trial in trials):
                holder = folder.holder()
                if holder and holder["attempt"] in jobs:
                    asked.append(folder)
                    cancellation.request(storage, folder.name, BY)
            if asked:
                each = "the running trial saves" if len(asked) == 1 else f"{len(asked)} running trials save"
                console.print(f"\n{each} a checkpoint, within {LIMIT_S:.0f} s; Ctrl-C again ends at once")
            _wait([TrialRecord.of(folder.journal) for folder in asked])
    except KeyboardInterrupt:
        pass
    for folder in asked:
        with contextlib.suppress(OSError, StoreUnavailable):
            cancellation.withdraw(storage, folder.name)


def _wait(records: list[TrialRecord]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while any(record.state in AT_WORK for record in records) and time.monotonic() < deadline:
        time.sleep(POLL_S)
        for record in records:
            record.follow()


def describe_kept(storage: Storage, trials: Iterable[TrialSpec]) -> Iterator[str]:
    """One line a trial: what an interruption has left of it, and what is lost."""
    trials = list(trials)
    width = max((len(trial.label) for trial in trials), default=0)
    for trial in trials:
        record = TrialRecord.of(storage.trial(trial.fingerprint).journal)
        yield f"  {trial.label:<{width}}  {_kept(record, trial.training.steps)}"


def _kept(record: TrialRecord, steps: int) -> str:
    if record.state == "finished":
        return "finished"
    if record.state == "stopped" and record.stopped:
        return f"stopped early at step {record.stopped.step} of {steps}"
    if record.state == "cancelled" and record.cancelled and record.cancelled.by != BY:
        return f"cancelled at step {record.cancelled.step} of {steps}"
    lost = record.last_step - record.saved_step
    if record.saved_step:
        kept = f"checkpoint at step {record.saved_step} of {steps}"
        return f"{kept}; {_steps(lost)} lost" if lost > 0 else kept
    if record.launched:
        return "no checkpoint yet, starts over" + (f"; {_steps(lost)} lost" if lost > 0 else "")
    return "not started"


def _steps(number: int) -> str:
    return f"the last {number} steps are" if number > 1 else "the last step is"
