"""MLflow: one run a trial, mirrored from the trial's journal; one run a sweep, which holds the comparison.

The journals are the truth: one thread of the sweep's process follows them and logs to MLflow in batches, so that a slow
or absent server delays nothing. What has been logged is recorded beside the journal, and a step that a resumed trial
repeats is logged once. A trial's run is found again by its fingerprint, from any sweep and machine.

MLflow blocks for minutes on a server that does not answer and imports slowly: only this module imports it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from orchestrator.records.events import (
    Cancelled,
    Eval,
    Event,
    Failed,
    Finished,
    ModelReady,
    Started,
    Step,
    Stopped,
)
from orchestrator.records.json_files import write_json
from orchestrator.records.provenance import Provenance
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec
from workloads.errors import InputError

if TYPE_CHECKING:
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
METRICS_A_CALL = 1000  # MLflow's own limit on a batch

# MLflow's status for a trial's state; a trial that has not begun has no run. One stopped early counts as killed: its
# last perplexity is of fewer tokens, and a filter on FINISHED leaves it out. Its tag stopped_early has the reason.
STATUS = {
    "starting": "RUNNING", "running": "RUNNING", "finished": "FINISHED", "stopped": "KILLED",
    "cancelled": "KILLED", "failed": "FAILED",
}  # fmt: skip

# MLflow's names of a step's fields. Every curve is also logged by tokens seen, under by_tokens/.
STEP_METRICS = {
    "loss": "train/loss",
    "tokens": "train/tokens",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "perf/tokens_per_second",
    "peak_memory_gib": "perf/peak_memory_gib",
    "mfu": "perf/mfu",  # on GPUs whose peak is known
}


def metrics_of(event: Step | Eval, context_length: int, workers: int) -> dict[str, float]:
    """MLflow's metrics for a step or an evaluation, by their names in MLflow."""
    match event:
        case Step():
            values = {name: getattr(event, field) for field, name in STEP_METRICS.items()}
            metrics = {name: value for name, value in values.items() if value is not None}
            return metrics | {"perf/tokens_per_second_per_gpu": event.tokens_per_second / workers}
        case Eval(context_length=length) if length == context_length:
            return {"eval/perplexity": event.perplexity}
        case Eval():
            return {f"eval/perplexity_{event.context_length}": event.perplexity}


def sweep_metrics(context: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(name, value, step) of a comparison's numbers for a context length; a method's are those of its best setting."""
    length = context["context_length"]
    for setting in context["settings"]:
        method, step = setting["method"], setting["final"]["step"]
        if setting["chosen"]:
            yield f"final/perplexity_{length}/{method}", setting["final"]["perplexity"], step
            if setting["hours"] is not None:
                yield f"final/{context['hours_unit'].replace(' ', '_')}_{length}/{method}", setting["hours"], step
            if setting["reached"]:
                yield f"to_target/tokens_{length}/{method}", setting["reached"]["tokens"], step
    for gap in context["gaps"]:
        for point in gap["points"]:
            yield f"gap_percent_{length}/{gap['method']} to {gap['baseline']}", point["percent"], point["step"]


def attempt_tags(started: Started) -> dict[str, str]:
    """The code and machine of an attempt, as tags of the trial's run."""
    fields = (
        *("hardware", "host", "platform", "python", "driver", "cuda", "git_commit", "git_diff", "device_memory_gib"),
        *("usd_per_device_hour", "price_source"),
    )
    tags = {name: str(value) for name in fields if (value := getattr(started, name)) is not None}
    return tags | {f"package.{name}": version for name, version in started.packages.items()}


def tracking_uri(storage: Storage, given: str | None) -> str:
    """The store to use: the one given, else MLFLOW_TRACKING_URI, else SQLite under the storage root."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.mlflow / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """The address without a user's name and password, fit to be shown and stored."""
    return re.sub(r"//[^/@]*@", "//", uri)


class Tracker:
    """The connection to one MLflow store and experiment."""

    def __init__(self, uri: str, experiment: str, storage: Storage) -> None:
        self.uri, self.experiment, self.storage = uri, experiment, storage
        self.runs: dict[str, TrialRun] = {}

    def connect(self) -> None:
        """Reaches the store and finds or makes the experiment.

        Raises:
            InputError: it does not answer, or is no MLflow store.
        """
        # MLflow would wait for four minutes; later outages are handled by trying again.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        self.storage.mlflow.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            with FileLock(self.storage.mlflow / ".lock"):  # two sweeps at once would both create the tables
                self.client = MlflowClient(self.uri)
                found = self.client.get_experiment_by_name(self.experiment)
                self.experiment_id = found.experiment_id if found else self._create_experiment()
        except (MlflowException, OSError, ValueError) as error:
            reason = without_password(str(error).splitlines()[0][:200])
            raise InputError(
                f"MLflow at {without_password(self.uri)} does not answer ({reason}); start the server, or "
                "choose another with --tracking-uri or MLFLOW_TRACKING_URI (without either, a store under the storage "
                "root is used)"
            ) from error

    def _create_experiment(self) -> str:
        local = self.uri.startswith("sqlite:")
        artifacts = (self.storage.mlflow / "artifacts").as_uri() if local else None
        return self.client.create_experiment(self.experiment, artifact_location=artifacts)

    def follow(self, trials: Iterable[TrialSpec], sweep: str, provenance: Provenance) -> None:
        """Logs what the trials' journals have and MLflow has not."""
        for trial in trials:
            run = self.runs.get(trial.fingerprint)
            if run is None:
                folder = self.storage.trial(trial.fingerprint)
                if not folder.journal.exists():
                    continue
                run = self.runs[trial.fingerprint] = TrialRun(self, trial, folder, sweep, provenance)
            run.follow()

    def find_run(self, filter_string: str) -> str | None:
        """The id of a run that matches a filter of MLflow's, if there is one."""
        found = self.client.search_runs([self.experiment_id], filter_string, max_results=1)
        return found[0].info.run_id if found else None

    def interrupted(self) -> None:
        """Marks the runs of interrupted trials as killed; a resumed trial continues in the same run."""
        for run in self.runs.values():
            if run.record.state in ("starting", "running"):
                run.set_status("KILLED")

    def log_sweep(self, name: str, comparison: dict[str, Any], trials: list[TrialSpec], artifacts: list[Path]) -> str:
        """Logs the comparison, the report and the list of trials to the sweep's own run, and returns its id.

        The run is found by the sweep's name, or created.
        """
        from mlflow.entities import Metric, Param, RunTag

        run_id = self.find_run(f"tags.`longspan.kind` = 'sweep' and tags.`longspan.sweep` = '{name}'")
        if run_id is None:
            tags = {"longspan.kind": "sweep", "longspan.sweep": name}
            run_id = self.client.create_run(self.experiment_id, run_name=f"sweep {name}", tags=tags).info.run_id
        now = int(time.time() * 1000)
        metrics, run_tags = [], [RunTag("mlflow.note.content", "\n\n".join(comparison["sentences"]))]
        for context in comparison["contexts"]:
            for name, value, step in sweep_metrics(context):
                metrics.append(Metric(name.replace("+", "_plus"), value, now, step))
            if context["winner"]:
                run_tags.append(RunTag(f"winner_{context['context_length']}", context["winner"]))
        run_tags += [RunTag(key, comparison[key]) for key in ("git_commit", "git_diff") if comparison[key]]
        params = [Param("model", comparison["model"]["name"]), Param("data", comparison["data"]["name"])]
        for trial in trials:
            run_tags.append(RunTag(f"trial.{trial.label.replace('+', '_plus')}", self.run_id(trial) or ""))
        self.client.log_batch(run_id, metrics=metrics, tags=run_tags, params=params)
        for path in artifacts:
            self.client.log_artifact(run_id, str(path))
        self.client.set_terminated(run_id, "FINISHED")
        return run_id

    def run_id(self, trial: TrialSpec) -> str | None:
        """The id of a trial's run, if this process follows the trial."""
        run = self.runs.get(trial.fingerprint)
        return run.run_id if run else None


class TrialRun:
    """One trial's run in MLflow, and how far its journal has been logged."""

    def __init__(self, tracker: Tracker, trial: TrialSpec, folder: TrialFolder, sweep: str, provenance: Provenance):
        self.tracker, self.trial, self.folder = tracker, trial, folder
        self.provenance = provenance
        self.record = TrialRecord(folder.journal)
        self.status: str | None = None
        folder.path.mkdir(parents=True, exist_ok=True)  # may be missing in the mirror of an object store
        with FileLock(folder.path / ".mlflow.lock"):  # two sweeps that share the trial share its run
            stores = folder.read_mlflow_state()
            state = stores.get(self._store_key)
            self.run_id = state["run_id"] if state else self._find_or_create()
            # The last step logged of each metric.
            self.logged: dict[str, int] = state["logged"] if state else {}
            self.kept: list[str] = state.get("artifacts", []) if state else []
            self._save()
        self._tag_with_sweep(sweep)

    @property
    def _store_key(self) -> str:
        return f"{without_password(self.tracker.uri)} {self.tracker.experiment_id}"

    def _find_or_create(self) -> str:
        fingerprint = self.trial.fingerprint
        found = self.tracker.find_run(f"tags.`longspan.fingerprint` = '{fingerprint}'")
        times_put_aside = self.folder.times_put_aside
        if found:
            run = self.tracker.client.get_run(found)
            if int(run.data.tags.get("longspan.times_put_aside", 0)) == times_put_aside:
                return found
            self._retire(run)
        from mlflow.entities import Param

        training = self.trial.training
        run = self.tracker.client.create_run(
            self.tracker.experiment_id,
            run_name=self.trial.label,
            tags={
                "longspan.kind": "trial",
                "longspan.fingerprint": fingerprint,
                "method": training.method,
                "context_length": str(training.context_length),
                "attention": training.attention,
                "positions": training.positions,
                **({"longspan.times_put_aside": str(times_put_aside)} if times_put_aside else {}),
                **self.provenance.tags(),
            },
        )
        params = {
            "model": self.trial.model,
            "data": self.trial.data,
            "model_identity": self.trial.identities.model,
            "data_identity": self.trial.identities.data,
            **dataclasses.asdict(training),
        }
        self.tracker.client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in params.items()])
        return run.info.run_id

    def _retire(self, run: Run) -> None:
        """Keeps the run of a trial that starts afresh (--force) under another name and without its fingerprint.

        The trial gets a new run: MLflow cannot remove points from a curve.
        """
        client, number = self.tracker.client, int(run.data.tags.get("longspan.times_put_aside", 0)) + 1
        client.update_run(run.info.run_id, name=f"{self.trial.label} (earlier {number})")
        if run.info.status == "RUNNING":  # its sweep was killed
            client.set_terminated(run.info.run_id, "KILLED")
        tags = {"longspan.kind": "earlier", "longspan.earlier_fingerprint": self.trial.fingerprint}
        for name, value in tags.items():
            client.set_tag(run.info.run_id, name, value)
        client.delete_tag(run.info.run_id, "longspan.fingerprint")

    def _tag_with_sweep(self, sweep: str) -> None:
        tags = self.tracker.client.get_run(self.run_id).data.tags
        sweeps = [name for name in tags.get("longspan.sweeps", "").split(", ") if name]
        if sweep not in sweeps:
            self.tracker.client.set_tag(self.run_id, "longspan.sweeps", ", ".join([*sweeps, sweep]))

    def follow(self) -> None:
        """Logs what was added to the journal."""
        from mlflow.entities import Metric, RunTag

        events = self.record.follow()
        workers = self.record.started.workers if self.record.started else 1
        metrics, logged = [], dict(self.logged)
        for event in events:
            if not isinstance(event, Step | Eval):
                continue
            timestamp = int(event.time * 1000)
            for name, value in metrics_of(event, self.trial.training.context_length, workers).items():
                if event.step <= logged.get(name, -1):
                    continue  # repeated after a restart
                logged[name] = event.step
                metrics.append(Metric(name, value, timestamp, event.step))
                metrics.append(Metric(f"by_tokens/{name}", value, timestamp, event.tokens))
        tags = [RunTag(name, value) for event in events for name, value in self._tags(event).items()]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.tracker.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_A_CALL])
        if tags:
            self.tracker.client.log_batch(self.run_id, tags=tags)
        if any(isinstance(event, Started) for event in events):
            self._log_artifacts()
        if metrics:
            self.logged = logged
            self._save()
        self.set_status(STATUS.get(self.record.state))

    def _tags(self, event: Event) -> dict[str, str]:
        """What an event sets of the run's tags."""
        match event:
            case Started():
                # Tags, not parameters: those cannot change when a trial is resumed with other settings.
                return attempt_tags(event) | {f"execution.{name}": str(v) for name, v in event.execution.items()}
            case ModelReady() if event.attention_backend is not None:
                return {"attention_backend": event.attention_backend}
            case Stopped():
                return {"stopped_early": event.reason[:5000]}
            case Cancelled():
                return {"cancelled": f"at step {event.step}, by {event.by}"}
            case Failed():
                return {"failure": event.reason[:5000]}
            case Finished():
                earlier = {"stopped_early": self.record.stopped, "cancelled": self.record.cancelled}
                return {name: "no: it went on, and finished" for name, ended in earlier.items() if ended}
        return {}

    def _log_artifacts(self) -> None:
        """Logs the resolved trial and its code's diff, each once."""
        for path in [self.folder.path / "trial.json", *sorted(self.folder.path.glob("code-*.diff"))]:
            if path.name not in self.kept and path.exists():
                self.tracker.client.log_artifact(self.run_id, str(path))
                self.kept.append(path.name)
                self._save()

    def rewind(self) -> None:
        """Makes the next ``follow`` read the journal from its start; what is logged is not repeated."""
        self.record = TrialRecord(self.folder.journal)

    def set_status(self, status: str | None) -> None:
        """Sets the run's status, with the time at which the trial ended; None changes nothing."""
        if status is None or status == self.status:
            return
        if status == "RUNNING":
            self.tracker.client.update_run(self.run_id, status=status)
        else:
            # The trial's own end, whenever it is logged: a later sweep that shares the trial logs it again.
            interrupted = self.record.state in ("starting", "running")
            ended = time.time() if interrupted or self.record.ended is None else self.record.ended
            self.tracker.client.set_terminated(self.run_id, status, end_time=int(ended * 1000))
        self.status = status

    def _save(self) -> None:
        stores = self.folder.read_mlflow_state()
        stores[self._store_key] = {"run_id": self.run_id, "logged": self.logged, "artifacts": self.kept}
        write_json(self.folder.mlflow_state, stores)


class TrackingThread:
    """Follows the journals while trials run. If MLflow does not answer it tries again; nothing waits for it."""

    def __init__(self, tracker: Tracker, trials: list[TrialSpec], sweep: str, provenance: Provenance) -> None:
        self.arguments = (trials, sweep, provenance)
        self.tracker = tracker
        self.trouble: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and logs the rest."""
        self._stop.set()
        self._thread.join()
        self._follow()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._follow()

    def _follow(self) -> None:
        try:
            self.tracker.follow(*self.arguments)
            self.trouble = None
        except Exception as error:  # of any kind: the journals keep everything, and the next turn tries again
            self.trouble = f"MLflow does not answer ({str(error).splitlines()[0][:120]}); nothing is lost, trying again"
            logger.debug("MLflow", exc_info=True)
            # Events read but not logged are read again.
            for run in self.tracker.runs.values():
                run.rewind()
