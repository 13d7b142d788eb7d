"""Says at each rung whether the trial that is being trained is to stop."""

from __future__ import annotations

from typing import Literal

from orchestrator.planning.early_stopping import Rungs, curve_of
from orchestrator.records.events import Eval, Event, Step, Stopped
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec


class Judge:
    """Follows one trial from inside its worker 0 and says at each rung whether it is to stop.

    ``event`` is told all that the trial tells; ``asked`` is a ``poll_request`` of :func:`workloads.training.loop.run`.
    Where it has said "stop", ``verdict`` holds the event for the journal.
    """

    def __init__(self, rungs: Rungs, trial: TrialSpec, record: TrialRecord) -> None:
        self.rungs, self.trial = rungs, trial
        self.curve = curve_of(trial, record)
        self.due = rungs.settings.rungs(trial.training)
        self.judged: dict[int, float] = {}  # what it scored at its rungs, as written down there first
        self.at: Step | None = None  # the last
        self.verdict: Stopped | None = None

    def event(self, event: Event) -> None:
        """Takes note of the trial's steps and evaluations."""
        if isinstance(event, Step):
            self.at = event
        elif isinstance(event, Eval) and event.context_length == self.trial.training.context_length:
            self.curve[event.step] = event.perplexity

    def asked(self) -> Literal["stop"] | None:
        # A trial that was killed between a rung's checkpoint and its judgement makes up for it here, a step later.
        while self.due and self.due[0] in self.curve:
            step = self.due.pop(0)
            entry = self.rungs.judge(self.trial, step, {**self.judged, step: self.curve[step]})
            self.judged[step] = entry["scores"]["asha"]
            if entry["stop"]:
                self.verdict = Stopped(
                    step=self.at.step if self.at else step,
                    tokens=self.at.tokens if self.at else None,
                    sweep=self.rungs.sweep,
                    reason=entry["reason"],
                    rule=entry["rule"],
                    rung=entry["tokens"],
                    score=entry["scores"][entry["rule"]],
                    cutoff=entry["cutoff"],
                    compared_with=entry["compared_with"],
                )
                return "stop"
        return None
