"""A sweep that is looked at, cancelled, killed and taken up again from another terminal, as a person does it."""

import os
import signal
import subprocess
import sys

from mlflow import MlflowClient

from orchestrator.journal import Journal, TrialRecord
from orchestrator.overview import Overview
from orchestrator.storage import Storage
from tests.orchestrator.conftest import ROOT, SweepCommand, wait_for

LONG = (
    *("--name", "long", "--methods", "lora", "lora+", "full", "--context-lengths", "256", "--references", "none"),
    *("--positions", "none", "--steps", "5000", "--batch", "2", "--eval-every", "1000", "--eval-documents", "2"),
    *("--checkpoint-every", "10", "--max-concurrent", "1"),
)


def other_terminal(module, *arguments):
    command = [sys.executable, "-m", f"orchestrator.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_sweep_is_watched_cancelled_killed_and_taken_up_again(tmp_path, text_folder):
    storage = tmp_path / "runs"
    where = ("--storage", str(storage))
    command = SweepCommand(storage, "convergence", *LONG, "--data", str(text_folder))

    def trials():
        return {trial.label: trial for sweep in Overview(Storage.at(str(storage))).sweeps() for trial in sweep.trials}

    def states():
        return {label: trial.state for label, trial in trials().items()}

    def training():
        return [label for label, trial in trials().items() if trial.state == "training" and trial.step]

    def record(label):
        return TrialRecord.of(Journal(storage / "trials" / trials()[label].fingerprint / "journal.jsonl"))

    process = command.start()
    (first,) = wait_for(training, process, "the first trial trains")
    waiting = [label for label, state in states().items() if state == "waiting"]
    assert len(waiting) == 2 and states()["untuned none 256"] == "finished"
    status, printed = other_terminal("status", *where)
    assert status == 0 and "long: running on" in printed and "waiting: for its turn" in printed, printed

    # One that trains stops with a checkpoint, one that waits does not begin, and the third has its turn.
    assert other_terminal("cancel", f"long/{first}", *where)[0] == 0
    wait_for(lambda: states()[first] == "cancelled", process, "the first trial is cancelled")
    stopped = record(first)
    assert stopped.saved_step == stopped.last_step == stopped.cancelled["step"] > 0
    (second,) = wait_for(lambda: [label for label in training() if label != first], process, "the second trial trains")
    (third,) = set(waiting) - {second}
    assert other_terminal("cancel", trials()[third].fingerprint[:8], *where)[0] == 0

    # The sweep's process is killed: its workers go with it, and nothing claims any longer to run.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    fresh = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: states()[second] == "interrupted", fresh, "the second trial is told as interrupted")
    fresh.kill()
    assert states()[third] == "not begun" and not record(third).attempts
    assert "long: interrupted" in other_terminal("status", *where)[1]
    status, printed = other_terminal("cancel", "long", *where)
    assert status == 2 and "does not run" in printed

    # The same command goes on with all of them, and one that is finished begins anew where that is asked for.
    untuned = trials()["untuned none 256"]
    again = SweepCommand(storage, *command.arguments[3:-2], "--force-trials", untuned.fingerprint[:6])
    process = again.start()
    wait_for(lambda: record(first).resumed_at and training() == [first], process, "the first trial goes on")
    assert record(first).resumed_at == stopped.cancelled["step"]
    status, printed = other_terminal("cancel", "long", *where)
    assert status == 0, printed
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"cancelled: {first} at step" in output and "The sweep is unfinished: 3 of 4" in output
    assert sorted(states().values()) == ["cancelled"] * 3 + ["finished"]
    assert f"{stopped.cancelled['step']} of 5000, where it was cancelled" in " ".join(output.split())

    folder = storage / "trials" / untuned.fingerprint
    earlier, now = (TrialRecord.of(Journal(path / "journal.jsonl")) for path in (folder / "earlier-1", folder))
    assert earlier.state == now.state == "finished" and now.launched > earlier.ended
    assert now.curve(256)[-1]["perplexity"] == earlier.curve(256)[-1]["perplexity"]

    client = MlflowClient(f"sqlite:///{storage / 'mlflow' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("longspan").experiment_id])
    by_kind = {}
    for run in runs:
        by_kind.setdefault(run.data.tags["longspan.kind"], []).append((run.info.run_name, run.info.status))
    assert sorted(status for _, status in by_kind["trial"]) == ["FINISHED"] + ["KILLED"] * 3
    assert by_kind["earlier"] == [("untuned none 256 (earlier 1)", "FINISHED")]
