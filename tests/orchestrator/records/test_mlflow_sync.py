"""MLflow against a real store: one run a trial, every point once, and nothing lost while the server is away."""

import os
import signal
import socket
import time

import pytest

from orchestrator.expansion import expand
from orchestrator.records.events import Cancelled, Eval, Failed, Finished, ModelReady, Started, Step, Stopped
from orchestrator.records.mlflow_sync import TrackingThread
from orchestrator.records.provenance import Provenance
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.events import a_step, document_evaluation
from tests.support.mlflow_server import start_mlflow_server
from tests.support.mlflow_store import PROVENANCE, STARTED, connect, history, runs, write_some_steps
from workloads.errors import InputError


def test_a_journal_becomes_one_run_with_curves_by_step(storage, trial):
    journal = storage.trial(trial.fingerprint).journal
    write_some_steps(journal)
    journal.append(ModelReady(parameters=1, trainable_parameters=1, attention_backend="cudnn"))
    journal.append(Finished())
    tracker = connect(storage)
    tracker.follow([trial], "first", PROVENANCE)

    client, (run,) = runs(tracker.uri)
    assert run.info.status == "FINISHED"
    assert history(client, run, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0)]
    # What a chart's axis can be, at each step and evaluation: steps of 2 s each on one worker.
    assert history(client, run, "train/tokens") == [(0, 0), (1, 10), (2, 20), (3, 30)]
    assert history(client, run, "train/device_hours") == [(n, pytest.approx(2 * n / 3600)) for n in range(4)]
    assert history(client, run, "eval/perplexity_1024") == [(0, 20.0)]
    assert history(client, run, "eval/perplexity_512") == [(0, 2.0)]
    tags = run.data.tags
    assert (tags["method"], tags["context_length"], tags["attention"]) == ("lora+", "1024", "s2")
    assert (tags["longspan.fingerprint"], tags["git_commit"]) == (trial.fingerprint, "abc123-dirty")
    assert (tags["hardware"], tags["package.torch"]) == ("1 x NVIDIA H200", "2")
    assert (tags["driver"], tags["cuda"], tags["usd_per_device_hour"]) == ("580.65.06", "13.0", "7.912")
    assert (tags["execution.engine"], tags["execution.offload"]) == ("zero2", "True")
    assert tags["attention_backend"] == "cudnn"
    assert run.data.params["lora_rank"] == "8"
    assert (tags["mlflow.source.name"], tags["mlflow.source.git.commit"]) == ("longspan", "abc123")
    (dataset,) = (each.dataset for each in run.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == (trial.data, "d")


def test_references_are_lines_and_each_variant_has_its_colour(storage):
    spec = SweepSpec(context_lengths=(1024,), methods=("lora+", "full"), references=("none",), seeds=(0, 1))
    trials = expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials
    for trial in trials:
        storage.add_trial(trial)
        journal = storage.trial(trial.fingerprint).journal
        journal.append(Started(**STARTED))
        journal.append(Eval(**document_evaluation(0, 9.0, 1024)))
        for step in range(1, 5 if trial.training.method != "untuned" else 0):
            journal.append(Step(**a_step(step)))
            if step % 2 == 0:
                journal.append(Eval(**document_evaluation(step, 9.0 - step, 1024)))
    tracker = connect(storage)
    for _ in range(2):
        tracker.follow(trials, "first", PROVENANCE)
    client, found = runs(tracker.uri)
    by_name = {run.info.run_name: run for run in found}
    reference, full = by_name["untuned none 1024"], by_name["full 1024"]
    assert history(client, full, "eval/perplexity_1024") == [(0, 9.0), (2, 7.0), (4, 5.0)]
    assert history(client, reference, "eval/perplexity_1024") == [(0, 9.0), (2, 9.0), (4, 9.0)]
    assert history(client, reference, "train/tokens")[-1] == (4, 4 * 4096)
    low, high = (history(client, full, f"eval/perplexity_1024_{end}")[-1][1] for end in ("low", "high"))
    assert low < 5.0 < high
    colours = {name: run.data.tags["mlflow.runColor"] for name, run in by_name.items()}
    assert colours["full 1024"] == colours["full 1024 seed 1"] and len(set(colours.values())) == 4


def test_utilisation_is_logged_where_a_step_tells_it(storage, trial):
    journal = storage.trial(trial.fingerprint).journal
    journal.append(Started(**STARTED))
    journal.append(Step(**a_step(1)))
    journal.append(Step(**a_step(2), mfu=0.4))
    tracker = connect(storage)
    tracker.follow([trial], "first", PROVENANCE)
    client, (run,) = runs(tracker.uri)
    assert history(client, run, "perf/mfu") == [(2, 0.4)]
    assert history(client, run, "perf/tokens_per_second") == [(1, 5.0), (2, 5.0)]


def test_restarts_and_a_second_sweep_add_no_run_and_no_point(storage, trial):
    journal = storage.trial(trial.fingerprint).journal
    write_some_steps(journal)
    connect(storage).follow([trial], "first", PROVENANCE)
    # The trial goes on from step 1 and tells of steps 2 and 3 again; another process follows, in another sweep.
    write_some_steps(journal, first=2, last=4)
    journal.append(Finished())
    tracker = connect(storage)
    for _ in range(2):
        tracker.follow([trial], "second", PROVENANCE)
    # Even one that has lost what it knew of MLflow.
    storage.trial(trial.fingerprint).mlflow_state.unlink()
    connect(storage).follow([trial], "second", PROVENANCE)

    client, (run,) = runs(tracker.uri)
    assert run.info.status == "FINISHED"
    (finished,) = (event for event in journal.read().events if event.name == "finished")
    assert run.info.end_time == int(finished.time * 1000)
    assert history(client, run, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    assert run.data.tags["longspan.sweeps"] == "first, second"


def test_the_resolved_trial_and_what_its_code_differed_in_are_artifacts_of_its_run(storage, trial):
    folder = storage.trial(trial.fingerprint)
    first, second = (Provenance("abc-dirty", {}, diff) for diff in ("one line\n", "another line\n"))
    assert Provenance("abc", {}, None).keep_diff(folder.path) is None
    first.keep_diff(folder.path)
    write_some_steps(folder.journal, last=1)
    tracker = connect(storage)
    tracker.follow([trial], "first", first)
    # It goes on with other code, in another process.
    second.keep_diff(folder.path)
    write_some_steps(folder.journal, first=2, last=2)
    tracker = connect(storage)
    tracker.follow([trial], "first", second)
    client, (run,) = runs(tracker.uri)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "trial.json", first.diff_name, second.diff_name,
    }  # fmt: skip
    kept = client.download_artifacts(run.info.run_id, second.diff_name)
    with open(kept) as file:
        assert file.read() == "another line\n"


def test_a_failed_trial_says_why_and_an_interrupted_one_is_not_left_running(storage, trial):
    journal = storage.trial(trial.fingerprint).journal
    write_some_steps(journal)
    tracker = connect(storage)
    tracker.follow([trial], "first", PROVENANCE)
    assert runs(tracker.uri)[1][0].info.status == "RUNNING"
    tracker.interrupted()
    assert runs(tracker.uri)[1][0].info.status == "KILLED"
    storage.trial(trial.fingerprint).log.write_text(
        "".join(f"line {number}\n" for number in range(1000)) + "HF_TOKEN=hf_abcdefghijklmnop1\nloss is nan\n"
    )
    journal.append(Failed(reason="NonFiniteLoss: step 4", attempt="a"))
    tracker.follow([trial], "first", PROVENANCE)
    client, (run,) = runs(tracker.uri)
    with open(client.download_artifacts(run.info.run_id, "end_of_log.txt")) as file:
        log = file.read()
    assert log.endswith("loss is nan") and "line 999" in log and "line 500" not in log and "abcdefgh" not in log
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "NonFiniteLoss: step 4")


def test_a_trial_that_was_stopped_early_is_killed_with_its_reason_until_it_is_finished(storage, trial):
    journal = storage.trial(trial.fingerprint).journal
    write_some_steps(journal)
    journal.append(Stopped(step=3, tokens=30, sweep="first", reason="perplexity 9 is not among the best 1 of 3"))
    tracker = connect(storage)
    tracker.follow([trial], "first", PROVENANCE)
    tracker.interrupted()  # the sweep may still be: this trial has ended all the same
    (run,) = runs(tracker.uri)[1]
    (stopped,) = (event for event in journal.read().events if event.name == "stopped")
    assert (run.info.status, run.info.end_time) == ("KILLED", int(stopped.time * 1000))
    assert run.data.tags["stopped_early"] == "perplexity 9 is not among the best 1 of 3"
    write_some_steps(journal, first=4, last=5)
    journal.append(Finished())
    connect(storage).follow([trial], "second", PROVENANCE)
    (run,) = runs(tracker.uri)[1]
    assert (run.info.status, run.data.tags["stopped_early"]) == ("FINISHED", "no: it went on, and finished")


def test_a_cancelled_trial_is_killed_by_name_until_it_is_finished(storage, trial):
    journal = storage.trial(trial.fingerprint).journal
    write_some_steps(journal)
    journal.append(Cancelled(step=3, by="somebody on head"))
    tracker = connect(storage)
    tracker.follow([trial], "first", PROVENANCE)
    (run,) = runs(tracker.uri)[1]
    assert (run.info.status, run.data.tags["cancelled"]) == ("KILLED", "at step 3, by somebody on head")
    write_some_steps(journal, first=4, last=5)
    journal.append(Finished())
    connect(storage).follow([trial], "first", PROVENANCE)
    (run,) = runs(tracker.uri)[1]
    assert (run.info.status, run.data.tags["cancelled"]) == ("FINISHED", "no: it went on, and finished")


def test_a_trial_that_begins_anew_has_one_run_and_its_earlier_points_stay_in_another(storage, trial):
    folder = storage.trial(trial.fingerprint)
    write_some_steps(folder.journal)
    folder.journal.append(Finished())
    tracker = connect(storage)
    tracker.follow([trial], "first", PROVENANCE)
    folder.put_aside()
    write_some_steps(folder.journal, last=2)
    for _ in range(2):  # and again in a process that knows nothing of it
        connect(storage).follow([trial], "first", PROVENANCE)
        folder.mlflow_state.unlink()
    client, found = runs(tracker.uri)
    kinds = {run.data.tags["longspan.kind"]: run for run in found}
    assert len(found) == 2 and kinds.keys() == {"trial", "earlier"}
    now, earlier = kinds["trial"], kinds["earlier"]
    assert (
        now.data.tags["longspan.fingerprint"] == trial.fingerprint == earlier.data.tags["longspan.earlier_fingerprint"]
    )
    assert "longspan.fingerprint" not in earlier.data.tags and earlier.info.run_name == f"{trial.label} (earlier 1)"
    assert history(client, now, "train/loss") == [(1, 9.0), (2, 8.0)]
    assert history(client, earlier, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert (now.info.status, earlier.info.status) == ("RUNNING", "FINISHED")


def test_a_server_that_does_not_answer_is_one_clear_error(storage):
    began = time.monotonic()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*--tracking-uri") as refused:
        connect(storage, "http://somebody:secret@127.0.0.1:9")
    assert "secret" not in str(refused.value)
    assert time.monotonic() - began < 180  # MLflow itself tries for four minutes; here it takes seconds


def until(condition):
    """Waits for something that another thread does; the limit is for one that never does."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_outage_of_the_server_loses_no_point_and_leaves_one_run(storage, trial, tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.records.mlflow_sync.INTERVAL_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    journal = storage.trial(trial.fingerprint).journal
    server = start_mlflow_server(tmp_path, port)
    tracker = connect(storage, f"http://127.0.0.1:{port}")
    thread = TrackingThread(tracker, [trial], "first", PROVENANCE)
    thread.start()
    write_some_steps(journal, last=5)
    until(lambda: tracker.runs and tracker.runs[trial.fingerprint].logged.get("train/loss") == 5)

    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    for step in range(6, 10):
        journal.append(Step(**a_step(step, loss=10.0 - step)))
    until(lambda: thread.trouble)
    assert "nothing is lost" in thread.trouble

    server = start_mlflow_server(tmp_path, port)
    journal.append(Finished())
    thread.stop()
    assert thread.trouble is None
    client, (run,) = runs(tracker.uri)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(client, run, "train/loss")] == list(range(1, 10))
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
