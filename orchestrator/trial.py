"""A trial as Tune runs it: a function that drives a Ray Train TorchTrainer and waits for it.

Untuned trials are evaluated in seconds, less than a process takes to start, so one drive takes all of a sweep's; every
trial that trains has a drive of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from orchestrator.journal import TrialRecord
from orchestrator.storage import TrialFolder


def drive_trial(config: dict[str, Any]) -> None:
    """Tune's function: trains the trials of ``config`` (see :meth:`orchestrator.sweep.Sweep.run_config`) to their end.

    A trial that fails ends this function normally, with the reason in its journal: the other trials go on, and the
    sweep tells of it at its end.
    """
    folders = [TrialFolder(Path(entry["folder"])) for entry in config["trials"]]
    for folder in folders:
        folder.journal.append("launched")
    # Imported here, so that the sweep's own process, which only names this function, does without torch.
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from orchestrator.worker import train_worker

    name = folders[0].path.name
    # Train's own state of an earlier attempt is not needed, checkpoints lie in the trial's folder; and a damaged
    # snapshot in it would keep the run from starting at all.
    shutil.rmtree(Path(config["ray_storage"]) / name, ignore_errors=True)
    resources = config["resources"]
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=config,
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
            storage_path=config["ray_storage"],
            failure_config=ray.train.FailureConfig(max_failures=config["max_failures"]),
            callbacks=[TuneReportCallback()],
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        # A worker writes down an error of its own; what is left is one that died too often.
        reason = _root_cause(error)
        for folder in folders:
            record = TrialRecord.of(folder.journal)
            if record.state != "finished" and record.failed_attempt != config["attempt"]:
                with folder.log.open("a") as log:
                    log.write(f"the trial failed: {reason}\n")
                folder.journal.append("failed", reason=reason, attempt=config["attempt"])


def _root_cause(error: BaseException) -> str:
    """The first line of the error under Ray's layers."""
    if failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    elif (failure := getattr(error, "controller_failure", None)) is not None:
        error = failure
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}"
