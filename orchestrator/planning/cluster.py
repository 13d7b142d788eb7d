"""The Ray cluster a sweep runs on: started on this machine, or joined."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from clusters.prices import Hired, find_cluster
from orchestrator.gpus import visible_gpus
from orchestrator.planning.ray_files import make_token_folder, restrict
from orchestrator.planning.ray_head import RUN_HERE, check_head
from orchestrator.process import end_on_signal
from orchestrator.ray_internals import HEAD_NODE_RESOURCE, ray_folder
from orchestrator.records.provenance import cpu_name
from orchestrator.run_options import RunOptions
from orchestrator.terminal import GIB
from workloads.budget import Device, host_memory
from workloads.config import Precision
from workloads.engines.allocator import allocator_variables
from workloads.errors import InputError, first_line

# Set before Ray starts, so that its processes inherit them.
ENVIRONMENT = {
    # How often Train's controller checks its workers, by default every 2 s: the end of a trial may wait that long.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # A preemption notice usually comes 30 s ahead; the default of 5 s would lose a sixth of that.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # A worker that hangs never leaves its process group; before a restart Ray would wait 30 s for it.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # The sweep has its own journals, and handles Ctrl-C itself.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints its heading even at verbose=0
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A trial has half a dozen small actors beside its workers; by default only as many processes as CPUs start at a
    # time, and Ray warns about the rest.
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Set explicitly, or tokenizers warns about every process started after it has used threads.
    "TOKENIZERS_PARALLELISM": "true",
}
# On a cluster of this one machine: it is never preempted, and each trial saves a process.
LOCAL_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# A trial's driver runs on the head node, since one lost with another node would leave its workers alive. It holds no
# share of a CPU, which could keep out a worker.
DRIVER_RESOURCES = {HEAD_NODE_RESOURCE: 0.0001}  # the smallest share that Ray knows
# A sweep passes only metrics through Ray's object store.
OBJECT_STORE_BYTES = 150 * 2**20


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Args:
        memory, gpu_memory: bytes; ``gpu_memory`` is of each GPU.
        gpu: its GPUs' name, as ``torch.cuda.get_device_name`` gives it.
        bfloat16: whether its processor multiplies in bfloat16.
    """

    cpus: float
    gpus: float = 0
    memory: float = 0
    gpu: str | None = None
    gpu_memory: float = 0
    bfloat16: bool = False


@dataclass(frozen=True)
class Cluster:
    """The machines that trials run on.

    Args:
        worker, head: the machines of its file; None without a file, or if the head's type is unknown. Its autoscaler
            starts and ends workers as trials need them.
        own: whether this process started it, so that its workers inherit this environment.
    """

    nodes: tuple[Node, ...]
    worker: Hired | None = None
    head: Hired | None = None
    own: bool = True

    @property
    def cpus(self) -> float:
        """CPUs of all machines together."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all machines together."""
        return sum(node.gpus for node in self.nodes)

    @classmethod
    def named(cls, name: str) -> Cluster:
        """The cluster of a file in ``clusters/``, at its full size.

        Raises:
            InputError: there is no such file.
        """
        try:
            found = find_cluster(name)
        except ValueError as error:
            raise InputError(f"--cluster: {error}") from error
        kind = found.worker.instance
        memory, gpu_memory = (kind.memory_gib or 0) * GIB, (kind.gpu_memory_gib or 0) * GIB
        node = Node(kind.cpus or 0, kind.gpus, memory, kind.gpu, gpu_memory)
        return cls((node,) * found.nodes, found.worker, found.head)

    @classmethod
    def this_machine(cls) -> Cluster:
        """What Ray would find on this machine, without starting it."""
        gpus = visible_gpus()
        name, memory = min(gpus, key=lambda gpu: gpu[1], default=(None, 0))
        return cls((Node(usable_cpus(), len(gpus), host_memory(), name, memory, multiplies_bfloat16()),))

    @property
    def is_only_planned_for(self) -> bool:
        """Whether it is a cluster file's, and nothing here says what is installed there."""
        return self.worker is not None and self.own

    def with_machines(self, number: int) -> Cluster:
        """The cluster with its first machines only."""
        return dataclasses.replace(self, nodes=self.nodes[:number])

    @property
    def precision(self) -> Precision:
        """The fastest on this cluster: bfloat16 on GPUs, and on processors that multiply in it."""
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
        """How many workers of one trial fit on one machine: plans do not account for a network between machines."""
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
            InputError: not one fits.
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
        """What a worker computes on.

        On a mixed cluster the device with the least memory, so that a planned trial fits wherever it runs. Of an
        unknown GPU only the memory is known.
        """
        if self.gpus:
            node = min((node for node in self.nodes if node.gpus), key=lambda node: node.gpu_memory)
            known = Device.named(node.gpu or "")
            share = min(1.0, options.gpus_per_worker)
            gpu_memory = int((min(known.memory, node.gpu_memory) if known else node.gpu_memory) * share)
            if known is None:
                known = Device(
                    name=node.gpu or "an unknown GPU", memory=gpu_memory, bfloat16=0, float32=0, bandwidth=1,
                    linear_efficiency=1, attention_efficiency=1, bandwidth_efficiency=1, streaming_efficiency=1,
                    launch=0, efficiency_source="", link=1, host_link=1,
                )  # fmt: skip
            hosts = [node.memory / max(1, self._slots_of(node, options)) for node in self.nodes if node.gpus]
            return dataclasses.replace(known, memory=gpu_memory, host_memory=int(min(hosts)))
        # The operating system lets processes share a machine's memory as they need it.
        memory = min(node.memory for node in self.nodes)
        return Device.cpu(max(1, int(options.cpus_per_worker)), int(memory), self.precision == "bfloat16")

    def hardware(self, options: RunOptions) -> str:
        """A worker's device as trials record it (:func:`orchestrator.records.provenance.hardware`)."""
        if self.gpus:
            return self.device(options).name
        threads = max(1, int(options.cpus_per_worker))
        return f"{threads} CPU thread{'s' if threads > 1 else ''} ({cpu_name()})"


def multiplies_bfloat16() -> bool:
    """Whether this machine's processor has bfloat16 instructions: AVX-512 BF16, AMX, or Arm's."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def is_connected() -> bool:
    """Whether this process has started or joined a Ray cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def join_or_start(options: RunOptions) -> Cluster:
    """Connects this process to Ray: a given address, a submitted job's cluster (RAY_ADDRESS), or a new local one.

    Raises:
        InputError: the cluster cannot be joined, Ray cannot be started here, or this process has joined one already.
    """
    if is_connected():
        raise InputError(
            "this process is connected to Ray already, and a sweep makes a connection with its own settings: call "
            "ray.shutdown() first; address='host:port' then joins the same cluster"
        )
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    # These values count on a cluster that is joined, not those of its nodes.
    environment = (
        ENVIRONMENT | allocator_variables() | {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(options.hang_timeout)}
    )
    for name, value in (environment | (LOCAL_ENVIRONMENT if local else {})).items():
        os.environ.setdefault(name, value)
    given = f"--address {options.address}" if options.address else f"RAY_ADDRESS={address}"
    if not local:
        check_head(address, given)
    with end_on_signal():
        nodes = _start_ray() if local else _join_ray(address, given, environment)
    if options.cluster is None:
        return Cluster(nodes, own=local)
    if local:
        raise InputError(
            f"--cluster {options.cluster}: this sweep would run on this machine; join that cluster with --address, or "
            "plan for it with longspan plan"
        )
    return dataclasses.replace(Cluster.named(options.cluster), own=False)


# Ray is silent: its workers' output is in the trials' logs.
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


def _start_ray() -> tuple[Node, ...]:
    import ray

    try:
        make_token_folder()
        started = ray.init(
            address="local", num_cpus=usable_cpus(), include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES, **QUIET,
        )  # fmt: skip
        restrict(Path(started.address_info["session_dir"]))
        return _nodes()
    except Exception as error:
        raise InputError(
            f"Ray cannot be started on this machine: {first_line(error)}; its files are in {ray_folder()}, which "
            "RAY_TMPDIR moves (to a short path: sockets of Ray have at most 107 bytes)"
        ) from error


def _join_ray(address: str, given: str, environment: dict[str, str]) -> tuple[Node, ...]:
    import ray

    try:
        ray.init(address=address, runtime_env={"env_vars": environment}, **QUIET)
        return _nodes()
    except Exception as error:
        raise InputError(
            f"{given}: the Ray cluster there answers, but cannot be joined from this machine: {first_line(error)}; "
            f"run the sweep on a node of the cluster or submit it (ray job submit), or {RUN_HERE}"
        ) from error


def _nodes() -> tuple[Node, ...]:
    """The nodes of the Ray cluster that this process has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    inspect = ray.remote(num_cpus=0)(_inspect_node)
    on = NodeAffinitySchedulingStrategy
    seen = {
        node["NodeID"]: inspect.options(scheduling_strategy=on(node["NodeID"], soft=False)).remote()
        for node in alive
        if node["NodeID"] != here and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }
    nodes = []
    for node in alive:
        has, name = node["Resources"], node["NodeID"]
        gpus, bfloat16 = ray.get(seen[name], timeout=120) if name in seen else _inspect_node()
        gpu, memory = min(gpus, key=lambda each: each[1], default=(None, 0))
        nodes.append(Node(has.get("CPU", 0), has.get("GPU", 0), has.get("memory", 0), gpu, memory, bfloat16))
    return tuple(nodes)


def _inspect_node() -> tuple[list[tuple[str, float]], bool]:
    """What Ray does not report of a node: its GPUs, and whether its processor multiplies in bfloat16."""
    return visible_gpus(), multiplies_bfloat16()


def usable_cpus() -> int:
    """The CPUs that this process may use: in a container perhaps fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
