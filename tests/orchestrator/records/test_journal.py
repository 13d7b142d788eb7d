"""The journal: what a dying process may leave behind, and what readers make of it."""

import itertools
import json
import multiprocessing
import os
import signal
import time

from orchestrator.records.events import (
    Cancelled,
    Eval,
    Failed,
    Finished,
    Launched,
    Resumed,
    Saved,
    Started,
    Step,
    as_line,
    parse,
)
from orchestrator.records.journal import Journal
from orchestrator.records.trial_record import TrialRecord
from tests.support.events import a_step, evaluation


def test_a_line_cut_off_by_a_dying_process_is_passed_over_and_the_next_one_is_whole(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Step(**a_step(1)))
    with journal.path.open("ab") as file:
        file.write(b'{"event": "step", "ti')
    assert [event.step for event in journal.read().events] == [1]
    journal.append(Step(**a_step(2)))
    assert [event.step for event in journal.read().events] == [1, 2]


def test_what_a_newer_version_has_added_is_kept_and_written_again():
    lines = [
        {"event": "step", "time": 1.5, "version": 99, **a_step(1), "fan_speed": [1, 2]},
        {"event": "moved", "time": 2.5, "version": 99, "to": "elsewhere"},
    ]
    events, skipped = parse("".join(json.dumps(line) + "\n" for line in lines).encode())
    assert (events[0].step, events[0].extra) == (1, {"fan_speed": [1, 2]})
    assert events[1].name == "moved" and not skipped
    assert [json.loads(as_line(event)) for event in events] == lines


def test_a_journal_without_versions_is_read_and_old_names_of_faults_are_mapped():
    lines = [{"event": "saved", "time": 1.0, "step": 3}]
    lines += [{"event": "retry", "time": 2.0, "kind": kind, "remedy": "again"} for kind in ("hiccup", "lost")]
    events, _ = parse("".join(json.dumps(line) + "\n" for line in lines).encode())
    assert [event.version for event in events] == [1, 1, 1]
    assert (events[0].step, events[1].kind, events[2].kind) == (3, "transient", "lost")


def test_lines_without_an_event_are_passed_over_and_reported(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    damaged = [b"5", b"[]", b'{"event": "saved", "time": 1.0}', b'{"event": "saved", "step": 1}', b"\xff\x00"]
    journal.path.write_bytes(b"\n".join(damaged) + b"\n")
    journal.append(Saved(step=7))
    record = TrialRecord.of(journal)
    assert record.saved_step == 7 and [line for line, _ in record.skipped] == damaged
    assert "step" in record.skipped[2].reason and "time" in record.skipped[3].reason


def test_a_reader_that_follows_sees_each_line_once_and_no_half_lines(tmp_path):
    record = TrialRecord(Journal(tmp_path / "journal.jsonl"))
    assert record.follow() == []
    record.journal.append(Step(**a_step(1)))
    assert len(record.follow()) == 1
    with record.journal.path.open("ab") as file:
        file.write(b'{"event": "saved", "time": 0, ')
        file.flush()
        assert record.follow() == []
        file.write(b'"step": 1}\n')
    assert [event.name for event in record.follow()] == ["saved"]


def test_a_cancelled_trial_stays_so_until_it_is_begun_again_and_never_was_once_finished(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Started(hardware="one"))
    journal.append(Cancelled(step=0, by="somebody"))
    record = TrialRecord.of(journal)
    assert (record.state, record.reason, record.cancelled.step) == ("cancelled", "by somebody", 0)
    journal.append(Launched())
    assert record.follow() and record.state == "starting"
    journal.append(Finished())
    journal.append(Cancelled(step=0, by="somebody"))  # another sweep waited for it
    assert record.follow() and record.state == "finished"


def test_a_resumed_trial_tells_twice_and_the_later_line_holds(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Started(hardware="one"))
    journal.append(Eval(**evaluation(0, 9.0)))
    for step in (1, 2, 3):
        journal.append(Step(**a_step(step, loss=step)))
    journal.append(Started(hardware="other"))
    journal.append(Resumed(step=1))
    journal.append(Step(**a_step(2, loss=20.0)))
    journal.append(Eval(**evaluation(2, 5.0)))
    journal.append(Eval(**evaluation(2, 6.0, context_length=512)))
    record = TrialRecord.of(journal)
    assert (record.state, record.resumed_at, record.started.hardware) == ("running", 1, "other")
    assert record.steps[2].loss == 20.0
    assert [(e.step, e.perplexity) for e in record.curve(1024)] == [(0, 9.0), (2, 5.0)]


def test_a_trial_that_failed_and_is_tried_again_is_running_and_then_finished(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(Failed(reason="NonFiniteLoss: step 3", attempt="a"))
    assert (TrialRecord.of(journal).state, TrialRecord.of(journal).reason) == ("failed", "NonFiniteLoss: step 3")
    journal.append(Started())
    assert TrialRecord.of(journal).state == "running"
    journal.append(Finished())
    assert (TrialRecord.of(journal).state, TrialRecord.of(journal).reason) == ("finished", None)


def _write_for_ever(path):
    journal = Journal(path)
    step = 0
    while True:
        step += 1
        journal.append(Step(**a_step(step)))


def test_a_killed_writer_loses_at_most_the_line_it_was_writing(tmp_path):
    path = tmp_path / "journal.jsonl"
    for _ in range(3):
        writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(path,))
        writer.start()
        size = path.stat().st_size if path.exists() else 0
        while not path.exists() or path.stat().st_size < size + 2000:
            time.sleep(0.01)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    steps = [event.step for event in Journal(path).read().events]
    runs = "".join("|" if step == 1 else "." for step in steps)
    assert runs.count("|") == 3
    for first, second in itertools.pairwise(steps):
        assert second in (first + 1, 1)
