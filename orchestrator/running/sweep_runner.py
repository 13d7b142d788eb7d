"""How a planned sweep is trained: one job after the other with Ray Tune, the terminal and MLflow following."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from orchestrator.plan import Planned
from orchestrator.planning.cluster import DRIVER_RESOURCES
from orchestrator.ray_internals import silent_progress
from orchestrator.records import cancellation
from orchestrator.records.mlflow_tracking import TrackingThread
from orchestrator.reporting.live_view import LiveView
from orchestrator.reporting.progress import Row
from orchestrator.running.credentials import share_token
from orchestrator.running.driver import drive_trial
from orchestrator.running.job import FaultLimits, Resources, TrialJob
from orchestrator.running.scheduling import Job, JobQueue
from orchestrator.trial_spec import TrialSpec

if TYPE_CHECKING:
    from orchestrator.sweep import Sweep


class Running:
    """The trials of a sweep that has been planned, from the first that starts to the last that ends."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def train(self) -> None:
        """Runs every trial that is not finished, with Tune over Train."""
        sweep = self.sweep
        to_train = [p.trial for p in sweep.planned if p.trains]
        # The largest first, so that none is left to run alone at the end.
        to_train.sort(key=lambda trial: (sweep.estimates[trial.fingerprint].workers, self.work(trial)), reverse=True)
        tracking = TrackingThread(sweep.tracker, sweep.trials, sweep.name, sweep.provenance)
        rows = [Row(p.trial, p.record, known=p.action == "known") for p in sweep.planned]
        view = LiveView(sweep.name, rows, sweep.concurrency, sweep.console)
        view.note = lambda: tracking.trouble or (sweep.storage.store and sweep.storage.store.trouble)
        view.tokens_to_come = lambda: sweep.search.tokens_to_come if sweep.search else 0
        tracking.start()
        try:
            with view, sweep.spending:
                self.tune(self.jobs(to_train, view))
        except KeyboardInterrupt:
            _end_ray()
            tracking.stop()
            sweep.tracker.interrupted()
            raise
        tracking.stop()
        if tracking.trouble:
            sweep.console.print(f"note: {tracking.trouble} at the next run of this command", markup=False)
        if sweep.spending.exhausted:
            sweep.console.print(f"stopped: {sweep.spending.exhausted}; with a larger one the same command goes on")

    def work(self, trial: TrialSpec) -> float:
        """How much of it there is, in whatever is known of all trials."""
        estimates = self.sweep.estimates
        if all(estimate.seconds is not None for estimate in estimates.values()):
            return estimates[trial.fingerprint].hours
        return trial.training.steps * trial.training.batch * trial.training.context_length

    def jobs(self, trials: list[TrialSpec], view: LiveView) -> Iterator[Job]:
        """One job after the other: first the planned trials, then what a search suggests meanwhile."""
        for planned in self.sweep.planned:
            self.enter_at_rungs(planned)
        for trial in trials:
            self.add_trial(trial)
        # The untuned first: what they score is step 0 of the trials that start from them.
        untuned = [trial for trial in trials if trial.training.method == "untuned"]
        if untuned:
            yield self.job(untuned)
        for trial in trials:
            if trial not in untuned:
                yield self.job([trial])
        while not self.sweep.is_cancelled() and (planned := self.sweep.next_of_search()):
            self.enter_at_rungs(planned)
            view.rows.append(Row(planned.trial, planned.record, known=planned.action == "known"))
            if planned.trains:
                self.add_trial(planned.trial)
                yield self.job([planned.trial], suggested=True)

    def add_trial(self, trial: TrialSpec) -> None:
        storage = self.sweep.storage
        folder = storage.add_trial(trial, self.sweep.source.location)
        cancellation.withdraw(storage, folder.name)
        if diff := self.sweep.provenance.keep_diff(folder.path):
            storage.push(diff)

    def enter_at_rungs(self, planned: Planned) -> None:
        """Those that have finished before count at the rungs of early stopping too."""
        if self.sweep.rungs and planned.action == "known":
            self.sweep.rungs.enter(planned.trial, planned.record)

    def job(self, trials: list[TrialSpec], suggested: bool = False) -> Job:
        """What the scheduler knows of the job that trains these trials."""
        each = [self.sweep.estimates[trial.fingerprint] for trial in trials]
        seconds = sum(math.inf if estimate.seconds is None else estimate.seconds for estimate in each)
        workers = max(estimate.workers for estimate in each)
        return Job(self.trial_job(trials).to_config(), workers, seconds, suggested)

    def trial_job(self, trials: list[TrialSpec]) -> TrialJob:
        """What a driver and its workers need to train these trials, one after the other."""
        sweep, options = self.sweep, self.sweep.options
        estimate = sweep.estimates[trials[0].fingerprint]
        return TrialJob(
            id=uuid.uuid4().hex,
            sweep=sweep.name,
            storage=sweep.storage.location,
            trials=tuple(trials),
            model=sweep.source,
            corpus=sweep.packed.folder.name,
            execution=estimate.execution,
            layers=estimate.layers,
            resources=Resources(workers=estimate.workers, **sweep.cluster.worker_resources(options)),
            limits=FaultLimits(
                max_failures=options.max_failures,
                max_preemptions=options.max_preemptions,
                hang_timeout=options.hang_timeout,
            ),
            own_cluster=sweep.cluster.own,
            early_stopping=sweep.rungs.settings if sweep.rungs else None,
            provenance=sweep.provenance.of_attempt(),
            prices=sweep.prices,
        )

    def tune(self, jobs: Iterator[Job]) -> None:
        """Runs jobs with Tune, as many at a time as there is room for."""
        from ray import tune

        from orchestrator.running.tune_queue import TuneQueue

        sweep, options = self.sweep, self.sweep.options
        name = f"{sweep.name}-{uuid.uuid4().hex[:8]}"
        tuner = tune.Tuner(
            tune.with_resources(drive_trial, tune.PlacementGroupFactory([DRIVER_RESOURCES])),
            tune_config=tune.TuneConfig(
                search_alg=TuneQueue(JobQueue(jobs, sweep.cluster.slots_by_node(options))),
                num_samples=-1,  # until the jobs end
                max_concurrent_trials=options.max_concurrent or sweep.cluster.slots(options),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(sweep.storage.ray_train),
                # A driver raises nothing of its own; what Tune tries again is one whose process was lost.
                failure_config=tune.FailureConfig(max_failures=options.max_failures),
                callbacks=[silent_progress()],
                verbose=0,
            ),
        )
        keeper = None if sweep.cluster.own else share_token()
        try:
            tuner.fit()
        finally:
            del keeper
            shutil.rmtree(sweep.storage.ray_train / name, ignore_errors=True)


def _end_ray() -> None:
    import ray

    ray.shutdown()
