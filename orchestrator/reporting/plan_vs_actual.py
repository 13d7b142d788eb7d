"""The plan beside the truth: what trials were said to take and what they took, once a sweep has trained them.

It is written to the sweep's folder as ``plan-and-truth.json``, and one sentence of it goes into the comparison. A later
run of the same command that trains nothing leaves it as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.plan import Planned, Totals, duration
from orchestrator.planning.cluster import Cluster
from orchestrator.records.events import Event, Failed, Finished, Launched, Preempted, Started, Step, Stopped
from orchestrator.records.storage import Storage

GIB = 2**30
FILE = "plan-and-truth.json"
ENDS = (Finished, Stopped, Failed, Preempted)


@dataclass(frozen=True)
class Took:
    """What a trial took since a time, from its journal. None: it has not begun, has not ended, or was not measured.

    Args:
        launched, started, ended: Unix seconds: its driver's start, its worker's, and its last end.
        tokens_per_second: the median over steps; of all workers together.
        peak_memory_gib: of a worker.
    """

    launched: float | None
    started: float | None
    ended: float | None
    outcome: str | None
    tokens_per_second: float | None
    peak_memory_gib: float | None

    @classmethod
    def of(cls, events: Iterable[Event], since: float) -> Took:
        events = [event for event in events if event.time >= since]
        steps = [event for event in events if isinstance(event, Step)]
        ends = [event for event in events if isinstance(event, ENDS)]
        return cls(
            launched=min((event.time for event in events if isinstance(event, Launched)), default=None),
            started=min((event.time for event in events if isinstance(event, Started)), default=None),
            ended=ends[-1].time if ends else None,
            outcome=ends[-1].name if ends else None,
            tokens_per_second=statistics.median(step.tokens_per_second for step in steps) if steps else None,
            peak_memory_gib=max((step.peak_memory_gib for step in steps), default=None),
        )


def plan_and_truth(
    planned: list[Planned],
    total: Totals,
    storage: Storage,
    cluster: Cluster,
    since: float,
    usd_per_hour: float | None = None,
) -> dict[str, Any]:
    """Both of each trial that was to be trained, and of all together, as plain data.

    Seconds of a trial are those from its driver's start to its end, lost attempts between them included; those of all
    from the first such start to the last end. A total of what ran is None where nothing did.

    Args:
        total: what was said at the start.
        since: the sweep's own start, Unix seconds: what journals tell from before it is an earlier run's.
    """
    trained = [p for p in planned if p.trains]
    took = {p.trial.fingerprint: _took(storage, p, since) for p in trained}
    seconds = _seconds([(p, took[p.trial.fingerprint]) for p in trained])
    hours = sum(p.estimate.devices * seconds[p.trial.fingerprint] for p in trained if seconds[p.trial.fingerprint])
    begins = [each.launched for each in took.values() if each.launched]
    ends = [each.ended for each in took.values() if each.ended]
    ran = bool(begins and ends)
    both = {
        "trials": [_both(p, took[p.trial.fingerprint], seconds[p.trial.fingerprint], cluster) for p in trained],
        "seconds": {"plan": total.makespan, "truth": max(ends) - min(begins) if ran else None},
        "hours": {"plan": total.hours, "truth": hours / 3600 if ran else None},
        "usd": {"plan": total.usd, "truth": usd_per_hour * hours / 3600 if ran and usd_per_hour else None},
        "unit": "GPU" if cluster.gpus else "CPU",
    }
    return both | {"summary": _summary(both)}


def _took(storage: Storage, planned: Planned, since: float) -> Took:
    return Took.of(storage.trial(planned.trial.fingerprint).journal.read().events, since)


def _seconds(trained: list[tuple[Planned, Took]]) -> dict[str, float | None]:
    """How long each took. Untuned models share one driver and follow each other in it: each begins where the one before
    it ended.
    """
    ends = [took.ended for p, took in trained if p.trial.training.method == "untuned" and took.ended]
    seconds = {}
    for planned, took in trained:
        begin = took.launched
        if begin and took.started and planned.trial.training.method == "untuned":
            begin = max(begin, *(end for end in (begin, *ends) if end <= took.started))
        seconds[planned.trial.fingerprint] = took.ended - begin if begin and took.ended else None
    return seconds


def _both(planned: Planned, took: Took, seconds: float | None, cluster: Cluster) -> dict[str, Any]:
    estimate = planned.estimate
    both = {
        "fingerprint": planned.trial.fingerprint,
        "label": planned.trial.label,
        "outcome": took.outcome,
        "tokens_per_second": {"plan": estimate.tokens_per_second, "truth": took.tokens_per_second},
        "seconds": {"plan": estimate.seconds, "truth": seconds},
    }
    if cluster.gpus:  # of a CPU the peak is that of the whole process, with all that it has imported
        truth = took.peak_memory_gib and took.peak_memory_gib * GIB
        both["peak_memory_bytes"] = {"plan": estimate.memory.allocated, "truth": truth}
    return both


def _summary(both: dict[str, Any]) -> str | None:
    """One sentence; None if nothing ran or nothing could be said before."""
    if both["seconds"]["truth"] is None or both["seconds"]["plan"] is None:
        return None

    def words(side: str, unit: str = "") -> str:
        parts = [duration(both["seconds"][side]), f"{both['hours'][side]:.2f}{unit}"]
        if both["usd"]["plan"] is not None and both["usd"]["truth"] is not None:
            parts.append(f"{both['usd'][side]:,.2f} USD")
        return f"{', '.join(parts[:-1])} and {parts[-1]}"

    sentence = f"The plan said {words('plan', ' ' + both['unit'] + ' hours')}; it took {words('truth')}"
    others = [trial for trial in both["trials"] if trial["outcome"] != "finished"]
    return sentence + (f", with {len(others)} of {len(both['trials'])} trials unfinished." if others else ".")
