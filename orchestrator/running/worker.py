"""What each Ray Train worker does: it joins Ray and ``workloads``.

The worker's process imports this module, so each import here adds to every trial's start-up time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.util import get_current_placement_group

from orchestrator.planning.early_stopping import Rungs
from orchestrator.ray_internals import preemption_announced
from orchestrator.records import leases
from orchestrator.records.cancellation import Cancellation, cancel_before_start
from orchestrator.records.events import Cancelled, Event, Failed, Finished, Preempted, Started, make_event, stamp
from orchestrator.records.leases import LeaseLost
from orchestrator.records.object_store import StoreUnavailable
from orchestrator.records.provenance import describe_machine
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.records.writer import LocalWriter, Uploader
from orchestrator.running.credentials import receive_token
from orchestrator.running.faults import classify, watch_exit
from orchestrator.running.job import TrialJob
from orchestrator.running.judge import Judge
from orchestrator.trial_spec import TrialSpec
from workloads.data import ExampleCorpus, PackedCorpus
from workloads.engines.allocator import keep_freed_memory
from workloads.engines.choose import make_engine
from workloads.errors import InputError
from workloads.evaluation.intervals import DocumentScores
from workloads.files.safe import PlainFileHandler
from workloads.training.compile_cache import keep_compiled
from workloads.training.loop import Request, run


def train_worker(job: TrialJob) -> None:
    """Trains the job's trials, one after the other."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(job.resources.cpus)))
        keep_freed_memory()
    receive_token()
    storage, exiting = Storage.at(job.storage), watch_exit()
    for trial in job.trials:
        _train(trial, storage, job, device, exiting)


def _train(trial: TrialSpec, storage: Storage, job: TrialJob, device: torch.device, exiting: threading.Event) -> None:
    context = ray.train.get_context()
    workers, is_first = context.get_world_size(), context.get_world_rank() == 0
    folder = storage.trial(trial.fingerprint)
    if not folder.is_visible():
        raise InputError(
            f"{folder.path} is not visible on node {socket.gethostname()}; give --storage a folder that every node "
            "sees, or an object store"
        )
    keep_compiled(storage.compiled)
    with contextlib.ExitStack() as stack:
        stack.enter_context(log_to(folder.log))
        lease = stack.enter_context(folder.lease(leases.owner(job.id, job.sweep))) if is_first else None
        rungs = Rungs(storage, job.sweep, job.early_stopping) if lease and job.early_stopping else None
        if not _broadcast(is_first and _is_to_train(folder, job.attempt), workers):
            record = TrialRecord.of(folder.journal)
            if rungs and record.state == "finished":
                rungs.enter(trial, record)
            return
        if _broadcast(is_first and cancel_before_start(storage, folder), workers):
            return
        observer = Observer()
        if lease:
            observer.writer = folder.writer(lease)
            stack.enter_context(observer.writer)
            observer.judge = Judge(rungs, trial, TrialRecord.of(folder.journal)) if rungs else None
            observer.cancellation = stack.enter_context(Cancellation(storage, trial.fingerprint))
        try:
            observer.record(_started(job, device, workers))
            finished = _run(trial, storage, job, device, workers, observer)
            observer.record_end(finished, job.attempt)
        except (LeaseLost, StoreUnavailable):
            # Train starts this attempt again: it waits for the process that has the trial now, or for the storage.
            raise
        except Exception as error:
            kind = classify(error)
            if kind == "lost" or exiting.is_set():
                raise  # Ray Train restarts the workers unless it is ending them
            reason = f"{type(error).__name__}: {error}"
            (observer.writer or folder.journal).append(stamp(Failed(kind=kind, reason=reason, attempt=job.attempt)))
            if workers > 1:
                raise  # the others wait for this one
            logging.getLogger(__name__).error("the attempt ended in an error", exc_info=error)


@dataclass
class Observer:
    """Records the events of a trial on worker 0, and polls what may stop it. On other workers it does nothing."""

    writer: LocalWriter | Uploader | None = None
    judge: Judge | None = None
    cancellation: Cancellation | None = None
    preempted: bool = False

    def record(self, event: Event) -> None:
        """Writes the event to the journal and shows it to those who may stop the trial."""
        if self.writer:
            self.writer.append(stamp(event))
        if self.judge:
            self.judge.on_event(event)
        if self.cancellation:
            self.cancellation.on_event(event)

    def emit(self, name: str, **fields: Any) -> None:
        """The training loop's ``emit``."""
        self.record(make_event(name, **fields))

    def poll_request(self) -> Request | None:
        """The training loop's ``poll_request``: stop for a preemption, for the judge or for a person.

        Before a node is preempted the trial stops with a checkpoint, and its driver starts it again elsewhere: what it
        trained until the node is gone would be lost.
        """
        self.preempted = preemption_announced()
        if self.preempted:
            return "stop"
        if self.judge and self.judge.poll_request():
            return "stop"
        return self.cancellation.poll_request() if self.cancellation else None

    def record_end(self, finished: bool, attempt: str) -> None:
        """Records how the attempt ended: the trial finished, or one of those who may stop it did."""
        if finished:
            self.record(Finished())
        elif self.judge and self.judge.verdict:
            self.record(self.judge.verdict)
        elif self.preempted:
            self.record(Preempted(attempt=attempt))
        elif self.cancellation and self.cancellation.request:
            self.record(Cancelled(step=self.cancellation.step, by=self.cancellation.request["by"]))


def _started(job: TrialJob, device: torch.device, workers: int) -> Started:
    node = ray.get_runtime_context().get_node_id()
    return Started(
        **describe_machine(device, workers, job.prices) | job.provenance,
        machine_devices=_devices_of(node, "GPU" if device.type == "cuda" else "CPU"),
        sweep=job.sweep,
        drive=job.id,
        node=node,
        placement_group=get_current_placement_group().id.hex(),
        execution=dataclasses.asdict(job.execution),
    )


def _devices_of(node: str, kind: str) -> float | None:
    """The GPUs or CPUs that a node of the cluster has."""
    return next((each["Resources"].get(kind) for each in ray.nodes() if each["NodeID"] == node), None)


def _run(
    trial: TrialSpec, storage: Storage, job: TrialJob, device: torch.device, workers: int, observer: Observer
) -> bool:
    """Trains and evaluates the trial from its newest checkpoint; returns whether it finished."""
    folder = storage.trial(trial.fingerprint)
    _fetch_checkpoint(folder, observer.writer is not None, workers)
    untuned = TrialRecord.of(storage.trial(trial.untuned().fingerprint).journal)
    corpus = ExampleCorpus if trial.training.task == "sft" else PackedCorpus
    return run(
        job.model,
        trial.training,
        job.execution,
        corpus.open(storage.corpus(job.corpus)),
        folder.checkpoints,
        make_engine(job.execution, device, trial.training.precision),
        observer.emit,
        _broadcast(_scores_at_step_0(trial, untuned), workers),
        poll_request=observer.poll_request,
    )


def _fetch_checkpoint(folder: TrialFolder, is_first: bool, workers: int) -> None:
    """From an object store worker 0 chooses the newest whole checkpoint, and every node fetches it."""
    if folder.store is None:
        return
    chosen = _broadcast(folder.fetch_newest_checkpoint() if is_first else None, workers)
    if chosen and not is_first and not folder.fetch_checkpoint(chosen):
        raise OSError(f"checkpoint {chosen} of {folder.path} cannot be fetched whole to {socket.gethostname()}")


def _scores_at_step_0(trial: TrialSpec, untuned: TrialRecord) -> DocumentScores | None:
    """The scores before training, if the untuned trial with the same start is finished.

    A quantised base has other scores than the untuned trial's.
    """
    known = untuned.state == "finished" and trial.training.quantization == "none"
    return untuned.scores(trial.training.context_length) if known else None


def _is_to_train(folder: TrialFolder, attempt: str) -> bool:
    """Whether this attempt has anything left to do.

    Another sweep may have finished the trial while this one waited for the lease, and an error of this very attempt is
    final.
    """
    record = TrialRecord.of(folder.journal)
    return record.state != "finished" and record.failed_attempt != attempt


def _broadcast(value: Any, workers: int) -> Any:
    """Worker 0's value, on every worker."""
    return ray.train.collective.broadcast_from_rank_zero(value) if workers > 1 else value


class log_to:
    """A context that sends this process's log records, and an exception that leaves it, to the trial's log file."""

    def __init__(self, path: Path) -> None:
        self.handler = PlainFileHandler(path)
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def __enter__(self) -> None:
        root = logging.getLogger()
        root.addHandler(self.handler)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
        logging.captureWarnings(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            logging.getLogger(__name__).error("the attempt ended in an error", exc_info=error)
        logging.getLogger().removeHandler(self.handler)
        self.handler.close()
