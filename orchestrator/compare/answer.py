"""A sweep's trials compared: a variant is a method with the values of its axes, represented by its best setting.

Only finished trials compete. Settings are compared over their seeds and the scored documents, at every evaluation they
have in common, paired (:mod:`workloads.evaluation.intervals`). Variants that finished different seeds are compared over
the shared ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from orchestrator.compare import quality_and_cost as cost
from orchestrator.compare import words
from orchestrator.compare.baselines import Baselines, choose_baselines
from orchestrator.compare.effects import effects
from orchestrator.compare.outcomes import Outcome, Setting, best_of_each_variant, seeds_in_common, settings_of
from orchestrator.records import trial_cost
from orchestrator.variants import Variant, find_variant, variants_of
from workloads.evaluation.intervals import (
    FEWEST_DOCUMENTS,
    DocumentScores,
    Interval,
    gap_interval,
    perplexity_interval,
)

# By default "as good as full fine-tuning" means within 1% of its perplexity.
AS_GOOD = 0.01


def compare(
    outcomes: list[Outcome],
    original_length: int,
    as_good: float = AS_GOOD,
    target_perplexity: float | None = None,
    axes: Iterable[str] = (),
    baseline: str | None = None,
) -> list[dict[str, Any]]:
    """One entry a context length, shortest first: see ``dashboards.comparison.Context``.

    Args:
        outcomes: the trials of a sweep, in any state.
        original_length: the context length that the model was pretrained for.
        as_good: how far above the baseline's perplexity counts as equally good, as a share of it.
        target_perplexity: the perplexity whose cost is compared; by default the baseline's final perplexity.
        axes: the fields of TrainingConfig for which the sweep has several values.
        baseline: the variant that all others are compared with, by name; by default full fine-tuning with the same
            values of the axes.

    Raises:
        InputError: no variant has the baseline's name.
    """
    axes = tuple(axes)
    variants = variants_of((outcome.trial.training for outcome in outcomes), axes)
    requested = find_variant(baseline, variants) if baseline is not None else None
    by_length = defaultdict(list)
    for outcome in outcomes:
        by_length[outcome.context_length].append(outcome)
    return [
        _compare_length(length, by_length[length], original_length, as_good, target_perplexity, axes, requested)
        for length in sorted(by_length)
    ]


def _compare_length(
    length: int,
    outcomes: list[Outcome],
    original_length: int,
    as_good: float,
    target_perplexity: float | None,
    axes: tuple[str, ...],
    requested: Variant | None,
) -> dict[str, Any]:
    trained = [outcome for outcome in outcomes if outcome.trial.training.method != "untuned"]
    variants = variants_of((outcome.trial.training for outcome in trained), axes)
    names = {variant.id: variant.name for variant in variants}
    settings = settings_of(trained, axes)
    best = best_of_each_variant(settings)
    seeds = seeds_in_common(best.values()) or None
    scores = {variant: setting.scores(seeds=seeds) for variant, setting in best.items()}
    ranked = sorted(scores, key=lambda variant: scores[variant].perplexity)
    baselines = choose_baselines(best, ranked, requested)
    target = _target(baselines, best, target_perplexity)
    unit = trial_cost.unit_of([o.record for o in trained if o.record.steps])
    described = _describe_settings(settings, best, baselines, target, unit, as_good, names)
    references = _references(outcomes, trained)
    untuned = min(references, key=lambda positions: references[positions].perplexity, default=None)
    _add_differences(described, scores, scores[ranked[0]] if ranked else None, references[untuned] if untuned else None)
    before = _unchanged_at(original_length, outcomes)
    context = {
        "context_length": length,
        "references": [
            {"label": words.REFERENCE_LABELS[positions], **_as_perplexity(perplexity_interval(reference))}
            for positions, reference in references.items()
        ],
        "trials": _named(
            [_describe(o, best, axes, baselines, original_length, before, as_good, unit) for o in trained], names
        ),
        "settings": described,
        "gaps": _gaps(best, _pairs(ranked, baselines, axes)),
        "target": target,
        "hours_unit": unit,
        "scored_documents": next((each.num_documents for each in [*scores.values(), *references.values()]), None),
        "baselines": baselines.of,
        **_ranking(ranked, scores),
        "against_untuned": _against_untuned(ranked, described, untuned),
        "effects": effects(best, axes),
    }
    hardware = sorted({trial_cost.device_of(o.record) for o in trained if o.record.steps})
    return context | {"sentences": words.of_context(context, names, baselines.notes, seeds, hardware)}


def _ranking(ranked: list[str], scores: dict[str, DocumentScores]) -> dict[str, Any]:
    """The variant with the lowest perplexity, those that cannot be told from it, and whether it wins."""
    lowest = ranked[0] if ranked else None
    if lowest is None:
        return {"lowest": None, "not_distinguishable": [], "winner": None}
    alike = [other for other in ranked[1:] if gap_interval(scores[other], scores[lowest]).sign <= 0]
    wins = not alike and scores[lowest].num_documents >= FEWEST_DOCUMENTS
    return {"lowest": lowest, "not_distinguishable": alike, "winner": lowest if wins else None}


def _add_differences(
    described: list[dict[str, Any]],
    scores: dict[str, DocumentScores],
    lowest: DocumentScores | None,
    untuned: DocumentScores | None,
) -> None:
    """Adds to the setting that represents each variant its gaps to the lowest one and to the best untuned model."""
    for setting in described:
        own = scores[setting["variant"]] if setting["chosen"] else None
        for key, other in (("above_lowest", lowest), ("against_untuned", untuned)):
            setting[key] = as_percent(gap_interval(own, other)) if own and other else None


def _against_untuned(ranked: list[str], described: list[dict[str, Any]], untuned: str | None) -> dict[str, Any] | None:
    """The best trained variant against the best untuned model."""
    if not ranked or untuned is None:
        return None
    gap = next(one["against_untuned"] for one in described if one["variant"] == ranked[0] and one["chosen"])
    return {"variant": ranked[0], "reference": words.REFERENCE_LABELS[untuned], **gap}


def _target(baselines: Baselines, best: dict[str, Setting], given: float | None) -> dict[str, Any] | None:
    if given is not None:
        return {"perplexity": given, "source": "as requested"}
    if baselines.target is None:
        return None
    setting = best[baselines.target]
    return {
        "perplexity": setting.scores().perplexity,
        "source": f"the final perplexity of {setting.variant.name}",
    }


def _pairs(ranked: list[str], baselines: Baselines, axes: tuple[str, ...]) -> list[tuple[str, str]]:
    """The (variant, baseline) whose gaps are shown: every pair, or with axes the baseline's and the best's alone."""
    own = list(baselines.of.items())
    if axes:
        others = [(variant, ranked[0]) for variant in ranked[1:]]
    else:
        others = [(variant, one) for place, one in enumerate(ranked) for variant in ranked[place + 1 :]]
    taken = {frozenset(pair) for pair in own}
    return own + [pair for pair in others if frozenset(pair) not in taken]


def _describe_settings(
    settings: list[Setting],
    best: dict[str, Setting],
    baselines: Baselines,
    target: dict[str, Any] | None,
    unit: str | None,
    as_good: float,
    names: dict[str, str],
) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = []
    for setting in settings:
        curve = setting.curve()
        last = curve[-1]
        reached = cost.reach(curve, target["perplexity"]) if target else None
        baseline = best.get(baselines.of.get(setting.variant.id, "")) if baselines.explicit else None
        described.append(
            {
                "method": setting.variant.method,
                "variant": setting.variant.id,
                "learning_rate": setting.training.learning_rate,
                "fingerprint": next(iter(setting.by_seed.values())).trial.fingerprint,
                "chosen": best[setting.variant.id] is setting,
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
                "as_good_from_step": _as_good_from(setting, baseline, as_good) if baseline else None,
                "gap": _gap(setting, baseline, as_good) if baseline else None,
            }
        )
    if unit:
        points = [(one["hours"], one["final"]["perplexity"]) for one in described]
        for one, dominated in zip(described, cost.dominated(points)):
            one["dominated"] = dominated
    described = _named(described, names)
    for one in described:
        one["dominated_by"] = _dominator(one, described) if one.get("dominated") else None
    return described


def _dominator(beaten: dict[str, Any], settings: list[dict[str, Any]]) -> str:
    """The name of the best setting that is at least as good for no more hours."""

    def costs(setting: dict[str, Any]) -> tuple[float, float]:
        return setting["final"]["perplexity"], setting["hours"]

    limits = costs(beaten)
    better = [one for one in settings if costs(one) != limits and all(a <= b for a, b in zip(costs(one), limits))]
    return min(better, key=costs)["name"]


def _named(described: list[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """Adds the name that the report shows."""
    return [{**one, "name": name} for one, name in zip(described, words.distinct_names(described, names))]


def _gaps(best: dict[str, Setting], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The gap of each pair's first to its second, at every evaluation of both but step 0."""
    gaps = []
    for variant, baseline in pairs:
        ours, theirs = best[variant], best[baseline]
        seeds = seeds_in_common([ours, theirs]) or None
        points = []
        for step in sorted(set(ours.steps()) & set(theirs.steps()) - {0}):
            gap = gap_interval(ours.scores(step, seeds), theirs.scores(step, seeds))
            points.append({"step": step, "tokens": ours.tokens(step), **as_percent(gap)})
        gaps.append({"method": variant, "baseline": baseline, "seeds": seeds or [], "points": points})
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
    best: dict[str, Setting],
    axes: tuple[str, ...],
    baselines: Baselines,
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
    variant = Variant.of(training, axes).id
    baseline = best.get(baselines.of.get(variant, "")) if baselines.explicit else None
    same_seed = baseline.by_seed.get(training.seed) if baseline else None
    return {
        "label": outcome.trial.label,
        "method": training.method,
        "variant": variant,
        "fingerprint": outcome.trial.fingerprint,
        "state": record.state if record.state in ("finished", "failed", "stopped", "cancelled") else "unfinished",
        "reason": record.reason,
        "last_step": record.last_step,
        "log": outcome.log,
        "learning_rate": training.learning_rate,
        "trainable_parameters": record.model.trainable_parameters if record.model else None,
        "seed": training.seed,
        "chosen": variant in best and outcome in best[variant].by_seed.values(),
        "curve": curve,
        "final": curve[-1] if outcome.finished else None,
        "original_length": {"context_length": original_length, "before": before, "after": at_original[-1]}
        if outcome.finished and at_original
        else None,
        "gap_to_full": _gap(_alone(outcome, axes), _alone(same_seed, axes), as_good)
        if same_seed and outcome.finished
        else None,
        "tokens_per_second": record.tokens_per_second,
        "peak_memory_gib": record.peak_memory_gib,
        "train_seconds": record.train_seconds,
        "hours": trial_cost.total(trial_cost.hours_by_step(record)) if unit else None,
        "usd": trial_cost.total(trial_cost.dollars_by_step(record)),
        "mlflow_run_id": None,
    }


def _alone(outcome: Outcome, axes: tuple[str, ...]) -> Setting:
    """One seed of a setting."""
    training = outcome.trial.training
    return Setting(training, Variant.of(training, axes), {training.seed: outcome})


def _gap(setting: Setting, baseline: Setting, as_good: float) -> dict[str, Any]:
    """The final gap to the baseline, over the seeds that both have."""
    seeds = seeds_in_common([setting, baseline]) or None
    return {
        **as_percent(gap_interval(setting.scores(seeds=seeds), baseline.scores(seeds=seeds))),
        "as_good_from_step": _as_good_from(setting, baseline, as_good),
    }


def _as_good_from(setting: Setting, baseline: Setting, as_good: float) -> int | None:
    """The first step from which the perplexity stays within the share of the baseline's at the same steps, or None.

    Over the seeds that both have. Step 0 does not count: there both are the same untuned model.
    """
    seeds = seeds_in_common([setting, baseline]) or None
    reached = None
    for step in sorted(set(setting.steps()) & set(baseline.steps()) - {0}):
        if setting.scores(step, seeds).perplexity / baseline.scores(step, seeds).perplexity - 1 > as_good:
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
