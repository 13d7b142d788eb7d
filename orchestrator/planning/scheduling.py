"""Which job starts next: the largest first, on whichever machines have room; none starves, none waits for ever.

A trial needs all of its workers at once. Ray reserves them together or not at all, so two trials never hold half of
what each needs; this module decides the order. The largest job waits at the head. Smaller ones may start before it only
if that does not delay the expected start of the head (backfilling with a reservation for the head, as in batch
schedulers: Lifka, "The ANL/IBM SP scheduling system", 1995).
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """What one driver trains, on how many workers, and for how long.

    Args:
        config: plain data for :func:`orchestrator.running.trial_launcher.drive_trial`.
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
    """How many workers each machine has room for, and which jobs run there until when.

    Args:
        running: by name of the job, its placement and expected end.
    """

    slots: Placement
    running: dict[str, tuple[Placement, float]] = field(default_factory=dict)

    @property
    def free(self) -> list[int]:
        """How many more workers fit on each machine."""
        held = [placement for placement, _ in self.running.values()]
        return [slots - sum(placement[machine] for placement in held) for machine, slots in enumerate(self.slots)]

    def start(self, name: str, placement: Placement, until: float) -> None:
        """Places a job that is expected to end at ``until``."""
        self.running[name] = (placement, until)

    def end(self, name: str) -> None:
        """Frees the job's place; a job that is not running is ignored."""
        self.running.pop(name, None)

    def earliest(self, workers: int, now: float) -> float:
        """When so many workers could start together, if running jobs end as expected and no other starts."""
        free, later = self.free, sorted(self.running.values(), key=lambda each: each[1])
        if place(workers, free):
            return now
        for placement, until in later:
            free = [a + b for a, b in zip(free, placement)]
            if place(workers, free):
                return max(until, now)
        return math.inf

    def with_job(self, placement: Placement, until: float) -> Machines:
        """These machines with one more job; these stay as they are."""
        return Machines(self.slots, {**self.running, "": (placement, until)})


def place(workers: int, free: list[int]) -> Placement | None:
    """How many of the workers each machine takes; None if there is no room.

    Workers of a trial communicate, so they go on one machine where one has room for all (the one with the least), else
    on as few as possible.
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
    """Jobs in the order in which they may start.

    Args:
        jobs: the largest first; a search's suggestions use earlier results, so each is taken as late as possible.
        slots: how many workers fit on each machine.
    """

    def __init__(self, jobs: Iterator[Job], slots: Placement, clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.machines, self.clock = jobs, Machines(slots), clock
        self.waiting: list[Job] = []

    def next(self, name: str) -> Job | None:
        """The job that starts now, under this name; None while none fits, or when all have started."""
        self._look_ahead()
        now = self.clock()
        for job in self.waiting:
            placement = place(job.workers, self.machines.free)
            if placement and self._keeps_reservation(job, placement, now):
                self.waiting.remove(job)
                self.machines.start(name, placement, now + job.seconds)
                return job
        return None

    @property
    def all_started(self) -> bool:
        """Whether no job is left to start."""
        self._look_ahead()
        return not self.waiting

    def end(self, name: str) -> None:
        """Frees the place of the job with this name, however it ended."""
        self.machines.end(name)

    def _keeps_reservation(self, job: Job, placement: Placement, now: float) -> bool:
        """Whether the job at the head can still start as early as without this one."""
        head = self.waiting[0]
        if job is head:
            return True
        beside = self.machines.with_job(placement, now + job.seconds)
        return beside.earliest(head.workers, now) <= self.machines.earliest(head.workers, now)

    def _look_ahead(self) -> None:
        """Takes the jobs that are known; of a search one suggestion at a time, and only while there is room for it."""
        while not any(job.suggested for job in self.waiting):
            if self.waiting and not any(self.machines.free):
                return
            job = next(self.jobs, None)
            if job is None:
                return
            self.waiting.append(job)


@dataclass(frozen=True)
class Schedule:
    """When jobs run, if each takes as long as expected.

    Args:
        seconds: until the last one ends; infinity if one needs more workers than there is room for.
        machines: seconds of each machine from the start of its first job to the end of its last; 0: it has none.
    """

    seconds: float
    machines: tuple[float, ...]

    @classmethod
    def of(cls, jobs: Sequence[Job], slots: Placement, at_once: int | None = None) -> Schedule:
        """Runs a queue on a simulated clock.

        Args:
            jobs: the largest first.
            slots: how many workers fit on each machine.
            at_once: jobs that may run at the same time.
        """
        now, ends = 0.0, list[tuple[float, str]]()
        queue = JobQueue(iter(jobs), slots, clock=lambda: now)
        first, last = [math.inf] * len(slots), [0.0] * len(slots)
        started = 0
        while not queue.all_started or ends:
            while (at_once is None or len(ends) < at_once) and not queue.all_started:
                if queue.next(name := str(started)) is None:
                    break
                started += 1
                placement, until = queue.machines.running[name]
                heapq.heappush(ends, (until, name))
                for machine, workers in enumerate(placement):
                    if workers:
                        first[machine], last[machine] = min(first[machine], now), max(last[machine], until)
            if not ends:
                return cls(math.inf, (math.inf,) * len(slots))
            now, name = heapq.heappop(ends)
            queue.end(name)
        return cls(now, tuple(max(0.0, end - begin) for begin, end in zip(first, last)))
