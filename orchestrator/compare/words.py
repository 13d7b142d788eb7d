"""The answer in words: what the numbers of a comparison say, in sentences for the terminal and the report."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from workloads.evaluation.bootstrap import CONFIDENCE, DocumentScores, gap_interval, perplexity_interval
from workloads.models.positions import POSITIONS

METHOD_NAMES = {
    "lora": "LoRA",
    "lora+norm": "LoRA with norms",
    "lora+embed": "LoRA with embeddings",
    "lora+": "LoRA+",
    "full": "full fine-tuning",
}
POSITIONS_NAMES = {name: kind.label for name, kind in POSITIONS.items() if name != "none"}
REFERENCE_NAMES = {"none": "untuned, no change"} | {key: f"untuned, {name}" for key, name in POSITIONS_NAMES.items()}
REFERENCE_PHRASES = {REFERENCE_NAMES["none"]: "the unchanged model"} | {
    REFERENCE_NAMES[key]: f"the untuned model with {name}" for key, name in POSITIONS_NAMES.items()
}


def summarise(contexts: list[dict[str, Any]], seeds: list[int]) -> list[str]:
    """The whole answer in a few sentences."""
    winners = defaultdict(list)
    for context in contexts:
        winners[context["winner"]].append(context["context_length"])
    sentences = []
    for winner, lengths in winners.items():
        at = join([f"{length:,}" for length in lengths])
        if winner is None:
            sentences.append(f"At {at} tokens nothing that was trained has finished, so nothing wins.")
        else:
            sentences.append(f"Of what was trained, {METHOD_NAMES[winner]} has the lowest perplexity at {at} tokens.")
    unbeaten = defaultdict(list)
    for context in contexts:
        if ahead := _reference_ahead(context):
            unbeaten[ahead].append(f"{context['context_length']:,}")
    for reference, lengths in unbeaten.items():
        sentences.append(f"At {join(lengths)} tokens nothing that was trained beats {REFERENCE_PHRASES[reference]}.")
    if any(_rates(context["settings"], s["method"])[1:] for context in contexts for s in context["settings"]):
        sentences.append(
            "Each method stands with the best of several settings, chosen by its final perplexity on the scored "
            "documents themselves, which flatters it."
        )
    if len(seeds) == 1:
        sentences.append(
            f"Each setting was trained with one seed: the {CONFIDENCE:.0%} intervals come from which documents were "
            "scored and show nothing of the variance between seeds."
        )
    return sentences


def of_context(
    context: dict[str, Any],
    scores: dict[str, DocumentScores],
    references: dict[str, DocumentScores],
    as_good: float,
    seeds: list[int] | None,
    hardware: list[str],
) -> list[str]:
    """What one context length shows.

    Args:
        context: all of it but its sentences.
        scores: of each method's best setting, over the seeds that all of them finished.
        references: of the untuned models, by their positions.
        as_good: the share above full fine-tuning's perplexity that is as good.
        seeds: which seeds those are; None where the methods have none in common.
        hardware: what the trials ran on.
    """
    sentences, winner, trials = [], context["winner"], context["trials"]
    chosen = {setting["method"]: setting for setting in context["settings"] if setting["chosen"]}
    if winner is not None:
        interval = perplexity_interval(scores[winner])
        sentences.append(
            f"At {context['context_length']:,} tokens {METHOD_NAMES[winner]} "
            f"{'wins with' if len(scores) > 1 else 'reaches'} a perplexity of {interval.value:.3f} ({CONFIDENCE:.0%} "
            f"interval {interval.low:.3f} to {interval.high:.3f})."
        )
        sentences += _chosen_rates(context["settings"], chosen)
        sentences += [_spread(METHOD_NAMES[m], trials, m) for m in scores if len(chosen[m]["seeds"]) > 1]
        sentences += _unequal_seeds(chosen, seeds)
        for method in sorted(set(scores) - {winner}, key=lambda method: scores[method].perplexity):
            sentences.append(_versus(METHOD_NAMES[method], METHOD_NAMES[winner], scores[method], scores[winner]))
    if "full" in chosen:
        sentences += [_convergence(chosen[method], as_good) for method in chosen if method != "full"]
    sentences += _effort(context, chosen, hardware)
    if references:
        best = min(references, key=lambda positions: references[positions].perplexity)
        sentences += [_against(METHOD_NAMES[m], scores[m], REFERENCE_NAMES[best], references[best]) for m in scores]
    sentences += _at_original_length(trials)
    for trial in trials:
        if trial["state"] == "failed":
            sentences.append(f"{trial['label']} failed: {trial['reason']} (log: {trial['log']}).")
        elif trial["state"] == "stopped":
            why = f" ({trial['reason']})" if trial["reason"] else ""
            sentences.append(
                f"{trial['label']} was stopped early at step {trial['last_step']}{why} and does not compete."
            )
        elif trial["state"] == "cancelled":
            why = f" {trial['reason']}" if trial["reason"] else ""
            sentences.append(
                f"{trial['label']} was cancelled{why} at step {trial['last_step']} and is unfinished; the same command "
                "goes on with it."
            )
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


def _rates(settings: list[dict[str, Any]], method: str) -> list[float]:
    """The learning rates that a method finished with."""
    return sorted({setting["learning_rate"] for setting in settings if setting["method"] == method})


def _chosen_rates(settings: list[dict[str, Any]], chosen: dict[str, dict[str, Any]]) -> list[str]:
    """What a sweep over the learning rate chose, and whether the grid may have ended too early."""
    words = []
    for method, setting in chosen.items():
        rates = _rates(settings, method)
        if len(rates) > 1:
            edge = setting["learning_rate"] in (rates[0], rates[-1])
            words.append(
                f"{METHOD_NAMES[method]} with {setting['learning_rate']:g} of {join([f'{rate:g}' for rate in rates])}"
                + (" (the edge of what was tried: a better one may lie beyond)" if edge else "")
            )
    if not words:
        return []
    return [
        f"Each method's learning rate is the one that ends lowest: {'; '.join(words)}. They were chosen on the scored "
        "documents themselves, which flatters every method."
    ]


def _unequal_seeds(chosen: dict[str, dict[str, Any]], seeds: list[int] | None) -> list[str]:
    if len({tuple(setting["seeds"]) for setting in chosen.values()}) <= 1:
        return []
    if seeds is None:
        return ["The methods have no finished seed in common: their gaps are not paired by seed."]
    these = join([str(seed) for seed in seeds])
    return [f"The methods are compared over seed{'s' if len(seeds) > 1 else ''} {these}, which all of them finished."]


def _versus(name: str, winner: str, scores: DocumentScores, best: DocumentScores) -> str:
    gap = gap_interval(scores, best)
    text = f"{capital(name)} is {gap.value:.1%} above {winner} (paired interval {gap.low:.1%} to {gap.high:.1%})"
    what = "these documents and seeds" if len(scores.seeds) > 1 else "these documents"
    return text + ("." if gap.low > 0 else f", a difference that {what} do not establish.")


def _convergence(setting: dict[str, Any], as_good: float) -> str:
    name, step = capital(METHOD_NAMES[setting["method"]]), setting["as_good_from_step"]
    above = f"{100 * as_good:g}% above full fine-tuning"
    if step is None:
        return f"{name} is still more than {above} after {setting['final']['step']} steps."
    return f"{name} is at most {above} from step {step} on."


def _effort(context: dict[str, Any], chosen: dict[str, dict[str, Any]], hardware: list[str]) -> list[str]:
    """What it takes to reach the target, and which methods are worth their hours."""
    sentences, unit, target = [], context["hours_unit"], context["target"]
    if target is not None and chosen:
        reached = [
            f"{METHOD_NAMES[method]} takes {setting['reached']['tokens']:,.0f} tokens"
            + (f" and {hours(setting['reached']['hours'], unit)}" if unit else "")
            + (f" ({dollars(setting['reached']['usd'])})" if setting["reached"]["usd"] is not None else "")
            for method, setting in chosen.items()
            if setting["reached"]
        ]
        missed = [METHOD_NAMES[method] for method, setting in chosen.items() if not setting["reached"]]
        if missed:
            reached.append(f"{join(missed)} {'does' if len(missed) == 1 else 'do'} not reach it")
        where = f"To reach a perplexity of {target['perplexity']:.3f} ({target['source']})"
        sentences.append(f"{where}: {'; '.join(reached)}.")
    if unit is None and len(hardware) > 1:
        sentences.append(f"Hours are not compared, since the trials ran on different hardware: {'; '.join(hardware)}.")
    if unit and len(chosen) > 1:
        front = [METHOD_NAMES[method] for method, setting in chosen.items() if not setting["dominated"]]
        beaten = [METHOD_NAMES[method] for method, setting in chosen.items() if setting["dominated"]]
        if front and beaten:
            verb, they = ("is", "it") if len(beaten) == 1 else ("are", "they")
            sentences.append(
                f"By perplexity and {unit}, {join(beaten)} {verb} not worth what {they} cost{'s' * (they == 'it')}: "
                "something else that was trained is at least as good for no more."
            )
    return sentences


def hours(value: float, unit: str) -> str:
    """``0.0123 GPU hours``."""
    return f"{value:.3g} {unit}"


def dollars(value: float) -> str:
    return f"${value:,.2f}" if value == 0 or value >= 0.01 else "under $0.01"


def _against(name: str, scores: DocumentScores, label: str, reference: DocumentScores) -> str:
    """A method against the best of the untuned models."""
    gap = gap_interval(scores, reference)
    other = f"{REFERENCE_PHRASES[label]} ({reference.perplexity:.3f})"
    paired = f"(paired interval of the difference {gap.low:+.1%} to {gap.high:+.1%})"
    if gap.high < 0:
        return f"{capital(name)} beats {other} by {-gap.value:.1%} {paired}."
    if gap.low > 0:
        return f"{capital(name)} does not beat {other}: it is {gap.value:.1%} above it {paired}."
    return f"{capital(name)} and {other} cannot be told apart {paired}."


def _spread(name: str, trials: list[dict[str, Any]], method: str) -> str:
    """What a method's seeds differ by; the figures of the other sentences are of their mean log-likelihood."""
    finals = [t["final"]["perplexity"] for t in trials if t["method"] == method and t["chosen"] and t["final"]]
    return (
        f"{capital(name)} is the mean over {len(finals)} seeds, which end from {min(finals):.3f} to {max(finals):.3f}."
    )


def _at_original_length(trials: list[dict[str, Any]]) -> list[str]:
    """What the longer context cost at the length that the model was made for."""
    after = [(trial, trial["original_length"]) for trial in trials if trial["original_length"] and trial["chosen"]]
    if not after or after[0][1]["before"] is None:
        return []
    length, before = after[0][1]["context_length"], after[0][1]["before"]
    each = join([f"{trial['label']} {at['after']:.3f}" for trial, at in after])
    return [f"At its original {length:,} tokens the unchanged model scores {before:.3f}; afterwards: {each}."]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
