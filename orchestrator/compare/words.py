"""The wording of a comparison: labels, and sentences for the terminal and the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from orchestrator.terminal import and_list
from orchestrator.variants import Variant
from workloads.evaluation.intervals import CONFIDENCE, FEWEST_DOCUMENTS, FEWEST_TO_RESAMPLE
from workloads.models.positions import POSITIONS
from workloads.wording import LABELS, METHOD_LABELS, METHODS, axis_label

UNCHANGED = f"untuned, {POSITIONS['none'].label}"
REFERENCE_LABELS: dict[str, str] = {"none": UNCHANGED} | {
    name: f"untuned, {kind.label}" for name, kind in POSITIONS.items()
}
REFERENCE_PHRASES = {
    REFERENCE_LABELS[name]: f"the untuned model with {kind.label}" for name, kind in POSITIONS.items()
} | {UNCHANGED: "the unchanged model"}
# Sentences tell of this many variants; tables have all.
FEW = 2


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


def headline(contexts: list[dict[str, Any]], names: dict[str, str] | None = None) -> list[str]:
    """A sentence for each context length: the best trained variant, against the best untuned model and its baseline.

    An untuned model that nothing beats comes first.

    Args:
        names: of the variants, by id; by default the methods'.
    """
    called = METHOD_LABELS if names is None else names
    return _at_lengths(contexts, lambda context: _answer(context, called))


def summarise(contexts: list[dict[str, Any]], seeds: list[int], names: dict[str, str] | None = None) -> list[str]:
    """The :func:`headline`, and what limits it."""
    sentences = [*headline(contexts, names), *cautions(contexts)]
    if any(_rates(context["settings"], s["variant"])[1:] for context in contexts for s in context["settings"]):
        what = "variant" if any(context["effects"] for context in contexts) else "method"
        sentences.append(
            f"Each {what} is represented by the best of its settings, chosen by final perplexity on the scored "
            "documents themselves, which flatters it."
        )
    if len(seeds) == 1:
        sentences.append(
            f"Each setting has one seed: the {CONFIDENCE:.0%} intervals cover which documents were scored, not the "
            "variance between seeds."
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


def _answer(context: dict[str, Any], names: dict[str, str]) -> str:
    lowest, alike, untuned = context["lowest"], context["not_distinguishable"], context["against_untuned"]
    if lowest is None:
        return "At {at} no training has finished, so there is no winner."
    chosen = ranked(context)
    name, value = names[lowest], f"{chosen[0]['final']['perplexity']:.3f}"
    if (context["scored_documents"] or 0) < FEWEST_DOCUMENTS:
        return f"At {{at}} {name} measured lowest, {value}, but too few documents are scored for a winner."
    versus = _versus_baseline(context, chosen, names)
    if untuned:
        phrase = REFERENCE_PHRASES[untuned["reference"]]
        measured = next(one["perplexity"] for one in context["references"] if one["label"] == untuned["reference"])
        if untuned["low"] is None or untuned["high"] >= 0:
            relation = "beats" if untuned["low"] and untuned["low"] > 0 else "is distinguishable from"
            told = f"At {{at}} no trained model {relation} {phrase} ({measured:.3f}): the best, {name} ({value}), is "
            return f"{told}{difference(untuned, 'it', first=True)}{f', and {versus}' if versus else ''}."
        versus = join([difference(untuned, phrase, first=True), *([versus] if versus else [])])
    if alike:
        told = f"At {{at}} {name} has the lowest perplexity, {value}, not distinguishable from {_some(alike, names)}"
    elif len(chosen) == 1:
        told = f"At {{at}} {name} reaches a perplexity of {value}"
    else:
        told = f"At {{at}} {name} wins with a perplexity of {value}"
    return f"{told}: {versus}." if versus else f"{told}."


def _versus_baseline(context: dict[str, Any], chosen: list[dict[str, Any]], names: dict[str, str]) -> str | None:
    """The best variant against its baseline; if it is the baseline itself, or has none, the next best against it."""
    best, *others = chosen
    if best["gap"]:
        baseline = context["baselines"][best["variant"]]
        return difference(best["gap"], names[baseline], judged=baseline not in context["not_distinguishable"])
    if not others:
        return None
    percent, low, high = (others[0]["above_lowest"][key] for key in ("percent", "low", "high"))
    # Turned round: how far the best is below the next.
    turned = {"percent": _turned(percent), "low": _turned(high), "high": _turned(low)}
    other = others[0]["variant"]
    return difference(turned, names[other], judged=other not in context["not_distinguishable"])


def _turned(percent: float | None) -> float | None:
    """How far B is above A, in percent, from how far A is above B."""
    return None if percent is None else 100 * (1 / (1 + percent / 100) - 1)


def ranked(context: dict[str, Any]) -> list[dict[str, Any]]:
    """The setting that represents each variant, lowest perplexity first, over the seeds that all variants finished."""
    chosen = [setting for setting in context["settings"] if setting["chosen"]]
    return sorted(chosen, key=lambda setting: setting["above_lowest"]["percent"])


def difference(gap: dict[str, Any], other: str, *, first: bool = False, judged: bool = True) -> str:
    """``2.1% below the unchanged model (-2.6% to -1.6%)``.

    Args:
        first: of a sentence, which names the interval.
        judged: says so if the interval does not exclude zero.
    """
    percent, low, high = gap["percent"], gap["low"], gap["high"]
    size = "less than 0.1%" if abs(percent) < 0.05 else f"{abs(percent):.1f}%"
    text = f"{size} {'above' if percent > 0 else 'below'} {other}"
    if low is None or high is None:
        return text
    named = f"paired {CONFIDENCE:.0%} interval " if first else ""
    alike = ", not distinguishable" if judged and low <= 0 <= high else ""
    return f"{text} ({named}{low:+.1f}% to {high:+.1f}%{alike})"


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
    notes: list[str],
    seeds: list[int] | None,
    hardware: list[str],
) -> list[str]:
    """What neither the answer nor a table tells of one context length.

    Args:
        context: all its fields but the sentences.
        names: of the variants, by id.
        notes: on the baselines.
        seeds: those that the best settings of all variants finished; None if they have none in common.
        hardware: the trials' devices.
    """
    chosen = ranked(context)
    return [
        *_followers(context, chosen, names),
        *_chosen_rates(context["settings"], chosen, names),
        *_spreads(chosen[:FEW], context["trials"], names),
        *_unequal_seeds(chosen, seeds),
        *notes,
        *_costs(context, chosen, names, hardware),
        *_at_original_length(context, chosen, names),
    ]


def _followers(context: dict[str, Any], chosen: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """The next best variants, and whether they are distinguishable from the best."""
    if len(chosen) < 2:
        return []
    told = [
        f"{names[one['variant']]}, {difference(one['above_lowest'], 'it', first=place == 0)}"
        for place, one in enumerate(chosen[1 : FEW + 1])
    ]
    best = names[chosen[0]["variant"]]
    return [f"At {context['context_length']:,} tokens {best} is followed by {'; '.join(told)}."]


def _some(variants: list[str], names: dict[str, str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"{len(variants) - 3} more"] if len(variants) > 4 else []
    return join([names[variant] for variant in (variants[:3] if more else variants)] + more)


def _rates(settings: list[dict[str, Any]], variant: str) -> list[float]:
    """The learning rates that a variant finished with."""
    return sorted({setting["learning_rate"] for setting in settings if setting["variant"] == variant})


def _chosen_rates(settings: list[dict[str, Any]], chosen: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """What a sweep over the learning rate chose, and whether the grid may be too narrow."""
    words = []
    for setting in chosen:
        rates = _rates(settings, setting["variant"])
        if len(rates) > 1:
            edge = setting["learning_rate"] in (rates[0], rates[-1])
            words.append(
                f"{names[setting['variant']]} with {setting['learning_rate']:g} of "
                f"{join([f'{rate:g}' for rate in rates])}"
                + (" (the edge of the grid: a better one may be beyond it)" if edge else "")
            )
    if not words:
        return []
    each = "method" if all(setting["variant"] == setting["method"] for setting in chosen) else "variant"
    return [f"Each {each}'s learning rate is the one with the lowest final perplexity: {'; '.join(words)}."]


def _unequal_seeds(chosen: list[dict[str, Any]], seeds: list[int] | None) -> list[str]:
    if len({tuple(setting["seeds"]) for setting in chosen}) <= 1:
        return []
    each = "methods" if all(setting["variant"] == setting["method"] for setting in chosen) else "variants"
    if seeds is None:
        return [f"The {each} have no finished seed in common, so their gaps are not paired by seed."]
    these = join([str(seed) for seed in seeds])
    return [f"The {each} are compared over seed{'s' if len(seeds) > 1 else ''} {these}, which all of them finished."]


def _costs(
    context: dict[str, Any], chosen: list[dict[str, Any]], names: dict[str, str], hardware: list[str]
) -> list[str]:
    """The cost of reaching the target, and which variants no other dominates."""
    sentences, unit, target = [], context["hours_unit"], context["target"]
    at = f"at {context['context_length']:,} tokens"
    if target is not None and chosen:
        reaching = sorted((one for one in chosen if one["reached"]), key=lambda one: one["reached"]["tokens"])
        told = [f"{names[one['variant']]} {_takes(one['reached'], unit)}" for one in reaching[:FEW]]
        missed = [names[one["variant"]] for one in chosen if not one["reached"]]
        if len(reaching) > FEW:
            told.append(f"{len(reaching) - FEW} more {'reaches' if len(reaching) == FEW + 1 else 'reach'} it later")
        if missed:
            who = join(missed) if len(missed) <= FEW else f"{len(missed)} of {len(chosen)}"
            told.append(f"{who} {'does' if len(missed) == 1 else 'do'} not reach it")
        where = f"To reach a perplexity of {target['perplexity']:.3f} {at} ({target['source']})"
        sentences.append(f"{where}: {'; '.join(told)}.")
    if unit is None and len(hardware) > 1:
        sentences.append(f"Hours are not compared because the trials ran on different hardware: {'; '.join(hardware)}.")
    if unit and any(one["dominated"] for one in chosen):
        front = [one["variant"] for one in chosen if not one["dominated"]]
        verb = "dominates every other setting" if len(front) == 1 else "are dominated by no other setting"
        if front:
            sentences.append(f"By perplexity and {unit} {at}, {_some(front, names)} {verb}.")
    return sentences


def _takes(reached: dict[str, Any], unit: str | None) -> str:
    if not reached["tokens"]:
        return "is there before training"
    spent = hours(reached["hours"], unit) if unit else f"{reached['tokens']:,.0f} tokens"
    return f"takes {spent}" + (f" ({dollars(reached['usd'])})" if reached["usd"] is not None else "")


def hours(value: float, unit: str) -> str:
    """Three significant digits with the unit: ``0.0123 GPU hours``."""
    return f"{value:.3g} {unit}"


def dollars(value: float) -> str:
    """``$1,234.50``; less than a cent is ``under $0.01``."""
    return f"${value:,.2f}" if value == 0 or value >= 0.01 else "under $0.01"


def _spreads(chosen: list[dict[str, Any]], trials: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """The range over each variant's seeds; the other sentences use their mean log-likelihood."""
    told = []
    for setting in chosen:
        variant = setting["variant"]
        finals = [t["final"]["perplexity"] for t in trials if t["variant"] == variant and t["chosen"] and t["final"]]
        if len(finals) > 1:
            told.append(f"{names[variant]} from {min(finals):.3f} to {max(finals):.3f} with {len(finals)} seeds")
    return [f"Final perplexities of single seeds: {'; '.join(told)}."] if told else []


def _at_original_length(context: dict[str, Any], chosen: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """How training for the longer context changed perplexity at the pretrained length."""
    after = defaultdict(list)
    for trial in context["trials"]:
        if (at := trial["original_length"]) and trial["chosen"] and at["before"] is not None:
            after[trial["variant"]].append(at)
    told = [setting["variant"] for setting in chosen if setting["variant"] in after]
    if not told:
        return []
    at = after[told[0]][0]
    best = _after(after[told[0]])
    text = (
        f"At the original {at['context_length']:,} tokens the unchanged model scores {at['before']:.3f}; trained at "
        f"{context['context_length']:,}, {names[told[0]]} {best}"
    )
    others = [each for variant in told[1:] for each in after[variant]]
    what = names[told[1]] if len(told) == 2 else "others"
    return [f"{text} and {what} {_after(others)}." if others else f"{text}."]


def _after(each: list[dict[str, Any]]) -> str:
    low, high = (f"{bound(at['after'] for at in each):.3f}" for bound in (min, max))
    return low if low == high else f"{low} to {high}"


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
