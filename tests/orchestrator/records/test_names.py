"""Names and paths that mean something in another syntax, and a sweep's name that is used again."""

import json
import os
import shlex
import shutil
import sqlite3
from types import SimpleNamespace

import pytest

from dashboards.mlflow import sqlite_url
from orchestrator import sweep
from orchestrator.cli import parse
from orchestrator.expansion import expand
from orchestrator.planning.preparation import check_sweep
from orchestrator.records.heartbeat import Heartbeat
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.trial_launcher import _record_failure
from orchestrator.spec import SweepSpec
from orchestrator.terminal import shell_command
from orchestrator.trial_spec import Identities
from tests.support.mlflow_store import connect

ODD = "a # b?c=%41 %d $(x) 'y' é"


def test_mlflows_store_is_in_the_storage_and_nowhere_else_whatever_its_path(tmp_path, monkeypatch, empty_database):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage.open(str(tmp_path / ODD))
    storage.mlflow.mkdir()
    shutil.copy(empty_database, storage.mlflow / "mlflow.db")
    store = connect(storage).store
    run = store.client.create_run(store.experiment_id)
    store.client.log_dict(run.info.run_id, {"a": 1}, "a.json")
    with sqlite3.connect(storage.mlflow / "mlflow.db") as database:
        assert database.execute("SELECT run_uuid FROM runs").fetchall() == [(run.info.run_id,)]
    assert json.loads(next(storage.mlflow.glob("artifacts/**/a.json")).read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [storage.root]
    assert sqlite_url(tmp_path / "runs" / "mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"  # as before


def test_a_printed_command_can_be_typed():
    assert shlex.split(shell_command("python", "--storage", ODD)) == ["python", "--storage", ODD]


@pytest.mark.parametrize("where", ["local", "store"])
def test_a_name_used_again_puts_the_earlier_sweep_aside(tmp_path, monkeypatch, where):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = Storage.at(str(tmp_path / "runs") if where == "local" else f"memory://{tmp_path.name}")
    for file in ("spec.json", "comparison.json", "report/a.json", "rungs/1/2/a.json"):
        storage.write(f"sweeps/mine/{file}", {"of": "the first"})
    storage.write("sweeps/mine/sweep.json", {"trials": ["a", "b"]})
    assert not storage.lists_others("mine", {"a", "b", "c"})  # it has grown
    assert not storage.lists_others("other", {"a"})
    assert storage.lists_others("mine", {"a", "c"})
    assert storage.put_aside_sweep("mine").name == "earlier-1"
    assert storage.read("sweeps/mine/spec.json") is None
    for file in ("spec.json", "comparison.json", "report/a.json"):
        assert storage.read(f"sweeps/mine/earlier-1/{file}") == {"of": "the first"}
    assert storage.read("sweeps/mine/rungs/1/2/a.json")
    storage.write("sweeps/mine/sweep.json", {"trials": "damaged"})
    assert storage.lists_others("mine", {"a"})
    assert storage.put_aside_sweep("mine").name == "earlier-2"


def test_the_name_of_a_running_sweep_is_refused_for_another_one(tmp_path, monkeypatch, capsys):
    storage = Storage.open(str(tmp_path / "runs"))
    flags = ["--name", "mine", "--storage", str(storage.root), "--steps"]
    with Heartbeat(storage, "mine", dict, parse([*flags, "7"])[1].digest()):
        before = storage.read("sweeps/mine/command.json")
        assert sweep.main([*flags, "8"]) == 2
        assert storage.read("sweeps/mine/command.json") == before
        error = " ".join(capsys.readouterr().err.split())
        assert f"a sweep named mine is running with other settings (process {os.getpid()} on " in error
        assert f"longspan cancel mine --storage {storage.root}" in error
        same = check_sweep(*parse([*flags, "7"]))
        assert sweep._find_running_namesake(same)["owner"]["pid"] == os.getpid()
    assert sweep._find_running_namesake(check_sweep(*parse([*flags, "8"]))) is None


def test_a_trials_folder_removed_while_it_trains_is_the_reason_of_its_failure(tmp_path):
    storage = Storage.open(str(tmp_path / "runs"))
    spec = SweepSpec(context_lengths=(1024,), methods=("lora+",), references=())
    (trial,) = expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials
    folder = storage.add_trial(trial)
    shutil.rmtree(folder.path)
    _record_failure(SimpleNamespace(attempt="a"), [folder], "FileNotFoundError: journal.jsonl")
    record = TrialRecord.of(folder.journal)
    assert record.state == "failed" and "was removed while it trained" in record.reason
    assert folder.log.exists()
