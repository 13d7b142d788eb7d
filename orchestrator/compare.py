"""From the trials' journals to an answer: curves, gaps to full fine-tuning, how sure they are, and in words.

The result is plain data, ready for JSON; ``dashboards.report`` documents its fields and draws it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.journal import TrialRecord
from orchestrator.spec import TrialSpec
from workloads.evaluation.bootstrap import (
    CONFIDENCE,
    DocumentScores,
    Interval,
    gap_interval,
    perplexity_interval,
)

# "Within 1% of full fine-tuning" is what the comparison calls as good as it.
AS_GOOD = 0.01
METHOD_NAMES = {
    "lora": "LoRA",
    "lora+norm": "LoRA with norms",
    "lora+embed": "LoRA with embeddings",
    "lora+": "LoRA+",
    "full": "full fine-tuning",
}
POSITIONS_NAMES = {
    "linear": "linear interpolation",
    "ntk": "NTK-aware positions",
    "dynamic": "dynamic NTK",
    "yarn": "YaRN",
    "llama3": "Llama-3 scaling",
}
REFERENCE_NAMES = {"none": "untuned, no change"} | {key: f"untuned, {name}" for key, name in POSITIONS_NAMES.items()}
REFERENCE_PHRASES = {REFERENCE_NAMES["none"]: "the unchanged model"} | {
    REFERENCE_NAMES[key]: f"the untuned model with {name}" for key, name in POSITIONS_NAMES.items()
}


@dataclass(frozen=True)
class Outcome:
    """A trial with what its journal says."""

    trial: TrialSpec
    record: TrialRecord
    log: str = ""

    @property
    def finished(self) -> bool:
        return self.record.state == "finished"

    @property
    def context_length(self) -> int:
        return self.trial.training.context_length

    def scores(self, step: int | None = None) -> DocumentScores | None:
        """What it scored at its trained length at a step, by default the last."""
        return self.record.scores(self.context_length, step)


def compare(outcomes: list[Outcome], original_length: int) -> list[dict[str, Any]]:
    """One entry a context length, shortest first: references, trials, winner, sentences."""
    by_length = defaultdict(list)
    for outcome in outcomes:
        by_length[outcome.context_length].append(outcome)
    return [_compare_length(length, by_length[length], original_length) for length in sorted(by_length)]


def summarise(contexts: list[dict[str, Any]], seeds: list[int]) -> list[str]:
    """The whole answer in a few sentences."""
    winners = defaultdict(list)
    for context in contexts:
        winners[context["winner"]].append(context["context_length"])
    sentences = []
    for winner, lengths in winners.items():
        at = _join([f"{length:,}" for length in lengths])
        if winner is None:
            sentences.append(f"At {at} tokens nothing that was trained has finished, so nothing wins.")
        else:
            sentences.append(f"Of what was trained, {METHOD_NAMES[winner]} has the lowest perplexity at {at} tokens.")
    unbeaten = defaultdict(list)
    for context in contexts:
        if ahead := _reference_ahead(context):
            unbeaten[ahead].append(f"{context['context_length']:,}")
    for reference, lengths in unbeaten.items():
        sentences.append(f"At {_join(lengths)} tokens nothing that was trained beats {REFERENCE_PHRASES[reference]}.")
    if len(seeds) == 1:
        sentences.append(
            f"Each setting was trained with one seed: the {CONFIDENCE:.0%} intervals come from which documents were "
            "scored and show nothing of the variance between seeds."
        )
    return sentences


def _compare_length(length: int, outcomes: list[Outcome], original_length: int) -> dict[str, Any]:
    trained = [outcome for outcome in outcomes if outcome.trial.training.method != "untuned"]
    full = {o.trial.training.seed: o for o in trained if o.trial.training.method == "full" and o.finished}
    by_method: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in trained:
        if outcome.finished:
            by_method[outcome.trial.training.method].append(outcome)
    scores = {method: _mean([o.scores() for o in group]) for method, group in by_method.items()}
    winner = min(scores, key=lambda method: scores[method].perplexity, default=None)
    references = _references(outcomes, trained)
    before = _unchanged_at(original_length, outcomes)
    trials = [_describe(o, full.get(o.trial.training.seed), original_length, before) for o in trained]
    return {
        "context_length": length,
        "references": [
            {"label": REFERENCE_NAMES[positions], **_as_perplexity(perplexity_interval(reference))}
            for positions, reference in references.items()
        ],
        "trials": trials,
        "winner": winner,
        "sentences": _sentences(length, scores, winner, references, trials),
    }


def _references(outcomes: list[Outcome], trained: list[Outcome]) -> dict[str, DocumentScores]:
    """Scores of the untuned models by their positions. Step 0 of a tuned trial is the untuned model it starts from,
    unless that is quantised, and stands in where the untuned trial failed."""
    found = {}
    for outcome in outcomes:
        if outcome.trial.training.method == "untuned" and outcome.finished:
            found[outcome.trial.training.positions] = outcome.scores()
    for outcome in trained:
        training = outcome.trial.training
        if training.quantization == "none" and training.positions not in found and (scores := outcome.scores(step=0)):
            found[training.positions] = scores
    return {positions: found[positions] for positions in REFERENCE_NAMES if positions in found}


def _unchanged_at(original_length: int, outcomes: list[Outcome]) -> float | None:
    """The perplexity of the unchanged model at its original length, if the sweep has it among its references."""
    for outcome in outcomes:
        if outcome.trial.training.method == "untuned" and outcome.trial.training.positions == "none":
            for event in outcome.record.curve(original_length):
                return event["perplexity"]
    return None


def _describe(outcome: Outcome, full: Outcome | None, original_length: int, before: float | None) -> dict[str, Any]:
    training, record = outcome.trial.training, outcome.record
    curve = [
        {
            "step": event["step"],
            "tokens": event["tokens"],
            **_as_perplexity(perplexity_interval(DocumentScores.of(event))),
        }
        for event in record.curve(outcome.context_length)
    ]
    at_original = [event["perplexity"] for event in record.curve(original_length)]
    return {
        "label": outcome.trial.label,
        "method": training.method,
        "fingerprint": outcome.trial.fingerprint,
        "state": {"finished": "finished", "failed": "failed"}.get(record.state, "unfinished"),
        "reason": record.reason,
        "log": outcome.log,
        "learning_rate": training.learning_rate,
        "trainable_parameters": record.model.get("trainable_parameters"),
        "seed": training.seed,
        "curve": curve,
        "final": curve[-1] if outcome.finished else None,
        "original_length": {"context_length": original_length, "before": before, "after": at_original[-1]}
        if outcome.finished and at_original
        else None,
        "gap_to_full": _gap(outcome, full) if full and outcome is not full and outcome.finished else None,
        "tokens_per_second": record.tokens_per_second,
        "peak_memory_gib": record.peak_memory_gib,
        "train_seconds": record.train_seconds,
        "mlflow_run_id": None,
    }


def _gap(outcome: Outcome, full: Outcome) -> dict[str, Any]:
    gap = gap_interval(outcome.scores(), full.scores())
    return {
        "percent": 100 * gap.value,
        "low": 100 * gap.low,
        "high": 100 * gap.high,
        "within_1_percent_from_step": _as_good_from(outcome, full),
    }


def _as_good_from(outcome: Outcome, full: Outcome) -> int | None:
    """The first step from which on the perplexity stays within 1% of full fine-tuning's at the same steps, or None.

    Step 0 does not count: there both are the same untuned model.
    """
    reached = None
    for event in outcome.record.curve(outcome.context_length):
        baseline = full.scores(event["step"])
        if event["step"] == 0 or baseline is None:
            continue
        if event["perplexity"] / baseline.perplexity - 1 > AS_GOOD:
            reached = None
        elif reached is None:
            reached = event["step"]
    return reached


def _sentences(
    length: int,
    scores: dict[str, DocumentScores],
    winner: str | None,
    references: dict[str, DocumentScores],
    trials: list[dict[str, Any]],
) -> list[str]:
    sentences = []
    if winner is not None:
        interval = perplexity_interval(scores[winner])
        sentences.append(
            f"At {length:,} tokens {METHOD_NAMES[winner]} {'wins with' if len(scores) > 1 else 'reaches'} a perplexity "
            f"of {interval.value:.3f} ({CONFIDENCE:.0%} interval {interval.low:.3f} to {interval.high:.3f})."
        )
        sentences += [_spread(METHOD_NAMES[method], trials, method) for method in scores if _seeds(trials, method) > 1]
        for method in sorted(set(scores) - {winner}, key=lambda method: scores[method].perplexity):
            sentences.append(_versus(METHOD_NAMES[method], METHOD_NAMES[winner], scores[method], scores[winner]))
    sentences += [
        _convergence(trial) for trial in trials if trial["method"] != "full" and trial["gap_to_full"] is not None
    ]
    if references:
        best = min(references, key=lambda positions: references[positions].perplexity)
        sentences += [_against(METHOD_NAMES[m], scores[m], REFERENCE_NAMES[best], references[best]) for m in scores]
    sentences += _at_original_length(trials)
    for trial in trials:
        if trial["state"] == "failed":
            sentences.append(f"{trial['label']} failed: {trial['reason']} (log: {trial['log']}).")
        elif trial["state"] == "unfinished":
            sentences.append(f"{trial['label']} is unfinished; the same command goes on with it.")
    return sentences


def _reference_ahead(context: dict[str, Any]) -> str | None:
    """The best of the untuned models, if it is below everything that was trained."""
    trained = [trial["final"]["perplexity"] for trial in context["trials"] if trial["final"]]
    if not trained or not context["references"]:
        return None
    best = min(context["references"], key=lambda reference: reference["perplexity"])
    return best["label"] if best["perplexity"] < min(trained) else None


def _versus(name: str, winner: str, scores: DocumentScores, best: DocumentScores) -> str:
    gap = gap_interval(scores, best)
    text = f"{_capital(name)} is {gap.value:.1%} above {winner} (paired interval {gap.low:.1%} to {gap.high:.1%})"
    return text + ("." if gap.low > 0 else ", a difference that these documents do not establish.")


def _convergence(trial: dict[str, Any]) -> str:
    name = _capital(METHOD_NAMES[trial["method"]]) + (f" (seed {trial['seed']})" if trial["seed"] else "")
    step = trial["gap_to_full"]["within_1_percent_from_step"]
    if step is None:
        return f"{name} is still more than 1% above full fine-tuning after {trial['final']['step']} steps."
    return f"{name} is at most 1% above full fine-tuning from step {step} on."


def _against(name: str, scores: DocumentScores, label: str, reference: DocumentScores) -> str:
    """A method against the best of the untuned models."""
    gap = gap_interval(scores, reference)
    other = f"{REFERENCE_PHRASES[label]} ({reference.perplexity:.3f})"
    paired = f"(paired interval of the difference {gap.low:+.1%} to {gap.high:+.1%})"
    if gap.high < 0:
        return f"{_capital(name)} beats {other} by {-gap.value:.1%} {paired}."
    if gap.low > 0:
        return f"{_capital(name)} does not beat {other}: it is {gap.value:.1%} above it {paired}."
    return f"{_capital(name)} and {other} cannot be told apart {paired}."


def _seeds(trials: list[dict[str, Any]], method: str) -> int:
    return sum(trial["method"] == method and trial["final"] is not None for trial in trials)


def _spread(name: str, trials: list[dict[str, Any]], method: str) -> str:
    """What a method's seeds differ by; the figures of the other sentences are of their mean log-likelihood."""
    finals = [t["final"]["perplexity"] for t in trials if t["method"] == method and t["final"] is not None]
    return (
        f"{_capital(name)} is the mean over {len(finals)} seeds, which end from {min(finals):.3f} to {max(finals):.3f}."
    )


def _at_original_length(trials: list[dict[str, Any]]) -> list[str]:
    """What the longer context cost at the length that the model was made for."""
    after = [(trial, trial["original_length"]) for trial in trials if trial["original_length"]]
    if not after or after[0][1]["before"] is None:
        return []
    length, before = after[0][1]["context_length"], after[0][1]["before"]
    each = _join([f"{trial['label']} {at['after']:.3f}" for trial, at in after])
    return [f"At its original {length:,} tokens the unchanged model scores {before:.3f}; afterwards: {each}."]


def _mean(scores: list[DocumentScores]) -> DocumentScores:
    """Over seeds: the mean negative log-likelihood of each document."""
    return DocumentScores(np.mean([s.nll for s in scores], axis=0), scores[0].tokens)


def _as_perplexity(interval: Interval) -> dict[str, float]:
    return {"perplexity": interval.value, "low": interval.low, "high": interval.high}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
