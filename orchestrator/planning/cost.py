"""What a plan costs in all: device hours, money, time and disk, held against the budget.

Money is what the machines cost, not the trials: from the start of a machine's first trial to the end of its last, idle
devices included, and the head all the while. Machines that nothing starts and ends are paid for until the last trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.planning.cluster import Cluster
from orchestrator.planning.estimate import Estimate, Estimator
from orchestrator.planning.planner import Planned
from orchestrator.planning.rates import Rates
from orchestrator.planning.scheduling import Job, Schedule
from orchestrator.run_options import RunOptions
from workloads.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What is left to do, for all trials together that can run. None: unknown for at least one.

    Args:
        trials: how many trials this is the total of.
        infeasible: how many others do not fit.
        hours: of all devices together: GPU hours where there are GPUs, else CPU hours.
        usd: what the machines cost.
        usd_per_hour: the same an hour, while the most machines are in use.
        machine_hours: of all machines together, without the head.
        machines: how many are used.
        makespan: seconds until the last trial ends.
        disk: bytes of checkpoints.
    """

    trials: int
    infeasible: int
    hours: float | None
    usd: float | None
    usd_per_hour: float | None
    machine_hours: float | None
    machines: int
    makespan: float | None
    disk: int


def sum_up(planned: Iterable[Planned], upcoming: Iterable[Estimate], estimator: Estimator) -> Totals:
    """Adds up what is left to do.

    Args:
        upcoming: estimates of the trials that a search has not suggested yet.
    """
    planned = list(planned)
    estimates = [p.estimate for p in planned if p.action not in ("known", "stopped")] + list(upcoming)
    to_do = [estimate for estimate in estimates if estimate.refusal is None]
    return total_of(to_do, estimator, infeasible=len(estimates) - len(to_do))


def total_of(to_do: Sequence[Estimate], estimator: Estimator, infeasible: int = 0) -> Totals:
    """The totals of trials that can run."""
    cluster, rates = estimator.cluster, estimator.rates
    schedule = _schedule(to_do, estimator)
    busy = _machine_seconds(schedule, cluster) if schedule else ()
    used = [(seconds, rate) for seconds, rate in zip(busy, rates.machines) if seconds]
    return Totals(
        trials=len(to_do),
        infeasible=infeasible,
        hours=_sum(estimate.hours for estimate in to_do),
        usd=_usd([*used, (schedule.seconds, rates.head)]) if schedule else None,
        usd_per_hour=_sum([rate for _, rate in used] + [rates.head]) if schedule else None,
        machine_hours=sum(seconds for seconds, _ in used) / 3600 if schedule else None,
        machines=len(used),
        makespan=schedule.seconds if schedule else None,
        disk=sum(estimate.disk for estimate in to_do),
    )


def _schedule(to_do: Sequence[Estimate], estimator: Estimator) -> Schedule | None:
    """When each runs; None if the time of one is unknown, or one has no room."""
    if any(estimate.seconds is None for estimate in to_do):
        return None
    jobs = [Job({}, estimate.workers, estimate.seconds or 0.0) for estimate in to_do]
    jobs.sort(key=lambda job: (job.workers, job.workers * job.seconds), reverse=True)
    options = estimator.options
    schedule = Schedule.of(jobs, estimator.cluster.slots_by_node(options), options.max_concurrent)
    return schedule if schedule.seconds < math.inf else None


def _machine_seconds(schedule: Schedule, cluster: Cluster) -> tuple[float, ...]:
    """How long each machine is paid for."""
    if cluster.worker is not None:  # an autoscaler starts and ends it
        return schedule.machines
    return (schedule.seconds,) * len(schedule.machines)


def _usd(parts: Iterable[tuple[float, float | None]]) -> float | None:
    return _sum(None if rate is None else seconds / 3600 * rate for seconds, rate in parts)


def _sum(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def within_rate(cluster: Cluster, rates: Rates, limit: float | None) -> Cluster:
    """The cluster with as many machines as --budget-usd-per-hour allows.

    Raises:
        InputError: not one is allowed, the price is unknown, or the machines run whether they are used or not.
    """
    if limit is None:
        return cluster
    flag = f"--budget-usd-per-hour {limit:g}"
    all_together = _sum([*rates.machines, rates.head])
    if all_together is None:
        raise InputError(
            f"{flag}: the price of an hour is unknown; give --price-per-hour or --prices, or drop the flag"
        )
    if all_together <= limit:
        return cluster
    if cluster.worker is None:
        raise InputError(
            f"{flag}: the machines cost {all_together:,.4g} US dollars an hour together; raise the limit, or give a "
            "smaller cluster"
        )
    machine, head = rates.machines[0] or 0.0, rates.head or 0.0
    allowed = int((limit - head) // machine) if limit > head else 0
    if not allowed:
        raise InputError(
            f"{flag}: one machine and the head cost {machine + head:,.4g} US dollars an hour; raise the limit"
        )
    return cluster.with_machines(allowed)


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
