"""Refusals of MLflow and deletions in it: distinguished from outages, and repaired where possible."""

import contextlib
import http.server
import os
import signal
import socket
import sqlite3
import threading
import time

import pytest
from mlflow import MlflowClient

from orchestrator.expansion import expand
from orchestrator.records import mlflow_store
from orchestrator.records.events import Finished, Step
from orchestrator.records.mlflow_sync import TrackingThread
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.events import a_step
from tests.support.mlflow_server import start_mlflow_server
from tests.support.mlflow_store import PROVENANCE, connect, history, runs, write_some_steps
from workloads.errors import InputError

ALL_STEPS = [(1, 9.0), (2, 8.0), (3, 7.0)]


@pytest.fixture
def journals(storage, trials):
    """Two trials with three steps each."""
    journals = [storage.trial(trial.fingerprint).journal for trial in trials]
    for journal in journals:
        write_some_steps(journal)
    return journals


@pytest.fixture
def mirrored(storage, trials, journals):
    """A tracker that has logged both trials."""
    tracker = connect(storage)
    tracker.follow(trials, "first", PROVENANCE)
    return tracker


def losses(uri):
    """The loss curves of the runs that are there, by the runs' names."""
    client, found = runs(uri)
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: history(client, run, "train/loss") for run in found}


def comparison(data="d", identity="1"):
    return {
        "sentences": [], "contexts": [], "git_commit": None, "git_diff": None,
        "model": {"name": "m", "identity": "m"}, "data": {"name": data, "identity": identity},
    }  # fmt: skip


def test_a_deleted_run_is_made_again_with_all_its_points(storage, trials, journals, mirrored):
    mirrored.store.client.delete_run(mirrored.run_id(trials[0]))
    journals[0].append(Finished())
    mirrored.follow(trials, "first", PROVENANCE)  # in the process that made it
    assert losses(mirrored.uri) == {trial.label: ALL_STEPS for trial in trials}
    for trial in trials:
        mirrored.store.client.delete_run(mirrored.run_id(trial))
    mirrored.follow(trials, "first", PROVENANCE, check_runs=True)  # there is nothing new of them
    assert losses(mirrored.uri) == {trial.label: ALL_STEPS for trial in trials}
    mirrored.store.client.delete_run(mirrored.run_id(trials[1]))
    later = connect(storage)
    later.follow(trials, "second", PROVENANCE)
    assert losses(later.uri) == {trial.label: ALL_STEPS for trial in trials}
    _, found = runs(later.uri)
    (finished,) = (run for run in found if run.info.run_name == trials[0].label)
    assert (finished.info.status, finished.data.params["lora_rank"]) == ("FINISHED", "8")
    assert not mirrored.refused and not later.refused


def test_a_deleted_experiment_is_restored_and_that_is_said(storage, trials, journals, mirrored):
    mirrored.store.client.delete_experiment(mirrored.store.experiment_id)
    journals[0].append(Step(**a_step(4, loss=6.0)))
    mirrored.follow(trials, "first", PROVENANCE)
    assert mirrored.trouble is None and "experiment longspan had been deleted" in mirrored.store.notes[0]
    assert losses(mirrored.uri) == {trials[0].label: [*ALL_STEPS, (4, 6.0)], trials[1].label: ALL_STEPS}
    mirrored.store.client.delete_experiment(mirrored.store.experiment_id)
    mirrored.log_sweep("first", "settings", comparison(), trials, [])
    assert mirrored.trouble is None
    mirrored.store.client.delete_experiment(mirrored.store.experiment_id)
    later = connect(storage)
    later.follow(trials, "second", PROVENANCE)
    assert later.trouble is None and later.store.notes
    assert set(losses(later.uri)) == {trials[0].label, trials[1].label, "sweep first"}


def test_a_deleted_store_is_made_again_with_all_points(storage, trials, journals, mirrored):
    (storage.mlflow / "mlflow.db").unlink()
    mirrored.follow(trials, "first", PROVENANCE, check_runs=True)
    assert mirrored.trouble is None
    assert losses(mirrored.uri) == {trial.label: ALL_STEPS for trial in trials}
    (storage.mlflow / "mlflow.db").unlink()
    connect(storage).follow(trials, "second", PROVENANCE)
    assert losses(mirrored.uri) == {trial.label: ALL_STEPS for trial in trials}


def test_a_store_in_a_folder_that_is_not_there_yet_is_made(storage, trials, journals, tmp_path):
    tracker = connect(storage, f"sqlite:///{tmp_path / 'new' / 'folder' / 'mlflow.db'}")
    tracker.follow(trials[:1], "first", PROVENANCE)
    assert losses(tracker.uri) == {trials[0].label: ALL_STEPS}


def test_a_damaged_record_of_what_was_logged_repeats_no_point(storage, trials, journals, mirrored):
    for damage in ("", "[1]", "{"):
        storage.trial(trials[0].fingerprint).mlflow_state.write_text(damage)
        later = connect(storage)
        later.follow(trials, "first", PROVENANCE)
        assert later.trouble is None
    assert losses(mirrored.uri) == {trial.label: ALL_STEPS for trial in trials}


def test_a_run_whose_settings_were_lost_gets_them(storage, trial, journals, mirrored):
    """The process that made it died in between."""
    run_id = mirrored.run_id(trial)
    with contextlib.closing(sqlite3.connect(storage.mlflow / "mlflow.db")) as database:
        database.execute("DELETE FROM params WHERE run_uuid = ?", [run_id])
        database.commit()
    connect(storage).follow([trial], "first", PROVENANCE)
    assert MlflowClient(mirrored.uri).get_run(run_id).data.params["lora_rank"] == "8"


def test_a_trial_that_is_refused_holds_up_no_other_and_nothing_is_promised(storage, trials, journals, mirrored):
    with contextlib.closing(sqlite3.connect(storage.mlflow / "mlflow.db")) as database:  # a rule of the store's owner
        database.execute(
            f"CREATE TRIGGER rule BEFORE INSERT ON metrics WHEN NEW.run_uuid = '{mirrored.run_id(trials[0])}' "
            "BEGIN SELECT RAISE(ABORT, 'this run is closed'); END"
        )
        database.commit()
    for journal in journals:
        journal.append(Step(**a_step(4, loss=6.0)))
    thread = TrackingThread(mirrored, trials, "first", PROVENANCE)
    thread.start()
    thread.stop()
    assert losses(mirrored.uri) == {trials[0].label: ALL_STEPS, trials[1].label: [*ALL_STEPS, (4, 6.0)]}
    assert f"MLflow refuses {trials[0].label} (this run is closed): choose another experiment" in thread.trouble
    assert list(mirrored.refused) == [trials[0].label] and mirrored.outage is None
    assert "trying again" not in thread.trouble and "nothing is lost" not in thread.trouble

    with contextlib.closing(sqlite3.connect(storage.mlflow / "mlflow.db")) as database:
        database.execute("DROP TRIGGER rule")
        database.commit()
    mirrored.follow(trials, "first", PROVENANCE)
    assert losses(mirrored.uri) == {trial.label: [*ALL_STEPS, (4, 6.0)] for trial in trials}
    assert mirrored.trouble is None


def test_a_store_of_another_user_refuses_and_an_interruption_stays_one(storage, trials, journals, mirrored):
    read_only = f"sqlite:///file:{storage.mlflow / 'mlflow.db'}?mode=ro&uri=true"
    journals[1].append(Step(**a_step(4)))
    tracker = connect(storage, read_only)
    tracker.follow(trials, "second", PROVENANCE)
    tracker.interrupted()
    tracker.log_sweep("second", "settings", comparison(), trials, [])
    assert set(tracker.refused) == {*(trial.label for trial in trials), "sweep second"} and tracker.outage is None
    assert "attempt to write a readonly database" in tracker.trouble and "belong to another user" in tracker.trouble


def test_a_locked_database_is_one_error_at_the_start_and_an_outage_later(storage, trials, mirrored, monkeypatch):
    monkeypatch.setattr(mlflow_store, "LOCKED_S", 0.5)
    database = sqlite3.connect(storage.mlflow / "mlflow.db", isolation_level=None)
    database.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match=r"mlflow\.db is locked by another process; end that process or wait"):
        connect(storage)
    assert mlflow_store.is_outage(sqlite3.OperationalError("database is locked"))
    database.close()
    connect(storage)


@pytest.mark.parametrize("damage", ["overwritten", "another file", "a folder"])
def test_a_damaged_database_is_one_error_at_the_start(storage, damage):
    file = storage.mlflow / "mlflow.db"
    if damage == "overwritten":
        content = bytearray(file.read_bytes())
        content[100:200_000] = bytes(199_900)
        file.write_bytes(content)
    else:
        file.unlink()
        file.mkdir() if damage == "a folder" else file.write_bytes(b"neither tables nor rows " * 500)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be used \(.*(not a database|malformed|unable to open).*(aside|make)"):
        connect(storage)
    assert time.monotonic() - began < 100  # MLflow itself tries for two minutes; here it takes a second


def test_trials_are_nested_under_the_first_sweep_that_logs_them(storage, trials, mirrored):
    mirrored.log_sweep("first", "settings", comparison(), trials, [])
    later = connect(storage)
    later.follow(trials, "second", PROVENANCE)
    later.log_sweep("second", "settings", comparison(), trials, [])
    _, found = runs(later.uri)
    by_name = {run.info.run_name: run for run in found}
    parents = {by_name[trial.label].data.tags["mlflow.parentRunId"] for trial in trials}
    assert parents == {by_name["sweep first"].info.run_id}
    assert all({"in_sweep.first", "in_sweep.second"} <= set(by_name[trial.label].data.tags) for trial in trials)


def test_a_name_used_again_for_other_data_or_settings_gets_a_run_of_its_own(storage, trials, mirrored):
    for settings, data, identity in (("a", "d", "1"), ("a", "d", "1"), ("b", "d", "1"), ("b", "e", "3")):
        mirrored.log_sweep("again", settings, comparison(data, identity), trials, [])
        assert mirrored.trouble is None
    _, found = runs(mirrored.uri)
    by_name = {run.info.run_name: run for run in found if run.data.tags["longspan.kind"] != "trial"}
    assert set(by_name) == {"sweep again (earlier 1)", "sweep again (earlier 2)", "sweep again"}
    assert by_name["sweep again"].data.params["data_identity"] == "3"
    assert by_name["sweep again (earlier 1)"].data.params["settings"] == "a"
    assert by_name["sweep again (earlier 2)"].data.params["data"] == "d"
    assert all(mirrored.run_id(trial) in by_name["sweep again"].data.tags.values() for trial in trials)


def test_a_sweep_of_more_trials_than_mlflow_takes_tags_at_once_lists_all(mirrored):
    layers = [",".join(map(str, range(last))) for last in range(2, 32)]
    axes = dict(positions=["linear", "yarn"], train_layers=layers, lora_targets=[["q_proj"], ["q_proj", "v_proj"]])
    spec = SweepSpec.of(dict(context_lengths=[1024], methods=["lora+"], references=[], batch=2) | axes)
    trials = expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials
    mirrored.log_sweep("wide", "settings", comparison(), trials, [])
    assert mirrored.trouble is None and not mirrored.refused
    _, found = runs(mirrored.uri)
    (sweep,) = (run for run in found if run.data.tags["longspan.kind"] == "sweep")
    assert sum(tag.startswith("trial.lora_plus 1024 ") for tag in sweep.data.tags) == len(trials) == 120


@contextlib.contextmanager
def answering(status, body="<html>"):
    """A server, or a proxy before it, that answers everything alike; yields its address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "cannot be used .*set MLFLOW_TRACKING_USERNAME"),
        (403, "cannot be used .*ask its owner for the permission"),
        (404, "cannot be used .*no MLflow server"),
        (200, "cannot be used .*no MLflow server"),
        (502, "does not answer .*start the server"),
        (503, "does not answer .*start the server"),
    ],
)
def test_a_server_that_refuses_is_told_from_one_that_is_down(storage, status, message):
    with answering(status) as address, pytest.raises(InputError, match=message):
        connect(storage, address)


def test_what_is_deleted_on_a_server_is_made_again_too(storage, trials, journals, tmp_path, empty_database):
    (tmp_path / "server.db").write_bytes(empty_database.read_bytes())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start_mlflow_server(tmp_path, port)
    try:
        tracker = connect(storage, f"http://127.0.0.1:{port}")
        tracker.follow(trials, "first", PROVENANCE)
        tracker.store.client.delete_run(tracker.run_id(trials[0]))
        journals[0].append(Step(**a_step(4, loss=6.0)))
        tracker.follow(trials, "first", PROVENANCE)
        tracker.store.client.delete_experiment(tracker.store.experiment_id)
        journals[1].append(Step(**a_step(4, loss=6.0)))
        tracker.follow(trials, "first", PROVENANCE)
        assert tracker.trouble is None and tracker.store.notes
        page = f"{tracker.uri}/#/experiments/{tracker.store.experiment_id}/runs?"
        links = dict(tracker.links("first"))
        assert "first: perplexity by step" in links and all(each.startswith(page) for each in links.values())
        assert tracker.links("never run") == [] and tracker.trouble is None
        _, found = runs(tracker.uri)
        assert len(found) == 3  # a restored experiment has its deleted run back
        newest = {run.info.run_name: run for run in reversed(found)}
        for trial in trials:
            assert history(tracker.store.client, newest[trial.label], "train/loss") == [*ALL_STEPS, (4, 6.0)]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
