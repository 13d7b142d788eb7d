"""What a plan costs in all: device hours, money, time and disk, held against the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.planning.cluster import Cluster
from orchestrator.planning.estimate import Estimate, makespan
from orchestrator.planning.planner import Planned
from orchestrator.run_options import RunOptions
from workloads.errors import InputError


@dataclass(frozen=True)
class Totals:
    """What is left to do, for all trials together. None: unknown for at least one.

    Args:
        hours: of all devices together: GPU hours where there are GPUs, else CPU hours.
        makespan: seconds until the last trial ends.
        disk: bytes of checkpoints.
    """

    hours: float | None
    usd: float | None
    makespan: float | None
    disk: int


def sum_up(planned: Iterable[Planned], upcoming: Iterable[Estimate], cluster: Cluster, options: RunOptions) -> Totals:
    """Adds up what is left to do.

    Args:
        upcoming: estimates of the trials that a search has not suggested yet.
    """
    to_do = [p.estimate for p in planned if p.trains] + list(upcoming)
    jobs = [(e.workers, e.seconds) for e in to_do if e.seconds is not None]
    return Totals(
        hours=_sum(e.hours for e in to_do),
        usd=_sum(e.usd for e in to_do),
        makespan=makespan(jobs, cluster.slots(options), options.max_concurrent) if len(jobs) == len(to_do) else None,
        disk=sum(e.disk for e in to_do),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def refuse_over_budget(total: Totals, spent: tuple[float, float | None], options: RunOptions) -> None:
    """Refuses a plan that exceeds --budget-hours or --budget-usd.

    Args:
        spent: device hours and US dollars that earlier runs of this sweep have taken.

    Raises:
        InputError: the sweep would exceed its budget, or its cost is unknown.
    """
    for flag, limit, before, left, unit in (
        ("--budget-hours", options.budget_hours, spent[0], total.hours, "device hours"),
        ("--budget-usd", options.budget_usd, spent[1], total.usd, "US dollars"),
    ):
        if limit is None:
            continue
        if left is None:
            needed = "--price-per-hour" if flag == "--budget-usd" else "a device whose speed is known"
            raise InputError(f"{flag} {limit:g}: the cost of this sweep is unknown; give {needed}, or drop the flag")
        if left and left + (before or 0) > limit:
            raise InputError(
                f"{flag} {limit:g}: the rest of this sweep takes about {left:,.3g} {unit}, and {before or 0:,.3g} "
                "are already spent; raise the limit, or sweep fewer lengths, methods or steps"
            )
