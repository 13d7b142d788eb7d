"""The comparison in the terminal: the answer, tables, and what they do not tell; and its best trials."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Prints the answer, the tables, what neither tells of each context length, and what limits the answer."""
    headline = comparison.get("headline") or []
    for sentence in headline:
        console.print(sentence, style="bold", highlight=False)
    console.print(result_table(comparison))
    if effects := effect_table(comparison):
        console.print(effects)
    console.print()
    of_lengths = [sentence for context in comparison["contexts"] for sentence in context["sentences"]]
    for sentence in of_lengths + [sentence for sentence in comparison["sentences"] if sentence not in headline]:
        console.print(sentence)


def result_table(comparison: dict[str, Any]) -> Table:
    """One row a trial, and one for the mean of a setting's seeds; a dash where there is no value.

    With axes, a setting with several seeds has the row of its mean alone; the report has the others.
    """
    several = any(len(setting["seeds"]) > 1 for context in comparison["contexts"] for setting in context["settings"])
    table = Table(
        title=f"\nPerplexity on held-out text, {comparison['confidence']:.0%} intervals over documents"
        + (", of means over seeds too" if several else ""),
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("context", justify="right")
    table.add_column("setting", no_wrap=not comparison["axes"])
    within = f"within {100 * comparison['as_good']:g}% from"
    for name in ("perplexity", "interval", _gap_heading(comparison), within, "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for context in comparison["contexts"]:
        length = f"{context['context_length']:,}"
        for reference in context["references"]:
            table.add_row(length, reference["label"], *_interval(reference), "-", "-", "-", style="dim")
        means = {setting["fingerprint"]: setting for setting in context["settings"] if len(setting["seeds"]) > 1}
        of_seeds = {t["fingerprint"]: s for s in means.values() for t in _trials_of(s, context)}
        for trial in context["trials"]:
            setting = of_seeds.get(trial["fingerprint"])
            won = trial["variant"] == context["winner"] and trial["chosen"]
            if setting is None or not comparison["axes"]:
                table.add_row(
                    length,
                    _name(trial, context["trials"], comparison),
                    *(_interval(trial["final"]) if trial["final"] else (_state(trial), "-")),
                    *_against(trial["gap_to_full"]),
                    _speed([trial]),
                    style="bold" if won and setting is None else None,
                )
            if setting and trial is (seeds := _trials_of(setting, context))[-1]:
                table.add_row(
                    length,
                    f"{setting['name']}, mean of {len(seeds)} seeds",
                    *_interval(setting["final"]),
                    *_against(setting["gap"]),
                    _speed(seeds),
                    style="bold" if won else None,
                )
    return table


def _trials_of(setting: dict[str, Any], context: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished trials of a setting, one a seed."""
    return [
        trial
        for trial in context["trials"]
        if trial["final"]
        and trial["variant"] == setting["variant"]
        and trial["learning_rate"] == setting["learning_rate"]
        and trial["seed"] in setting["seeds"]
    ]


def effect_table(comparison: dict[str, Any]) -> Table | None:
    """What each axis changes with the others held, a row a value and context length; None without axes."""
    if not any(context["effects"] for context in comparison["contexts"]):
        return None
    table = Table(
        title=f"\nEffect of each axis on perplexity, the others held; paired {comparison['confidence']:.0%} intervals",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for name in ("context", "axis", "value", "against", "effect", "interval", "pairs"):
        table.add_column(name, justify="left" if name in ("axis", "value", "against") else "right")
    for context in comparison["contexts"]:
        for effect in context["effects"]:
            low, high = effect["low"], effect["high"]
            table.add_row(
                f"{context['context_length']:,}", effect["label"], effect["value"], effect["against"],
                f"{effect['percent']:+.1f}%", "-" if low is None else f"{low:+.1f}% to {high:+.1f}%",
                str(len(effect["matched"])),
            )  # fmt: skip
    return table


def _gap_heading(comparison: dict[str, Any]) -> str:
    return "gap to baseline" if comparison["baseline"] else "gap to full"


def _name(trial: dict[str, Any], trials: list[dict[str, Any]], comparison: dict[str, Any]) -> str:
    """The method, with the part of the label that sets a trial apart; with axes the name that the report shows."""
    if comparison["axes"]:
        return trial["name"]
    siblings = [other for other in trials if other["method"] == trial["method"]]
    if len(siblings) == 1:
        return trial["method"]
    method, _, *distinction = trial["label"].split(" ")
    seed = " seed 0" if not trial["seed"] and any(other["seed"] for other in siblings) else ""
    return " ".join([method, *distinction]) + seed


def _state(trial: dict[str, Any]) -> str:
    state = trial["state"]
    return f"{state} at {trial['last_step']}" if state in ("stopped", "cancelled") else state


def _speed(trials: list[dict[str, Any]]) -> str:
    """The mean of their tokens per second."""
    known = [trial["tokens_per_second"] for trial in trials if trial["tokens_per_second"]]
    return f"{fmean(known):,.0f}" if known else "-"


def _against(gap: dict[str, Any] | None) -> tuple[str, str]:
    """The gap to the baseline, and from which step on it is as good."""
    if gap is None:
        return "-", "-"
    step = gap["as_good_from_step"]
    return f"{gap['percent']:+.1f}%", f"step {step}" if step is not None else "not reached"


def _interval(value: dict[str, float | None]) -> tuple[str, str]:
    known = value["low"] is not None and value["high"] is not None
    return f"{value['perplexity']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}" if known else "-"


def best_trials(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The trial to export at each context length: of the setting with the lowest perplexity, the best seed."""
    best = []
    for context in comparison["contexts"]:
        finished = [t for t in context["trials"] if t["variant"] == context["lowest"] and t["chosen"]]
        best += sorted(finished, key=lambda trial: trial["final"]["perplexity"])[:1]
    return best
