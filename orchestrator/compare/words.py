"""The wording of a comparison: labels, and sentences for the terminal and the report."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from orchestrator.terminal import and_list
from workloads.evaluation.intervals import (
    CONFIDENCE,
    FEWEST_DOCUMENTS,
    DocumentScores,
    Interval,
    gap_interval,
    perplexity_interval,
)
from workloads.models.positions import POSITIONS
from workloads.wording import LABELS, METHOD_LABELS, METHODS

UNCHANGED = f"untuned, {POSITIONS['none'].label}"
REFERENCE_LABELS: dict[str, str] = {"none": UNCHANGED} | {
    name: f"untuned, {kind.label}" for name, kind in POSITIONS.items()
}
REFERENCE_PHRASES = {
    REFERENCE_LABELS[name]: f"the untuned model with {kind.label}" for name, kind in POSITIONS.items()
} | {UNCHANGED: "the unchanged model"}


def method_labels(contexts: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The label and the description of each method that was trained, for the report."""
    methods = dict.fromkeys(trial["method"] for context in contexts for trial in context["trials"])
    return {
        "method_labels": {method: capital(METHOD_LABELS[method]) for method in methods},
        "method_descriptions": {method: METHODS[method] for method in methods},
    }


def distinct_names(items: list[dict[str, Any]]) -> list[str]:
    """Names of trials or settings of one context length.

    Each is the method's label; if a method has several, with the learning rate, seed or fingerprint that differs.
    """

    def name(item: dict[str, Any]) -> str:
        siblings = [other for other in items if other["method"] == item["method"]]
        texts = {
            "learning_rate": f"{LABELS['learning_rate'].short} {item['learning_rate']:g}".replace("e-0", "e-"),
            "seed": f"{LABELS['seed'].short} {item.get('seed')}",
        }
        differing = [key for key in texts if len({other.get(key) for other in siblings}) > 1]
        alike = sum(all(other.get(key) == item.get(key) for key in differing) for other in siblings)
        own = [item["fingerprint"][:6]] if alike > 1 else []
        return " ".join([capital(METHOD_LABELS[item["method"]]), *(texts[key] for key in differing), *own])

    return [name(item) for item in items]


def summarise(contexts: list[dict[str, Any]], seeds: list[int]) -> list[str]:
    """The whole answer in a few sentences."""
    winners = defaultdict(list)
    for context in contexts:
        winners[context["winner"]].append(context["context_length"])
    sentences = []
    for winner, lengths in winners.items():
        at = join([f"{length:,}" for length in lengths])
        if winner is None:
            sentences.append(f"At {at} tokens no training has finished, so there is no winner.")
        else:
            sentences.append(f"Among trained models, {METHOD_LABELS[winner]} has the lowest perplexity at {at} tokens.")
    unbeaten = defaultdict(list)
    for context in contexts:
        if ahead := _reference_ahead(context):
            unbeaten[ahead].append(f"{context['context_length']:,}")
    for reference, lengths in unbeaten.items():
        sentences.append(f"At {join(lengths)} tokens no trained model beats {REFERENCE_PHRASES[reference]}.")
    if any(_rates(context["settings"], s["method"])[1:] for context in contexts for s in context["settings"]):
        sentences.append(
            "Each method is represented by the best of its settings, chosen by final perplexity on the scored "
            "documents themselves, which flatters it."
        )
    if len(seeds) == 1:
        sentences.append(
            f"Each setting was trained with one seed: the {CONFIDENCE:.0%} intervals reflect which documents were "
            "scored, not the variance between seeds."
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
    """The sentences of one context length.

    Args:
        context: all its fields but the sentences.
        scores: each method's best setting, over the seeds that all of them finished.
        references: the untuned models, by their positions.
        as_good: the share above full fine-tuning's perplexity that counts as equally good.
        seeds: those seeds; None if the methods have none in common.
        hardware: the trials' devices.
    """
    sentences, winner, trials = [], context["winner"], context["trials"]
    chosen = {setting["method"]: setting for setting in context["settings"] if setting["chosen"]}
    if winner is not None:
        interval = perplexity_interval(scores[winner])
        ends = "" if interval.low is None else f" ({CONFIDENCE:.0%} interval {interval.low:.3f} to {interval.high:.3f})"
        sentences.append(
            f"At {context['context_length']:,} tokens {METHOD_LABELS[winner]} "
            f"{'wins with' if len(scores) > 1 else 'reaches'} a perplexity of {interval.value:.3f}{ends}."
        )
        sentences += _chosen_rates(context["settings"], chosen)
        sentences += [_spread(METHOD_LABELS[m], trials, m) for m in scores if len(chosen[m]["seeds"]) > 1]
        sentences += _unequal_seeds(chosen, seeds)
        for method in sorted(set(scores) - {winner}, key=lambda method: scores[method].perplexity):
            sentences.append(_versus(METHOD_LABELS[method], METHOD_LABELS[winner], scores[method], scores[winner]))
    if "full" in chosen:
        sentences += [_convergence(chosen[method], as_good) for method in chosen if method != "full"]
    sentences += _costs(context, chosen, hardware)
    if references:
        best = min(references, key=lambda positions: references[positions].perplexity)
        sentences += [_against(METHOD_LABELS[m], scores[m], REFERENCE_LABELS[best], references[best]) for m in scores]
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
                "resumes it."
            )
        elif trial["state"] == "unfinished":
            sentences.append(f"{trial['label']} is unfinished; the same command resumes it.")
    return sentences


def _reference_ahead(context: dict[str, Any]) -> str | None:
    """The best untuned model, if it is below every trained one."""
    trained = [trial["final"]["perplexity"] for trial in context["trials"] if trial["final"]]
    if not trained or not context["references"]:
        return None
    best = min(context["references"], key=lambda reference: reference["perplexity"])
    return best["label"] if best["perplexity"] < min(trained) else None


def _rates(settings: list[dict[str, Any]], method: str) -> list[float]:
    """The learning rates that a method finished with."""
    return sorted({setting["learning_rate"] for setting in settings if setting["method"] == method})


def _chosen_rates(settings: list[dict[str, Any]], chosen: dict[str, dict[str, Any]]) -> list[str]:
    """What a sweep over the learning rate chose, and whether the grid may be too narrow."""
    words = []
    for method, setting in chosen.items():
        rates = _rates(settings, method)
        if len(rates) > 1:
            edge = setting["learning_rate"] in (rates[0], rates[-1])
            words.append(
                f"{METHOD_LABELS[method]} with {setting['learning_rate']:g} of {join([f'{rate:g}' for rate in rates])}"
                + (" (the edge of the grid: a better one may be beyond it)" if edge else "")
            )
    if not words:
        return []
    return [
        f"Each method's learning rate is the one with the lowest final perplexity: {'; '.join(words)}. They "
        "were chosen on the scored documents themselves, which flatters every method."
    ]


def _unequal_seeds(chosen: dict[str, dict[str, Any]], seeds: list[int] | None) -> list[str]:
    if len({tuple(setting["seeds"]) for setting in chosen.values()}) <= 1:
        return []
    if seeds is None:
        return ["The methods have no finished seed in common, so their gaps are not paired by seed."]
    these = join([str(seed) for seed in seeds])
    return [f"The methods are compared over seed{'s' if len(seeds) > 1 else ''} {these}, which all of them finished."]


def _versus(name: str, winner: str, scores: DocumentScores, best: DocumentScores) -> str:
    gap = gap_interval(scores, best)
    text = f"{capital(name)} is {gap.value:.1%} above {winner}{_paired(gap)}"
    what = "these documents and seeds" if len(scores.seeds) > 1 else "these documents"
    return text + ("." if gap.sign > 0 else f", a difference that {what} do not establish.")


def _convergence(setting: dict[str, Any], as_good: float) -> str:
    name, step = capital(METHOD_LABELS[setting["method"]]), setting["as_good_from_step"]
    above = f"{100 * as_good:g}% above full fine-tuning"
    if step is None:
        return f"{name} is still more than {above} after {setting['final']['step']} steps."
    return f"{name} is at most {above} from step {step} on."


def _costs(context: dict[str, Any], chosen: dict[str, dict[str, Any]], hardware: list[str]) -> list[str]:
    """The cost of reaching the target, and which methods others dominate."""
    sentences, unit, target = [], context["hours_unit"], context["target"]
    if target is not None and chosen:
        reached = [
            f"{METHOD_LABELS[method]} takes {setting['reached']['tokens']:,.0f} tokens"
            + (f" and {hours(setting['reached']['hours'], unit)}" if unit else "")
            + (f" ({dollars(setting['reached']['usd'])})" if setting["reached"]["usd"] is not None else "")
            for method, setting in chosen.items()
            if setting["reached"]
        ]
        missed = [METHOD_LABELS[method] for method, setting in chosen.items() if not setting["reached"]]
        if missed:
            reached.append(f"{join(missed)} {'does' if len(missed) == 1 else 'do'} not reach it")
        where = f"To reach a perplexity of {target['perplexity']:.3f} ({target['source']})"
        sentences.append(f"{where}: {'; '.join(reached)}.")
    if unit is None and len(hardware) > 1:
        sentences.append(f"Hours are not compared because the trials ran on different hardware: {'; '.join(hardware)}.")
    if unit and len(chosen) > 1:
        beaten = [
            f"{METHOD_LABELS[method]} is dominated by {_dominator(setting, context['settings'], chosen)}"
            for method, setting in chosen.items()
            if setting["dominated"]
        ]
        if beaten:
            sentences.append(f"By perplexity and {unit}, {join(beaten)}.")
    return sentences


def _dominator(beaten: dict[str, Any], settings: list[dict[str, Any]], chosen: dict[str, dict[str, Any]]) -> str:
    """The best setting that is at least as good for no more hours; by its method, if it is the method's chosen one."""

    def costs(setting: dict[str, Any]) -> tuple[float, float]:
        return setting["final"]["perplexity"], setting["hours"]

    better = [one for one in settings if costs(one) != costs(beaten) and _no_worse(costs(one), costs(beaten))]
    best = min(better, key=costs)
    return METHOD_LABELS[best["method"]] if chosen[best["method"]] is best else best["name"]


def _no_worse(costs: tuple[float, float], others: tuple[float, float]) -> bool:
    return costs[0] <= others[0] and costs[1] <= others[1]


def hours(value: float, unit: str) -> str:
    """Three significant digits with the unit: ``0.0123 GPU hours``."""
    return f"{value:.3g} {unit}"


def dollars(value: float) -> str:
    """``$1,234.50``; less than a cent is ``under $0.01``."""
    return f"${value:,.2f}" if value == 0 or value >= 0.01 else "under $0.01"


def _against(name: str, scores: DocumentScores, label: str, reference: DocumentScores) -> str:
    """A method against the best untuned model."""
    gap = gap_interval(scores, reference)
    other = f"{REFERENCE_PHRASES[label]} ({reference.perplexity:.3f})"
    if gap.sign < 0:
        return f"{capital(name)} beats {other} by {-gap.value:.1%}{_paired(gap)}."
    if gap.sign > 0:
        return f"{capital(name)} does not beat {other}: it is {gap.value:.1%} above it{_paired(gap)}."
    return f"The difference between {name} and {other} is not established{_paired(gap)}."


def _paired(gap: Interval) -> str:
    """The interval of a difference in brackets, or nothing."""
    return "" if gap.low is None else f" (paired interval of the difference {gap.low:+.1%} to {gap.high:+.1%})"


def _spread(name: str, trials: list[dict[str, Any]], method: str) -> str:
    """The range over a method's seeds; the other sentences use their mean log-likelihood."""
    finals = [t["final"]["perplexity"] for t in trials if t["method"] == method and t["chosen"] and t["final"]]
    spread = f"from {min(finals):.3f} to {max(finals):.3f}"
    return f"{capital(name)} is the mean over {len(finals)} seeds, with final perplexities {spread}."


def _at_original_length(trials: list[dict[str, Any]]) -> list[str]:
    """How training for the longer context changed perplexity at the pretrained length."""
    after = [(trial, trial["original_length"]) for trial in trials if trial["original_length"] and trial["chosen"]]
    if not after or after[0][1]["before"] is None:
        return []
    length, before = after[0][1]["context_length"], after[0][1]["before"]
    each = join([f"{trial['label']} {at['after']:.3f}" for trial, at in after])
    return [f"At its original {length:,} tokens the unchanged model scores {before:.3f}; after training: {each}."]


def too_few(num_documents: int) -> str:
    """Why so few documents give no interval, and what to do."""
    scored = "1 document is" if num_documents == 1 else f"{num_documents} documents are"
    return (
        f"only {scored} scored, and intervals need at least {FEWEST_DOCUMENTS}. Hold out more data, or raise "
        "--eval-documents if more is held out."
    )


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def join(words: list[str]) -> str:
    """``a, b and c``."""
    return and_list(tuple(words))
