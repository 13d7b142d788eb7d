"""A sweep that a user watches, kills, restarts and cancels from another terminal."""

import os
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from orchestrator.records import cancellation
from orchestrator.records.journal import Journal
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.reporting.overview import Overview
from tests.support.commands import ROOT, SweepCommand, wait_for

pytestmark = pytest.mark.ray

# Trials of equal work but for what trains, one at a time: lora+ or full first, lora last.
LONG = (
    *("--name", "long", "--methods", "lora", "lora+", "full", "--context-lengths", "256", "--references"),
    *("--steps", "5000", "--batch", "2", "--eval-every", "5000", "--eval-documents", "2", "--checkpoint-every", "5"),
    *("--max-concurrent", "1"),
)


def other_terminal(module, *arguments):
    """(exit status, what was printed)."""
    command = [sys.executable, "-m", f"orchestrator.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_sweep_is_watched_killed_begun_anew_and_cancelled(tmp_path, text_folder):
    storage = Storage.at(str(tmp_path / "runs"))
    where = ("--storage", str(storage.root))
    flags = ("convergence", *LONG, "--data", str(text_folder))

    def trials():
        return {trial.label: trial for sweep in Overview(storage).sweeps() for trial in sweep.trials}

    def states():
        return {label: trial.state for label, trial in trials().items()}

    def training():
        return [label for label, trial in trials().items() if trial.state == "training" and trial.step > 5]

    process = SweepCommand(storage.root, *flags).start()
    (first,) = wait_for(training, process, "the first trial trains")
    assert sorted(states().values()) == ["training", "waiting", "waiting"]
    status, printed = other_terminal("status", *where)
    assert status == 0 and "long: running on" in printed and "waiting: for its turn" in printed, printed

    # The sweep's process is killed. Ray's go with it, and nothing claims any longer to run.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.time() + 300
    while states()[first] != "interrupted":
        assert time.time() < deadline, states()
        time.sleep(0.1)
    others = [label for label, state in states().items() if state == "not started"]
    assert len(others) == 2 and "long: interrupted" in other_terminal("status", *where)[1]
    status, printed = other_terminal("cancel", "long", *where)
    assert status == 2 and "is not running" in printed
    folder = storage.trial(trials()[first].fingerprint)
    before = folder.journal.path.read_bytes()

    # The same command, with one trial begun anew. Requests to cancel that are left of a command before hold no longer.
    for label in others:
        cancellation.request(storage, f"trials/{trials()[label].fingerprint}", "somebody")
    process = SweepCommand(storage.root, *flags, "--force-trials", folder.path.name[:6]).start()
    wait_for(lambda: training() == [first], process, "the first trial trains again")
    record = TrialRecord.of(folder.journal)
    assert len(record.attempts) == 1 and record.resumed_at == 0
    assert (folder.path / "earlier-1" / "journal.jsonl").read_bytes() == before
    assert list((folder.path / "earlier-1" / "checkpoints").glob("step-*"))

    # It stops with a checkpoint, and the next has its turn.
    assert other_terminal("cancel", f"long/{first}", *where)[0] == 0
    wait_for(lambda: states()[first] == "cancelled", process, "the first trial is cancelled")
    stopped = TrialRecord.of(folder.journal)
    assert stopped.saved_step == stopped.last_step == stopped.cancelled.step > 5
    wait_for(lambda: sorted(states().values())[1:] != ["waiting"] * 2, process, "the second trial begins")

    # The whole sweep: what waits does not begin.
    status, printed = other_terminal("cancel", "long", *where)
    assert status == 0, printed
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 130, output
    assert f"cancelled: {first} at step" in output and "The sweep is unfinished: 3 of 3" in output
    assert set(states().values()) == {"cancelled"}
    assert not TrialRecord.of(Journal(storage.trial(trials()["lora 256"].fingerprint).journal.path)).attempts

    # One run a trial; the one that began anew left its points in a run of another kind.
    client = MlflowClient(f"sqlite:///{storage.mlflow / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("longspan").experiment_id
    runs = client.search_runs([experiment], "tags.`longspan.kind` != 'sweep'")
    kinds = {run.info.run_name: (run.data.tags["longspan.kind"], run.info.status) for run in runs}
    expected = {label: ("trial", "KILLED") for label in (first, *others)}
    assert kinds == expected | {f"{first} (earlier 1)": ("earlier", "KILLED")}
