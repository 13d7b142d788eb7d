"""Cost: device hours, dollars, the cost of reaching a perplexity, and which settings others dominate.

Hours are of training steps alone (a step's seconds x the devices of the attempt that made it): how often a sweep
evaluates, saves and starts is its own affair, and a step that a crash had made twice counts once. GPU hours where the
workers had GPUs; CPU hours, of a thread each, where they had none; worker-hours of journals that do not say.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.records.events import Started
from orchestrator.records.trial_record import TrialRecord

UNITS = {"gpu": "GPU hours", "cpu": "CPU hours", None: "worker-hours"}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A point of a curve: the perplexity, and what had been spent by then (USD None where no price is known)."""

    step: float
    tokens: float
    hours: float
    usd: float | None
    perplexity: float


def hours_by_step(record: TrialRecord) -> dict[int, float]:
    """Hours of all devices together from the start to the end of each step."""
    return _add_up(record, lambda attempt: attempt.num_devices)


def dollars_by_step(record: TrialRecord) -> dict[int, float] | None:
    """Likewise in USD; None where an attempt had no price."""
    if not record.attempts or any(attempt.usd_per_device_hour is None for attempt in record.attempts):
        return None
    return _add_up(record, lambda attempt: attempt.num_devices * (attempt.usd_per_device_hour or 0.0))


def held(record: TrialRecord, sweep: str | None = None) -> tuple[float, float | None]:
    """The hours for which the trial's devices were held, and their price in USD.

    From each attempt's start to its last line: what is paid for, with evaluation, saving and what a crash lost. USD is
    None if an attempt had no price. With ``sweep``, only of the attempts that this sweep made.
    """
    hours = 0.0
    usd: float | None = 0.0
    for attempt, heard in zip(record.attempts, record.attempts_heard):
        if sweep is None or attempt.sweep in (None, sweep):
            taken = attempt.num_devices * (heard - attempt.time) / 3600
            price = attempt.usd_per_device_hour
            hours += taken
            usd = None if usd is None or price is None else usd + taken * price
    return hours, usd


def _add_up(record: TrialRecord, an_hour: Callable[[Started], float]) -> dict[int, float]:
    began = [attempt.time for attempt in record.attempts]
    total, by_step = 0.0, {}
    for step in sorted(record.steps):
        event = record.steps[step]
        place = max(0, bisect.bisect_right(began, event.time) - 1)
        attempt = record.attempts[place] if record.attempts else Started()
        total += event.seconds / 3600 * an_hour(attempt)
        by_step[step] = total
    return by_step


def device_of(record: TrialRecord) -> str:
    """What one device of the trial is; of several kinds, all of them."""
    named = {attempt.device_name or attempt.hardware or "unknown" for attempt in record.attempts}
    return ", ".join(sorted(named)) or "unknown"


def unit_of(records: list[TrialRecord]) -> str | None:
    """The unit of the trials' hours; None where they ran on different devices, whose hours cannot be compared."""
    devices = {device_of(record) for record in records}
    units = {UNITS[attempt.device] for record in records for attempt in record.attempts}
    return (units or {UNITS[None]}).pop() if len(devices) <= 1 and len(units) <= 1 else None


def reach(curve: list[Evaluation], target: float) -> Evaluation | None:
    """What it takes to reach a perplexity for the first time, or None if the curve never does.

    Between the last evaluation above it and the first at or below it, the logarithm of the perplexity is taken to fall
    in a line with steps, tokens, hours and dollars.
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


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def last(by_step: dict[int, float] | None) -> float | None:
    """The total."""
    return by_step[max(by_step)] if by_step else None
