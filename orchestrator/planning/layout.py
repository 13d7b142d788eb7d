"""Another number of workers for each trial that costs less, or takes less time for the same money."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from orchestrator.planning.cost import Totals, total_of
from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.planning.planner import Planned
from orchestrator.terminal import duration, usd

# A suggestion is worth a line from these on; a plan's own error is about a tenth (docs/budget.md).
FASTER, CHEAPER, SAME_MONEY = 0.1, 0.05, 0.02


def suggest_layout(planned: Sequence[Planned], now: Totals, estimator: Estimator, fit: bool) -> str | None:
    """One line on the best other number of workers, or None if none is clearly better.

    Only on GPUs whose speed and price are known, and where every trial can run; a search's own trials are not counted.
    """
    options, cluster = estimator.options, estimator.cluster
    if not cluster.gpus or now.usd is None or now.makespan is None or now.infeasible:
        return None
    to_do = [p for p in planned if p.trains]
    batches = [p.trial.training.batch for p in to_do if p.trial.training.steps]
    found: list[tuple[int, Totals]] = []
    for workers in (2**power for power in range(cluster.most_workers(options).bit_length())):
        if workers == options.workers or any(batch % workers for batch in batches):
            continue
        other = estimator.with_options(dataclasses.replace(options, workers=workers))
        estimates: list[Estimate] = [other.estimate(p.trial, p.record, fit) for p in to_do]
        if not any(estimate.refusal for estimate in estimates):
            found.append((workers, total_of(estimates, other)))
    better = [(workers, total) for workers, total in found if _is_better(total, now)]
    if not better:
        return None
    workers, best = min(better, key=lambda each: (each[1].makespan or 0.0) * (each[1].usd or 0.0))
    assert best.makespan is not None and best.usd is not None
    same = abs(best.usd - now.usd) <= SAME_MONEY * now.usd
    money = " for the same money" if same else f", {usd(best.usd)} instead of {usd(now.usd)}"
    each = f"{workers} worker{'s' * (workers > 1)} a trial (--workers {workers})"
    return f"{each}: {duration(best.makespan)} instead of {duration(now.makespan)}{money}"


def _is_better(total: Totals, now: Totals) -> bool:
    """Whether it is clearly cheaper and hardly slower, or clearly faster and hardly dearer."""
    if total.usd is None or total.makespan is None or now.usd is None or now.makespan is None:
        return False
    money, time = total.usd / now.usd, total.makespan / now.makespan
    return (time <= 1 - FASTER and money <= 1 + SAME_MONEY) or (money <= 1 - CHEAPER and time <= 1 + SAME_MONEY)
