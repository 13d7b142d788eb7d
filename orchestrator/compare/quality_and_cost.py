"""Perplexity against cost: the cost of reaching a perplexity, and which settings are dominated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A point of a curve: the perplexity, and what had been spent by then. USD is None if no price is known."""

    step: float
    tokens: float
    hours: float
    usd: float | None
    perplexity: float


def reach(curve: list[Evaluation], target: float) -> Evaluation | None:
    """The cost of first reaching a perplexity, or None if the curve never does.

    Between the last evaluation above it and the first at or below it, the logarithm of the perplexity is interpolated
    linearly in steps, tokens, hours and dollars.
    """
    if curve and curve[0].perplexity <= target:
        return curve[0]
    for before, after in pairwise(curve):
        if before.perplexity > target >= after.perplexity:
            share = math.log(before.perplexity / target) / math.log(before.perplexity / after.perplexity)

            def between(start: float, end: float, share: float = share) -> float:
                return start + share * (end - start)

            return Evaluation(
                step=between(before.step, after.step),
                tokens=between(before.tokens, after.tokens),
                hours=between(before.hours, after.hours),
                usd=None if before.usd is None or after.usd is None else between(before.usd, after.usd),
                perplexity=target,
            )
    return None


def dominated(points: list[tuple[float, float]]) -> list[bool]:
    """For each (hours, perplexity): whether another point has no more of either and less of one."""
    return [any(other != point and all(o <= p for o, p in zip(other, point)) for other in points) for point in points]
