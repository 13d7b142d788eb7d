"""A trial as Tune runs it: a function that drives a Ray Train TorchTrainer and waits for it.

Untuned trials are evaluated in seconds, less than a process takes to start, so one drive takes all of a sweep's; every
trial that trains has a drive of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.records.cancellation import cancelled_before_its_start
from orchestrator.records.storage import Storage, TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.running.faults import Kind, Remedy, remedy
from orchestrator.trial_spec import TrialSpec
from workloads.config import ExecutionConfig

if TYPE_CHECKING:
    from ray.train.backend import BackendConfig
    from ray.train.torch import TorchTrainer


def drive_trial(config: dict[str, Any]) -> None:
    """Tune's function: trains the trials of ``config`` (:meth:`orchestrator.running.sweep_runner.Running.run_config`) to their end.

    A fault with a remedy (:mod:`orchestrator.running.faults`) is followed by another attempt. A trial that fails for good ends
    this function normally, with the reason in its journal: the other trials go on, and the sweep tells of it at its
    end.
    """
    storage = Storage.at(config["storage"])
    folders = [storage.trial(TrialSpec.from_dict(trial).fingerprint) for trial in config["trials"]]
    mended: list[Kind] = []
    # A list, so that each that is cancelled says so in its journal.
    while not all([cancelled_before_its_start(storage, folder) for folder in folders]):
        # Names this attempt, so that what went wrong in it is told from what went wrong before.
        config = {**config, "attempt": uuid.uuid4().hex}
        _attempt(config, storage, folders)
        after = _remedy(config, folders, mended)
        if after is None:
            return
        time.sleep(after.pause)
        config = {**config, "execution": dataclasses.asdict(after.execution)}


def _attempt(config: dict[str, Any], storage: Storage, folders: list[TrialFolder]) -> None:
    """One run of Ray Train, which itself replaces workers that are lost."""
    _release_what_an_earlier_process_held(config, folders)
    for folder in folders:
        folder.journal.append("launched", sweep=config["sweep"], resources=config["resources"])
    try:
        _trainer(config, storage.ray_train, name=folders[0].path.name).fit()
    except Exception as error:
        # A worker writes down an error of its own; what is left is one that died too often.
        reason = _root_cause(error)
        # Ray's own guard of the host's memory ends workers, and says so in these words.
        kind = "out_of_host_memory" if "OutOfMemory" in reason or "memory pressure" in reason else "lost"
        for folder in folders:
            record = TrialRecord.of(folder.journal)
            if record.state != "finished" and record.failed_attempt != config["attempt"]:
                folder.journal.append("failed", kind=kind, reason=reason, attempt=config["attempt"])
                with contextlib.suppress(OSError):
                    folder.path.mkdir(parents=True, exist_ok=True)  # on another node than the worker's
                    with folder.log.open("a") as log:
                        log.write(f"the trial failed: {reason}\n")


def _release_what_an_earlier_process_held(config: dict[str, Any], folders: list[TrialFolder]) -> None:
    """Where the process of this drive was killed and Tune has started another one: Ray then ends its workers, but what
    was reserved for them stays so until the sweep ends (Ray 2.60; where the cluster runs the dashboard, an actor of Ray
    Train does what is done here).
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for folder in folders:
        started = TrialRecord.of(folder.journal).started
        if started and started.get("drive") == config["drive"]:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(started["placement_group"])))


def _remedy(config: dict[str, Any], folders: list[TrialFolder], mended: list[Kind]) -> Remedy | None:
    """How to go on after an attempt, written into the journals; None where every trial is finished or has failed for
    good. ``mended`` remembers what has been gone on after.
    """
    execution = ExecutionConfig(**config["execution"])
    for trial, folder in zip(config["trials"], folders):
        record = TrialRecord.of(folder.journal)
        if record.preempted_attempt == config["attempt"]:
            if mended.count("preempted") < config["max_preemptions"]:
                mended.append("preempted")
                return Remedy(execution, 0, "goes on elsewhere")
            folder.journal.append(
                "failed", kind="preempted", attempt=config["attempt"],
                reason=f"preempted more than {config['max_preemptions']} times; allow more with --max-preemptions",
            )  # fmt: skip
        if record.state != "failed" or record.failed_attempt != config["attempt"]:
            continue
        share = trial["training"]["batch"] // config["resources"]["workers"]
        found = remedy(record.failure_kind, execution, share, config["layers"], mended)
        if found is not None:
            mended.append(record.failure_kind)
            folder.journal.append("retry", kind=record.failure_kind, remedy=found.words, pause=found.pause)
            return found
    return None


def _trainer(config: dict[str, Any], ray_storage: Path, name: str) -> TorchTrainer:
    # Imported here, so that the sweep's own process, which only names `drive_trial`, does without torch.
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller import TrainController

    # An actor each, which takes 2 to 3 s of a core to start. The first hands out Ray's data sets, of which there are
    # none. The second, which `_release_what_an_earlier_process_held` tells of, asks the dashboard, and our own cluster
    # runs none.
    useless = (DatasetsCallback, PlacementGroupCleanerCallback) if config["own_cluster"] else (DatasetsCallback,)

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list:
            return [each for each in super()._create_default_callbacks() if not isinstance(each, useless)]

        def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
            """The controller, which starts and watches the workers, runs in this process, the driver's, which waits for
            it anyway: as an actor of its own it took 3 s of a core for each trial.
            """
            controller = TrainController(**arguments)
            asyncio.run(controller.run())
            return controller.get_result()

    # Train's own state of an earlier attempt is not needed, checkpoints lie in the trial's folder; and a damaged
    # snapshot in it would keep the run from starting at all.
    shutil.rmtree(ray_storage / name, ignore_errors=True)
    resources = config["resources"]
    alone = resources["workers"] == 1
    return Trainer(
        _work,
        train_loop_config=config,
        torch_config=_no_process_group() if alone else TorchConfig(timeout_s=config["hang_timeout"]),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources["workers"],
            use_gpu=resources["gpus"] > 0,
            resources_per_worker={
                "CPU": resources["cpus"],
                **({"GPU": resources["gpus"]} if resources["gpus"] else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(ray_storage),
            failure_config=ray.train.FailureConfig(
                max_failures=config["max_failures"], max_preemption_failures=config["max_preemptions"]
            ),
            # Metrics go to the journal and not to Tune: nobody would read them there, and TuneReportCallback hangs for
            # ever if the last report comes just as the driver returns (Ray 2.60, seen on a busy machine: the thread
            # that empties the queue of results waits for room to add one).
        ),
    )


def _no_process_group() -> BackendConfig:
    """For a worker that is alone, which TorchConfig would have join a group of its own."""
    from ray.train.backend import BackendConfig

    alone = BackendConfig()
    alone.backend = "none"  # TorchTrainer wants a name
    return alone


def _work(config: dict[str, Any]) -> None:
    """What each worker runs. The driver unpickles it too, so that what a worker alone needs is imported inside."""
    # 800,000 objects come with these imports, and stay: looking through them for garbage, again and again while they
    # come and once more when the process ends, took 2 of 6 s.
    gc.disable()
    from orchestrator.running.worker import train_worker

    gc.freeze()
    gc.enable()
    train_worker(config)


def _root_cause(error: BaseException) -> str:
    """The first line of the error under Ray's layers."""
    if failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    elif (failure := getattr(error, "controller_failure", None)) is not None:
        error = failure
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}"
