"""What a journal says of its trial so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.records.journal import Journal
from workloads.evaluation.bootstrap import DocumentScores

if TYPE_CHECKING:
    from orchestrator.records.segments import SegmentedJournal


State = Literal["waiting", "starting", "running", "finished", "stopped", "failed", "cancelled"]


@dataclass
class TrialRecord:
    """What a journal says of its trial so far; ``follow`` reads what has been added."""

    journal: Journal | SegmentedJournal
    state: State = "waiting"
    reason: str | None = None
    failure_kind: str = "error"
    failed_attempt: str | None = None
    preempted_attempt: str | None = None
    remedies: list[str] = field(default_factory=list)
    launched: float | None = None
    waits_for: dict[str, Any] = field(default_factory=dict)  # the last ``launched``: its sweep and resources
    pause_ends: float | None = None  # of the last retry
    heard: float | None = None  # when the last line was written
    ended: float | None = None
    stopped: dict[str, Any] | None = None  # the last time that it was stopped early
    cancelled: dict[str, Any] | None = None  # the last time that it was cancelled
    started: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)  # each ``started``, in order
    attempts_heard: list[float] = field(default_factory=list)  # when the last line of each was written
    model: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evals: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)  # by (context length, step)
    resumed_at: int = 0
    saved_step: int = 0
    offset: int = 0

    @classmethod
    def of(cls, journal: Journal | SegmentedJournal) -> TrialRecord:
        """All that a journal says by now."""
        record = cls(journal)
        record._take_all(journal.read())
        return record

    def follow(self) -> list[dict[str, Any]]:
        """Takes in the lines added since the last call, and returns them."""
        return self._take_all(self.journal.poll(self.offset))

    def _take_all(self, read: tuple[list[dict[str, Any]], int]) -> list[dict[str, Any]]:
        events, self.offset = read
        for event in events:
            self._take(event)
        return events

    def _take(self, event: dict[str, Any]) -> None:
        if self.state == "starting" and event["event"] in ("step", "eval"):
            self.state = "running"  # a second sweep waits for the one that trains it
        self.heard = event["time"]
        if self.state == "running" and self.attempts and event["event"] not in ("launched", "retry"):
            self.attempts_heard[-1] = event["time"]
        match event["event"]:
            case "launched" if self.state != "finished":  # another sweep may have finished it in between
                self.state, self.reason, self.launched = "starting", None, event["time"]
                self.waits_for = event
            case "started":
                self.state, self.reason, self.started = "running", None, event
                self.attempts.append(event)
                self.attempts_heard.append(event["time"])
                self.resumed_at = 0
            case "model":
                self.model = event
            case "resume":
                self.resumed_at = event["step"]
            case "step":
                self.steps[event["step"]] = event
            case "eval":
                self.evals[event["context_length"], event["step"]] = event
            case "saved":
                self.saved_step = event["step"]
            case "finished":
                self.state, self.reason, self.ended = "finished", None, event["time"]
            case "stopped" if self.state != "finished":
                self.state, self.reason, self.stopped = "stopped", event["reason"], event
                self.ended = event["time"]
            case "failed" if event.get("attempt") != self.failed_attempt or self.state != "failed":
                # Of several workers' errors in one attempt the first is the cause.
                self.state, self.reason, self.failed_attempt = "failed", event["reason"], event.get("attempt")
                self.failure_kind = event.get("kind", "error")
                self.ended = event["time"]
            case "retry":
                self.state, self.pause_ends = "starting", event["time"] + event.get("pause", 0)
                self.remedies.append(f"{event['kind'].replace('_', ' ')}: {event['remedy']}")
            case "preempted":
                self.state, self.preempted_attempt = "starting", event["attempt"]
            case "cancelled" if self.state != "finished":
                self.state, self.reason, self.cancelled = "cancelled", f"by {event['by']}", event
                self.ended = event["time"]

    def curve(self, context_length: int) -> list[dict[str, Any]]:
        """The evaluations at a length, by step."""
        return [self.evals[key] for key in sorted(self.evals) if key[0] == context_length]

    def scores(self, context_length: int, step: int | None = None) -> DocumentScores | None:
        """What was scored at a length at a step, by default the last; None if nothing was."""
        events = [event for event in self.curve(context_length) if step is None or event["step"] == step]
        return DocumentScores.of(events[-1]) if events else None

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)

    @property
    def start_up_seconds(self) -> float | None:
        """From the start of the trial's driver until its model stands ready to be evaluated; None if unknown."""
        if self.launched is None or not self.model or self.model["time"] < self.launched:
            return None
        return self.model["time"] - self.launched

    @property
    def train_seconds(self) -> float:
        return sum(step["seconds"] for step in self.steps.values())

    @property
    def tokens_per_second(self) -> float | None:
        """The median over all steps, so that each process's first, which also warms up, does not count."""
        speeds = sorted(step["tokens_per_second"] for step in self.steps.values())
        return speeds[len(speeds) // 2] if speeds else None

    @property
    def peak_memory_gib(self) -> float | None:
        return max((step["peak_memory_gib"] for step in self.steps.values()), default=None)
