"""A trial's state and results, from its journal."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.records.events import (
    Cancelled,
    Eval,
    Event,
    Failed,
    FaultKind,
    Finished,
    Launched,
    ModelReady,
    Preempted,
    Resumed,
    Retry,
    Saved,
    Skipped,
    Started,
    Step,
    Stopped,
    seconds_between,
)
from orchestrator.records.journal import Journal, Read
from orchestrator.records.segments import SegmentedJournal
from workloads.evaluation.intervals import DocumentScores

State = Literal["waiting", "starting", "running", "finished", "stopped", "failed", "cancelled"]


@dataclass
class TrialRecord:
    """A trial's state and results, from its journal; ``follow`` reads what has been added.

    Args:
        remedies: what was changed or waited for after each fault.
        launched: the last launch. Likewise ``started``, ``model``, ``stopped`` and ``cancelled``.
        pause_ends: when the last retry begins, in Unix seconds.
        heard: when the last line was written; ``attempts_held``: seconds from each attempt's start to its last line.
        attempt_of_step: the attempt that made each step, the last where several did.
        ended: when the trial last finished, failed, or was stopped or cancelled.
        evals: by (context length, step).
        skipped: lines that could not be read.
    """

    journal: Journal | SegmentedJournal
    state: State = "waiting"
    reason: str | None = None
    failure_kind: FaultKind = "error"
    failed_attempt: str | None = None
    preempted_attempt: str | None = None
    remedies: list[str] = field(default_factory=list)
    launched: Launched | None = None
    pause_ends: float | None = None
    heard: float | None = None
    ended: float | None = None
    stopped: Stopped | None = None
    cancelled: Cancelled | None = None
    attempts: list[Started] = field(default_factory=list)
    attempts_held: list[float] = field(default_factory=list)
    last_of_attempt: Event | None = None
    model: ModelReady | None = None
    steps: dict[int, Step] = field(default_factory=dict)
    attempt_of_step: dict[int, Started] = field(default_factory=dict)
    evals: dict[tuple[int, int], Eval] = field(default_factory=dict)
    resumed_at: int = 0
    saved_step: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    offset: int = 0

    @classmethod
    def of(cls, journal: Journal | SegmentedJournal) -> TrialRecord:
        """The record of all that the journal holds now."""
        record = cls(journal)
        record._take_all(journal.read())
        return record

    def follow(self) -> list[Event]:
        """Takes in the lines added since the last call, and returns their events."""
        return self._take_all(self.journal.poll(self.offset))

    def _take_all(self, read: Read) -> list[Event]:
        self.offset = read.offset
        self.skipped += read.skipped
        for event in read.events:
            self._take(event)
        return read.events

    def _take(self, event: Event) -> None:
        if self.state == "starting" and isinstance(event, Step | Eval):
            self.state = "running"  # a second sweep waits for the one that trains it
        self.heard = event.time
        if self.state == "running" and self.last_of_attempt and _is_of_attempt(event, self.last_of_attempt):
            self.attempts_held[-1] += seconds_between(self.last_of_attempt, event)
            self.last_of_attempt = event
        match event:
            case Launched() if self.state != "finished":  # another sweep may have finished it in between
                self.state, self.reason, self.launched = "starting", None, event
            case Started():
                self.state, self.reason = "running", None
                self.attempts.append(event)
                self.attempts_held.append(0.0)
                self.last_of_attempt = event
                self.resumed_at = 0
            case ModelReady():
                self.model = event
            case Resumed():
                self.resumed_at = event.step
            case Step():
                self.steps[event.step] = event
                self.attempt_of_step[event.step] = self.started or Started()
            case Eval():
                self.evals[event.context_length, event.step] = event
            case Saved():
                self.saved_step = event.step
            case Finished():
                self.state, self.reason, self.ended = "finished", None, event.time
            case Stopped() if self.state != "finished":
                self.state, self.reason, self.stopped, self.ended = "stopped", event.reason, event, event.time
            case Failed() if event.attempt != self.failed_attempt or self.state != "failed":
                # Of several workers' errors in one attempt the first is the cause.
                self.state, self.reason, self.ended = "failed", event.reason, event.time
                self.failure_kind, self.failed_attempt = event.kind, event.attempt
            case Retry():
                self.state, self.pause_ends = "starting", event.time + event.pause
                self.remedies.append(f"{event.kind.replace('_', ' ')}: {event.remedy}")
            case Preempted():
                self.state, self.preempted_attempt = "starting", event.attempt
            case Cancelled() if self.state != "finished":
                self.state, self.reason, self.cancelled = "cancelled", f"by {event.by}", event
                self.ended = event.time

    @property
    def damage(self) -> str | None:
        """The damaged lines of the journal, in words; None without any. A killed process's last line is no damage."""
        damaged = [line for line in self.skipped if not line.is_cut_off]
        if not damaged:
            return None
        first, number = damaged[0], len(damaged)
        lines = "1 line is" if number == 1 else f"{number:,} lines are"
        return (
            f"{self.journal.location}: {lines} damaged and passed over, the first: {first.line[:60]!r} ({first.reason})"
        )

    @property
    def started(self) -> Started | None:
        """The last attempt."""
        return self.attempts[-1] if self.attempts else None

    def curve(self, context_length: int) -> list[Eval]:
        """The evaluations at a length, by step."""
        return [self.evals[key] for key in sorted(self.evals) if key[0] == context_length]

    def scores(self, context_length: int, step: int | None = None) -> DocumentScores | None:
        """The scores at a length and step, by default the last; None if there are none."""
        evals = [each for each in self.curve(context_length) if step is None or each.step == step]
        return evals[-1].scores if evals else None

    @property
    def last_step(self) -> int:
        """The last step trained, 0 if none was."""
        return max(self.steps, default=0)

    @property
    def start_up_seconds(self) -> float | None:
        """From the start of the trial's driver until its model is ready to be evaluated; None if unknown."""
        if self.launched is None or self.model is None or self.model.time < self.launched.time:
            return None
        return seconds_between(self.launched, self.model)

    @property
    def train_seconds(self) -> float:
        """Seconds of all training steps; a repeated step counts once."""
        return sum(step.seconds for step in self.steps.values())

    @property
    def tokens_per_second(self) -> float | None:
        """The median over all steps (the upper of two), so that the first of each process, a warm-up, has no weight."""
        return statistics.median_high(each.tokens_per_second for each in self.steps.values()) if self.steps else None

    @property
    def peak_memory_gib(self) -> float | None:
        """The highest of any step, in GiB of one worker."""
        return max((step.peak_memory_gib for step in self.steps.values()), default=None)


def _is_of_attempt(event: Event, last: Event) -> bool:
    """Whether the devices of an attempt were held until this line, which follows another one of it.

    A trial whose command was killed may be cancelled days later, by a process that held none.
    """
    if isinstance(event, Cancelled):
        return event.process is not None or last.process is None
    return not isinstance(event, Launched | Retry)
