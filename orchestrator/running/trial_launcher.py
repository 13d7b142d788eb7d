"""A trial as Tune runs it: a function that starts a Ray Train TorchTrainer, waits for it, and remedies its faults.

Untuned trials are evaluated in less time than a process takes to start, so one driver evaluates all of them;
every trial that trains has its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.process import gc_paused
from orchestrator.ray_internals import (
    is_memory_monitor_kill,
    lean_trainer,
    no_process_group,
    release_placement_group,
)
from orchestrator.records.cancellation import cancel_before_start
from orchestrator.records.events import Failed, FaultKind, Launched, Retry, stamp
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.faults import Remedy, find_remedy
from orchestrator.running.job import TrialJob
from workloads.files.safe import open_plain

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def drive_trial(config: dict[str, Any]) -> None:
    """Trains the trials of a job to their end: the function that Tune runs.

    A fault with a remedy (:mod:`orchestrator.running.faults`) is followed by another attempt. A trial that fails for
    good ends this function normally, with the reason in its journal: the other trials continue, and the sweep reports
    the failure when it ends.

    Args:
        config: :meth:`TrialJob.to_config`'s.
    """
    job = TrialJob.from_config(config)
    storage = Storage.at(job.storage)
    folders = [storage.trial(trial.fingerprint) for trial in job.trials]
    past_faults: list[FaultKind] = []
    # A list, so that all() does not stop before every cancelled trial is journaled.
    while not all([cancel_before_start(storage, folder) for folder in folders]):
        job = dataclasses.replace(job, attempt=uuid.uuid4().hex)
        _attempt(job, storage, folders)
        remedy = _choose_remedy(job, folders, past_faults)
        if remedy is None:
            return
        time.sleep(remedy.pause)
        job = dataclasses.replace(job, execution=remedy.execution)


def _attempt(job: TrialJob, storage: Storage, folders: list[TrialFolder]) -> None:
    """One run of Ray Train, which itself replaces lost workers."""
    _release_earlier_reservation(job, folders)
    for folder in folders:
        folder.journal.append(stamp(Launched(sweep=job.sweep, resources=dataclasses.asdict(job.resources))))
    try:
        _make_trainer(job, storage.ray_train, name=folders[0].path.name).fit()
    except Exception as error:
        _record_failure(job, folders, _reason(error))


def _release_earlier_reservation(job: TrialJob, folders: list[TrialFolder]) -> None:
    """Releases the workers' reservation of this job's earlier driver, if Tune had to start another one.

    Ray ends the workers of a killed driver but not their reservation (Ray 2.60; where the cluster runs the dashboard,
    an actor of Ray Train releases it).
    """
    for folder in folders:
        started = TrialRecord.of(folder.journal).started
        if started and started.drive == job.id and started.placement_group:
            release_placement_group(started.placement_group)


def _record_failure(job: TrialJob, folders: list[TrialFolder], reason: str) -> None:
    """Records why Ray Train gave up, for each trial that is not finished and has recorded no error of its own."""
    kind: FaultKind = "out_of_host_memory" if is_memory_monitor_kill(reason) else "lost"
    for folder in folders:
        if folder.store is None and not folder.path.is_dir():
            folder.path.mkdir(parents=True)
            reason = (
                f"its folder {folder.path} was removed while it trained; the same command trains it again ({reason})"
            )
        record = TrialRecord.of(folder.journal)
        if record.state == "finished" or record.failed_attempt == job.attempt:
            continue
        folder.journal.append(stamp(Failed(kind=kind, reason=reason, attempt=job.attempt)))
        with contextlib.suppress(OSError):
            folder.path.mkdir(parents=True, exist_ok=True)  # the worker may have been on another node
            with open_plain(folder.log, "a") as log:
                log.write(f"the trial failed: {reason}\n")


def _choose_remedy(job: TrialJob, folders: list[TrialFolder], past_faults: list[FaultKind]) -> Remedy | None:
    """How to continue after an attempt; None if every trial is finished or failed for good.

    A retry, and a trial preempted too often, are recorded in its journal; its worker has recorded a preemption.

    Args:
        past_faults: this job's faults that had a remedy; this one is added.
    """
    for trial, folder in zip(job.trials, folders):
        record = TrialRecord.of(folder.journal)
        if record.preempted_attempt == job.attempt:
            if past_faults.count("preempted") < job.limits.max_preemptions:
                past_faults.append("preempted")
                return Remedy(job.execution, 0, "continues on another node")
            reason = f"preempted more than {job.limits.max_preemptions} times; allow more with --max-preemptions"
            folder.journal.append(stamp(Failed(kind="preempted", attempt=job.attempt, reason=reason)))
        if record.state != "failed" or record.failed_attempt != job.attempt:
            continue
        worker_batch = trial.training.batch // job.resources.workers
        found = find_remedy(record.failure_kind, job.execution, worker_batch, job.layers, past_faults)
        if found is not None:
            past_faults.append(record.failure_kind)
            folder.journal.append(stamp(Retry(kind=record.failure_kind, remedy=found.description, pause=found.pause)))
            return found
    return None


def _make_trainer(job: TrialJob, ray_storage: Path, name: str) -> TorchTrainer:
    # Imported here: the sweep's own process, which only names `drive_trial`, starts without torch.
    import ray.train
    from ray.train.torch import TorchConfig

    # Train's state of an earlier attempt is not needed, since checkpoints are in the trial's folder; a damaged
    # snapshot in it would keep the run from starting.
    shutil.rmtree(ray_storage / name, ignore_errors=True)
    resources, limits = job.resources, job.limits
    gpus = {"GPU": resources.gpus} if resources.gpus else {}
    # Metrics go to the journal, not to Tune: nothing reads them there, and TuneReportCallback hangs if the last report
    # comes just as the driver returns (Ray 2.60: the thread that empties the queue of results waits for room in it).
    return lean_trainer(
        _run_worker,
        job.own_cluster,
        train_loop_config=job.to_config(),
        torch_config=no_process_group() if resources.workers == 1 else TorchConfig(timeout_s=limits.hang_timeout),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **gpus},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(ray_storage),
            failure_config=ray.train.FailureConfig(
                max_failures=limits.max_failures, max_preemption_failures=limits.max_preemptions
            ),
        ),
    )


def _run_worker(config: dict[str, Any]) -> None:
    """What each worker runs. The driver unpickles it too, so a worker's own imports are inside."""
    # These imports create 800,000 objects that stay. Collecting garbage among them, during the imports and at exit,
    # took 2 of 6 s.
    with gc_paused():
        from orchestrator.running.worker import train_worker
    train_worker(TrialJob.from_config(config))


def _reason(error: BaseException) -> str:
    """The class and the first line of the error below Ray's layers."""
    if failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    elif (failure := getattr(error, "controller_failure", None)) is not None:
        error = failure
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}"
