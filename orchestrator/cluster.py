"""The Ray cluster a sweep runs on: started on this machine, or joined."""

from __future__ import annotations

import os
from dataclasses import dataclass

from orchestrator.spec import RunOptions
from workloads.errors import InputError

# Set before Ray starts, so that its processes inherit them.
ENVIRONMENT = {
    # Train's controller polls its workers this often and each report waits for a poll: 10 reports took 18 s at the
    # default of 2 s, 2.25 s at 0.1 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # The sweep has its own journals and its own way to end on Ctrl-C.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its heading even at verbose=0
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A trial is half a dozen small actors beside its workers; by default only as many processes as there are CPUs start
    # at a time, and Ray warns of the rest.
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Said outright, or tokenizers warns of every process that is started after it has used threads.
    "TOKENIZERS_PARALLELISM": "true",
}
# On a cluster of this one machine: nobody takes the machine away, and each trial saves a process.
LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# What a driver of a trial holds while it waits for its workers; each worker gives up that much, so that as many trials
# fit as there are CPUs for.
DRIVER_CPU = 0.001
# A sweep passes metrics through Ray's object store, nothing large.
OBJECT_STORE_BYTES = 150 * 2**20


@dataclass(frozen=True)
class Cluster:
    cpus: float
    gpus: float
    own: bool = True  # started by this process, whose environment its workers have

    def concurrency(self, options: RunOptions) -> int:
        """How many trials fit at once.

        Raises:
            InputError: not one does.
        """
        cpus, gpus = options.workers * options.cpus_per_worker, options.workers if self.gpus else 0
        fits = int(self.cpus // cpus) if not gpus else int(min(self.cpus // cpus, self.gpus // gpus))
        if fits < 1:
            has = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"
            raise InputError(
                f"a trial needs {cpus:g} CPUs and {gpus:g} GPUs, but the cluster has {has}; "
                "lower --workers or --cpus-per-worker, or join a larger cluster with --address"
            )
        return min(fits, options.max_concurrent or fits)

    def trial_resources(self, options: RunOptions) -> dict[str, float]:
        """Of one trial: its workers, and the CPUs and GPUs that each reserves."""
        cpus = options.cpus_per_worker - DRIVER_CPU
        return {"workers": options.workers, "cpus": cpus, "gpus": 1 if self.gpus else 0}


def join_or_start(address: str | None) -> Cluster:
    """Connects this process to Ray: to ``address``, the cluster of a submitted job (RAY_ADDRESS), or a new local one.

    Raises:
        InputError: the cluster does not answer.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    local = address in (None, "local")
    for name, value in (ENVIRONMENT | (LOCAL_ENVIRONMENT if local else {})).items():
        os.environ.setdefault(name, value)
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if local:
        ray.init(
            address="local", num_cpus=usable_cpus(), include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES, **quiet,
        )  # fmt: skip
    else:
        try:
            ray.init(address=address, runtime_env={"env_vars": ENVIRONMENT}, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one, or leave "
                "out --address and unset RAY_ADDRESS to run on this machine"
            ) from error
    resources = ray.cluster_resources()
    return Cluster(resources.get("CPU", 0), resources.get("GPU", 0), own=local)


def usable_cpus() -> int:
    """The CPUs that this process may use: a container may have fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
