"""What each Ray Train worker does: the glue between Ray and ``workloads``.

Imported by name in the worker's process, so what it imports at its top is part of every trial's start-up time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import socket
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch

from orchestrator import leases
from orchestrator.credentials import receive_token
from orchestrator.journal import TrialRecord
from orchestrator.leases import LeaseLost
from orchestrator.object_store import StoreAway
from orchestrator.provenance import package_versions
from orchestrator.spec import TrialSpec
from orchestrator.storage import Storage, TrialFolder
from workloads.config import ExecutionConfig
from workloads.data import ExampleCorpus, PackedCorpus
from workloads.engine import make_engine
from workloads.errors import InputError
from workloads.evaluation.bootstrap import DocumentScores
from workloads.models import ModelSource
from workloads.training import run


def train_worker(config: dict[str, Any]) -> None:
    """Trains the trials of ``config``, one after the other: see :meth:`orchestrator.sweep.Sweep.run_config`."""
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config["threads"])))
    receive_token()
    storage = Storage.at(config["storage"])
    for trial in map(TrialSpec.from_dict, config["trials"]):
        _train(trial, storage, config, device)


def _train(trial: TrialSpec, storage: Storage, config: dict[str, Any], device: torch.device) -> None:
    context = ray.train.get_context()
    workers, first = context.get_world_size(), context.get_world_rank() == 0
    folder = storage.trial(trial.fingerprint)
    if not folder.is_visible():
        raise InputError(
            f"{folder.path} is not visible on node {socket.gethostname()}; give --storage a folder that every node "
            "sees, or an object store"
        )

    def emit(event: str, **fields: Any) -> None:
        if first:
            writer.append(event, **fields)
        # Tells Ray of evaluations at the trained length only: each report costs one poll of Train's controller.
        if event == "eval" and fields["context_length"] == trial.training.context_length:
            ray.train.report({name: fields[name] for name in ("step", "tokens", "perplexity")})

    with contextlib.ExitStack() as stack:
        stack.enter_context(log_to(folder.log))
        if first:
            lease = stack.enter_context(folder.lease(leases.owner(config["attempt"], config["sweep"])))
        if not _agree(first and _is_to_train(folder, config["attempt"]), workers):
            return
        if first:
            writer = stack.enter_context(folder.writer(lease))
        corpus = ExampleCorpus if trial.training.task == "sft" else PackedCorpus
        try:
            emit("started", sweep=config["sweep"], **describe_attempt(device, workers))
            _fetch_checkpoint(folder, first, workers)
            untuned = TrialRecord.of(storage.trial(trial.untuned().fingerprint).journal)
            execution = ExecutionConfig(**config["execution"])
            ended = run(
                ModelSource(trial.model, config["model_location"], config["model_revision"]),
                trial.training,
                execution,
                corpus.open(storage.corpus(config["corpus"])),
                folder.checkpoints,
                make_engine(execution, device, trial.training.precision),
                emit,
                _agree(_scores_at_step_0(trial, untuned), workers),
            )
            if ended:
                emit("finished")
        except (LeaseLost, StoreAway):
            # Train starts this attempt again: it waits for the process that has the trial now, or for the storage.
            raise
        except Exception as error:
            # An error in Python comes again at every attempt: unlike a lost worker it is not retried.
            (writer if first else folder.journal).append(
                "failed", reason=f"{type(error).__name__}: {error}", attempt=config["attempt"]
            )
            raise


def _fetch_checkpoint(folder: TrialFolder, first: bool, workers: int) -> None:
    """From an object store: worker 0 chooses the newest whole checkpoint, and every node fetches it."""
    if folder.store is None:
        return
    chosen = _agree(folder.fetch_newest_checkpoint() if first else None, workers)
    if chosen and not first and not folder.fetch_checkpoint(chosen):
        raise OSError(f"checkpoint {chosen} of {folder.path} cannot be fetched whole to {socket.gethostname()}")


def _scores_at_step_0(trial: TrialSpec, untuned: TrialRecord) -> DocumentScores | None:
    """What the model scores before training, if the untuned trial that starts alike has shown it: a 4-bit base scores
    otherwise."""
    known = untuned.state == "finished" and trial.training.quantization == "none"
    return untuned.scores(trial.training.context_length) if known else None


def _is_to_train(folder: TrialFolder, attempt: str) -> bool:
    """Whether there is something left: another sweep may have finished the trial while this one waited for the lock,
    and an error of this very attempt is final."""
    record = TrialRecord.of(folder.journal)
    return record.state != "finished" and record.failed_attempt != attempt


def _agree(value: Any, workers: int) -> Any:
    """What worker 0 decides or knows, for all."""
    return ray.train.collective.broadcast_from_rank_zero(value) if workers > 1 else value


def describe_attempt(device: torch.device, workers: int) -> dict[str, Any]:
    """What the trial runs on, for the record."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "workers": workers,
        "hardware": hardware(device, workers),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def hardware(device: torch.device, workers: int) -> str:
    """``2 x NVIDIA H200`` or ``1 x 1 CPU thread (AMD EPYC)``."""
    if device.type == "cuda":
        return f"{workers} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{workers} x {threads} CPU thread{'s' if threads > 1 else ''} ({cpu_name()})"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


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
