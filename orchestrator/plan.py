"""What a sweep would do with each of its trials, and why, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.journal import TrialRecord
from orchestrator.spec import TrialSpec
from orchestrator.storage import Storage


@dataclass(frozen=True)
class Planned:
    trial: TrialSpec
    record: TrialRecord
    action: Literal["run", "resume", "known", "stopped"]
    reason: str

    @property
    def trains(self) -> bool:
        return self.action in ("run", "resume")


def plan(trials: list[TrialSpec], storage: Storage, stopping: str | None = None) -> list[Planned]:
    """Each trial with what is to be done about it, from what its journal says.

    ``stopping`` is the name of a sweep that stops trials early: those that it has stopped before stay so. To any other
    sweep they are unfinished.
    """
    return [_plan(trial, TrialRecord.of(storage.trial(trial.fingerprint).journal), stopping) for trial in trials]


def _plan(trial: TrialSpec, record: TrialRecord, stopping: str | None) -> Planned:
    if record.state == "finished":
        return Planned(trial, record, "known", f"finished before, in trials/{trial.fingerprint}")
    if record.state == "stopped" and record.stopped["sweep"] == stopping:
        return Planned(trial, record, "stopped", f"stopped early at step {record.stopped['step']}: {record.reason}")
    if record.saved_step:
        return Planned(trial, record, "resume", f"from step {record.saved_step} of {trial.training.steps}")
    if record.state == "failed":
        return Planned(trial, record, "run", f"failed before ({record.reason}), tried again")
    return Planned(trial, record, "run", "not trained yet" if trial.training.steps else "not evaluated yet")


def summary(planned: list[Planned]) -> str:
    """One line: how many trials run, resume and are known already."""
    counts = {action: sum(p.action == action for p in planned) for action in ("run", "resume", "known", "stopped")}
    words = {
        "run": "to run",
        "resume": "to resume",
        "known": "finished before, not trained again",
        "stopped": "stopped early before",
    }
    total = f"{len(planned)} trial" + ("s" if len(planned) != 1 else "")
    return f"{total}: " + ", ".join(f"{n} {words[action]}" for action, n in counts.items() if n)
