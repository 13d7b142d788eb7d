"""Which trial begins next: the largest first, on whatever machines have room; none is starved, none waits for ever.

A trial needs all of its workers at once. Ray gives them to it together or not at all, so that two trials never hold
half of what each needs; what is decided here is the order. The largest waits at the head. Smaller ones may begin before
it only where that does not put off the time at which it could begin, as far as is expected of those that run
(backfilling with a reservation for the head, as batch schedulers do: Lifka, "The ANL/IBM SP scheduling system", 1995).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """What one driver trains, on how many workers, for how long.

    Args:
        config: plain data for :func:`orchestrator.running.driver.drive_trial`.
        seconds: expected; infinity if unknown.
        suggested: by a search, whose suggestions improve with each result it knows.
    """

    config: dict[str, Any]
    workers: int
    seconds: float = math.inf
    suggested: bool = False


Placement = tuple[int, ...]  # workers on each machine


@dataclass
class Machines:
    """How many workers each machine has room for, and who runs there until when."""

    slots: Placement
    running: dict[str, tuple[Placement, float]] = field(default_factory=dict)

    @property
    def free(self) -> list[int]:
        held = [placement for placement, _ in self.running.values()]
        return [slots - sum(placement[machine] for placement in held) for machine, slots in enumerate(self.slots)]

    def begin(self, name: str, placement: Placement, until: float) -> None:
        self.running[name] = (placement, until)

    def end(self, name: str) -> None:
        self.running.pop(name, None)

    def earliest(self, workers: int, now: float) -> float:
        """When so many workers could begin together, if those that run end as expected and nothing else begins."""
        free, later = self.free, sorted(self.running.values(), key=lambda each: each[1])
        if place(workers, free):
            return now
        for placement, until in later:
            free = [a + b for a, b in zip(free, placement)]
            if place(workers, free):
                return max(until, now)
        return math.inf

    def with_also(self, placement: Placement, until: float) -> Machines:
        return Machines(self.slots, {**self.running, "": (placement, until)})


def place(workers: int, free: list[int]) -> Placement | None:
    """Where so many workers go, or None if there is no room: on the machine that they fill best, if one has room for
    all, since they talk to each other; else on as few as possible.
    """
    fitting = [(room, machine) for machine, room in enumerate(free) if room >= workers]
    if fitting:
        _, best = min(fitting)
        return tuple(workers if machine == best else 0 for machine in range(len(free)))
    if sum(free) < workers:
        return None
    placed = [0] * len(free)
    for room, machine in sorted(((room, machine) for machine, room in enumerate(free)), reverse=True):
        placed[machine] = min(room, workers - sum(placed))
    return tuple(placed)


class JobQueue:
    """Jobs in the order in which they may begin. They come from an iterator, the largest first, that may go on by
    what has finished until then.
    """

    def __init__(self, jobs: Iterator[Job], slots: Placement, clock: Callable[[], float] = time.time) -> None:
        self.jobs, self.machines, self.clock = jobs, Machines(slots), clock
        self.waiting: list[Job] = []

    def next(self, name: str) -> Job | None:
        """The job that begins now, under this name; None while there is no room, or when all have begun."""
        self._look_ahead()
        now = self.clock()
        for job in self.waiting:
            placement = place(job.workers, self.machines.free)
            if placement and self._holds_up_nobody(job, placement, now):
                self.waiting.remove(job)
                self.machines.begin(name, placement, now + job.seconds)
                return job
        return None

    @property
    def all_have_begun(self) -> bool:
        self._look_ahead()
        return not self.waiting

    def end(self, name: str) -> None:
        """The job of this name has ended, in whatever way."""
        self.machines.end(name)

    def _holds_up_nobody(self, job: Job, placement: Placement, now: float) -> bool:
        head = self.waiting[0]
        if job is head:
            return True
        beside = self.machines.with_also(placement, now + job.seconds)
        return beside.earliest(head.workers, now) <= self.machines.earliest(head.workers, now)

    def _look_ahead(self) -> None:
        """Takes what is known to come. Of a search one suggestion at a time, and only with room for it."""
        while not any(job.suggested for job in self.waiting):
            if self.waiting and not any(self.machines.free):
                return
            job = next(self.jobs, None)
            if job is None:
                return
            self.waiting.append(job)
