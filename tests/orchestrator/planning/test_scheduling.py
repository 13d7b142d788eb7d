"""Jobs of different shapes on machines of different sizes, simulated from one job's end to the next."""

import heapq
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.scheduling import Job, JobQueue, Machines, Schedule, place


class Simulation:
    """Runs a queue on a simulated clock, on which a job takes ``takes(job)`` seconds."""

    def __init__(self, jobs, slots, takes=lambda job: job.seconds):
        self.now, self.takes = 0.0, takes
        self.queue = JobQueue(iter(jobs), tuple(slots), clock=lambda: self.now)
        self.started: list[tuple[float, Job]] = []
        self.most = 0

    def run(self):
        ends, number = [], 0
        while True:
            while job := self.queue.next(str(number)):
                self.started.append((self.now, job))
                heapq.heappush(ends, (self.now + self.takes(job), str(number), job))
                number += 1
                assert min(self.queue.machines.free) >= 0, "more workers than there is room for"
            if not ends:
                assert self.queue.all_started, "a job waits for ever"
                return
            self.now, name, _ = heapq.heappop(ends)
            self.queue.end(name)


shapes = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=25)
machines = st.lists(st.integers(1, 8), min_size=1, max_size=4).filter(lambda slots: sum(slots) >= 8)


def jobs_of(shapes, seconds=lambda known: float(known)):
    each = [Job({"number": n}, workers, seconds(known)) for n, (workers, known) in enumerate(shapes)]
    return sorted(each, key=lambda job: (job.workers, job.seconds), reverse=True)


@settings(max_examples=150, deadline=None)
@given(shapes, machines)
def test_every_job_runs_once_and_no_machine_is_overfull(shapes, slots):
    simulation = Simulation(jobs_of(shapes), slots)
    simulation.run()
    assert sorted(job.config["number"] for _, job in simulation.started) == list(range(len(shapes)))


@settings(max_examples=150, deadline=None)
@given(shapes, machines)
def test_backfilling_delays_no_job_that_came_before(shapes, slots):
    """Where the expected times are right, the head of the queue starts no later than without backfilling."""
    jobs = jobs_of(shapes)
    simulation = Simulation(jobs, slots)
    simulation.run()
    began = {job.config["number"]: at for at, job in simulation.started}
    first_that_waited = next((job for job in jobs if began[job.config["number"]] > 0), None)
    if first_that_waited is None:
        return
    before = jobs[: jobs.index(first_that_waited)]
    strict = Machines(tuple(slots))
    for number, job in enumerate(before):  # they all began at once
        strict.start(str(number), place(job.workers, strict.free), job.seconds)
    assert began[first_that_waited.config["number"]] <= strict.earliest(first_that_waited.workers, 0.0)


@settings(max_examples=100, deadline=None)
@given(shapes, machines)
def test_no_job_starves_where_times_are_unknown_or_wrong(shapes, slots):
    unknown = Simulation(jobs_of(shapes, lambda known: math.inf), slots, takes=lambda job: 7.0)
    unknown.run()
    wrong = Simulation(jobs_of(shapes), slots, takes=lambda job: 100.0 / job.seconds)
    wrong.run()


def test_a_large_job_starts_despite_a_stream_of_small_ones():
    small = [Job({}, 1, 10.0) for _ in range(8)]
    large = Job({"large": True}, 8, 10.0)
    simulation = Simulation([*small[:4], large, *small[4:]], [8])
    simulation.run()
    assert [at for at, job in simulation.started if job is large] == [10.0]
    assert [at for at, job in simulation.started if job is not large] == [0.0] * 8, "the others filled the gaps"


def test_workers_of_a_job_go_on_as_few_machines_as_possible():
    assert place(4, [8, 4, 6]) == (0, 4, 0)
    assert place(10, [8, 4, 6]) == (8, 0, 2)
    assert place(9, [4, 4]) is None


def test_a_search_suggests_only_when_there_is_room():
    suggested = []

    def suggestions():
        yield Job({}, 1, 5.0)
        yield Job({}, 1, 5.0)
        for number in range(3):
            suggested.append(number)
            yield Job({"suggested": number}, 1, 5.0, suggested=True)

    queue = JobQueue(suggestions(), (2,))
    assert queue.next("a") and queue.next("b")
    assert queue.next("c") is None and len(suggested) <= 1
    queue.end("a")
    assert queue.next("c").config == {"suggested": 0}


@settings(max_examples=100, deadline=None)
@given(shapes)
def test_the_planned_makespan_is_between_ideal_and_sequential(shapes):
    """Never better than the ideal, never worse than one job after the other."""
    found = Schedule.of(jobs_of(shapes), (8,))
    assert found.seconds >= max(max(s for _, s in shapes), sum(w * s for w, s in shapes) / 8)
    assert found.seconds <= sum(seconds for _, seconds in shapes)
    assert found.machines == (found.seconds,)


def test_a_schedule_by_hand():
    """Two machines of 8: 8 workers for 10 s, 4 for 6 s, 4 for 4 s and 2 for 5 s, which starts at 4 s."""
    jobs = [Job({}, 8, 10.0), Job({}, 4, 6.0), Job({}, 4, 4.0), Job({}, 2, 5.0)]
    assert Schedule.of(jobs, (8, 8)) == Schedule(10.0, (10.0, 9.0))
    assert Schedule.of(jobs, (8, 8), at_once=1) == Schedule(25.0, (25.0, 0.0))
    assert Schedule.of(jobs, (8, 0)) == Schedule(19.0, (19.0, 0.0))
    assert Schedule.of(jobs, (4, 0)).seconds == math.inf
