"""Trials of different shapes on machines of different sizes: simulated to the end, second by second of their ends."""

import heapq
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planning.estimate import makespan
from orchestrator.running.scheduling import Drive, DriveQueue, Machines, place


class Simulation:
    """Runs a queue with a clock of its own, on which every drive takes ``takes(drive)`` seconds."""

    def __init__(self, drives, slots, takes=lambda drive: drive.seconds):
        self.now, self.takes = 0.0, takes
        self.queue = DriveQueue(iter(drives), tuple(slots), clock=lambda: self.now)
        self.begun: list[tuple[float, Drive]] = []
        self.most = 0

    def run(self):
        ends, number = [], 0
        while True:
            while drive := self.queue.next(str(number)):
                self.begun.append((self.now, drive))
                heapq.heappush(ends, (self.now + self.takes(drive), str(number), drive))
                number += 1
                assert min(self.queue.machines.free) >= 0, "more workers than there is room for"
            if not ends:
                assert self.queue.all_have_begun, "something waits for ever"
                return
            self.now, name, _ = heapq.heappop(ends)
            self.queue.end(name)


shapes = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=25)
machines = st.lists(st.integers(1, 8), min_size=1, max_size=4).filter(lambda slots: sum(slots) >= 8)


def drives_of(shapes, seconds=lambda known: float(known)):
    each = [Drive({"number": n}, workers, seconds(known)) for n, (workers, known) in enumerate(shapes)]
    return sorted(each, key=lambda drive: (drive.workers, drive.seconds), reverse=True)


@settings(max_examples=150, deadline=None)
@given(shapes, machines)
def test_all_run_once_and_no_machine_is_overfull(shapes, slots):
    simulation = Simulation(drives_of(shapes), slots)
    simulation.run()
    assert sorted(drive.config["number"] for _, drive in simulation.begun) == list(range(len(shapes)))


@settings(max_examples=150, deadline=None)
@given(shapes, machines)
def test_no_backfilled_trial_delays_one_that_came_before_it(shapes, slots):
    """Against the same queue without any backfilling: where the expected times are true, the head of the queue begins
    no later than when nothing may pass it.
    """
    drives = drives_of(shapes)
    simulation = Simulation(drives, slots)
    simulation.run()
    began = {drive.config["number"]: at for at, drive in simulation.begun}
    first_that_waited = next((drive for drive in drives if began[drive.config["number"]] > 0), None)
    if first_that_waited is None:
        return
    before = drives[: drives.index(first_that_waited)]
    strict = Machines(tuple(slots))
    for number, drive in enumerate(before):  # they all began at once
        strict.begin(str(number), place(drive.workers, strict.free), drive.seconds)
    assert began[first_that_waited.config["number"]] <= strict.earliest(first_that_waited.workers, 0.0)


@settings(max_examples=100, deadline=None)
@given(shapes, machines)
def test_nothing_is_starved_or_stuck_where_times_are_unknown_or_wrong(shapes, slots):
    unknown = Simulation(drives_of(shapes, lambda known: math.inf), slots, takes=lambda drive: 7.0)
    unknown.run()
    wrong = Simulation(drives_of(shapes), slots, takes=lambda drive: 100.0 / drive.seconds)
    wrong.run()


def test_a_large_trial_is_not_passed_by_a_stream_of_small_ones():
    small = [Drive({}, 1, 10.0) for _ in range(8)]
    large = Drive({"large": True}, 8, 10.0)
    simulation = Simulation([*small[:4], large, *small[4:]], [8])
    simulation.run()
    assert [at for at, drive in simulation.begun if drive is large] == [10.0]
    assert [at for at, drive in simulation.begun if drive is not large] == [0.0] * 8, "the others filled the gaps"


def test_the_workers_of_a_trial_go_where_they_talk_to_each_other_fastest():
    assert place(4, [8, 4, 6]) == (0, 4, 0)
    assert place(10, [8, 4, 6]) == (8, 0, 2)
    assert place(9, [4, 4]) is None


def test_a_search_is_asked_only_when_there_is_room():
    asked = []

    def suggestions():
        yield Drive({}, 1, 5.0)
        yield Drive({}, 1, 5.0)
        for number in range(3):
            asked.append(number)
            yield Drive({"suggested": number}, 1, 5.0, suggested=True)

    queue = DriveQueue(suggestions(), (2,))
    assert queue.next("a") and queue.next("b")
    assert queue.next("c") is None and len(asked) <= 1
    queue.end("a")
    assert queue.next("c").config == {"suggested": 0}


@settings(max_examples=100, deadline=None)
@given(shapes)
def test_the_makespan_of_the_plan_is_that_of_the_queue_on_one_machine_without_reservations(shapes):
    """Never better than the ideal, never worse than one after the other."""
    jobs = [(workers, float(seconds)) for workers, seconds in shapes]
    found = makespan(jobs, 8)
    assert found >= max(max(s for _, s in jobs), sum(w * s for w, s in jobs) / 8)
    assert found <= sum(seconds for _, seconds in jobs)
