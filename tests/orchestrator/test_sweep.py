"""A sweep as a user runs it: real Ray, real trials of the built-in model, real MLflow, in a process of its own."""

import importlib.util
import json
import os
import re
import shutil
import signal

import pytest

from tests.support.commands import ONE_TRIAL, SMALL, SweepCommand, wait_for
from tests.support.storage import mlflow_runs, records, running_trial

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_folder):
    """A sweep of three methods and two references that has run once."""
    storage = tmp_path_factory.mktemp("finished") / "runs"
    command = SweepCommand(storage, "convergence", *SMALL, "--data", str(text_folder))
    status, output = command.run()
    assert status == 0, output
    return command, output


def test_it_ends_with_table_report_and_the_command_for_mlflow(finished):
    command, output = finished
    for setting in ("untuned, no change", "untuned, YaRN", "untuned, linear", "lora", "lora+", "full"):
        assert re.search(rf"^ +1,024 +{re.escape(setting)}", output, re.M), output
    report = re.search(r"^report: (.*)$", output, re.M)[1]
    page = (command.storage / "sweeps").glob("*/report/report.html")
    assert os.path.realpath(report) == os.path.realpath(next(page))
    assert re.search(r"^MLflow: .* -m dashboards\.mlflow --storage ", output, re.M)
    assert "no intervals and no winner: only 2 documents are scored" in " ".join(output.split())
    exported = re.search(r"^export \S+ 1024: .* -m workloads\.export (\S+) DIR$", output, re.M)[1]
    assert os.path.realpath(exported) in {os.path.realpath(path) for path in command.storage.glob("trials/*")}


def test_nothing_but_the_sweep_itself_speaks(finished):
    _, output = finished
    assert output.startswith("sweep convergence-")
    for noise in ("WARNING", "Warning", "INFO", "(raylet)", "Traceback", "ray.init", "Loading weights"):
        assert noise not in output, output


def test_each_trial_has_a_whole_record(finished):
    command, _ = finished
    found = records(command.storage)
    assert len(found) == 6
    assert {record.state for record in found.values()} == {"finished"}
    for record in found.values():
        trained = json.loads((record.journal.path.parent / "trial.json").read_text())["training"]
        steps = trained["steps"]
        assert sorted(record.steps) == list(range(1, steps + 1))
        assert [e.step for e in record.curve(1024)] == ([0, 2, 4] if steps else [0])
        assert [e.step for e in record.curve(512)] == [steps]
        assert record.started.execution["engine"] == "auto" and "checkpoint_minutes" in record.started.execution


def test_mlflow_has_one_run_a_trial_and_one_of_the_sweep_with_its_report(finished):
    command, _ = finished
    client, trials, sweeps = mlflow_runs(command.storage)
    assert sorted(run.info.run_name for run in trials) == [
        "full 1024", "lora 1024", "lora+ 1024", "untuned linear 1024", "untuned none 1024", "untuned yarn 1024",
    ]  # fmt: skip
    assert {run.info.status for run in trials + sweeps} == {"FINISHED"}
    full = next(run for run in trials if run.info.run_name == "full 1024")
    curve = client.get_metric_history(full.info.run_id, "eval/perplexity_1024")
    assert sorted(point.step for point in curve) == [0, 2, 4]
    (sweep,) = sweeps
    artifacts = {file.path for file in client.list_artifacts(sweep.info.run_id)}
    assert {"report.html", "final_perplexity.png", "comparison.json"} <= artifacts
    listed = {value for key, value in sweep.data.tags.items() if key.startswith("trial.")}
    assert listed == {run.info.run_id for run in trials}


def test_the_second_time_nothing_is_trained_and_it_says_why(finished):
    command, _ = finished
    before = {name: record.journal.path.read_bytes() for name, record in records(command.storage).items()}
    status, output = command.run()
    assert status == 0
    assert "already finished" in output and "Nothing is left to train" in output
    assert {name: record.journal.path.read_bytes() for name, record in records(command.storage).items()} == before
    _, trials, sweeps = mlflow_runs(command.storage)
    assert (len(trials), len(sweeps)) == (6, 1)


def test_damaged_files_are_named_and_stop_no_sweep(finished):
    command, _ = finished
    trial = sorted((command.storage / "trials").iterdir())[0]
    journal, whole = (trial / "journal.jsonl").read_bytes(), (trial / "trial.json").read_bytes()
    other = command.storage / "sweeps" / "other"
    other.mkdir()
    (other / "sweep.json").touch()
    (trial / "trial.json").write_text("12")
    (trial / "journal.jsonl").write_bytes(journal + b"12\n")
    status, output = command.run()
    (trial / "journal.jsonl").write_bytes(journal)
    shutil.rmtree(other)
    assert status == 0 and "Nothing is left to train" in output and "Traceback" not in output
    assert f"{trial.name}/journal.jsonl: 1 line is damaged and passed over" in output
    assert "it is written again" in output and (trial / "trial.json").read_bytes() == whole


def test_a_saved_sweep_with_an_axis_shares_the_trials(finished, text_folder):
    command, _ = finished
    (spec,) = (command.storage / "sweeps").glob("*/spec.json")
    flags = ["--methods", "lora", "--positions", "linear", "yarn", "--lora-rank", "8", "--name", "shared"]
    status, output = SweepCommand(command.storage, "--spec", str(spec), *flags).run()
    assert status == 0, output
    assert "5 trials: 1 to run, 4 already finished" in output
    _, trials, sweeps = mlflow_runs(command.storage)
    assert (len(trials), len(sweeps)) == (7, 2)
    assert {"lora 1024", "lora 1024 yarn"} <= {run.info.run_name for run in trials}
    shared = [run for run in trials if "shared" in run.data.tags["longspan.sweeps"].split(", ")]
    assert len(shared) == 5


def test_results_that_mlflow_refuses_are_an_error_at_the_end(finished):
    command, _ = finished
    read_only = f"sqlite:///file:{command.storage / 'mlflow' / 'mlflow.db'}?mode=ro&uri=true"
    status, output = SweepCommand(command.storage, *command.arguments[3:-2], "--tracking-uri", read_only).run()
    printed = " ".join(output.split())
    assert status == 3 and "no intervals and no winner: only 2 documents are scored" in printed
    assert "error: MLflow refuses " in printed and "(attempt to write a readonly database)" in printed
    assert "make them writable" in printed and "the results are kept in" in printed
    assert "logs them" not in printed and "Traceback" not in output


def test_two_workers_train_the_same_trial(finished, tmp_path, text_folder):
    """The workers and their engine are no part of a trial's identity, and change its losses by rounding alone."""
    engine = "zero3" if importlib.util.find_spec("deepspeed") else "ddp"
    alone, _ = finished
    flags = [*SMALL, "--data", str(text_folder), "--methods", "lora+", "--references"]
    flags += ["--workers", "2", "--engine", engine]
    command = SweepCommand(tmp_path / "runs", *flags)
    status, output = command.run()
    assert status == 0, output
    ((fingerprint, together),) = records(command.storage).items()
    assert together.started.workers == 2
    expected = {step: event.loss for step, event in records(alone.storage)[fingerprint].steps.items()}
    assert {step: event.loss for step, event in together.steps.items()} == pytest.approx(expected, rel=1e-3)


def test_ctrl_c_ends_the_command_and_the_same_command_goes_on(tmp_path, text_folder):
    """SIGTERM is how a job scheduler or `ray job stop` asks the same."""
    command = SweepCommand(tmp_path / "runs", *ONE_TRIAL, "--steps", "12", "--data", str(text_folder))
    kept = 0
    for at_step, end, stop in ((4, os.killpg, signal.SIGINT), (8, os.kill, signal.SIGTERM)):
        process = command.start()
        wait_for(lambda step=at_step: running_trial(command.storage, step), process, f"step {at_step}")
        end(process.pid, stop)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 130
        assert not kept or f"from step {kept} of 12" in output
        kept = int(re.search(r"full 1024 +checkpoint at step (\d+) of 12", output)[1])
        assert "the running trial saves a checkpoint, within 10 s; Ctrl-C again ends at once" in output
        (record,) = records(command.storage).values()
        # On a busy machine a step and its checkpoint may take longer, and the last steps are lost.
        assert (record.state, kept) == ("cancelled", record.last_step) or " lost" in output
        assert kept >= at_step - 2 and "The same command continues from there." in output
        assert "Traceback" not in output
        _, (run,), _ = mlflow_runs(command.storage)
        assert run.info.status == "KILLED"

    status, output = command.run()
    assert status == 0, output
    assert f"from step {kept} of 12" in output
    (record,) = records(command.storage).values()
    assert record.state == "finished" and record.resumed_at == kept
    _, (run,), _ = mlflow_runs(command.storage)
    assert run.info.status == "FINISHED"


def test_two_sweeps_at_once_train_a_shared_trial_once(tmp_path, text_folder):
    flags = (*ONE_TRIAL, "--steps", "6", "--data", str(text_folder))
    processes = [SweepCommand(tmp_path / "runs", *flags, "--name", name).start() for name in ("one", "other")]
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    (record,) = records(tmp_path / "runs").values()
    events = record.journal.read().events
    assert record.state == "finished"
    assert [event.step for event in events if event.name == "step"] == list(range(1, 7))
    client, (run,), sweeps = mlflow_runs(tmp_path / "runs")
    assert {sweep.data.tags["longspan.sweep"] for sweep in sweeps} == {"one", "other"}
    assert sorted(run.data.tags["longspan.sweeps"].split(", ")) == ["one", "other"]
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in losses) == list(range(1, 7))


def test_a_trial_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path, text_folder):
    diverges = ("--learning-rate-full", "1e30", "--warmup-steps", "0", "--max-grad-norm", "None")
    command = SweepCommand(
        tmp_path / "runs", *SMALL, "--data", str(text_folder), "--methods", "lora", "full", "--references", *diverges
    )
    status, output = command.run()
    assert status == 1
    # A line may be folded by the width of the terminal.
    assert re.search(r"failed: full 1024: NonFiniteLoss: step \d+", output), output
    states = {record.state for record in records(command.storage).values()}
    assert states == {"finished", "failed"}
    failed = next(record for record in records(command.storage).values() if record.state == "failed")
    log = (failed.journal.path.parent / "log.txt").read_text()
    assert "NonFiniteLoss" in log and "Traceback" in log
    assert sum(event.name == "started" for event in failed.journal.read().events) == 1  # it was not tried again
    _, trials, _ = mlflow_runs(command.storage)
    assert {run.info.run_name: run.info.status for run in trials} == {"full 1024": "FAILED", "lora 1024": "FINISHED"}
