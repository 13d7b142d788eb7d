"""A sweep's trials compared: a setting is all trials that differ only in their seed, a method is its best setting.

Only finished trials compete. Settings are compared over their seeds and the scored documents, at every evaluation they
have in common, by the bootstrap of :mod:`workloads.evaluation.intervals`: documents, and several
seeds, are resampled, the same ones for both sides. Methods that finished different seeds are compared over the shared
ones.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from orchestrator.compare import quality_and_cost as cost
from orchestrator.compare import words
from orchestrator.records import trial_cost
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec
from workloads.config import Method, TrainingConfig
from workloads.evaluation.intervals import DocumentScores, Interval, gap_interval, perplexity_interval

# By default "as good as full fine-tuning" means within 1% of its perplexity.
AS_GOOD = 0.01


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
    by_seed: dict[int, Outcome]

    @property
    def method(self) -> Method:
        """What trains."""
        return self.training.method

    @property
    def name(self) -> str:
        """The method's label."""
        return words.METHOD_LABELS[self.method]

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


def compare(
    outcomes: list[Outcome],
    original_length: int,
    as_good: float = AS_GOOD,
    target_perplexity: float | None = None,
) -> list[dict[str, Any]]:
    """One entry a context length, shortest first: see ``dashboards.comparison.Context``.

    Args:
        outcomes: the trials of a sweep, in any state.
        original_length: the context length that the model was pretrained for.
        as_good: how far above full fine-tuning's perplexity counts as equally good, as a share of it.
        target_perplexity: the perplexity whose cost is compared; by default the final perplexity of full fine-tuning.
    """
    by_length = defaultdict(list)
    for outcome in outcomes:
        by_length[outcome.context_length].append(outcome)
    return [
        _compare_length(length, by_length[length], original_length, as_good, target_perplexity)
        for length in sorted(by_length)
    ]


def _compare_length(
    length: int, outcomes: list[Outcome], original_length: int, as_good: float, target_perplexity: float | None
) -> dict[str, Any]:
    trained = [outcome for outcome in outcomes if outcome.trial.training.method != "untuned"]
    settings = _settings(trained)
    best = _best_of_each_method(settings)
    seeds = _seeds_in_common(best.values()) or None
    scores = {method: setting.scores(seeds=seeds) for method, setting in best.items()}
    ranked = sorted(scores, key=lambda method: scores[method].perplexity)
    winner = ranked[0] if ranked else None
    full = best.get("full")
    target = _target(full, target_perplexity)
    unit = trial_cost.unit_of([o.record for o in trained if o.record.steps])
    described = _describe_settings(settings, best, full, target, unit, as_good)
    references = _references(outcomes, trained)
    before = _unchanged_at(original_length, outcomes)
    context = {
        "context_length": length,
        "references": [
            {"label": words.REFERENCE_LABELS[positions], **_as_perplexity(perplexity_interval(reference))}
            for positions, reference in references.items()
        ],
        "trials": _named([_describe(o, full, best, original_length, before, as_good, unit) for o in trained]),
        "settings": described,
        "gaps": _gaps(best, ["full", *(m for m in ranked if m != "full")] if full else ranked),
        "target": target,
        "hours_unit": unit,
        "winner": winner,
    }
    hardware = sorted({trial_cost.device_of(o.record) for o in trained if o.record.steps})
    return context | {"sentences": words.of_context(context, scores, references, as_good, seeds, hardware)}


def _settings(trained: list[Outcome]) -> list[Setting]:
    """The settings of finished trials, in order."""
    groups: dict[TrainingConfig, dict[int, Outcome]] = defaultdict(dict)
    for outcome in trained:
        if outcome.finished:
            training = outcome.trial.training
            groups[dataclasses.replace(training, seed=0)][training.seed] = outcome
    return [Setting(training, by_seed) for training, by_seed in groups.items()]


def _best_of_each_method(settings: list[Setting]) -> dict[str, Setting]:
    """Each method's setting with the lowest final perplexity."""
    best: dict[str, Setting] = {}
    for setting in settings:
        known = best.get(setting.method)
        if known is None or setting.scores().perplexity < known.scores().perplexity:
            best[setting.method] = setting
    return best


def _seeds_in_common(settings: Iterable[Setting]) -> list[int]:
    each = [set(setting.by_seed) for setting in settings]
    return sorted(set.intersection(*each)) if each else []


def _target(full: Setting | None, given: float | None) -> dict[str, Any] | None:
    if given is not None:
        return {"perplexity": given, "source": "as requested"}
    if full is None:
        return None
    return {"perplexity": full.scores().perplexity, "source": "the final perplexity of full fine-tuning"}


def _describe_settings(
    settings: list[Setting],
    best: dict[str, Setting],
    full: Setting | None,
    target: dict[str, Any] | None,
    unit: str | None,
    as_good: float,
) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = []
    for setting in settings:
        curve = setting.curve()
        last = curve[-1]
        reached = cost.reach(curve, target["perplexity"]) if target else None
        described.append(
            {
                "method": setting.method,
                "learning_rate": setting.training.learning_rate,
                "fingerprint": next(iter(setting.by_seed.values())).trial.fingerprint,
                "chosen": best[setting.method] is setting,
                "seeds": sorted(setting.by_seed),
                "final": {
                    "step": last.step,
                    "tokens": last.tokens,
                    **_as_perplexity(perplexity_interval(setting.scores())),
                },
                "hours": last.hours if unit else None,
                "usd": last.usd,
                "reached": reached
                and {
                    "step": reached.step,
                    "tokens": reached.tokens,
                    "hours": reached.hours if unit else None,
                    "usd": reached.usd,
                },
                "as_good_from_step": _as_good_from(setting, full, as_good) if full and setting is not full else None,
            }
        )
    if unit:
        points = [(one["hours"], one["final"]["perplexity"]) for one in described]
        for one, dominated in zip(described, cost.dominated(points)):
            one["dominated"] = dominated
    return _named(described)


def _named(described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the name that the report shows."""
    return [{**one, "name": name} for one, name in zip(described, words.distinct_names(described))]


def _gaps(best: dict[str, Setting], order: list[str]) -> list[dict[str, Any]]:
    """The gap of every method to each before it in ``order``, at every evaluation of both but step 0."""
    gaps = []
    for place, baseline in enumerate(order):
        for method in order[place + 1 :]:
            ours, theirs = best[method], best[baseline]
            seeds = _seeds_in_common([ours, theirs]) or None
            points = []
            for step in sorted(set(ours.steps()) & set(theirs.steps()) - {0}):
                gap = gap_interval(ours.scores(step, seeds), theirs.scores(step, seeds))
                points.append({"step": step, "tokens": ours.tokens(step), **as_percent(gap)})
            gaps.append({"method": method, "baseline": baseline, "seeds": seeds or [], "points": points})
    return gaps


def _references(outcomes: list[Outcome], trained: list[Outcome]) -> dict[str, DocumentScores]:
    """Scores of the untuned models by their positions.

    Step 0 of a tuned trial is the untuned model it starts from, unless that is quantised, and replaces an untuned trial
    that failed.
    """
    found = {}
    for outcome in outcomes:
        if outcome.trial.training.method == "untuned" and outcome.finished:
            found[outcome.trial.training.positions] = outcome.evaluated()
    for outcome in trained:
        training = outcome.trial.training
        if training.quantization == "none" and training.positions not in found and (scores := outcome.scores(step=0)):
            found[training.positions] = scores
    return {positions: found[positions] for positions in words.REFERENCE_LABELS if positions in found}


def _unchanged_at(original_length: int, outcomes: list[Outcome]) -> float | None:
    """The perplexity of the unchanged model at its original length, if it is one of the sweep's references."""
    for outcome in outcomes:
        if outcome.trial.training.method == "untuned" and outcome.trial.training.positions == "none":
            for event in outcome.record.curve(original_length):
                return event.perplexity
    return None


def _describe(
    outcome: Outcome,
    full: Setting | None,
    best: dict[str, Setting],
    original_length: int,
    before: float | None,
    as_good: float,
    unit: str | None,
) -> dict[str, Any]:
    training, record = outcome.trial.training, outcome.record
    curve = [
        {
            "step": event.step,
            "tokens": event.tokens,
            **_as_perplexity(perplexity_interval(event.scores)),
        }
        for event in record.curve(outcome.context_length)
    ]
    at_original = [event.perplexity for event in record.curve(original_length)]
    same_seed = full.by_seed.get(training.seed) if full else None
    return {
        "label": outcome.trial.label,
        "method": training.method,
        "fingerprint": outcome.trial.fingerprint,
        "state": record.state if record.state in ("finished", "failed", "stopped", "cancelled") else "unfinished",
        "reason": record.reason,
        "last_step": record.last_step,
        "log": outcome.log,
        "learning_rate": training.learning_rate,
        "trainable_parameters": record.model.trainable_parameters if record.model else None,
        "seed": training.seed,
        "chosen": training.method in best and outcome in best[training.method].by_seed.values(),
        "curve": curve,
        "final": curve[-1] if outcome.finished else None,
        "original_length": {"context_length": original_length, "before": before, "after": at_original[-1]}
        if outcome.finished and at_original
        else None,
        "gap_to_full": _gap(outcome, same_seed, as_good)
        if same_seed and training.method != "full" and outcome.finished
        else None,
        "tokens_per_second": record.tokens_per_second,
        "peak_memory_gib": record.peak_memory_gib,
        "train_seconds": record.train_seconds,
        "hours": trial_cost.total(trial_cost.hours_by_step(record)) if unit else None,
        "usd": trial_cost.total(trial_cost.dollars_by_step(record)),
        "mlflow_run_id": None,
    }


def _gap(outcome: Outcome, full: Outcome, as_good: float) -> dict[str, Any]:
    """Against full fine-tuning with the same seed."""
    ours, theirs = (Setting(o.trial.training, {o.trial.training.seed: o}) for o in (outcome, full))
    return {
        **as_percent(gap_interval(outcome.evaluated(), full.evaluated())),
        "as_good_from_step": _as_good_from(ours, theirs, as_good),
    }


def _as_good_from(setting: Setting, full: Setting, as_good: float) -> int | None:
    """The first step from which the perplexity stays within the share of full fine-tuning's at the same steps, or None.

    Over the seeds that both have. Step 0 does not count: there both are the same untuned model.
    """
    seeds = _seeds_in_common([setting, full]) or None
    reached = None
    for step in sorted(set(setting.steps()) & set(full.steps()) - {0}):
        if setting.scores(step, seeds).perplexity / full.scores(step, seeds).perplexity - 1 > as_good:
            reached = None
        elif reached is None:
            reached = step
    return reached


def _as_perplexity(interval: Interval) -> dict[str, float | None]:
    return {"perplexity": interval.value, "low": interval.low, "high": interval.high}


def as_percent(gap: Interval) -> dict[str, float | None]:
    """A gap in percent, with its interval."""
    low, high = (None if end is None else 100 * end for end in (gap.low, gap.high))
    return {"percent": 100 * gap.value, "low": low, "high": high}
