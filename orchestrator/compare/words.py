"""The wording of a comparison: labels, and sentences for the terminal and the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.compare.baselines import Baselines
from orchestrator.terminal import and_list
from orchestrator.variants import Variant
from workloads.evaluation.intervals import (
    CONFIDENCE,
    FEWEST_DOCUMENTS,
    FEWEST_TO_RESAMPLE,
    DocumentScores,
    Interval,
    gap_interval,
    perplexity_interval,
)
from workloads.models.positions import POSITIONS
from workloads.wording import LABELS, METHOD_LABELS, METHODS, axis_label

UNCHANGED = f"untuned, {POSITIONS['none'].label}"
REFERENCE_LABELS: dict[str, str] = {"none": UNCHANGED} | {
    name: f"untuned, {kind.label}" for name, kind in POSITIONS.items()
}
REFERENCE_PHRASES = {
    REFERENCE_LABELS[name]: f"the untuned model with {kind.label}" for name, kind in POSITIONS.items()
} | {UNCHANGED: "the unchanged model"}
# Sentences tell of each variant up to this many; of more, they tell of the best few, and tables of all.
MOST_TOLD, FEW = 6, 3


def labels(variants: Iterable[Variant], axes: Iterable[str]) -> dict[str, Any]:
    """The labels of methods, variants and axes, and the descriptions of methods, for the report."""
    variants = list(variants)
    methods = dict.fromkeys(variant.method for variant in variants)
    return {
        "method_labels": {method: capital(METHOD_LABELS[method]) for method in methods},
        "method_descriptions": {method: METHODS[method] for method in methods},
        "variant_labels": {variant.id: capital(variant.name) for variant in variants},
        "axes": {field: axis_label(field) for field in axes},
    }


def distinct_names(items: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """Names of trials or settings of one context length.

    Each is the variant's; if a variant has several, with the learning rate, seed or fingerprint that differs.
    """

    def name(item: dict[str, Any]) -> str:
        siblings = [other for other in items if other["variant"] == item["variant"]]
        texts = {
            "learning_rate": f"{LABELS['learning_rate'].short} {item['learning_rate']:g}".replace("e-0", "e-"),
            "seed": f"{LABELS['seed'].short} {item.get('seed')}",
        }
        differing = [key for key in texts if len({other.get(key) for other in siblings}) > 1]
        alike = sum(all(other.get(key) == item.get(key) for key in differing) for other in siblings)
        own = [item["fingerprint"][:6]] if alike > 1 else []
        return " ".join([capital(names[item["variant"]]), *(texts[key] for key in differing), *own])

    return [name(item) for item in items]


def summarise(contexts: list[dict[str, Any]], seeds: list[int], names: dict[str, str] | None = None) -> list[str]:
    """The whole answer in a few sentences, an untuned model that nothing beats first.

    Args:
        names: of the variants, by id; by default the methods'.
    """
    names = METHOD_LABELS if names is None else names
    sentences = [
        *_at_lengths(contexts, _about_untuned),
        *_at_lengths(contexts, lambda context: _about_lowest(context, names)),
        *cautions(contexts),
    ]
    if any(_rates(context["settings"], s["variant"])[1:] for context in contexts for s in context["settings"]):
        what = "variant" if any(context["effects"] for context in contexts) else "method"
        sentences.append(
            f"Each {what} is represented by the best of its settings, chosen by final perplexity on the scored "
            "documents themselves, which flatters it."
        )
    if len(seeds) == 1:
        sentences.append(
            f"Each setting was trained with one seed: the {CONFIDENCE:.0%} intervals reflect which documents were "
            "scored, not the variance between seeds."
        )
    return sentences


def _at_lengths(contexts: list[dict[str, Any]], tell: Callable[[dict[str, Any]], str | None]) -> list[str]:
    """What ``tell`` says of each context, once for all lengths of which it says the same.

    In its text ``{at}`` stands for the lengths: ``1,024 and 2,048 tokens``.
    """
    lengths = defaultdict(list)
    for context in contexts:
        if text := tell(context):
            lengths[text].append(f"{context['context_length']:,}")
    return [text.replace("{at}", f"{join(each)} tokens") for text, each in lengths.items()]


def _about_untuned(context: dict[str, Any]) -> str | None:
    """The best trained variant against the best untuned model."""
    against = context["against_untuned"]
    if against is None:
        return None
    phrase = REFERENCE_PHRASES[against["reference"]]
    if against["percent"] > 0:
        return f"At {{at}} no trained model beats {phrase}."
    if against["high"] is None:
        return "At {at} the best trained model measures below every untuned one; there is no interval."
    if against["high"] < 0:
        return "At {at} the best trained model beats every untuned one."
    return f"At {{at}} no trained model is distinguishable from {phrase}."


def _about_lowest(context: dict[str, Any], names: dict[str, str]) -> str:
    lowest, alike = context["lowest"], context["not_distinguishable"]
    if lowest is None:
        return "At {at} no training has finished, so there is no winner."
    told = f"Among trained models, {names[lowest]} has the lowest perplexity at {{at}}"
    if context["winner"] is None and (context["scored_documents"] or 0) < FEWEST_DOCUMENTS:
        return f"{told}, but too few documents are scored for a winner."
    return f"{told}, not distinguishable from {_some(alike, names)}." if alike else f"{told}."


def cautions(contexts: list[dict[str, Any]]) -> list[str]:
    """What the number of scored documents means for the intervals, where there are few."""
    return _at_lengths(contexts, _caution)


def _caution(context: dict[str, Any]) -> str | None:
    number = context["scored_documents"]
    if number is None or number >= FEWEST_TO_RESAMPLE:
        return None
    if number < FEWEST_DOCUMENTS:
        return f"At {{at}} there are no intervals and no winner: {too_few(number)}"
    return (
        f"At {{at}} {number} documents are scored, fewer than {FEWEST_TO_RESAMPLE}: intervals are Student's t, which "
        "are wider. More held-out data narrows them."
    )


def of_context(
    context: dict[str, Any],
    names: dict[str, str],
    scores: dict[str, DocumentScores],
    references: dict[str, DocumentScores],
    baselines: Baselines,
    as_good: float,
    seeds: list[int] | None,
    hardware: list[str],
) -> list[str]:
    """The sentences of one context length.

    Args:
        context: all its fields but the sentences.
        names: of the variants, by id.
        scores: each variant's best setting, over the seeds that all of them finished.
        references: the untuned models, by their positions.
        baselines: what each variant is held against.
        as_good: the share above the baseline's perplexity that counts as equally good.
        seeds: those seeds; None if the variants have none in common.
        hardware: the trials' devices.
    """
    lowest, trials = context["lowest"], context["trials"]
    chosen = {setting["variant"]: setting for setting in context["settings"] if setting["chosen"]}
    ranked = sorted(chosen, key=lambda variant: scores[variant].perplexity)
    told = ranked if len(ranked) <= MOST_TOLD else ranked[:FEW]
    told = [variant for variant in chosen if variant in told]  # in the order of the settings
    sentences = []
    if references and lowest is not None:
        best = min(references, key=lambda positions: references[positions].perplexity)
        against = [_against(names[v], scores[v], REFERENCE_LABELS[best], references[best]) for v in told]
        if references[best].perplexity < scores[lowest].perplexity:
            sentences, against = against, []
    else:
        against = []
    if lowest is not None:
        sentences += _lowest(context, names, scores)
        sentences += _chosen_rates(context["settings"], chosen, names)
        sentences += [_spread(names[v], trials, v) for v in told if len(chosen[v]["seeds"]) > 1]
        sentences += _unequal_seeds(chosen, seeds)
        for variant in [variant for variant in ranked[1:] if variant in told]:
            sentences.append(_versus(names[variant], names[lowest], scores[variant], scores[lowest]))
    if len(told) < len(chosen):
        sentences.append(f"Tables have the other {len(chosen) - len(told)} of {len(chosen)} settings.")
    sentences += [_effect(effect, context["scored_documents"]) for effect in context["effects"]]
    sentences += baselines.notes
    if baselines.explicit:
        sentences += [
            _convergence(chosen[variant], names[variant], names[baselines.of[variant]], as_good)
            for variant in told
            if variant in baselines.of
        ]
    sentences += _costs(context, {variant: chosen[variant] for variant in told}, names, hardware)
    sentences += against
    sentences += _at_original_length([trial for trial in trials if trial["variant"] in told])
    return sentences + [text for trial in trials if (text := _unfinished(trial))]


def _unfinished(trial: dict[str, Any]) -> str | None:
    match trial["state"]:
        case "failed":
            return f"{trial['label']} failed: {trial['reason']} (log: {trial['log']})."
        case "stopped":
            why = f" ({trial['reason']})" if trial["reason"] else ""
            return f"{trial['label']} was stopped early at step {trial['last_step']}{why} and does not compete."
        case "cancelled":
            why = f" {trial['reason']}" if trial["reason"] else ""
            return (
                f"{trial['label']} was cancelled{why} at step {trial['last_step']} and is unfinished; the same command "
                "resumes it."
            )
        case "unfinished":
            return f"{trial['label']} is unfinished; the same command resumes it."
    return None


def _lowest(context: dict[str, Any], names: dict[str, str], scores: dict[str, DocumentScores]) -> list[str]:
    """Which variant wins, or has the lowest perplexity without winning, and why."""
    lowest = context["lowest"]
    interval = perplexity_interval(scores[lowest])
    at, name, value = f"At {context['context_length']:,} tokens", names[lowest], f"{interval.value:.3f}"
    if interval.low is None:
        return [f"{at} nothing wins: {too_few(scores[lowest].num_documents)}", f"{capital(name)} measured {value}."]
    value += f" ({CONFIDENCE:.0%} interval over {_sample(scores[lowest])} {interval.low:.3f} to {interval.high:.3f})"
    if alike := context["not_distinguishable"]:
        distinct = f"not distinguishable from {_some(alike, names)}"
        return [f"{at} {name} has the lowest perplexity, {value}, but is {distinct}."]
    return [f"{at} {name} {'wins with' if len(scores) > 1 else 'reaches'} a perplexity of {value}."]


def _some(variants: list[str], names: dict[str, str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(variants) - 3} more"] if len(variants) > 4 else []
    return join([names[variant] for variant in (variants[:3] if more else variants)] + more)


def _sample(scores: DocumentScores) -> str:
    """What an interval covers: ``16 documents``, ``16 documents and 3 seeds``."""
    documents = f"{scores.num_documents} documents"
    return f"{documents} and {len(scores.seeds)} seeds" if len(scores.seeds) > 1 else documents


def _rates(settings: list[dict[str, Any]], variant: str) -> list[float]:
    """The learning rates that a variant finished with."""
    return sorted({setting["learning_rate"] for setting in settings if setting["variant"] == variant})


def _chosen_rates(
    settings: list[dict[str, Any]], chosen: dict[str, dict[str, Any]], names: dict[str, str]
) -> list[str]:
    """What a sweep over the learning rate chose, and whether the grid may be too narrow."""
    words = []
    for variant, setting in chosen.items():
        rates = _rates(settings, variant)
        if len(rates) > 1:
            edge = setting["learning_rate"] in (rates[0], rates[-1])
            words.append(
                f"{names[variant]} with {setting['learning_rate']:g} of {join([f'{rate:g}' for rate in rates])}"
                + (" (the edge of the grid: a better one may be beyond it)" if edge else "")
            )
    if not words:
        return []
    each = "method" if all(variant == setting["method"] for variant, setting in chosen.items()) else "variant"
    return [
        f"Each {each}'s learning rate is the one with the lowest final perplexity: {'; '.join(words)}. They "
        f"were chosen on the scored documents themselves, which flatters every {each}."
    ]


def _unequal_seeds(chosen: dict[str, dict[str, Any]], seeds: list[int] | None) -> list[str]:
    if len({tuple(setting["seeds"]) for setting in chosen.values()}) <= 1:
        return []
    each = "methods" if all(variant == setting["method"] for variant, setting in chosen.items()) else "variants"
    if seeds is None:
        return [f"The {each} have no finished seed in common, so their gaps are not paired by seed."]
    these = join([str(seed) for seed in seeds])
    return [f"The {each} are compared over seed{'s' if len(seeds) > 1 else ''} {these}, which all of them finished."]


def _versus(name: str, lowest: str, scores: DocumentScores, best: DocumentScores) -> str:
    gap = gap_interval(scores, best)
    text = f"{capital(name)} is {gap.value:.1%} above {lowest}{_paired(gap, scores)}"
    return f"{text}: not distinguishable." if gap.sign <= 0 and gap.low is not None else f"{text}."


def _paired(gap: Interval, scores: DocumentScores) -> str:
    """The interval of a difference, and what it covers, in brackets; nothing without one."""
    if gap.low is None or gap.high is None:
        return ""
    return f" (paired interval over {_sample(scores)} {gap.low:+.1%} to {gap.high:+.1%})"


def _effect(effect: dict[str, Any], documents: int | None) -> str:
    """What one value of an axis changes, with the others held."""
    pairs, seeds = len(effect["matched"]), len(effect["seeds"])
    held = f"over {pairs} pairs of settings alike in all else" if pairs > 1 else "all else alike"
    percent, low, high = effect["percent"], effect["low"], effect["high"]
    interval = ""
    if low is not None and high is not None:
        covers = f"{documents} documents and {seeds} seeds" if seeds > 1 else f"{documents} documents"
        interval = f"; paired interval over {covers} {low:+.1f}% to {high:+.1f}%"
        if low <= 0 <= high:
            return (
                f"{capital(effect['value'])} is not distinguishable from {effect['against']} ({percent:+.1f}%, {held}"
                f"{interval})."
            )
    side = "above" if percent > 0 else "below"
    return f"{capital(effect['value'])} is {abs(percent):.1f}% {side} {effect['against']} ({held}{interval})."


def _convergence(setting: dict[str, Any], name: str, baseline: str, as_good: float) -> str:
    step = setting["as_good_from_step"]
    above = f"{100 * as_good:g}% above {baseline}"
    if step is None:
        return f"{capital(name)} is still more than {above} after {setting['final']['step']} steps."
    return f"{capital(name)} is at most {above} from step {step} on."


def _costs(
    context: dict[str, Any], chosen: dict[str, dict[str, Any]], names: dict[str, str], hardware: list[str]
) -> list[str]:
    """The cost of reaching the target, and which variants others dominate."""
    sentences, unit, target = [], context["hours_unit"], context["target"]
    if target is not None and chosen:
        reached = [
            f"{names[variant]} takes {setting['reached']['tokens']:,.0f} tokens"
            + (f" and {hours(setting['reached']['hours'], unit)}" if unit else "")
            + (f" ({dollars(setting['reached']['usd'])})" if setting["reached"]["usd"] is not None else "")
            for variant, setting in chosen.items()
            if setting["reached"]
        ]
        missed = [names[variant] for variant, setting in chosen.items() if not setting["reached"]]
        if missed:
            reached.append(f"{join(missed)} {'does' if len(missed) == 1 else 'do'} not reach it")
        where = f"To reach a perplexity of {target['perplexity']:.3f} ({target['source']})"
        sentences.append(f"{where}: {'; '.join(reached)}.")
    if unit is None and len(hardware) > 1:
        sentences.append(f"Hours are not compared because the trials ran on different hardware: {'; '.join(hardware)}.")
    if unit and len(chosen) > 1:
        beaten = [
            f"{names[variant]} is dominated by {_dominator(setting, context['settings'], names)}"
            for variant, setting in chosen.items()
            if setting["dominated"]
        ]
        if beaten:
            sentences.append(f"By perplexity and {unit}, {join(beaten)}.")
    return sentences


def _dominator(beaten: dict[str, Any], settings: list[dict[str, Any]], names: dict[str, str]) -> str:
    """The best setting that is at least as good for no more hours; by its variant, if it represents that."""

    def costs(setting: dict[str, Any]) -> tuple[float, float]:
        return setting["final"]["perplexity"], setting["hours"]

    better = [one for one in settings if costs(one) != costs(beaten) and _no_worse(costs(one), costs(beaten))]
    best = min(better, key=costs)
    return names[best["variant"]] if best["chosen"] else best["name"]


def _no_worse(costs: tuple[float, float], others: tuple[float, float]) -> bool:
    return costs[0] <= others[0] and costs[1] <= others[1]


def hours(value: float, unit: str) -> str:
    """Three significant digits with the unit: ``0.0123 GPU hours``."""
    return f"{value:.3g} {unit}"


def dollars(value: float) -> str:
    """``$1,234.50``; less than a cent is ``under $0.01``."""
    return f"${value:,.2f}" if value == 0 or value >= 0.01 else "under $0.01"


def _against(name: str, scores: DocumentScores, label: str, reference: DocumentScores) -> str:
    """A variant against the best untuned model."""
    gap = gap_interval(scores, reference)
    other, paired = f"{REFERENCE_PHRASES[label]} ({reference.perplexity:.3f})", _paired(gap, scores)
    if gap.sign < 0:
        return f"{capital(name)} beats {other} by {-gap.value:.1%}{paired}."
    if gap.sign > 0:
        return f"{capital(name)} does not beat {other}: it is {gap.value:.1%} above it{paired}."
    side = "above" if gap.value > 0 else "below"
    text = f"{capital(name)} is {abs(gap.value):.1%} {side} {other}{paired}"
    return f"{text}: not distinguishable." if paired else f"{text}."


def _spread(name: str, trials: list[dict[str, Any]], variant: str) -> str:
    """The range over a variant's seeds; the other sentences use their mean log-likelihood."""
    finals = [t["final"]["perplexity"] for t in trials if t["variant"] == variant and t["chosen"] and t["final"]]
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
        f"only {scored} scored, and intervals need at least {FEWEST_DOCUMENTS}. Hold out more data (--holdout, "
        "--eval-data), or raise --eval-documents if more is held out."
    )


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def join(words: list[str]) -> str:
    """``a, b and c``."""
    return and_list(tuple(words))
