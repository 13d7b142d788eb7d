"""Leases, in a local folder and in an S3-compatible server: one holder at a time, whatever happens to it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.records.leases import Lease, LeaseLost, owner
from orchestrator.records.object_store import LocalStore, ObjectStore

NEVER = 3600.0


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    return ObjectStore.at(request.getfixturevalue("bucket")) if request.param == "s3" else LocalStore(tmp_path)


def a_lease(store, name, limit_s=NEVER, clock=time.monotonic, **changed):
    """A lease of an owner on another machine, known only by its heartbeat."""
    elsewhere = owner(attempt=name, sweep=name) | {"machine": f"machine of {name}"} | changed
    return Lease(store, "lease", elsewhere, limit_s=limit_s, poll_s=0.02, clock=clock)


class Contest:
    """Several who want a lease, on a clock that moves only by ``tick``: no result depends on a quick machine."""

    def __init__(self, store, names, limit_s=3.0):
        self.now, self.looks, self.limit_s = 0.0, dict.fromkeys(names, 0), limit_s
        self.leases = {name: a_lease(store, name, limit_s=limit_s, clock=self.clock_of(name)) for name in names}
        self.ending = threading.Lock()

    def clock_of(self, name):
        def clock():
            self.looks[name] += 1
            return self.now

        return clock

    def tick(self):
        """A quarter of the limit passes: holders beat before it, and those who wait look twice after it."""
        with self.ending:
            for lease in self.leases.values():
                if lease.generation and not lease._stop.is_set():
                    lease._beat()
        self.now += self.limit_s / 4
        seen, deadline = dict(self.looks), time.monotonic() + 300
        for name, lease in self.leases.items():
            while lease.generation == 0 and self.looks[name] < seen[name] + 2:
                assert time.monotonic() < deadline, f"{name} no longer waits"
                time.sleep(0.005)

    def release(self, lease):
        with self.ending:
            lease.release()


def newest(store):
    return json.loads(store.read(store.names("lease")[-1]))


HOLDER = """
import sys
from pathlib import Path
from orchestrator.records.leases import Lease, LeaseLost, owner
from orchestrator.records.object_store import LocalStore, ObjectStore

where, limit, written = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
store = ObjectStore.at(where) if "://" in where else LocalStore(Path(where))
lease = Lease(store, "lease", owner("child", "child"), limit_s=limit)
lease.acquire()
print("held", flush=True)
for line in sys.stdin:  # asked to write
    try:
        lease.check()
    except LeaseLost as error:
        print(error, flush=True)
        continue
    written.write_text(written.read_text() + line)
    print("written", flush=True)
"""


class Holder:
    """A process that holds a lease and writes on request."""

    def __init__(self, store, limit_s, written: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, getattr(store, "url", str(store.root)), str(limit_s), str(written)],
            cwd=Path(__file__).parents[3], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "held\n"

    def write(self, word):
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self):
        self.process.kill()
        self.process.wait()


def test_several_who_want_it_have_it_one_after_the_other(store):
    inside, order = [], []

    def take(name):
        with a_lease(store, name):
            inside.append(name)
            order.append(tuple(inside))
            time.sleep(0.02)
            inside.remove(name)

    threads = [threading.Thread(target=take, args=(f"{number}",)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == [(f"{number}",) for number in range(5)]


def test_of_several_who_take_over_from_a_dead_one_a_single_one_wins(store):
    dead = a_lease(store, "dead")
    dead.acquire()
    dead._stop.set()  # its heart stops; nothing else tells that it is dead
    contest = Contest(store, "abcd")
    held, others = [], []

    def take(lease):
        lease.acquire()
        held.append(lease)
        until = contest.now + 2 * contest.limit_s  # alive longer than the limit of those who still wait
        while contest.now < until:
            time.sleep(0.005)
        held.remove(lease)
        others.append(len(held))
        contest.release(lease)

    takers = list(contest.leases.values())
    threads = [threading.Thread(target=take, args=(lease,)) for lease in takers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        contest.tick()
    assert others == [0, 0, 0, 0]
    assert [lease.lost for lease in takers] == [None] * 4
    assert sorted(lease.generation for lease in takers) == [2, 3, 4, 5]
    with pytest.raises(LeaseLost, match="taken over"):
        dead._beat()


def test_from_a_killed_process_of_this_machine_it_is_taken_over_at_once(store, tmp_path):
    (tmp_path / "written").write_text("")
    holder = Holder(store, NEVER, tmp_path / "written")
    holder.end()
    mine = Lease(store, "lease", owner("mine", "mine"), limit_s=NEVER)
    mine.acquire()  # would wait for an hour
    assert newest(store)["owner"]["pid"] == os.getpid()
    mine.release()


def test_a_restart_of_the_same_attempt_takes_it_over_at_once(store):
    before = a_lease(store, "attempt")
    before.acquire()
    after = a_lease(store, "attempt", machine="another machine", pid=1)
    after.acquire()
    assert after.generation == before.generation + 1
    after.release()
    before.release()
    assert newest(store)["released"]


def test_a_frozen_holder_loses_it_and_writes_nothing_more(store, tmp_path):
    written = tmp_path / "written"
    written.write_text("")
    holder = Holder(store, 1.0, written)
    try:
        assert holder.write("one") == "written"
        os.kill(holder.process.pid, signal.SIGSTOP)
        other = a_lease(store, "other", limit_s=1.0)
        other.acquire()
        os.kill(holder.process.pid, signal.SIGCONT)
        assert "taken over by another process" in holder.write("two")
        assert written.read_text() == "one\n"
        other.check()
        other.release()
    finally:
        holder.end()


def test_a_store_that_is_away_takes_the_lease_from_nobody(s3, bucket):
    store = ObjectStore.at(bucket)
    contest = Contest(store, ["holder", "waiter"])
    holder, waiter = contest.leases.values()
    holder.acquire()
    waiting = threading.Thread(target=waiter.acquire)
    waiting.start()
    contest.tick()
    s3.stop()
    contest.now += 2 * contest.limit_s
    time.sleep(0.2)  # the waiter meets the outage
    s3.start()
    for _ in range(10):
        contest.tick()
    assert waiter.generation == 0 and holder.lost is None
    holder.check()
    contest.release(holder)
    waiting.join()
    assert waiter.generation == 2
    waiter.release()
