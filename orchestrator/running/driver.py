"""A trial as Tune runs it: a function that drives a Ray Train TorchTrainer and waits for it.

Untuned trials are evaluated in seconds, less than a process takes to start, so one drive takes all of a sweep's; every
trial that trains has a drive of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.ray_internals import (
    is_memory_monitor_kill,
    lean_trainer,
    no_process_group,
    release_placement_group,
)
from orchestrator.records.cancellation import cancel_before_start
from orchestrator.records.events import Failed, FaultKind, Launched, Retry
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.faults import Remedy, remedy
from orchestrator.running.job import TrialJob

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


def drive_trial(config: dict[str, Any]) -> None:
    """Tune's function: trains the trials of ``config`` (:meth:`TrialJob.to_config`) to their end.

    A fault with a remedy (:mod:`orchestrator.running.faults`) is followed by another attempt. A trial that fails for good ends
    this function normally, with the reason in its journal: the other trials go on, and the sweep tells of it at its
    end.
    """
    job = TrialJob.from_config(config)
    storage = Storage.at(job.storage)
    folders = [storage.trial(trial.fingerprint) for trial in job.trials]
    mended: list[FaultKind] = []
    # A list, so that each that is cancelled says so in its journal.
    while not all([cancel_before_start(storage, folder) for folder in folders]):
        # Names this attempt, so that what went wrong in it is told from what went wrong before.
        job = dataclasses.replace(job, attempt=uuid.uuid4().hex)
        _attempt(job, storage, folders)
        after = _remedy(job, folders, mended)
        if after is None:
            return
        time.sleep(after.pause)
        job = dataclasses.replace(job, execution=after.execution)


def _attempt(job: TrialJob, storage: Storage, folders: list[TrialFolder]) -> None:
    """One run of Ray Train, which itself replaces workers that are lost."""
    _release_what_an_earlier_process_held(job, folders)
    for folder in folders:
        folder.journal.append(Launched(sweep=job.sweep, resources=dataclasses.asdict(job.resources)))
    try:
        _trainer(job, storage.ray_train, name=folders[0].path.name).fit()
    except Exception as error:
        # A worker writes down an error of its own; what is left is one that died too often.
        reason = _root_cause(error)
        kind: FaultKind = "out_of_host_memory" if is_memory_monitor_kill(reason) else "lost"
        for folder in folders:
            record = TrialRecord.of(folder.journal)
            if record.state != "finished" and record.failed_attempt != job.attempt:
                folder.journal.append(Failed(kind=kind, reason=reason, attempt=job.attempt))
                with contextlib.suppress(OSError):
                    folder.path.mkdir(parents=True, exist_ok=True)  # on another node than the worker's
                    with folder.log.open("a") as log:
                        log.write(f"the trial failed: {reason}\n")


def _release_what_an_earlier_process_held(job: TrialJob, folders: list[TrialFolder]) -> None:
    """Where the process of this drive was killed and Tune has started another one: Ray then ends its workers, but what
    was reserved for them stays so until the sweep ends (Ray 2.60; where the cluster runs the dashboard, an actor of Ray
    Train does what is done here).
    """
    for folder in folders:
        started = TrialRecord.of(folder.journal).started
        if started and started.drive == job.id and started.placement_group:
            release_placement_group(started.placement_group)


def _remedy(job: TrialJob, folders: list[TrialFolder], mended: list[FaultKind]) -> Remedy | None:
    """How to go on after an attempt, written into the journals; None where every trial is finished or has failed for
    good. ``mended`` remembers what has been gone on after.
    """
    for trial, folder in zip(job.trials, folders):
        record = TrialRecord.of(folder.journal)
        if record.preempted_attempt == job.attempt:
            if mended.count("preempted") < job.limits.max_preemptions:
                mended.append("preempted")
                return Remedy(job.execution, 0, "goes on elsewhere")
            reason = f"preempted more than {job.limits.max_preemptions} times; allow more with --max-preemptions"
            folder.journal.append(Failed(kind="preempted", attempt=job.attempt, reason=reason))
        if record.state != "failed" or record.failed_attempt != job.attempt:
            continue
        share = trial.training.batch // job.resources.workers
        found = remedy(record.failure_kind, job.execution, share, job.layers, mended)
        if found is not None:
            mended.append(record.failure_kind)
            folder.journal.append(Retry(kind=record.failure_kind, remedy=found.words, pause=found.pause))
            return found
    return None


def _trainer(job: TrialJob, ray_storage: Path, name: str) -> TorchTrainer:
    # Imported here, so that the sweep's own process, which only names `drive_trial`, does without torch.
    import ray.train
    from ray.train.torch import TorchConfig

    # Train's own state of an earlier attempt is not needed, checkpoints lie in the trial's folder; and a damaged
    # snapshot in it would keep the run from starting at all.
    shutil.rmtree(ray_storage / name, ignore_errors=True)
    resources = job.resources
    alone = resources.workers == 1
    return lean_trainer(
        _work,
        job.own_cluster,
        train_loop_config=job.to_config(),
        torch_config=no_process_group() if alone else TorchConfig(timeout_s=job.limits.hang_timeout),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={
                "CPU": resources.cpus,
                **({"GPU": resources.gpus} if resources.gpus else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(ray_storage),
            failure_config=ray.train.FailureConfig(
                max_failures=job.limits.max_failures, max_preemption_failures=job.limits.max_preemptions
            ),
            # Metrics go to the journal and not to Tune: nobody would read them there, and TuneReportCallback hangs for
            # ever if the last report comes just as the driver returns (Ray 2.60, seen on a busy machine: the thread
            # that empties the queue of results waits for room to add one).
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """What each worker runs. The driver unpickles it too, so that what a worker alone needs is imported inside."""
    # 800,000 objects come with these imports, and stay: looking through them for garbage, again and again while they
    # come and once more when the process ends, took 2 of 6 s.
    gc.disable()
    from orchestrator.running.worker import train_worker

    gc.freeze()
    gc.enable()
    train_worker(TrialJob.from_config(config))


def _root_cause(error: BaseException) -> str:
    """The first line of the error under Ray's layers."""
    if failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    elif (failure := getattr(error, "controller_failure", None)) is not None:
        error = failure
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}"
