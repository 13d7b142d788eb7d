"""A trial's journal, and what MLflow's store has of it."""

from mlflow import MlflowClient

from orchestrator.records.events import Eval, Started, Step
from orchestrator.records.mlflow_sync import Tracker, tracking_uri
from orchestrator.records.provenance import Provenance
from tests.support.events import a_step, evaluation

PROVENANCE = Provenance(git_commit="abc123", packages={})
STARTED = {
    "hardware": "1 x NVIDIA H200", "host": "here", "packages": {"torch": "2"}, "workers": 1, "driver": "580.65.06",
    "cuda": "13.0", "git_commit": "abc123-dirty", "usd_per_device_hour": 7.912, "price_source": "p5en.48xlarge",
    "execution": {"engine": "zero2", "offload": True, "micro_batch": None},
}  # fmt: skip


def connect(storage, uri=None):
    tracker = Tracker(tracking_uri(storage, uri), "longspan", storage)
    tracker.connect()
    return tracker


def runs(uri):
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("longspan")
    return client, client.search_runs([experiment.experiment_id])


def history(client, run, name):
    return [(m.step, m.value) for m in sorted(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)]


def write_some_steps(journal, first=1, last=3):
    journal.append(Started(**STARTED))
    if first == 1:
        journal.append(Eval(**evaluation(0, 20.0)))
        journal.append(Eval(**evaluation(0, 2.0, context_length=512)))
    for step in range(first, last + 1):
        journal.append(Step(**a_step(step, loss=10.0 - step)))
