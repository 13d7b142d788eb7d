"""Names and paths that mean something in another syntax, and a sweep's name that is used again."""

import shlex
import shutil
from types import SimpleNamespace

import pytest
from sqlalchemy.engine import make_url

from dashboards.mlflow import sqlite_url
from orchestrator.records.mlflow_sync import tracking_uri
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.trial_driver import _record_failure
from orchestrator.spec import SweepSpec
from orchestrator.terminal import shell_command
from orchestrator.trial_spec import Identities

ODD = "a # b?c=%41 %d $(x) 'y' é"


def test_mlflows_database_is_in_the_storage_whatever_its_path(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage.open(str(tmp_path / ODD))
    assert make_url(tracking_uri(storage, None)).database == str(tmp_path / ODD / "mlflow" / "mlflow.db")
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
    assert storage.put_aside_sweep("mine", {"a", "b", "c"}) is None  # it has grown
    assert storage.put_aside_sweep("other", {"a"}) is None
    assert storage.put_aside_sweep("mine", {"a", "c"}).name == "earlier-1"
    assert storage.read("sweeps/mine/spec.json") is None
    for file in ("spec.json", "comparison.json", "report/a.json"):
        assert storage.read(f"sweeps/mine/earlier-1/{file}") == {"of": "the first"}
    assert storage.read("sweeps/mine/rungs/1/2/a.json")
    storage.write("sweeps/mine/sweep.json", {"trials": ["z"]})
    assert storage.put_aside_sweep("mine", {"a"}).name == "earlier-2"


def test_a_trials_folder_removed_while_it_trains_is_the_reason_of_its_failure(tmp_path):
    storage = Storage.open(str(tmp_path / "runs"))
    (trial,) = SweepSpec(context_lengths=(1024,), methods=("lora+",), references=()).trials(
        Identities(model="m", tokenizer="t", data="d"), "float32"
    )
    folder = storage.add_trial(trial)
    shutil.rmtree(folder.path)
    _record_failure(SimpleNamespace(attempt="a"), [folder], "FileNotFoundError: journal.jsonl")
    record = TrialRecord.of(folder.journal)
    assert record.state == "failed" and "was removed while it trained" in record.reason
    assert folder.log.exists()
