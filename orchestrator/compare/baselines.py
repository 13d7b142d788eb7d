"""What each variant is held against: the requested baseline, else full fine-tuning, else the best variant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.compare.outcomes import Setting
from orchestrator.variants import Variant, nearest_variant


@dataclass(frozen=True)
class Baselines:
    """The baseline of each variant.

    Args:
        of: the baseline's id by the variant's; a baseline has none.
        target: the variant whose final perplexity is the target, or None.
        explicit: whether they were requested or are full fine-tuning, rather than the best variant.
        notes: a sentence for each that is not what one would expect.
    """

    of: dict[str, str]
    target: str | None
    explicit: bool
    notes: list[str]


def choose_baselines(best: dict[str, Setting], ranked: list[str], requested: Variant | None) -> Baselines:
    """The baselines of one context length.

    Args:
        best: the setting that represents each variant, by its id.
        ranked: the variants' ids, lowest perplexity first.
        requested: the variant that the user named, which may not have finished here.
    """
    notes = []
    if requested is not None and requested.id in best:
        return Baselines({one: requested.id for one in ranked if one != requested.id}, requested.id, True, [])
    if requested is not None:
        notes.append(f"The baseline {requested.name} has not finished, so the default is used.")
    full = [best[one].variant for one in ranked if best[one].variant.method == "full"]
    if not full:
        return Baselines({one: ranked[0] for one in ranked[1:]}, None, False, notes)
    chosen = {
        one: nearest
        for one in ranked
        if best[one].variant.method != "full" and (nearest := nearest_variant(best[one].variant, full))
    }
    notes += _inexact([(best[one].variant, nearest) for one, nearest in chosen.items()])
    return Baselines({one: nearest.id for one, nearest in chosen.items()}, full[0].id, True, notes)


def _inexact(pairs: Iterable[tuple[Variant, Variant]]) -> list[str]:
    """A sentence for each baseline that differs in an axis from the variants which it stands for."""
    inexact: dict[str, list[str]] = {}
    for variant, baseline in pairs:
        if variant.differences(baseline) != {"method"}:
            inexact.setdefault(baseline.name, []).append(variant.name)
    return [
        f"Full fine-tuning has not finished with the axis values of {', '.join(names)}: the baseline is {baseline}."
        for baseline, names in inexact.items()
    ]
