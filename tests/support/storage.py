"""What a sweep has left in a storage root and in its MLflow store."""

from mlflow import MlflowClient

from orchestrator.records.journal import Journal
from orchestrator.records.trial_record import TrialRecord


def records(storage):
    return {path.parent.name: TrialRecord.of(Journal(path)) for path in storage.glob("trials/*/journal.jsonl")}


def mlflow_runs(storage):
    client = MlflowClient(f"sqlite:///{storage / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("longspan")
    found = client.search_runs([experiment.experiment_id])
    by_kind = {"trial": [], "sweep": []}
    for run in found:
        by_kind[run.data.tags["longspan.kind"]].append(run)
    return client, by_kind["trial"], by_kind["sweep"]


def running_trial(storage, at_step):
    for record in records(storage).values():
        if record.state == "running" and record.last_step >= at_step:
            return record
    return None
