"""What a plan estimated and what its trials took, after a sweep has trained them.

It is written to the sweep's folder as ``plan-and-truth.json``, where an estimate is called ``plan`` and what was
measured ``truth``; one sentence of it goes into the comparison. A later run of the same command that trains nothing
leaves it as it is.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.planning.cluster import Cluster
from orchestrator.planning.cost import Totals
from orchestrator.planning.planner import Planned
from orchestrator.records.events import (
    Event,
    Failed,
    Finished,
    Launched,
    Preempted,
    Started,
    Step,
    Stopped,
    precedes,
    seconds_between,
)
from orchestrator.records.storage import Storage
from orchestrator.records.trial_cost import machines_usd
from orchestrator.records.trial_record import TrialRecord
from orchestrator.terminal import GIB, and_list, duration, usd

FILE = "plan-and-truth.json"
ENDS = (Finished, Stopped, Failed, Preempted)


@dataclass(frozen=True)
class Actual:
    """What a trial took in this run of its sweep, from its journal. None: not started, not ended, or not measured.

    Args:
        launched, started, ended: the events of its driver's first start, its worker's, and its last end.
        start_up: seconds from ``launched`` to ``started``; ``held``: from there to ``ended``.
        tokens_per_second: the median over steps; of all workers together.
        peak_memory_gib: of a worker.
    """

    launched: Event | None
    started: Event | None
    ended: Event | None
    start_up: float
    held: float
    tokens_per_second: float | None
    peak_memory_gib: float | None

    @classmethod
    def of(cls, events: Sequence[Event]) -> Actual:
        """From a journal's events."""
        steps = [event for event in events if isinstance(event, Step)]
        launched, started = (
            next((place for place, event in enumerate(events) if isinstance(event, kind)), None)
            for kind in (Launched, Started)
        )
        ended = max((place for place, event in enumerate(events) if isinstance(event, ENDS)), default=None)
        return cls(
            launched=None if launched is None else events[launched],
            started=None if started is None else events[started],
            ended=None if ended is None else events[ended],
            start_up=_seconds_along(events, launched, started),
            held=_seconds_along(events, launched if started is None else started, ended),
            tokens_per_second=statistics.median(step.tokens_per_second for step in steps) if steps else None,
            peak_memory_gib=max((step.peak_memory_gib for step in steps), default=None),
        )


def _seconds_along(events: Sequence[Event], first: int | None, last: int | None) -> float:
    if first is None or last is None:
        return 0.0
    return sum(seconds_between(*pair) for pair in itertools.pairwise(events[first : last + 1]))


def compare_with_plan(
    planned: Sequence[Planned],
    announced: Totals,
    storage: Storage,
    cluster: Cluster,
    elapsed: float,
) -> dict[str, Any]:
    """Planned and actual values of each trial that was to train, and of all together, as plain data.

    A trial's seconds run from its driver's start to its end, lost attempts between them included; those of the sweep
    from the first such start to the last end, by wall clocks, but no less than any trial and no more than ``elapsed``.
    An actual total is None where nothing ran.

    Args:
        announced: the totals that were printed at the start.
        elapsed: seconds since the sweep's command began, on its monotonic clock.
    """
    trained = [p for p in planned if p.trains]
    actuals = [Actual.of(storage.trial(p.trial.fingerprint).journal.read(p.journal_offset).events) for p in trained]
    seconds = [None if taken is None else min(taken, elapsed) for taken in _seconds(list(zip(trained, actuals)))]
    hours = sum(p.estimate.devices * taken for p, taken in zip(trained, seconds) if taken) / 3600
    begins = [actual.launched.time for actual in actuals if actual.launched]
    ends = [actual.ended.time for actual in actuals if actual.ended]
    ran = bool(begins and ends)
    longest = max((taken for taken in seconds if taken is not None), default=0.0)
    paid = machines_usd([_since(p, storage) for p in trained])
    both = {
        "trials": [_trial(*each, cluster) for each in zip(trained, actuals, seconds)],
        "seconds": {
            "plan": announced.makespan,
            "truth": min(max(max(ends) - min(begins), longest), elapsed) if ran else None,
        },
        "hours": {"plan": announced.hours, "truth": hours if ran else None},
        "usd": {"plan": announced.usd, "truth": paid if ran else None},
        "unit": "GPU" if cluster.gpus else "CPU",
    }
    return both | {"summary": _summary(both)}


def _since(planned: Planned, storage: Storage) -> TrialRecord:
    """The part of the trial's journal that belongs to this run of the sweep."""
    record = TrialRecord(storage.trial(planned.trial.fingerprint).journal, offset=planned.journal_offset)
    record.follow()
    return record


def _seconds(trained: list[tuple[Planned, Actual]]) -> list[float | None]:
    """How long each took. Untuned models share a driver and follow each other: each begins where the last one ended."""
    ends = [actual.ended for p, actual in trained if p.trial.training.method == "untuned" and actual.ended]
    seconds: list[float | None] = []
    for planned, actual in trained:
        start_up, started = actual.start_up, actual.started
        if started and planned.trial.training.method == "untuned":
            waits = [seconds_between(end, started) for end in ends if precedes(end, started)]
            start_up = min([start_up, *waits])
        seconds.append(start_up + actual.held if actual.launched and actual.ended else None)
    return seconds


def _trial(planned: Planned, actual: Actual, seconds: float | None, cluster: Cluster) -> dict[str, Any]:
    estimate = planned.estimate
    both = {
        "fingerprint": planned.trial.fingerprint,
        "label": planned.trial.label,
        "outcome": actual.ended.name if actual.ended else None,
        "tokens_per_second": {"plan": estimate.tokens_per_second, "truth": actual.tokens_per_second},
        "seconds": {"plan": estimate.seconds, "truth": seconds},
    }
    if cluster.gpus:  # on a CPU the peak is that of the whole process, with all that it has imported
        peak = actual.peak_memory_gib and actual.peak_memory_gib * GIB
        both["peak_memory_bytes"] = {"plan": estimate.memory.allocated, "truth": peak}
    return both


def _summary(both: dict[str, Any]) -> str | None:
    """One sentence; None if nothing ran, or the plan had no time."""
    if both["seconds"]["truth"] is None or both["seconds"]["plan"] is None:
        return None

    def words(side: str, unit: str = "") -> str:
        parts = [duration(both["seconds"][side]), f"{both['hours'][side]:.2f}{unit}"]
        if both["usd"]["plan"] is not None and both["usd"]["truth"] is not None:
            parts.append(usd(both["usd"][side]))
        return and_list(parts)

    sentence = f"The plan estimated {words('plan', ' ' + both['unit'] + ' hours')}; it took {words('truth')}"
    unfinished = [trial for trial in both["trials"] if trial["outcome"] != "finished"]
    return sentence + (f", with {len(unfinished)} of {len(both['trials'])} trials unfinished." if unfinished else ".")
