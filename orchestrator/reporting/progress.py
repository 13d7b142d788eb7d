"""The progress of a trial, from its journal: a row of the table of trials, or a part of a line in a log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.records.events import seconds_between
from orchestrator.records.trial_record import TrialRecord
from orchestrator.terminal import duration, first_of
from orchestrator.trial_spec import TrialSpec

# States of a trial that trains, or will be trained by a running command.
AT_WORK = {"starting", "loading", "training", "evaluating", "cancelling", "pausing", "restarting"}
TO_DO = AT_WORK | {"waiting"}
MOST_AT_WORK = 4  # trials that a line of a log names


@dataclass
class Row:
    """A trial with its record."""

    trial: TrialSpec
    record: TrialRecord
    known: bool = False  # finished before this sweep began


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One trial.

    Args:
        state: waiting, starting, loading, training, evaluating, cancelling, pausing, restarting; finished, known,
            stopped, failed, cancelled; interrupted (no process trains it any more), not started; damaged (by its
            trial.json).
        why: what it waits for, or what ended it.
        elsewhere: the other sweep that trains it, if one does.
        step: the last one; while it waits to be resumed, that of its checkpoint.
        attempts: how often a worker has started it.
        remedies: changes and pauses after faults.
        saved_step: of its newest checkpoint.
        heard: Unix seconds of the last line in its journal.
    """

    fingerprint: str
    label: str
    state: str
    why: str | None = None
    elsewhere: str | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    attempts: int = 0
    remedies: tuple[str, ...] = ()
    host: str | None = None
    saved_step: int | None = None
    heard: float | None = None

    @property
    def is_to_do(self) -> bool:
        """Whether a running command trains it or is about to."""
        return self.state in TO_DO


def progress(
    row: Row,
    sweep: str,
    *,
    alive: bool = True,
    due: bool = True,
    holder: dict[str, Any] | None = None,
    cancelling: bool = False,
) -> Progress:
    """One trial, from the point of view of a sweep.

    Args:
        alive: a worker trains it.
        due: a running command trains it or is about to.
        holder: the owner of its lease (orchestrator/records/leases.py), if known.
        cancelling: there is a request to stop it.
    """
    trial, record = row.trial, row.record
    state, why = ("known", None) if row.known else _state(trial, record, sweep, alive, due, holder)
    if cancelling and state in TO_DO:
        state, why = "cancelling", why
    began = state not in ("waiting", "starting", "pausing", "not started")
    last = record.steps.get(record.last_step) if began else None
    curve = record.curve(trial.training.context_length) if began else []
    return Progress(
        fingerprint=trial.fingerprint,
        label=trial.label,
        state=state,
        why=why,
        # While it waits to be resumed, its steps are an earlier attempt's: up to the checkpoint they are kept.
        step=record.last_step if began else record.saved_step,
        steps=trial.training.steps,
        elsewhere=_elsewhere(record, sweep) if state in AT_WORK else None,
        loss=last.loss if last else None,
        perplexity=curve[-1].perplexity if curve else None,
        tokens_per_second=record.tokens_per_second if last else None,
        seconds_left=trial_seconds_left(row) if record.state == "running" and alive and not row.known else None,
        attempts=len(record.attempts),
        remedies=tuple(record.remedies),
        host=record.started.host if record.started else None,
        saved_step=record.saved_step or None,
        heard=record.heard,
    )


def _state(
    trial: TrialSpec, record: TrialRecord, sweep: str, alive: bool, due: bool, holder: dict[str, Any] | None
) -> tuple[str, str | None]:
    """Its state, and why it waits or has ended."""
    resumes = f"its sweep's command resumes from step {record.saved_step}" if record.saved_step else None
    match record.state:
        case "waiting":
            return ("waiting", "for its turn") if due else ("not started", None)
        case "starting" if holder and holder["sweep"] != sweep:
            return "waiting", f"the sweep {holder['sweep']} trains it on {holder['host']}"
        case "starting" if not due:
            return "interrupted", resumes
        case "starting" if record.pause_ends and record.pause_ends > time.time():
            return "pausing", f"{record.remedies[-1]}, {duration(record.pause_ends - time.time())} left"
        case "starting":
            return "starting", _waits_for(record)
        case "running" if not alive:
            return ("restarting", "its worker was lost; Ray is starting another") if due else ("interrupted", resumes)
        case "running":
            return _doing(trial, record), None
    return record.state, record.reason


def _doing(trial: TrialSpec, record: TrialRecord) -> str:
    if record.started and (record.model is None or record.model.time < record.started.time):
        return "loading"
    due = trial.training.eval_every
    if not trial.training.steps:
        return "evaluating"
    evaluated = (trial.training.context_length, record.last_step) in record.evals
    at_evaluation = record.last_step % due == 0 or record.last_step == trial.training.steps
    return "evaluating" if at_evaluation and not evaluated else "training"


def _elsewhere(record: TrialRecord, sweep: str) -> str | None:
    """The other sweep that trains it and has its lease, if one does."""
    started = record.started
    if started is None or started.sweep in (None, sweep):
        return None
    return f"by {started.sweep} on {started.host}"


def _waits_for(record: TrialRecord) -> str | None:
    """What a trial needs before its worker begins; files do not show whether it waits for that or is starting up."""
    if record.launched is None or record.launched.resources is None:
        return None
    resources = record.launched.resources
    count, device = (resources["gpus"], "GPU") if resources.get("gpus") else (resources.get("cpus", 0), "CPU")
    workers = resources.get("workers", 1)
    each = f"{count:g} {device}{'s' * (count > 1)}{' each' * (workers > 1)}"
    return f"for {workers} worker{'s' * (workers > 1)} with {each} to start"


def progress_line(trials: list[Progress], elapsed: float, left: float | None) -> str:
    """A sweep in one line: ``10m34s: 17 of 18 trials done; training lora 1024 yarn 27/32; about 3s left``."""
    ended = Counter(trial.state for trial in trials if not trial.is_to_do)
    apart = [f"{ended[state]} {state}" for state in ("failed", "stopped", "cancelled") if ended[state]]
    parts = [f"{ended.total()} of {len(trials)} trials done" + (f" ({', '.join(apart)})" if apart else "")]
    at_work = sorted((trial for trial in trials if trial.state in AT_WORK), key=lambda trial: not trial.step)
    if at_work:
        parts.append(first_of([_at_step(trial) for trial in at_work], MOST_AT_WORK))
    elif waiting := [trial for trial in trials if trial.is_to_do]:
        parts.append(f"{len(waiting)} waiting" + (f" {waiting[0].why}" if waiting[0].why else ""))
    if left:
        parts.append(f"about {duration(left)} left")
    return f"{duration(elapsed)}: {'; '.join(parts)}"


def _at_step(trial: Progress) -> str:
    at = f" {trial.step}/{trial.steps}" if trial.steps and trial.state != "starting" else ""
    return f"{trial.state} {trial.label}{at}"


def trial_seconds_left(row: Row) -> float | None:
    """For the remaining steps at this trial's pace, evaluations included; None before its first step."""
    if (so_far := _since_it_started(row)) is None:
        return None
    steps, seconds = so_far
    return max(0.0, seconds / steps * (row.trial.training.steps - row.record.last_step))


def seconds_a_token(rows: Iterable[Row]) -> float | None:
    """Seconds per token of what has run so far, start-up and evaluation included."""
    spent = tokens = 0.0
    for row in rows:
        if not row.known and (so_far := _since_it_started(row)):
            steps, seconds = so_far
            spent += seconds
            tokens += steps * tokens_a_step(row)
    return spent / tokens if tokens else None


def _since_it_started(row: Row) -> tuple[int, float] | None:
    """The steps of the current attempt, and the seconds since it started; None before its first step."""
    record = row.record
    if record.last_step <= record.resumed_at or not record.started:
        return None
    # A restarted trial has not yet recorded from which step: the last step is then the lost attempt's.
    seconds = seconds_between(record.started, record.steps[record.last_step])
    return (record.last_step - record.resumed_at, seconds) if seconds > 0 else None


def tokens_left(row: Row) -> int:
    """Tokens that the trial still trains on, counted from its checkpoint unless it runs."""
    record = row.record
    done = record.last_step if record.state == "running" else record.saved_step
    return (row.trial.training.steps - done) * tokens_a_step(row)


def tokens_a_step(row: Row) -> int:
    """Tokens of a batch, padding included."""
    return row.trial.training.batch * row.trial.training.context_length


def seconds_left(rows: list[Row], concurrency: int, tokens_to_come: int) -> float | None:
    """For all trials of a running command, and those that its search has not suggested yet; None if unknown."""
    pace = seconds_a_token(rows)
    if pace is None:
        return None
    to_do = sum(tokens_left(row) for row in rows if row.record.state in ("waiting", "starting", "running"))
    start_ups = [row.record.start_up_seconds for row in rows if not row.known and row.record.start_up_seconds]
    waiting = [row for row in rows if row.record.state == "waiting"]
    starts = sum(row.trial.training.steps > 0 for row in waiting) + any(not r.trial.training.steps for r in waiting)
    starting = starts * sum(start_ups) / max(1, len(start_ups))
    return (pace * (to_do + tokens_to_come) + starting) / concurrency
