"""The Ray cluster a sweep runs on: started on this machine, or joined."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from clusters.prices import find_cluster
from orchestrator.options import RunOptions
from orchestrator.ray_internals import HEAD_NODE_RESOURCE
from orchestrator.records.provenance import cpu_name
from workloads.budget import Device, host_memory
from workloads.config import Precision
from workloads.engines.allocator import allocator_variables
from workloads.errors import InputError

GIB = 2**30

# Set before Ray starts, so that its processes inherit them.
ENVIRONMENT = {
    # Train's controller looks at its workers this often, by default every 2 s: so long the end of a trial may wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # A notice of 30 s is usual; at the default of 5 s a sixth of it would be gone.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
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
# What a driver of a trial holds while it waits for its workers: a place on the head node, without which there is no
# cluster. A driver elsewhere could be lost with its node while its workers live, which then keep what they hold; and
# one that held part of a CPU could keep out the worker that wants the rest.
DRIVER_RESOURCES = {HEAD_NODE_RESOURCE: 0.0001}  # the smallest share that Ray knows
# A sweep passes metrics through Ray's object store, nothing large.
OBJECT_STORE_BYTES = 150 * 2**20


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. Memory in bytes; ``gpu`` as ``torch.cuda.get_device_name`` gives it."""

    cpus: float
    gpus: float = 0
    memory: float = 0
    gpu: str | None = None
    gpu_memory: float = 0
    bfloat16: bool = False  # whether its processor multiplies in bfloat16


@dataclass(frozen=True)
class Cluster:
    """The machines that trials run on."""

    nodes: tuple[Node, ...]
    instance: str | None = None  # the type of its machines, where that is known
    own: bool = True  # started by this process, whose environment its workers have

    @property
    def cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    @classmethod
    def named(cls, name: str) -> Cluster:
        """That of a file in ``clusters/``, at its full size.

        Raises:
            InputError: there is none of this name.
        """
        try:
            found = find_cluster(name)
        except ValueError as error:
            raise InputError(f"--cluster: {error}") from error
        kind = found.instance
        node = Node(kind.cpus, kind.gpus, kind.memory_gib * GIB, kind.gpu, kind.gpu_memory_gib * GIB)
        return cls((node,) * found.nodes, kind.name)

    @classmethod
    def this_machine(cls) -> Cluster:
        """Without Ray: what it would find here."""
        gpus = visible_gpus()
        name, memory = min(gpus, key=lambda gpu: gpu[1], default=(None, 0))
        return cls((Node(usable_cpus(), len(gpus), host_memory(), name, memory, multiplies_bfloat16()),))

    @property
    def precision(self) -> Precision:
        """The one that is fastest here: bfloat16 on GPUs, and on processors that multiply in it."""
        fast = self.gpus or all(node.bfloat16 for node in self.nodes if node.cpus)
        return "bfloat16" if fast else "float32"

    def worker_resources(self, options: RunOptions) -> dict[str, float]:
        """What each worker reserves."""
        return {"cpus": options.cpus_per_worker, "gpus": options.gpus_per_worker if self.gpus else 0}

    def slots(self, options: RunOptions) -> int:
        """How many workers fit at once."""
        return sum(self.slots_by_node(options))

    def slots_by_node(self, options: RunOptions) -> tuple[int, ...]:
        """How many workers fit on each machine."""
        return tuple(self._slots_of(node, options) for node in self.nodes)

    def most_workers(self, options: RunOptions) -> int:
        """How many workers of one trial fit on one machine: beyond it they talk over a network that is not planned
        for.
        """
        return max((self._slots_of(node, options) for node in self.nodes), default=0)

    def _slots_of(self, node: Node, options: RunOptions) -> int:
        by_cpus = int(node.cpus // options.cpus_per_worker)
        if not self.gpus:
            return by_cpus
        a_gpu = int(1 / options.gpus_per_worker) if options.gpus_per_worker <= 1 else 1 / options.gpus_per_worker
        return min(by_cpus, int(node.gpus * a_gpu))

    def concurrency(self, options: RunOptions) -> int:
        """How many trials of ``options.workers`` workers fit at once.

        Raises:
            InputError: not one does.
        """
        fits = self.slots(options) // options.workers
        if fits < 1:
            needs = self.worker_resources(options)
            cpus, gpus = options.workers * options.cpus_per_worker, options.workers * needs["gpus"]
            has = f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"
            raise InputError(
                f"a trial needs {cpus:g} CPUs and {gpus:g} GPUs, but the cluster has {has}; "
                "lower --workers or --cpus-per-worker, or join a larger cluster with --address"
            )
        return min(fits, options.max_concurrent or fits)

    def device(self, options: RunOptions) -> Device:
        """What a worker computes on; on a mixed cluster that with the least memory, so that what is planned fits
        wherever it comes to run. Of a GPU that is not known only the memory is.
        """
        if self.gpus:
            node = min((node for node in self.nodes if node.gpus), key=lambda node: node.gpu_memory)
            known = Device.named(node.gpu or "")
            share = min(1.0, options.gpus_per_worker)
            memory = int((min(known.memory, node.gpu_memory) if known else node.gpu_memory) * share)
            if known is None:
                known = Device(
                    name=node.gpu or "an unknown GPU", memory=memory, bfloat16=0, float32=0, bandwidth=1,
                    linear_efficiency=1, attention_efficiency=1, bandwidth_efficiency=1, streaming_efficiency=1,
                    launch=0, efficiency_source="", link=1, host_link=1,
                )  # fmt: skip
            hosts = [node.memory / max(1, self._slots_of(node, options)) for node in self.nodes if node.gpus]
            return dataclasses.replace(known, memory=memory, host_memory=int(min(hosts)))
        # The operating system lets processes share a machine's memory as they need it.
        memory = min(node.memory for node in self.nodes)
        return Device.cpu(max(1, int(options.cpus_per_worker)), int(memory), self.precision == "bfloat16")

    def hardware(self, options: RunOptions) -> str:
        """How a trial's record calls a worker's device (:func:`orchestrator.records.provenance.hardware`)."""
        if self.gpus:
            return self.device(options).name
        threads = max(1, int(options.cpus_per_worker))
        return f"{threads} CPU thread{'s' if threads > 1 else ''} ({cpu_name()})"


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has instructions for it: AVX-512 BF16, AMX, or Arm's."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def visible_gpus() -> list[tuple[str, float]]:
    """(name, bytes of memory) of the NVIDIA GPUs of this machine that a process may use; without torch, which takes
    seconds to import.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    found = [[field.strip() for field in line.split(",")] for line in lines if line.count(",") == 3]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        wanted = [each.strip() for each in allowed.split(",") if each.strip()]
        found = [gpu for gpu in found if gpu[0] in wanted or any(gpu[1].startswith(each) for each in wanted)]
    return [(name, float(mebibytes) * 2**20) for _, _, name, mebibytes in found]


def join_or_start(options: RunOptions) -> Cluster:
    """Connects this process to Ray: to the address given, the cluster of a submitted job (RAY_ADDRESS), or a new local
    one.

    Raises:
        InputError: the cluster does not answer.
    """
    address = options.address or os.environ.get("RAY_ADDRESS")
    local = address in (None, "local")
    # Of a cluster that is joined: what is set here counts, not on its nodes.
    environment = (
        ENVIRONMENT | allocator_variables() | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(options.hang_timeout)}
    )
    for name, value in (environment | (LOCAL_ENVIRONMENT if local else {})).items():
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
            ray.init(address=address, runtime_env={"env_vars": environment}, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one, or leave "
                "out --address and unset RAY_ADDRESS to run on this machine"
            ) from error
    if options.cluster is None:
        return Cluster(_nodes(), own=local)
    if local:
        raise InputError(
            f"--cluster {options.cluster}: this sweep would run on this machine; join that cluster with --address, or "
            "plan for it with python -m orchestrator.plan"
        )
    return dataclasses.replace(Cluster.named(options.cluster), own=False)


def _nodes() -> tuple[Node, ...]:
    """The nodes of the Ray cluster that this process has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    look = ray.remote(num_cpus=0)(_look)
    on = NodeAffinitySchedulingStrategy
    seen = {
        node["NodeID"]: look.options(scheduling_strategy=on(node["NodeID"], soft=False)).remote()
        for node in alive
        if node["NodeID"] != here and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
    nodes = []
    for node in alive:
        has, name = node["Resources"], node["NodeID"]
        gpus, bfloat16 = ray.get(seen[name], timeout=120) if name in seen else _look()
        gpu, memory = min(gpus, key=lambda each: each[1], default=(None, 0))
        nodes.append(Node(has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0), gpu, memory, bfloat16))
    return tuple(nodes)


def _look() -> tuple[list[tuple[str, float]], bool]:
    """What Ray does not tell of a node."""
    return visible_gpus(), multiplies_bfloat16()


def usable_cpus() -> int:
    """The CPUs that this process may use: a container may have fewer than its machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
