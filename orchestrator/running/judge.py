"""Early stopping, as a running trial sees it."""

from __future__ import annotations

from typing import Literal

from orchestrator.planning.early_stopping import Rungs, curve_of
from orchestrator.records.events import Eval, Event, Step, Stopped
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec


class Judge:
    """Follows one trial in its worker 0 and decides at each rung whether it is to stop.

    ``on_event`` takes every event of the trial, and the training loop calls ``poll_request`` between steps. Once that
    has returned "stop", ``verdict`` is the event for the journal.
    """

    def __init__(self, rungs: Rungs, trial: TrialSpec, record: TrialRecord) -> None:
        self.rungs, self.trial = rungs, trial
        self.curve = curve_of(trial, record)
        self.due = rungs.settings.rungs(trial.training)
        self.judged: dict[int, float] = {}  # its score by rung, as first recorded there
        self.last_step: Step | None = None
        self.verdict: Stopped | None = None

    def on_event(self, event: Event) -> None:
        """Notes the trial's steps and evaluations."""
        if isinstance(event, Step):
            self.last_step = event
        elif isinstance(event, Eval) and event.context_length == self.trial.training.context_length:
            self.curve[event.step] = event.perplexity

    def poll_request(self) -> Literal["stop"] | None:
        """Judges the trial at each rung that it has reached.

        A trial that was killed between a rung's checkpoint and its judgement is judged here one step later.
        """
        while self.due and self.due[0] in self.curve:
            step = self.due.pop(0)
            entry = self.rungs.judge(self.trial, step, {**self.judged, step: self.curve[step]})
            self.judged[step] = entry["scores"]["asha"]
            if entry["stop"]:
                self.verdict = Stopped(
                    step=self.last_step.step if self.last_step else step,
                    tokens=self.last_step.tokens if self.last_step else None,
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
