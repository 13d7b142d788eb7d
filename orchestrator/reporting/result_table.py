"""The comparison as a table for the terminal, and its best trials."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def result_table(comparison: dict[str, Any]) -> Table:
    """One row a setting and context length; a dash where there is no value."""
    table = Table(
        title=f"\nPerplexity on held-out text, {comparison['confidence']:.0%} intervals over documents",
        title_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column("context", justify="right")
    table.add_column("setting", no_wrap=True)
    within = f"within {100 * comparison['as_good']:g}% from"
    for name in ("perplexity", "interval", "gap to full", within, "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for context in comparison["contexts"]:
        length = f"{context['context_length']:,}"
        for reference in context["references"]:
            table.add_row(length, reference["label"], *_interval(reference), "-", "-", "-", style="dim")
        for trial in context["trials"]:
            winner = trial["method"] == context["winner"] and trial["chosen"]
            gap = trial["gap_to_full"]
            table.add_row(
                length,
                _name(trial, context["trials"]),
                *(_interval(trial["final"]) if trial["final"] else (_state(trial), "-")),
                f"{gap['percent']:+.1f}%" if gap else "-",
                _within(gap),
                f"{trial['tokens_per_second']:,.0f}" if trial["tokens_per_second"] else "-",
                style="bold" if winner else None,
            )
    return table


def _name(trial: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    """The method, with the part of the label that sets a trial apart from others of the method and length."""
    siblings = [other for other in trials if other["method"] == trial["method"]]
    if len(siblings) == 1:
        return trial["method"]
    method, _, *distinction = trial["label"].split(" ")
    seed = " seed 0" if not trial["seed"] and any(other["seed"] for other in siblings) else ""
    return " ".join([method, *distinction]) + seed


def _state(trial: dict[str, Any]) -> str:
    state = trial["state"]
    return f"{state} at {trial['last_step']}" if state in ("stopped", "cancelled") else state


def _within(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return "-"
    step = gap["as_good_from_step"]
    return f"step {step}" if step is not None else "not reached"


def _interval(value: dict[str, float | None]) -> tuple[str, str]:
    known = value["low"] is not None and value["high"] is not None
    return f"{value['perplexity']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}" if known else "-"


def winners(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The best trial of each context length: of the winning setting, the seed with the lowest perplexity."""
    best = []
    for context in comparison["contexts"]:
        finished = [t for t in context["trials"] if t["method"] == context["winner"] and t["chosen"]]
        best += sorted(finished, key=lambda trial: trial["final"]["perplexity"])[:1]
    return best
