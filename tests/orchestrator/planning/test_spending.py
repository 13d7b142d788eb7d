"""Hours held do not depend on wall clocks, and nothing ends the watching of a budget."""

import dataclasses
import threading

import pytest

from orchestrator.planning.budget_watch import BudgetWatch
from orchestrator.records import events
from orchestrator.records.events import MAX_GAP_S, Cancelled, Failed, Launched, Saved, Started, make_event, stamp
from orchestrator.records.journal import Journal
from orchestrator.records.trial_cost import held_cost, hours_by_step, machines_usd
from orchestrator.records.trial_record import TrialRecord
from orchestrator.run_options import RunOptions
from tests.support.events import a_step

HOUR = 3600.0


def hours_of(tmp_path, *lines):
    journal = Journal(tmp_path / "journal.jsonl")
    for line in lines:
        journal.append(line)
    return held_cost(TrialRecord.of(journal))[0]


def worker_line(event, seconds, jump=0.0, process="one", boot=None):
    """A line ``seconds`` after the process began, when the wall clock is wrong by ``jump``."""
    time = 1_700_000_000.0 + seconds + jump
    return dataclasses.replace(event, process=process, boot=boot, uptime=1000.0 + seconds, time=time)


@pytest.mark.parametrize("jump", [-HOUR, 10 * HOUR])
def test_a_clock_that_is_set_changes_no_hours_held(jump, tmp_path):
    lines = [worker_line(Started(), 0), worker_line(make_event("step", **a_step(1)), 900, jump)]
    assert hours_of(tmp_path, *lines, worker_line(Saved(step=1), 1800, jump)) == pytest.approx(0.5)


def test_each_attempt_has_a_process_of_its_own(tmp_path):
    first = [worker_line(Started(), 0), worker_line(Saved(step=1), 1800)]
    second = [worker_line(Started(), 50, process="two"), worker_line(Saved(step=2), 950, process="two")]
    failed = dataclasses.replace(Failed(reason="lost"), time=first[-1].time + 900)  # written by the driver
    assert hours_of(tmp_path, *first, failed, *second) == pytest.approx(0.5 + 0.25 + 0.25)


@pytest.mark.parametrize("jump", [-HOUR, 3 * HOUR])
def test_processes_of_one_machine_share_its_monotonic_clock(jump, tmp_path):
    """A worker that was lost, its driver that noticed, and the worker that continued, while the clock was set."""
    first = [worker_line(Started(), 0, boot="b"), worker_line(Saved(step=1), 1800, boot="b")]
    second = worker_line(Started(), 2700, jump, "two", "b"), worker_line(Saved(step=2), 3600, jump, "two", "b")
    noticed = worker_line(Failed(reason="lost"), 4500, jump, "driver", "b")
    assert hours_of(tmp_path, *first, *second, noticed) == pytest.approx(1.25)


def test_an_interrupted_attempt_costs_nothing_until_a_later_cancel(tmp_path):
    attempt = [worker_line(Started(), 0), worker_line(Saved(step=1), 360)]
    by_worker = worker_line(Cancelled(step=1, by="someone"), 720)
    assert hours_of(tmp_path, *attempt, by_worker) == pytest.approx(0.2)
    (tmp_path / "journal.jsonl").unlink()
    by_another = Cancelled(step=1, by="someone", time=attempt[-1].time + 5 * HOUR)
    later = Launched(time=by_another.time + HOUR)
    assert hours_of(tmp_path, *attempt, by_another, later) == pytest.approx(0.1)


@pytest.mark.parametrize(("seconds", "hours"), [(-1e9, 0.0), (1000 * HOUR, MAX_GAP_S / HOUR), (HOUR, 1.0)])
def test_lines_without_a_monotonic_clock_are_bounded(seconds, hours, tmp_path):
    began = Started(time=1_700_000_000.0)
    assert hours_of(tmp_path, began, Saved(step=1, time=began.time + seconds)) == pytest.approx(hours)


def test_a_step_costs_what_the_attempt_that_made_it_costs(tmp_path):
    """Whatever the clock of the second attempt's machine says."""
    journal = Journal(tmp_path / "journal.jsonl")
    for process, devices, step, jump in (("one", 4, 1, 0.0), ("two", 2, 2, -HOUR)):
        journal.append(worker_line(Started(device="gpu", devices=devices), 0, jump, process))
        journal.append(worker_line(make_event("step", **a_step(step) | {"seconds": HOUR}), 60, jump, process))
    assert hours_by_step(TrialRecord.of(journal)) == {1: 4.0, 2: 6.0}


def test_a_stamped_line_is_read_back(tmp_path):
    event = stamp(Saved(step=3))
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(event)
    assert journal.read().events == [event] and event.process and event.uptime
    assert events.as_line(Saved(step=3, time=1.0)) == '{"event": "saved", "time": 1.0, "version": 2, "step": 3}\n'


def test_an_error_does_not_end_the_watching(monkeypatch):
    """Neither of the reading nor of the stopping."""
    monkeypatch.setattr("orchestrator.planning.budget_watch.POLL_S", 0.01)
    calls, stopped = [], threading.Event()

    class Spending:
        def so_far(self, trials):
            calls.append("read")
            if len(calls) == 1:
                raise OSError("the storage is away")
            return 5.0, None

    def stop(reason):
        calls.append("stop")
        if calls.count("stop") == 1:
            raise OSError("the storage is away")
        stopped.set()

    with BudgetWatch(Spending(), [], RunOptions(budget_hours=1.0), stop) as watch:
        assert stopped.wait(60)
    assert calls == ["read", "read", "stop", "read", "stop"] and watch.exhausted == "--budget-hours 1: 5 spent"


def attempt(tmp_path, name, seconds, end, devices=2, **changed):
    """A trial's record: one attempt on a machine of 8 GPUs at 3 USD an hour each, from ``seconds`` to ``end``."""
    journal = Journal(tmp_path / f"{name}.jsonl")
    fields = {"workers": devices, "devices": devices, "machine_devices": 8, "usd_per_device_hour": 3.0, **changed}
    journal.append(worker_line(Started(**fields), seconds, boot="b"))
    journal.append(worker_line(Saved(step=1), end, boot="b"))
    return TrialRecord.of(journal)


def test_a_machine_is_paid_for_whole_and_once(tmp_path):
    one, beside = attempt(tmp_path, "one", 0, HOUR), attempt(tmp_path, "beside", HOUR / 2, 2 * HOUR)
    assert machines_usd([one]) == pytest.approx(8 * 3.0)
    assert machines_usd([one, beside]) == pytest.approx(2 * 8 * 3.0)
    assert held_cost(one)[1] == pytest.approx(2 * 3.0), "a trial's own share"
    later = attempt(tmp_path, "later", 5 * HOUR, 6 * HOUR)
    assert machines_usd([one, later]) == pytest.approx(2 * 8 * 3.0), "not while no trial runs"
    over_two = attempt(tmp_path, "two", 0, HOUR, devices=16, head_usd_per_hour=0.5)
    assert machines_usd([over_two]) == pytest.approx(16 * 3.0 + 0.5)
    assert machines_usd([one, attempt(tmp_path, "free", 0, HOUR, usd_per_device_hour=None)]) is None
    old = [attempt(tmp_path, f"old{n}", 0, HOUR, machine_devices=None) for n in range(2)]
    assert machines_usd(old) == pytest.approx(2 * 2 * 3.0), "an older journal does not say what its machine has"
