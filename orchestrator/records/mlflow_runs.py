"""The runs of an MLflow experiment: one a trial, mirrored from its journal, and one a sweep, with its comparison."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from dashboards.mlflow_views import in_sweep_tag
from orchestrator.records.events import Eval, Failed, Started, Step
from orchestrator.records.json_files import write_json
from orchestrator.records.mlflow_colours import TAG as COLOUR_TAG
from orchestrator.records.mlflow_colours import Colours
from orchestrator.records.mlflow_metrics import STATUS, metrics_of, perplexity_metric, sweep_metrics, tags_of, trial_tag
from orchestrator.records.mlflow_store import MlflowStore, without_password
from orchestrator.records.provenance import Provenance, without_secrets
from orchestrator.records.trial_cost import hours_by_step
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import FIRST_RESULT_VERSION, TrialSpec
from workloads.config import RESULT_VERSION

if TYPE_CHECKING:
    from mlflow.entities import Run

METRICS_A_CALL, TAGS_A_CALL = 1000, 100  # MLflow's own limits on a batch
MOST_NAME_CHARACTERS, MOST_DIGEST_CHARACTERS = 500, 36  # and on a dataset
PARENT_TAG = "mlflow.parentRunId"  # the page nests a run under it
LOG_LINES, LOG_BYTES = 200, 2**17  # of a failed trial's log
LOCK_S = 60.0  # another sweep that shares the trial looks for its run in this time


class TrialRun:
    """One trial's run in MLflow, and how far its journal has been logged.

    What was logged is recorded beside the journal. The record is believed as long as the run is there: one that has
    been deleted, alone or with its store, is made again with all points.
    """

    def __init__(
        self,
        store: MlflowStore,
        trial: TrialSpec,
        folder: TrialFolder,
        sweep: str,
        provenance: Provenance,
        colours: Colours,
    ) -> None:
        self.store, self.trial, self.folder = store, trial, folder
        self.provenance = provenance
        self.record = TrialRecord(folder.journal)
        self.status: str | None = None
        folder.path.mkdir(parents=True, exist_ok=True)  # may be missing in the mirror of an object store
        with FileLock(folder.path / ".mlflow.lock", timeout=LOCK_S):  # two sweeps that share the trial share its run
            state = self.folder.read_mlflow_state().get(self._store_key)
            run = self.store.usable_run(state["run_id"]) if state else None
            if state is None or run is None:
                state, run = {}, self._find_or_create()
            self.run_id: str = run.info.run_id
            # The last step logged of each metric.
            self.logged: dict[str, int] = state.get("logged", {})
            self.kept: list[str] = state.get("artifacts", [])
            self._save()
            self._log_missing_params(run)
            self._log_dataset(run)
            self._tag(run, sweep, colours)

    @property
    def _store_key(self) -> str:
        return f"{without_password(self.store.uri)} {self.store.experiment_id}"

    def _find_or_create(self) -> Run:
        fingerprint, times_put_aside = self.trial.fingerprint, self.folder.times_put_aside
        for run in self.store.find_runs(fingerprint=fingerprint):
            earlier = int(run.data.tags.get("longspan.times_put_aside", 0))
            if earlier == times_put_aside:
                return run
            # The trial starts afresh (--force), and MLflow cannot remove points from a curve.
            self.store.retire(
                run, f"{self.trial.label} (earlier {earlier + 1})", earlier_fingerprint=fingerprint, fingerprint=""
            )
        training = self.trial.training
        return self.store.client.create_run(
            self.store.experiment_id,
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

    def _log_missing_params(self, run: Run) -> None:
        """Logs the trial's settings. Those that the run has stay: MLflow refuses to change one."""
        from mlflow.entities import Param

        params = {
            "model": self.trial.model,
            "data": self.trial.data,
            "model_identity": self.trial.identities.model,
            "data_identity": self.trial.identities.data,
            **dataclasses.asdict(self.trial.training),
        }
        missing = [Param(name, str(value)) for name, value in params.items() if name not in run.data.params]
        if missing:
            self.store.client.log_batch(self.run_id, params=missing)

    def _log_dataset(self, run: Run) -> None:
        """Logs the corpus as the run's dataset, once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if run.inputs and run.inputs.dataset_inputs:
            return
        data, digest = self.trial.data, re.split("[:@]", self.trial.identities.data)[-1][:MOST_DIGEST_CHARACTERS]
        dataset = Dataset(data[:MOST_NAME_CHARACTERS], digest, "local", json.dumps({"uri": data}))
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        self.store.client.log_inputs(self.run_id, inputs)

    def _tag(self, run: Run, sweep: str, colours: Colours) -> None:
        """Tags the run with its sweep and its colour, as far as it is not."""
        from mlflow.entities import RunTag

        tags = run.data.tags
        sweeps = [name for name in tags.get("longspan.sweeps", "").split(", ") if name]
        wanted = {
            "longspan.sweeps": ", ".join(sweeps if sweep in sweeps else [*sweeps, sweep]),
            in_sweep_tag(sweep): "yes",
            COLOUR_TAG: colours.of(self.trial, tags.get(COLOUR_TAG)),
        }
        missing = [RunTag(key, value) for key, value in wanted.items() if tags.get(key) != value]
        if missing:
            self.store.client.log_batch(self.run_id, tags=missing)

    def follow(self) -> None:
        """Logs what was added to the journal."""
        from mlflow.entities import RunTag

        events = self.record.follow()
        workers = self.record.started.workers if self.record.started else 1
        hours = {0: 0.0} | hours_by_step(self.record) if events else {}
        points = [(event, workers, hours.get(event.step)) for event in events if isinstance(event, Step | Eval)]
        self._log_points(points)
        tags = [RunTag(name, value) for event in events for name, value in tags_of(event, self.record).items()]
        if tags:
            self.store.client.log_batch(self.run_id, tags=tags)
        if any(isinstance(event, Started) for event in events):
            self._log_artifacts()
        if any(isinstance(event, Failed) for event in events):
            self._log_end_of_log()
        self.set_status(STATUS.get(self.record.state))

    def _log_points(self, points: list[tuple[Step | Eval, int, float | None]]) -> None:
        """Logs the metrics of (event, workers, device hours until then); a step that is logged is not repeated."""
        from mlflow.entities import Metric

        metrics, logged = [], dict(self.logged)
        for event, workers, hours in points:
            for name, value in metrics_of(event, workers, hours).items():
                if event.step > logged.get(name, -1):
                    logged[name] = event.step
                    metrics.append(Metric(name, value, int(event.time * 1000), event.step))
        for start in range(0, len(metrics), METRICS_A_CALL):
            self.store.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_A_CALL])
        if metrics:
            self.logged = logged
            self._save()

    def draw_beside(self, trained: TrialRun) -> None:
        """Repeats a reference's perplexity at each evaluation of a trained trial: charts then show it as a line."""
        length = self.trial.training.context_length
        own, drawn = self.record.curve(length), self.logged.get(perplexity_metric(length), 0)
        along = [each for each in trained.record.curve(length) if each.step > drawn]
        if not own or not along:
            return
        hours = hours_by_step(trained.record)
        moved = [dataclasses.replace(own[-1], step=each.step, tokens=each.tokens) for each in along]
        self._log_points([(each, 1, hours.get(each.step)) for each in moved])

    def _log_artifacts(self) -> None:
        """Logs the resolved trial and its code's diff, each once."""
        for path in [self.folder.path / "trial.json", *sorted(self.folder.path.glob("code-*.diff"))]:
            if path.name not in self.kept and path.exists():
                self.store.client.log_artifact(self.run_id, str(path))
                self.kept.append(path.name)
                self._save()

    def _log_end_of_log(self) -> None:
        """Logs the last lines of the trial's log; where workers write it to an object store, there is none here."""
        if not self.folder.log.exists():
            return
        with open(self.folder.log, "rb") as log:
            log.seek(max(0, self.folder.log.stat().st_size - LOG_BYTES))
            end = log.read().decode(errors="replace")
        lines = without_secrets("\n".join(end.splitlines()[-LOG_LINES:]))
        self.store.client.log_text(self.run_id, lines, "end_of_log.txt")

    def rewind(self) -> None:
        """Makes the next ``follow`` read the journal from its start; what is logged is not repeated."""
        self.record = TrialRecord(self.folder.journal)

    def set_status(self, status: str | None) -> None:
        """Sets the run's status, with the time at which the trial ended; None changes nothing."""
        if status is None or status == self.status:
            return
        if status == "RUNNING":
            self.store.client.update_run(self.run_id, status=status)
        else:
            # The trial's own end, whenever it is logged: a later sweep that shares the trial logs it again.
            interrupted = self.record.state in ("starting", "running")
            ended = time.time() if interrupted or self.record.ended is None else self.record.ended
            self.store.client.set_terminated(self.run_id, status, end_time=int(ended * 1000))
        self.status = status

    def _save(self) -> None:
        states = self.folder.read_mlflow_state()
        states[self._store_key] = {"run_id": self.run_id, "logged": self.logged, "artifacts": self.kept}
        write_json(self.folder.mlflow_state, states)


def log_sweep(
    store: MlflowStore,
    name: str,
    settings: str,
    comparison: dict[str, Any],
    run_ids: dict[str, str | None],
    artifacts: list[Path],
) -> str:
    """Logs a comparison, its report and its trials to the sweep's own run, and returns its id.

    Runs of trials are nested under the first sweep that logs them.

    The run is found by the sweep's name, or created. If it is of another model, other data, settings or results of an
    earlier version, under a name that is used again, it is kept as ``sweep <name> (earlier <n>)``.

    Args:
        settings: the digest of the sweep's.
        run_ids: of the trials, by label; None where a trial has none.
    """
    from mlflow.entities import Metric, Param, RunTag

    params = {
        "model": comparison["model"]["name"],
        "data": comparison["data"]["name"],
        "model_identity": comparison["model"]["identity"],
        "data_identity": comparison["data"]["identity"],
        "settings": settings,
        "result_version": str(RESULT_VERSION),
    }
    run = next(iter(store.find_runs(kind="sweep", sweep=name)), None)
    logged = {"result_version": str(FIRST_RESULT_VERSION), **run.data.params} if run else {}
    if run and any(logged.get(key, value) != value for key, value in params.items()):
        number = len(store.find_runs(earlier_sweep=name)) + 1
        store.retire(run, f"sweep {name} (earlier {number})", earlier_sweep=name, sweep="")
        run = None
    if run is None:
        tags = {"longspan.kind": "sweep", "longspan.sweep": name}
        run = store.client.create_run(store.experiment_id, run_name=f"sweep {name}", tags=tags)
    now = int(time.time() * 1000)
    metrics, run_tags = [], [RunTag("mlflow.note.content", "\n\n".join(comparison["sentences"]))]
    for context in comparison["contexts"]:
        for metric, value, step in sweep_metrics(context):
            metrics.append(Metric(_metric_name(metric), value, now, step))
        winner = context["winner"] or "not established"
        run_tags.append(RunTag(f"winner_{context['context_length']}", winner))
    run_tags += [RunTag(key, comparison[key]) for key in ("git_commit", "git_diff") if comparison[key]]
    for label, trial_run_id in run_ids.items():
        run_tags.append(RunTag(trial_tag(label), trial_run_id or ""))
    missing = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    run_id = run.info.run_id
    store.client.log_batch(run_id, params=missing)
    for trial_run in store.client.search_runs([store.experiment_id], f"tags.`{in_sweep_tag(name)}` = 'yes'"):
        if trial_run.info.run_id in run_ids.values() and PARENT_TAG not in trial_run.data.tags:
            store.client.set_tag(trial_run.info.run_id, PARENT_TAG, run_id)
    for start in range(0, len(metrics), METRICS_A_CALL):
        store.client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_CALL])
    for start in range(0, len(run_tags), TAGS_A_CALL):
        store.client.log_batch(run_id, tags=run_tags[start : start + TAGS_A_CALL])
    for path in artifacts:
        store.client.log_artifact(run_id, str(path))
    store.client.set_terminated(run_id, "FINISHED")
    return run_id


def _metric_name(name: str) -> str:
    """A metric's name with the characters that MLflow takes: + is written out, others are left out."""
    return re.sub(r"[^\w./: -]", "", name.replace("+", "_plus"))
