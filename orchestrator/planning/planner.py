"""What a sweep would do with each of its trials, why, and at what cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.run_options import RunOptions
from orchestrator.terminal import and_list
from orchestrator.trial_spec import TrialSpec
from workloads.errors import InputError

Action = Literal["run", "resume", "known", "stopped", "infeasible"]
NEW, NEW_UNTUNED = "not trained yet", "not evaluated yet"


@dataclass(frozen=True)
class Planned:
    """A trial: what its sweep does with it, why, and at what cost.

    Args:
        action: known: already finished; stopped: this sweep has already stopped it early; infeasible: it does not fit.
        forced: its earlier results are moved aside first (--force).
        journal_offset: where its journal ended, and with it what earlier runs of the sweep did.
    """

    trial: TrialSpec
    record: TrialRecord
    action: Action
    reason: str
    estimate: Estimate
    forced: bool = False
    journal_offset: int = 0

    @property
    def footnote(self) -> str | None:
        """The reason, unless it is the plain one of a trial that nothing is known of."""
        return self.reason.removeprefix(NEW).removeprefix(NEW_UNTUNED).removeprefix("; ") or None

    @property
    def trains(self) -> bool:
        """Whether the sweep runs it, from its start or from a checkpoint."""
        return self.action in ("run", "resume")


def plan_trials(
    trials: Sequence[TrialSpec],
    storage: Storage,
    estimator: Estimator,
    *,
    fit: bool = False,
    stopping_sweep: str | None = None,
    forced: Collection[str] = (),
) -> list[Planned]:
    """Decides what to do with each trial from its journal, and estimates the cost.

    Args:
        fit: change a trial that does not fit into memory until it does.
        stopping_sweep: the sweep's name if it stops trials early. A trial that it has stopped before stays stopped; for
            any other sweep the trial is unfinished.
        forced: fingerprints of trials that start over even if they are known.
    """
    records = [TrialRecord.of(storage.trial(trial.fingerprint).journal) for trial in trials]
    for record in records:
        storage.note_damage(record.damage)
    estimator.learn([*zip(trials, records), *storage.others(list(trials))])
    return [
        _force(trial, record, estimator, fit)
        if trial.fingerprint in forced and record.journal.exists()
        else _plan(trial, record, estimator, fit, stopping_sweep)
        for trial, record in zip(trials, records)
    ]


def _force(trial: TrialSpec, record: TrialRecord, estimator: Estimator, fit: bool) -> Planned:
    planned = _plan(trial, TrialRecord(record.journal), estimator, fit, None)
    if planned.action == "infeasible":
        return planned
    done = f"{record.state} at step {record.last_step}" if record.steps else record.state
    reason = f"starts over (--force); its earlier results ({done}) are kept"
    return dataclasses.replace(planned, reason=reason, forced=True)


def _plan(
    trial: TrialSpec, record: TrialRecord, estimator: Estimator, fit: bool, stopping_sweep: str | None
) -> Planned:
    estimate = estimator.estimate(trial, record, fit)

    def planned(action: Action, reason: str) -> Planned:
        return Planned(trial, record, action, reason, estimate, journal_offset=record.offset)

    if record.state == "finished":
        return planned("known", "already finished")
    if record.state == "stopped" and record.stopped and record.stopped.sweep == stopping_sweep:
        return planned("stopped", f"stopped early at step {record.stopped.step}: {record.reason}")
    if estimate.refusal:
        return planned("infeasible", estimate.refusal)
    # The table has a column for layers that recompute or are offloaded.
    changes = [each for each in estimate.changes if not each.startswith(("gradient checkpointing", "activations of"))]
    changed = f"; runs with {and_list(changes)}, to fit into memory" if changes else ""
    if record.saved_step:
        reason = f"from step {record.saved_step} of {trial.training.steps}"
        if record.state == "cancelled":
            reason += f", where it was cancelled {record.reason}"
        return planned("resume", reason + changed)
    if record.state == "failed":
        return planned("run", f"failed before ({record.reason}); will be retried" + changed)
    if record.state == "cancelled":
        return planned("run", f"cancelled before {record.reason}" + changed)
    return planned("run", (NEW if trial.training.steps else NEW_UNTUNED) + changed)


def superseded(planned: Sequence[Planned], storage: Storage) -> list[str]:
    """The labels of trials that start afresh although an earlier version of longspan has trained them here."""
    earlier = {
        old.fingerprint: each.trial.label
        for each in planned
        if each.action == "run"
        for old in each.trial.of_earlier_versions()
    }
    storage.read_ahead(list(earlier))
    return list(dict.fromkeys(label for name, label in earlier.items() if storage.trial(name).journal.exists()))


def find_forced(trials: Sequence[TrialSpec], options: RunOptions) -> set[str]:
    """The fingerprints of the trials that --force and --force-trials start over.

    Raises:
        InputError: no trial of the sweep, or more than one, has the given first digits.
    """
    forced = {trial.fingerprint for trial in trials if options.force}
    for digits in options.force_trials:
        found = [trial.fingerprint for trial in trials if trial.fingerprint.startswith(digits)]
        if len(found) != 1 or len(digits) < 4:
            each = ", ".join(f"{trial.fingerprint} ({trial.label})" for trial in trials)
            raise InputError(f"--force-trials {digits}: expected 4 or more digits of one of {each}")
        forced.add(found[0])
    return forced


def summarise_actions(planned: Sequence[Planned]) -> str:
    """One line: how many trials run, resume and are known already."""
    words: dict[Action, str] = {
        "run": "to run",
        "resume": "to resume",
        "known": "already finished",
        "stopped": "already stopped early",
        "infeasible": "infeasible",
    }
    counts = {action: sum(p.action == action for p in planned) for action in words}
    total = f"{len(planned)} trial" + ("s" if len(planned) != 1 else "")
    return f"{total}: " + ", ".join(f"{n} {words[action]}" for action, n in counts.items() if n)


def refuse_infeasible(planned: Sequence[Planned]) -> None:
    """Raises InputError if a trial does not fit into memory, with what would make it fit."""
    if infeasible := [p for p in planned if p.action == "infeasible"]:
        reasons = dict.fromkeys(p.reason for p in infeasible)
        each = "\n".join(
            f"  {', '.join(p.trial.label for p in infeasible if p.reason == reason)}: {reason}" for reason in reasons
        )
        raise InputError(f"{len(infeasible)} of {len(planned)} trials do not fit into memory:\n{each}")
