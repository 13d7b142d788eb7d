"""Runs side by side: their differences, their curves, and which is better, if that is established."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.compare.answer import as_percent
from orchestrator.compare.outcomes import Outcome
from orchestrator.compare.runs import Run, differences
from orchestrator.compare.words import join, too_few
from orchestrator.records import trial_cost
from workloads.evaluation.intervals import CONFIDENCE, FEWEST_DOCUMENTS, gap_interval, perplexity_interval


def side_by_side(runs: list[Run]) -> dict[str, Any]:
    """The comparison as plain data, ready for JSON; the others are compared with the first run.

    ``differences`` and ``same``: see :func:`orchestrator.compare.runs.differences`. ``curve``: a row for each step at
    which any was evaluated, with each run's tokens and perplexity, and its perplexity above the first's in percent with
    the paired interval, where both were evaluated on the same documents. ``winner``: an index into ``runs``, or None;
    ``verdict`` is sentences: which is better and how surely, or why that is not established.
    """
    outcomes = [Outcome(run.trial, run.record) for run in runs]
    differ, same = differences(runs)
    why_not = [_scored_differently(outcomes[0], outcome) for outcome in outcomes]
    curve = _curve(outcomes, [reason is None for reason in why_not])
    reasons = [f"{run.name}: {reason}" for run, reason in zip(runs, why_not) if reason]
    winner, verdict = _verdict(runs, outcomes, "; ".join(reasons))
    return {
        "runs": [_describe(run, outcome) for run, outcome in zip(runs, outcomes)],
        "differences": differ,
        "same": same,
        "scored_on_the_same_documents": not reasons,
        "curve": curve,
        "winner": winner,
        "verdict": verdict,
    }


def _describe(run: Run, outcome: Outcome) -> dict[str, Any]:
    record, scores = run.record, outcome.scores()
    interval = perplexity_interval(scores) if scores and outcome.finished else None
    return {
        "name": run.name,
        "fingerprint": run.trial.fingerprint,
        "folder": str(run.folder),
        "state": record.state,
        "reason": record.reason,
        "steps": record.last_step,
        "of_steps": run.trial.training.steps,
        "final": interval and {"perplexity": interval.value, "low": interval.low, "high": interval.high},
        "hours": trial_cost.total(trial_cost.hours_by_step(record)),
        "hours_unit": trial_cost.unit_of([record]) or "hours",
        "usd": trial_cost.total(trial_cost.dollars_by_step(record)),
        "tokens_per_second": record.tokens_per_second,
    }


def _scored_differently(first: Outcome, other: Outcome) -> str | None:
    """Why the perplexities of two runs cannot be compared; None if their scored tokens are the same."""
    ours, theirs = first.trial, other.trial
    for what, one, another in (
        ("the data", ours.identities.data, theirs.identities.data),
        ("the tokenizer", ours.identities.tokenizer, theirs.identities.tokenizer),
        *(
            (name.replace("_", " "), getattr(ours.training, name), getattr(theirs.training, name))
            for name in ("task", "context_length", "eval_documents", "eval_span")
        ),
    ):
        if one != another:
            return f"{what} differs ({one} and {another})"
    one_scores, other_scores = first.scores(), other.scores()
    if one_scores and other_scores and not np.array_equal(one_scores.tokens, other_scores.tokens):
        return "the scored documents differ in length"
    return None


def _curve(outcomes: list[Outcome], alike: list[bool]) -> list[dict[str, Any]]:
    curves = [{event.step: event for event in o.record.curve(o.context_length)} for o in outcomes]
    rows = []
    for step in sorted(set().union(*curves)):
        events = [curve.get(step) for curve in curves]
        gaps = [
            gap_interval(outcome.evaluated(step), outcomes[0].evaluated(step))
            if paired and event and events[0]
            else None
            for outcome, event, paired in zip(outcomes[1:], events[1:], alike[1:])
        ]
        rows.append(
            {
                "step": step,
                "tokens": [event and event.tokens for event in events],
                "perplexity": [event and event.perplexity for event in events],
                "gaps": [gap and as_percent(gap) for gap in gaps],
            }
        )
    return rows


def _verdict(runs: list[Run], outcomes: list[Outcome], why_not: str) -> tuple[int | None, list[str]]:
    """The index of the winner, or None, and the sentences."""
    sentences = [
        f"{run.name} is {_state(run)} and does not compete." for run, o in zip(runs, outcomes) if not o.finished
    ]
    if why_not:
        return None, [
            *sentences,
            f"No winner: not all were scored on the same tokens as {runs[0].name} ({why_not}), so their perplexities "
            "cannot be compared.",
        ]
    finished = [place for place, outcome in enumerate(outcomes) if outcome.finished]
    if len(finished) < 2:
        return None, [*sentences, "No winner: fewer than two of the runs have finished."]
    ranked = sorted(finished, key=lambda place: outcomes[place].evaluated().perplexity)
    best, established = ranked[0], True
    num_documents = outcomes[best].evaluated().num_documents
    for place in ranked[1:]:
        gap = gap_interval(outcomes[place].evaluated(), outcomes[best].evaluated())
        text = f"{runs[place].name} ends {gap.value:.2%} above {runs[best].name}"
        if gap.low is not None:
            text += f" (paired {CONFIDENCE:.0%} interval over documents {gap.low:+.2%} to {gap.high:+.2%})"
            if gap.sign == 0:
                text += ": not distinguishable"
        if gap.sign == 0:
            established = False
        sentences.append(f"{text}.")
    if num_documents < FEWEST_DOCUMENTS:
        return None, [*sentences, f"No winner: {too_few(num_documents)}"]
    if not established:
        return None, [*sentences, f"No winner: {runs[best].name} is not distinguishable from all others."]
    steps = [f"{runs[place].name} {runs[place].record.last_step:,}" for place in ranked]
    if len({runs[place].record.last_step for place in ranked}) > 1:
        sentences.append(f"They trained for different numbers of steps: {join(steps)}.")
    return best, [*sentences, f"{runs[best].name} is better."]


def _state(run: Run) -> str:
    at = f" at step {run.record.last_step}" if run.record.steps else ""
    reason = f" ({run.record.reason})" if run.record.reason else ""
    return ("stopped early" if run.record.state == "stopped" else run.record.state) + at + reason
