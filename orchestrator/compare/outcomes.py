"""Trials and settings as a comparison reads them: a setting is all finished trials that differ only in their seed."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from orchestrator.compare import quality_and_cost as cost
from orchestrator.records import trial_cost
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec
from orchestrator.variants import Variant
from workloads.config import TrainingConfig
from workloads.evaluation.intervals import DocumentScores


@dataclass(frozen=True)
class Outcome:
    """A trial with its journal's record."""

    trial: TrialSpec
    record: TrialRecord
    log: str = ""

    @property
    def finished(self) -> bool:
        """Whether it may compete."""
        return self.record.state == "finished"

    @property
    def context_length(self) -> int:
        """The trained length, at which trials are compared."""
        return self.trial.training.context_length

    def scores(self, step: int | None = None) -> DocumentScores | None:
        """Its scores at its trained length at a step, by default the last; None if it was not evaluated there."""
        return self.record.scores(self.context_length, step)

    def evaluated(self, step: int | None = None) -> DocumentScores:
        """Its scores at a step at which it was evaluated."""
        scores = self.scores(step)
        if scores is None:
            raise ValueError(f"{self.trial.label} has no evaluation at step {step}")
        return scores


@dataclass(frozen=True)
class Setting:
    """Finished trials that differ only in their seed."""

    training: TrainingConfig
    variant: Variant
    by_seed: dict[int, Outcome]

    def steps(self) -> list[int]:
        """The steps at which every seed was evaluated."""
        each = [{e.step for e in o.record.curve(o.context_length)} for o in self.by_seed.values()]
        return sorted(set.intersection(*each))

    def scores(self, step: int | None = None, seeds: Iterable[int] | None = None) -> DocumentScores:
        """The scores of some seeds together, by default all of them, at a step, by default the last."""
        chosen = self.by_seed if seeds is None else seeds
        return DocumentScores.over_seeds({seed: self.by_seed[seed].evaluated(step) for seed in chosen})

    def tokens(self, step: int) -> int:
        """Tokens trained on by a step; the mean if seeds differ."""
        at = [o.record.evals[o.context_length, step].tokens for o in self.by_seed.values()]
        return round(sum(at) / len(at))

    def curve(self) -> list[cost.Evaluation]:
        """Perplexity over the seeds and its cost, at every evaluation that all of them have."""
        hours = [trial_cost.hours_by_step(o.record) for o in self.by_seed.values()]
        dollars = [trial_cost.dollars_by_step(o.record) for o in self.by_seed.values()]
        return [
            cost.Evaluation(
                step=step,
                tokens=self.tokens(step),
                hours=fmean(each.get(step, 0.0) for each in hours),
                usd=fmean([each.get(step, 0.0) for each in dollars if each is not None])
                if None not in dollars
                else None,
                perplexity=self.scores(step).perplexity,
            )
            for step in self.steps()
        ]


def settings_of(trained: Iterable[Outcome], axes: tuple[str, ...]) -> list[Setting]:
    """The settings of finished trials, in order."""
    groups: dict[TrainingConfig, dict[int, Outcome]] = defaultdict(dict)
    for outcome in trained:
        if outcome.finished:
            training = outcome.trial.training
            groups[dataclasses.replace(training, seed=0)][training.seed] = outcome
    return [Setting(training, Variant.of(training, axes), by_seed) for training, by_seed in groups.items()]


def best_of_each_variant(settings: Iterable[Setting]) -> dict[str, Setting]:
    """By the variant's id, its setting with the lowest final perplexity."""
    best: dict[str, Setting] = {}
    for setting in settings:
        known = best.get(setting.variant.id)
        if known is None or setting.scores().perplexity < known.scores().perplexity:
            best[setting.variant.id] = setting
    return best


def seeds_in_common(settings: Iterable[Setting]) -> list[int]:
    """The seeds that all settings finished."""
    each = [set(setting.by_seed) for setting in settings]
    return sorted(set.intersection(*each)) if each else []
