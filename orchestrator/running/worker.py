"""What each Ray Train worker does: the glue between Ray and ``workloads``.

Imported by name in the worker's process, so what it imports at its top is part of every trial's start-up time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
from pathlib import Path
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
from orchestrator.records.events import Cancelled, Event, Failed, Finished, Preempted, Started, make_event
from orchestrator.records.leases import LeaseLost
from orchestrator.records.object_store import StoreUnavailable
from orchestrator.records.provenance import describe_machine
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.credentials import receive_token
from orchestrator.running.faults import classify, notice_the_end
from orchestrator.running.job import TrialJob
from orchestrator.running.judge import Judge
from orchestrator.trial_spec import TrialSpec
from workloads.data import ExampleCorpus, PackedCorpus
from workloads.engines.allocator import keep_freed_memory
from workloads.engines.choose import make_engine
from workloads.errors import InputError
from workloads.evaluation.bootstrap import DocumentScores
from workloads.training.compile_cache import keep_compiled
from workloads.training.loop import Request, run


def train_worker(job: TrialJob) -> None:
    """Trains the job's trials, one after the other."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(job.resources.cpus)))
        keep_freed_memory()
    receive_token()
    storage, ending = Storage.at(job.storage), notice_the_end()
    for trial in job.trials:
        _train(trial, storage, job, device, ending)


def _train(trial: TrialSpec, storage: Storage, job: TrialJob, device: torch.device, ending: threading.Event) -> None:
    context = ray.train.get_context()
    workers, first = context.get_world_size(), context.get_world_rank() == 0
    folder = storage.trial(trial.fingerprint)
    if not folder.is_visible():
        raise InputError(
            f"{folder.path} is not visible on node {socket.gethostname()}; give --storage a folder that every node "
            "sees, or an object store"
        )
    keep_compiled(storage.compiled)
    judge: Judge | None = None
    cancellation: Cancellation | None = None

    def record(event: Event) -> None:
        if first:
            writer.append(event)
        if judge:
            judge.event(event)
        if cancellation:
            cancellation.event(event)

    def emit(name: str, **fields: Any) -> None:
        record(make_event(name, **fields))

    notice = PreemptionNotice()
    asks = [notice.asked]
    with contextlib.ExitStack() as stack:
        stack.enter_context(log_to(folder.log))
        if first:
            lease = stack.enter_context(folder.lease(leases.owner(job.id, job.sweep)))
        rungs = _rungs(job, storage) if first else None
        if not _agree(first and _is_to_train(folder, job.attempt), workers):
            so_far = TrialRecord.of(folder.journal)
            if rungs and so_far.state == "finished":
                rungs.enter(trial, so_far)
            return
        if _agree(first and cancel_before_start(storage, folder), workers):
            return
        if first:
            writer = stack.enter_context(folder.writer(lease))
        if rungs:
            judge = Judge(rungs, trial, TrialRecord.of(folder.journal))
            asks.append(judge.asked)
        if first:
            cancellation = stack.enter_context(Cancellation(storage, trial.fingerprint))
            asks.append(cancellation.asked)
        corpus = ExampleCorpus if trial.training.task == "sft" else PackedCorpus
        try:
            machine = describe_machine(device, workers, job.prices)
            where = {
                "sweep": job.sweep,
                "drive": job.id,
                "node": ray.get_runtime_context().get_node_id(),
                "placement_group": get_current_placement_group().id.hex(),
            }
            execution = dataclasses.asdict(job.execution)
            record(Started(**machine, **where, **job.provenance, execution=execution))
            _fetch_checkpoint(folder, first, workers)
            untuned = TrialRecord.of(storage.trial(trial.untuned().fingerprint).journal)
            ended = run(
                job.model,
                trial.training,
                job.execution,
                corpus.open(storage.corpus(job.corpus)),
                folder.checkpoints,
                make_engine(job.execution, device, trial.training.precision),
                emit,
                _agree(_scores_at_step_0(trial, untuned), workers),
                poll_request=lambda: next((answer for each in asks if (answer := each())), None),
            )
            if ended:
                record(Finished())
            elif judge and judge.verdict:
                record(judge.verdict)
            elif notice.given:
                record(Preempted(attempt=job.attempt))
            elif cancellation and cancellation.request:
                record(Cancelled(step=cancellation.step, by=cancellation.request["by"]))
        except (LeaseLost, StoreUnavailable):
            # Train starts this attempt again: it waits for the process that has the trial now, or for the storage.
            raise
        except Exception as error:
            kind = classify(error)
            if kind == "lost" or ending.is_set():
                raise  # Ray Train starts the workers again, if it is to go on
            reason = f"{type(error).__name__}: {error}"
            (writer if first else folder.journal).append(Failed(kind=kind, reason=reason, attempt=job.attempt))
            if workers > 1:
                raise  # the others wait for this one
            logging.getLogger(__name__).error("the attempt ended in an error", exc_info=error)


class PreemptionNotice:
    """Whether a node of this trial is about to be taken away. The trial then stops with a checkpoint at once, and its
    driver starts it again elsewhere: whatever it trained until the node goes would be lost.
    """

    given = False

    def asked(self) -> Request | None:
        self.given = preemption_announced()
        return "stop" if self.given else None


def _fetch_checkpoint(folder: TrialFolder, first: bool, workers: int) -> None:
    """From an object store: worker 0 chooses the newest whole checkpoint, and every node fetches it."""
    if folder.store is None:
        return
    chosen = _agree(folder.fetch_newest_checkpoint() if first else None, workers)
    if chosen and not first and not folder.fetch_checkpoint(chosen):
        raise OSError(f"checkpoint {chosen} of {folder.path} cannot be fetched whole to {socket.gethostname()}")


def _scores_at_step_0(trial: TrialSpec, untuned: TrialRecord) -> DocumentScores | None:
    """What the model scores before training, if the untuned trial that starts alike has shown it: a quantised base
    scores otherwise.
    """
    known = untuned.state == "finished" and trial.training.quantization == "none"
    return untuned.scores(trial.training.context_length) if known else None


def _rungs(job: TrialJob, storage: Storage) -> Rungs | None:
    """Where and by what rule this sweep stops trials early, if it does."""
    return Rungs(storage, job.sweep, job.early_stopping) if job.early_stopping else None


def _is_to_train(folder: TrialFolder, attempt: str) -> bool:
    """Whether there is something left: another sweep may have finished the trial while this one waited for the lock,
    and an error of this very attempt is final.
    """
    record = TrialRecord.of(folder.journal)
    return record.state != "finished" and record.failed_attempt != attempt


def _agree(value: Any, workers: int) -> Any:
    """What worker 0 decides or knows, for all."""
    return ray.train.collective.broadcast_from_rank_zero(value) if workers > 1 else value


class log_to:
    """A context in which this process's log records and an exception that leaves it go to the trial's log file."""

    def __init__(self, path: Path) -> None:
        self.handler = logging.FileHandler(path)
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def __enter__(self) -> None:
        root = logging.getLogger()
        root.addHandler(self.handler)
        root.setLevel(min(root.level or logging.INFO, logging.INFO))
        logging.captureWarnings(True)

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            logging.getLogger(__name__).error("the attempt ended in an error", exc_info=(kind, error, traceback))
        logging.getLogger().removeHandler(self.handler)
        self.handler.close()
