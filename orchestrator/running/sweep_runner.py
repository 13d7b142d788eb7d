"""Trains a planned sweep with Ray Tune, while the terminal and MLflow follow."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Callable, Iterator

from rich.console import Console

from orchestrator.planning.budget_watch import BudgetWatch, Spending
from orchestrator.planning.cluster import DRIVER_RESOURCES
from orchestrator.planning.planner import Planned
from orchestrator.planning.preparation import Prepared
from orchestrator.planning.scheduling import Job, JobQueue
from orchestrator.planning.search import Search
from orchestrator.planning.sweep_plan import SweepPlan, next_suggestion, write_plan
from orchestrator.ray_internals import silent_progress
from orchestrator.records import cancellation
from orchestrator.records.mlflow_sync import Tracker, TrackingThread
from orchestrator.records.provenance import Provenance
from orchestrator.reporting.live_view import LiveView
from orchestrator.reporting.progress import Row
from orchestrator.running.credentials import share_token
from orchestrator.running.interruption import ask_for_checkpoints
from orchestrator.running.job import FaultLimits, Resources, TrialJob
from orchestrator.running.trial_launcher import drive_trial
from orchestrator.trial_spec import TrialSpec


class SweepRunner:
    """Runs the trials of a planned sweep, from the first that starts to the last that ends.

    Args:
        search: None without one; a search that suggests a trial replaces ``plan`` by a longer one.
        on_plan: is given each plan that replaces the last.
    """

    def __init__(
        self,
        sweep: Prepared,
        plan: SweepPlan,
        search: Search | None,
        tracker: Tracker,
        provenance: Provenance,
        console: Console,
        on_plan: Callable[[SweepPlan], None],
    ) -> None:
        self.sweep, self.plan, self.search = sweep, plan, search
        self.tracker, self.provenance, self.console, self.on_plan = tracker, provenance, console, on_plan
        self.job_ids: set[str] = set()
        self.trials = list(plan.trials)  # a search adds to it, and the threads of MLflow and of the budget see it

    def train(self) -> SweepPlan:
        """Runs every trial that is not finished; returns the plan as it is in the end."""
        sweep = self.sweep
        tracking = TrackingThread(self.tracker, self.trials, sweep.name, self.provenance)
        view = LiveView(
            sweep.name, [_row(planned) for planned in self.plan.planned], self.plan.concurrency, self.console
        )
        store = sweep.storage.store
        view.note = lambda: tracking.trouble or (store.trouble if store else None)
        view.tokens_to_come = lambda: self.plan.upcoming_tokens
        budget = BudgetWatch(Spending(sweep.name, sweep.storage), self.trials, sweep.options, self._cancel)
        tracking.start()
        try:
            with view, budget:
                self._tune(self._jobs(view))
        except KeyboardInterrupt:
            _end_ray()
            tracking.stop()
            self.tracker.interrupted()
            raise
        tracking.stop()
        if budget.exhausted:
            self.console.print(f"stopped: {budget.exhausted}; with a larger budget the same command continues")
        return self.plan

    def _cancel(self, reason: str) -> None:
        """Stops all trials that run, each with a checkpoint, and starts no other."""
        cancellation.request(self.sweep.storage, f"sweeps/{self.sweep.name}", reason)
        for trial in list(self.trials):
            cancellation.request(self.sweep.storage, self.sweep.storage.trial(trial.fingerprint).name, reason)

    def _jobs(self, view: LiveView) -> Iterator[Job]:
        """One job after the other: first the planned trials, then what a search suggests meanwhile."""
        for planned in self.plan.planned:
            self._enter_at_rungs(planned)
        trials = self._largest_first([p.trial for p in self.plan.planned if p.trains])
        for trial in trials:
            self._add_trial(trial)
        # The untuned first: what they score is step 0 of the trials that start from them.
        if untuned := [trial for trial in trials if trial.training.method == "untuned"]:
            yield self._job(untuned)
        for trial in trials:
            if trial not in untuned:
                yield self._job([trial])
        while not self.sweep.is_cancelled() and (suggested := self._next_suggestion()):
            self._enter_at_rungs(suggested)
            view.rows.append(_row(suggested))
            if suggested.trains:
                self._add_trial(suggested.trial)
                yield self._job([suggested.trial], suggested=True)

    def _next_suggestion(self) -> Planned | None:
        """The next trial of the search, which is part of the sweep from now on."""
        if self.search is None:
            return None
        planned, self.plan = next_suggestion(self.sweep, self.plan, self.search)
        self.on_plan(self.plan)
        if planned is not None:
            self.trials.append(planned.trial)
            write_plan(self.sweep, self.plan)
        return planned

    def _largest_first(self, trials: list[TrialSpec]) -> list[TrialSpec]:
        """By workers, then by device hours, or by tokens if any trial's time is unknown: none runs alone at the end."""
        estimates = self.plan.estimates
        timed = all(estimate.hours is not None for estimate in estimates.values())

        def size(trial: TrialSpec) -> tuple[int, float]:
            estimate, training = estimates[trial.fingerprint], trial.training
            tokens = training.steps * training.batch * training.context_length
            return estimate.workers, (estimate.hours or 0.0) if timed else tokens

        return sorted(trials, key=size, reverse=True)

    def _add_trial(self, trial: TrialSpec) -> None:
        storage = self.sweep.storage
        folder = storage.add_trial(trial, self.sweep.source.location)
        cancellation.withdraw(storage, folder.name)
        if diff := self.provenance.keep_diff(folder.path):
            storage.push(diff)

    def _enter_at_rungs(self, planned: Planned) -> None:
        """Counts a trial that finished before at the rungs of early stopping too."""
        if self.sweep.rungs and planned.action == "known":
            self.sweep.rungs.enter(planned.trial, planned.record)

    def _job(self, trials: list[TrialSpec], suggested: bool = False) -> Job:
        """What the scheduler knows of the job that trains these trials."""
        each = [self.plan.estimates[trial.fingerprint] for trial in trials]
        seconds = sum(math.inf if estimate.seconds is None else estimate.seconds for estimate in each)
        workers = max(estimate.workers for estimate in each)
        return Job(self._trial_job(trials).to_config(), workers, seconds, suggested)

    def _trial_job(self, trials: list[TrialSpec]) -> TrialJob:
        """What a driver and its workers need to train these trials, one after the other."""
        sweep, options = self.sweep, self.sweep.options
        estimate = self.plan.estimates[trials[0].fingerprint]
        job_id = uuid.uuid4().hex
        self.job_ids.add(job_id)
        return TrialJob(
            id=job_id,
            sweep=sweep.name,
            storage=sweep.storage.location,
            trials=tuple(trials),
            model=sweep.source,
            corpus=sweep.packed.folder.name,
            execution=estimate.execution,
            layers=estimate.layers,
            resources=Resources(workers=estimate.workers, **self.plan.cluster.worker_resources(options)),
            limits=FaultLimits(
                max_failures=options.max_failures,
                max_preemptions=options.max_preemptions,
                hang_timeout=options.hang_timeout,
            ),
            own_cluster=self.plan.cluster.own,
            early_stopping=sweep.early_stopping,
            provenance=self.provenance.of_attempt() | self.plan.estimator.rates.of_attempt(),
            prices=sweep.prices,
        )

    def _tune(self, jobs: Iterator[Job]) -> None:
        """Runs jobs with Tune, as many at a time as there is room for."""
        from ray import tune

        from orchestrator.running.tune_searcher import TuneQueue

        sweep, options = self.sweep, self.sweep.options
        name = f"{sweep.name}-{uuid.uuid4().hex[:8]}"
        tuner = tune.Tuner(
            tune.with_resources(drive_trial, tune.PlacementGroupFactory([DRIVER_RESOURCES])),
            tune_config=tune.TuneConfig(
                search_alg=TuneQueue(JobQueue(jobs, self.plan.cluster.slots_by_node(options))),
                num_samples=-1,  # until the jobs end
                max_concurrent_trials=options.max_concurrent or self.plan.cluster.slots(options),
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
        keeper = None if self.plan.cluster.own else share_token()
        try:
            tuner.fit()
        except KeyboardInterrupt:
            ask_for_checkpoints(sweep.storage, self.trials, self.job_ids, self.console)
            raise
        finally:
            del keeper
            shutil.rmtree(sweep.storage.ray_train / name, ignore_errors=True)


def _row(planned: Planned) -> Row:
    return Row(planned.trial, planned.record, known=planned.action == "known")


def _end_ray() -> None:
    import ray

    ray.shutdown()
