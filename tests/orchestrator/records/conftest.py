"""A storage root with an MLflow store, and trials in it."""

import shutil

import pytest

from orchestrator.expansion import expand
from orchestrator.records.mlflow_store import MlflowStore
from orchestrator.records.storage import Storage
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """MLflow's tables without an experiment but its own: making them takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowStore(f"sqlite:///{folder / 'mlflow.db'}", "Default", folder).connect()
    return folder / "mlflow.db"


@pytest.fixture
def storage(tmp_path, empty_database):
    storage = Storage.open(str(tmp_path / "runs"))
    storage.mlflow.mkdir()
    shutil.copy(empty_database, storage.mlflow / "mlflow.db")
    return storage


@pytest.fixture
def trials(storage):
    spec = SweepSpec(context_lengths=(1024,), methods=("lora+", "full"), references=())
    found = expand(spec, Identities(model="m", tokenizer="t", data="d"), "float32").trials
    for trial in found:
        storage.add_trial(trial)
    return found


@pytest.fixture
def trial(trials):
    return trials[0]
