"""The effect of each axis with the others held: the mean difference over variants that differ in that axis alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from orchestrator.compare.outcomes import Setting, seeds_in_common
from workloads.evaluation.intervals import DocumentScores, Interval, gap_interval
from workloads.wording import axis_label, axis_value


def effects(best: dict[str, Setting], axes: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each axis, each value against its first, or full fine-tuning: see ``dashboards.comparison.Effect``.

    The method counts as an axis too. Nothing without axes: then the gaps between methods say it all.

    Args:
        best: the setting that represents each variant, by its id.
    """
    found = []
    for field in ("method", *axes) if axes else ():
        values = dict.fromkeys(
            setting.variant.coordinates()[field] for setting in best.values() if field in setting.variant.coordinates()
        )
        first, *others = sorted(values, key=lambda value: (field, value) != ("method", "full")) or (None,)
        for value in others:
            matched = _matched(best, field, value, first)
            seeds = seeds_in_common(setting for pair in matched for setting in pair)
            if not seeds:
                continue
            gap = mean_gap(matched, seeds)
            found.append(
                {
                    "axis": field,
                    "label": axis_label(field),
                    "value": axis_value(field, value),
                    "against": axis_value(field, first),
                    "percent": 100 * gap.value,
                    "low": None if gap.low is None else 100 * gap.low,
                    "high": None if gap.high is None else 100 * gap.high,
                    "seeds": seeds,
                    "matched": [[one.variant.id, other.variant.id] for one, other in matched],
                }
            )
    return found


def mean_gap(matched: Iterable[tuple[Setting, Setting]], seeds: list[int]) -> Interval:
    """The mean difference in log perplexity of pairs of settings, as a fraction, paired over documents and seeds."""
    pairs = [(one.scores(seeds=seeds), other.scores(seeds=seeds)) for one, other in matched]
    tokens = pairs[0][0].tokens
    ours, theirs = (
        DocumentScores(np.mean([pair[side].nll for pair in pairs], axis=0), tokens, tuple(seeds)) for side in (0, 1)
    )
    return gap_interval(ours, theirs)


def _matched(best: dict[str, Setting], field: str, value: Any, first: Any) -> list[tuple[Setting, Setting]]:
    """The pairs with the two values of a field and the same of every other axis that has an effect on both."""
    return [
        (one, other)
        for one, other in itertools.product(best.values(), best.values())
        if one.variant.coordinates().get(field) == value
        and other.variant.coordinates().get(field) == first
        and one.variant.differences(other.variant) == {field}
    ]
