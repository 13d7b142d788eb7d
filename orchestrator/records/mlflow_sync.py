"""MLflow: one run a trial, mirrored from the trial's journal; one run a sweep, which holds the comparison.

The journals are the truth: one thread of the sweep's process follows them and logs to MLflow in batches, so that a slow
or absent server delays nothing. What has been logged is recorded beside the journal, and a step that a resumed trial
repeats is logged once. A trial's run is found again by its fingerprint, from any sweep and machine.

MLflow blocks for minutes on a server that does not answer and imports slowly: only the modules mlflow_* import it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dashboards.mlflow import sqlite_url
from dashboards.mlflow_views import views
from orchestrator.records.mlflow_colours import Colours
from orchestrator.records.mlflow_runs import TrialRun, log_sweep
from orchestrator.records.mlflow_store import MlflowStore, cause, is_outage, remedy
from orchestrator.records.provenance import Provenance
from orchestrator.records.storage import Storage
from orchestrator.records.trial_cost import UNITS
from orchestrator.trial_spec import TrialSpec

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0


def tracking_uri(storage: Storage, given: str | None) -> str:
    """The store to use: the one given, else MLFLOW_TRACKING_URI, else SQLite under the storage root."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(storage.mlflow / "mlflow.db")


class Refusal(NamedTuple):
    """What MLflow does not take (a trial by its label, or the sweep), why, and what helps."""

    what: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"MLflow refuses {self.what} ({self.reason}): {self.remedy}"


class Tracker:
    """Mirrors trials and sweeps into one MLflow experiment. Once it is connected it raises no error of MLflow's.

    Args:
        outage: why MLflow did not answer the last call; None if it did. The next ``follow`` tries again.
        refused: what stays out of MLflow until somebody acts, by :attr:`Refusal.what`.
    """

    def __init__(self, uri: str, experiment: str, storage: Storage) -> None:
        self.store, self.storage = MlflowStore(uri, experiment, storage.mlflow), storage
        self.runs: dict[str, TrialRun] = {}
        self.colours = Colours()
        self._arranged: tuple[object, ...] = ()  # what the saved views were made for
        self.outage: str | None = None
        self.refused: dict[str, Refusal] = {}

    @property
    def uri(self) -> str:
        """The store's address."""
        return self.store.uri

    def connect(self) -> None:
        """Reaches the store and finds, restores or makes the experiment.

        Raises:
            InputError: the store does not answer, or cannot be used.
        """
        self.store.connect()

    def follow(self, trials: Iterable[TrialSpec], sweep: str, provenance: Provenance, check_runs: bool = False) -> None:
        """Logs what the trials' journals have and MLflow has not. A trial that is refused holds up no other.

        Args:
            check_runs: look whether the runs are still there of which there is nothing new.
        """
        for trial in trials:
            self._attempt(trial.label, partial(self._follow_trial, trial, sweep, provenance, check_runs))
            if self.outage:
                return  # each further call would wait for seconds
        self._attempt(f"the charts of sweep {sweep}", partial(self._arrange, list(trials), sweep))

    def _arrange(self, trials: list[TrialSpec], sweep: str) -> None:
        """Draws references beside the trained trials and saves the views of the sweep's charts."""
        runs = [self.runs[trial.fingerprint] for trial in trials if trial.fingerprint in self.runs]
        trained: dict[int, TrialRun] = {}  # by context length, the one that has come furthest
        for run in sorted(runs, key=lambda run: run.record.last_step):
            if run.trial.training.method != "untuned":
                trained[run.trial.training.context_length] = run
        for run in runs:
            beside = trained.get(run.trial.training.context_length)
            if beside and run.trial.training.method == "untuned":
                run.draw_beside(beside)
        lengths = {length for run in runs for length, _ in run.record.evals}
        devices = {attempt.device for run in trained.values() for attempt in run.record.attempts}
        unit = UNITS[devices.pop()] if len(devices) == 1 else "device hours"
        contexts = {trial.training.context_length for trial in trials}
        arranged = (sweep, contexts, lengths, unit)
        if runs and arranged != self._arranged:
            self.store.save_views(views(sweep, contexts, lengths, unit))
            self._arranged = arranged

    def links(self, sweep: str) -> list[tuple[str, str]]:
        """(name, address) of the pages of an MLflow server that show a sweep."""
        found: list[tuple[str, str]] = []
        self._attempt(f"the views of sweep {sweep}", lambda: found.extend(self.store.links(sweep)))
        return found

    def _follow_trial(self, trial: TrialSpec, sweep: str, provenance: Provenance, check_run: bool) -> None:
        run = self.runs.get(trial.fingerprint)
        if run is None or (check_run and self.store.usable_run(run.run_id) is None):
            folder = self.storage.trial(trial.fingerprint)
            if not folder.journal.exists():
                return
            run = self.runs[trial.fingerprint] = TrialRun(self.store, trial, folder, sweep, provenance, self.colours)
        try:
            run.follow()
        except Exception as error:
            if is_outage(error):
                run.rewind()  # events read but not logged are read again
            else:
                del self.runs[trial.fingerprint]  # the run may have been deleted: it is looked for again
            raise

    def _attempt(self, what: str, call: Callable[[], object]) -> None:
        """Calls, and notes an outage or a refusal.

        A call that is refused is repeated once, with the store and the experiment opened anew: they may have been
        deleted.
        """
        self.outage = None
        try:
            try:
                call()
            except Exception as error:
                if is_outage(error):
                    raise
                self.store.open()
                call()
        except Exception as error:  # of any kind: the journals keep everything
            logger.debug("MLflow", exc_info=True)
            if is_outage(error):
                self.outage = cause(error)
            else:
                self.refused[what] = Refusal(what, cause(error), remedy(error))
                return
        self.refused.pop(what, None)

    @property
    def trouble(self) -> str | None:
        """What the last ``follow`` left out of MLflow, and why; None if nothing."""
        if self.outage:
            return f"MLflow does not answer ({self.outage}); nothing is lost, trying again"
        return next(map(str, self.refused.values()), None)

    def interrupted(self) -> None:
        """Marks the runs of interrupted trials as killed; a resumed trial continues in the same run."""
        for run in self.runs.values():
            if run.record.state in ("starting", "running"):
                self._attempt(run.trial.label, partial(run.set_status, "KILLED"))
                if self.outage:
                    return

    def log_sweep(
        self, name: str, settings: str, comparison: dict[str, Any], trials: list[TrialSpec], artifacts: list[Path]
    ) -> None:
        """Logs the comparison, the report and the list of trials to the sweep's own run."""
        run_ids = {trial.label: self.run_id(trial) for trial in trials}
        self._attempt(f"sweep {name}", partial(log_sweep, self.store, name, settings, comparison, run_ids, artifacts))

    def run_id(self, trial: TrialSpec) -> str | None:
        """The id of a trial's run, if this process follows the trial."""
        run = self.runs.get(trial.fingerprint)
        return run.run_id if run else None


class TrackingThread:
    """Follows the journals while trials run. If MLflow does not answer it tries again; nothing waits for it."""

    def __init__(self, tracker: Tracker, trials: list[TrialSpec], sweep: str, provenance: Provenance) -> None:
        self.arguments = (trials, sweep, provenance)
        self.tracker = tracker
        self.trouble: str | None = None  # what the last turn left out of MLflow, and why
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
        self.tracker.follow(*self.arguments)
        self.trouble = self.tracker.trouble
