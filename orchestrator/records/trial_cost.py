"""What trials have cost, from their journals: device hours and US dollars.

Hours by step are of training steps alone (a step's seconds x the devices of the attempt that made it): they do not
depend on how often a sweep evaluates, saves or starts, and a step repeated after a crash counts once. The unit is GPU
hours if the workers had GPUs, else CPU hours (of one thread); worker-hours if the journal does not say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

from orchestrator.records.events import Started
from orchestrator.records.trial_record import TrialRecord

UNITS = {"gpu": "GPU hours", "cpu": "CPU hours", None: "worker-hours"}


def hours_by_step(record: TrialRecord) -> dict[int, float]:
    """Hours of all devices together, from the start of training to the end of each step."""
    return _add_up(record, lambda attempt: attempt.num_devices)


def dollars_by_step(record: TrialRecord) -> dict[int, float] | None:
    """The same in USD; None if an attempt had no price."""
    if not record.attempts or any(attempt.usd_per_device_hour is None for attempt in record.attempts):
        return None
    return _add_up(record, lambda attempt: attempt.num_devices * (attempt.usd_per_device_hour or 0.0))


def held_cost(record: TrialRecord, sweep: str | None = None) -> tuple[float, float | None]:
    """The hours for which the trial's devices were held, and their price in USD.

    From each attempt's start to its last journal line, including evaluation, saving and work lost to crashes. USD is
    the devices' share of their machine (:func:`machines_usd` has the whole), None if an attempt had no price. With
    ``sweep``, only the attempts of this sweep count.
    """
    hours = 0.0
    usd: float | None = 0.0
    for attempt, seconds in zip(record.attempts, record.attempts_held):
        if sweep is None or attempt.sweep in (None, sweep):
            taken = attempt.num_devices * seconds / 3600
            price = attempt.usd_per_device_hour
            hours += taken
            usd = None if usd is None or price is None else usd + taken * price
    return hours, usd


def machines_usd(records: Iterable[TrialRecord], sweep: str | None = None) -> float | None:
    """What the machines have cost on which these trials ran, in USD; None if an attempt had no price.

    A machine is paid for whole while at least one trial holds devices of it, and once where several do; so is a head.
    Attempts of older journals, which do not say what their machine has, cost what their devices do.

    Args:
        sweep: only attempts of this sweep count.
    """
    held: dict[str, list[tuple[float, float]]] = defaultdict(list)  # by machine: from and to, in seconds of its clock
    rates: dict[str, float] = defaultdict(float)
    for record in records:
        for number, (attempt, seconds) in enumerate(zip(record.attempts, record.attempts_held)):
            if sweep is not None and attempt.sweep not in (None, sweep):
                continue
            if attempt.usd_per_device_hour is None:
                return None
            whole = attempt.machine_devices or attempt.num_devices
            begin = attempt.time if attempt.boot is None or attempt.uptime is None else attempt.uptime
            alone = f"{record.journal.location} {number}"  # what is not known to share a machine
            first = (attempt.boot or attempt.node or alone) if attempt.machine_devices else alone
            for machine in (first, *(f"{alone} {other}" for other in range(1, math.ceil(attempt.num_devices / whole)))):
                held[machine].append((begin, begin + seconds))
                rates[machine] = max(rates[machine], whole * attempt.usd_per_device_hour)
            if attempt.head_usd_per_hour:
                held["head"].append((attempt.time, attempt.time + seconds))
                rates["head"] = attempt.head_usd_per_hour
    return sum(rates[machine] * _covered(spans) / 3600 for machine, spans in held.items())


def _covered(spans: list[tuple[float, float]]) -> float:
    """The seconds that at least one of the spans covers."""
    covered, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def device_of(record: TrialRecord) -> str:
    """The name of the trial's devices; if there are several kinds, all of them."""
    named = {attempt.device_name or attempt.hardware or "unknown" for attempt in record.attempts}
    return ", ".join(sorted(named)) or "unknown"


def unit_of(records: list[TrialRecord]) -> str | None:
    """The unit of the trials' hours; None if they ran on different devices, whose hours cannot be compared."""
    devices = {device_of(record) for record in records}
    units = {UNITS[attempt.device] for record in records for attempt in record.attempts}
    return (units or {UNITS[None]}).pop() if len(devices) <= 1 and len(units) <= 1 else None


def total(by_step: dict[int, float] | None) -> float | None:
    """The total at the last step; None if there is none."""
    return by_step[max(by_step)] if by_step else None


def _add_up(record: TrialRecord, per_hour: Callable[[Started], float]) -> dict[int, float]:
    so_far, by_step = 0.0, {}
    for step in sorted(record.steps):
        so_far += record.steps[step].seconds / 3600 * per_hour(record.attempt_of_step[step])
        by_step[step] = so_far
    return by_step
