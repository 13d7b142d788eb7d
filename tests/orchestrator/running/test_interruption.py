"""Ctrl-C while trials run: they save a checkpoint as after ``cancel``; the command prints what each keeps and loses."""

import _thread
import signal
import threading

import pytest
from rich.console import Console

from orchestrator.expansion import expand
from orchestrator.records import leases
from orchestrator.records.cancellation import Cancellation, pending_request
from orchestrator.records.events import Cancelled, Launched, Saved, Started, Step
from orchestrator.records.storage import Storage
from orchestrator.running import interruption
from orchestrator.running.interruption import ask_for_checkpoints, describe_kept
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.events import a_step


@pytest.fixture
def trials(tmp_path):
    """(storage, trials by label): four that train."""
    spec = SweepSpec(context_lengths=(1024, 2048), methods=("lora", "full"), references=(), steps=30, batch=2)
    storage = Storage.open(str(tmp_path / "runs"))
    found = expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials
    return storage, {trial.label: trial for trial in found}


def begin(storage, trial, steps, saved=None):
    journal = storage.add_trial(trial).journal
    for event in (Launched(), Started(), *(Step(**a_step(step)) for step in range(1, steps + 1))):
        journal.append(event)
    if saved:
        journal.append(Saved(step=saved))
    return journal


def train_until_asked(storage, trial, journal, step):
    """A worker between two steps, in a thread."""
    with Cancellation(storage, trial.fingerprint) as asked:
        while asked.poll_request() is None:
            threading.Event().wait(0.01)
        journal.append(Saved(step=step))
        journal.append(Cancelled(step=step, by=asked.request["by"]))


def test_own_running_trials_save_and_the_lines_say_what_is_kept_and_lost(trials, monkeypatch):
    storage, by_label = trials
    saves, ignores, others, _waits = by_label.values()
    journal = begin(storage, saves, steps=8, saved=4)
    begin(storage, ignores, steps=5, saved=2)
    begin(storage, others, steps=3)
    monkeypatch.setattr(interruption, "LIMIT_S", 3.0)
    worker = threading.Thread(target=train_until_asked, args=(storage, saves, journal, 8))
    console = Console(record=True, width=120)
    with (
        storage.trial(saves.fingerprint).lease(leases.owner("one", "mine")),
        storage.trial(ignores.fingerprint).lease(leases.owner("two", "mine")),
        storage.trial(others.fingerprint).lease(leases.owner("three", "another")),
    ):
        worker.start()
        ask_for_checkpoints(storage, by_label.values(), {"one", "two"}, console)
        worker.join(60)
    assert "2 running trials save a checkpoint, within 3 s" in console.export_text()
    assert not any(pending_request(storage, f"trials/{trial.fingerprint}") for trial in by_label.values())
    kept = [line.split(maxsplit=2)[2] for line in describe_kept(storage, by_label.values())]
    assert kept == [
        "checkpoint at step 8 of 30",
        "checkpoint at step 2 of 30; the last 3 steps are lost",
        "no checkpoint yet, starts over; the last 3 steps are lost",
        "not started",
    ]


def test_a_second_ctrl_c_ends_the_wait(trials, monkeypatch):
    storage, by_label = trials
    trial = next(iter(by_label.values()))
    begin(storage, trial, steps=5)
    monkeypatch.setattr(interruption, "LIMIT_S", 600.0)
    again = threading.Timer(0.5, _thread.interrupt_main)
    # As the command does: a process that a shell starts in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with storage.trial(trial.fingerprint).lease(leases.owner("one", "mine")):
        again.start()
        ask_for_checkpoints(storage, [trial], {"one"}, Console(quiet=True))
    signal.signal(signal.SIGINT, before)
    assert pending_request(storage, f"trials/{trial.fingerprint}") is None
