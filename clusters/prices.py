"""What machines have and what their hours cost: a small table of instance types, and clusters known by name.

A price is the on-demand list price for Linux in US dollars, with its region, date and source. Prices change, and depend
on region, contract and spot markets: pass your own as ``overrides`` (:func:`read_prices` reads them from a file). A
price that could not be confirmed is None, not a guess.
"""

from __future__ import annotations

import difflib
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CLUSTER_FILES = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceType:
    """A type of machine.

    Args:
        name: the cloud's name for it.
        gpus: the number of GPUs; 0 if there are none, or they are unknown.
        gpu: their name as ``torch.cuda.get_device_name`` gives it; None if there are none, or they are unknown.
        gpu_memory_gib: of each GPU, as its driver reports it; PyTorch can use up to 1 GiB less.
        cpus: virtual CPUs.
        memory_gib: of the host.
        usd_per_hour: for the whole machine, on demand; None if unknown.
        region, date, source: of the price (date: ISO 8601).
    """

    name: str
    gpus: int
    gpu: str | None
    gpu_memory_gib: float | None
    cpus: int | None
    memory_gib: float | None
    usd_per_hour: float | None
    region: str | None
    date: str | None
    source: str

    @property
    def usd_per_gpu_hour(self) -> float | None:
        """The machine's price divided by its GPUs; None if there are none, or no price is known."""
        return self.usd_per_hour / self.gpus if self.usd_per_hour is not None and self.gpus else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """US dollars for an hour of one GPU or of one machine, and where the figure comes from, in words."""

    usd: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hired:
    """A machine as a cluster file asks for it: its type, and whether on the spot market."""

    instance: InstanceType
    spot: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedCluster:
    """A cluster described by a file in this folder: at most ``nodes`` workers of one type with GPUs, and a head.

    The head is None if its type is not in the table.
    """

    name: str
    nodes: int
    worker: Hired
    head: Hired | None

    @property
    def gpus(self) -> int:
        """The GPUs of all its workers."""
        return self.nodes * self.worker.instance.gpus


THIS_MACHINE = "this machine"
# In the user's prices: the price of any device that is not named, and what follows an instance type's name.
ANY, SPOT = "any", " spot"

# By torch.cuda.get_device_name: GiB, from the MiB that nvidia-smi lists.
GPU_MEMORY_GIB = {
    "NVIDIA A100-SXM4-40GB": 40.0,
    "NVIDIA A100-SXM4-80GB": 80.0,
    "NVIDIA H100 80GB HBM3": 79.6,
    "NVIDIA H200": 140.4,
    "NVIDIA A10G": 22.5,
    "NVIDIA L4": 22.5,
    "NVIDIA L40S": 45.0,
}

AWS = ("us-east-1", "2026-09-24", "AWS's price list, version 20260924211011, from tables that copy it")
GCP_A2 = ("us-central1", "2026-02-12", "Google's billing catalog, from the Cyclenerd pricing file")
GCP_A3 = ("us-central1", "2026-09-26", "Google's billing catalog: GPUs, vCPUs and memory, without the local disks")
AZURE = ("eastus", "2026-11-09", "Azure's retail price list, from a table that copies it")
AZURE_UNKNOWN = ("eastus", None, "the price could not be confirmed")

# Heads of clusters, which need no GPU.
AWS_HEADS = ("us-east-1", "2026-11-29", "AWS's price list, from a table that copies it")

# Name, GPUs, GPU, vCPUs, memory in GiB, USD an hour, source of the price. Sizes are from the clouds' pages on their
# instance types.
_TABLE: list[tuple[str, int, str | None, int, int, float | None, tuple[str, str | None, str]]] = [
    ("p4d.24xlarge", 8, "NVIDIA A100-SXM4-40GB", 96, 1152, 21.957642, AWS),
    ("p4de.24xlarge", 8, "NVIDIA A100-SXM4-80GB", 96, 1152, 27.44705, AWS),
    ("p5.48xlarge", 8, "NVIDIA H100 80GB HBM3", 192, 2048, 55.04, AWS),
    ("p5en.48xlarge", 8, "NVIDIA H200", 192, 2048, 63.296, AWS),
    ("g5.xlarge", 1, "NVIDIA A10G", 4, 16, 1.006, AWS),
    ("g5.2xlarge", 1, "NVIDIA A10G", 8, 32, 1.212, AWS),
    ("g5.4xlarge", 1, "NVIDIA A10G", 16, 64, 1.624, AWS),
    ("g5.8xlarge", 1, "NVIDIA A10G", 32, 128, 2.448, AWS),
    ("g5.12xlarge", 4, "NVIDIA A10G", 48, 192, 5.672, AWS),
    ("g5.16xlarge", 1, "NVIDIA A10G", 64, 256, 4.096, AWS),
    ("g5.24xlarge", 4, "NVIDIA A10G", 96, 384, 8.144, AWS),
    ("g5.48xlarge", 8, "NVIDIA A10G", 192, 768, 16.288, AWS),
    ("g6.xlarge", 1, "NVIDIA L4", 4, 16, 0.8048, AWS),
    ("g6.2xlarge", 1, "NVIDIA L4", 8, 32, 0.9776, AWS),
    ("g6.4xlarge", 1, "NVIDIA L4", 16, 64, 1.3232, AWS),
    ("g6.8xlarge", 1, "NVIDIA L4", 32, 128, 2.0144, AWS),
    ("g6.12xlarge", 4, "NVIDIA L4", 48, 192, 4.6016, AWS),
    ("g6.16xlarge", 1, "NVIDIA L4", 64, 256, 3.3968, AWS),
    ("g6.24xlarge", 4, "NVIDIA L4", 96, 384, 6.6752, AWS),
    ("g6.48xlarge", 8, "NVIDIA L4", 192, 768, 13.3504, AWS),
    ("g6e.xlarge", 1, "NVIDIA L40S", 4, 32, 1.861, AWS),
    ("g6e.2xlarge", 1, "NVIDIA L40S", 8, 64, 2.24208, AWS),
    ("g6e.4xlarge", 1, "NVIDIA L40S", 16, 128, 3.00424, AWS),
    ("g6e.8xlarge", 1, "NVIDIA L40S", 32, 256, 4.52856, AWS),
    ("g6e.12xlarge", 4, "NVIDIA L40S", 48, 384, 10.49264, AWS),
    ("g6e.16xlarge", 1, "NVIDIA L40S", 64, 512, 7.57719, AWS),
    ("g6e.24xlarge", 4, "NVIDIA L40S", 96, 768, 15.06559, AWS),
    ("g6e.48xlarge", 8, "NVIDIA L40S", 192, 1536, 30.13118, AWS),
    ("a2-highgpu-1g", 1, "NVIDIA A100-SXM4-40GB", 12, 85, 3.673385, GCP_A2),
    ("a2-highgpu-2g", 2, "NVIDIA A100-SXM4-40GB", 24, 170, 7.34677, GCP_A2),
    ("a2-highgpu-4g", 4, "NVIDIA A100-SXM4-40GB", 48, 340, 14.69354, GCP_A2),
    ("a2-highgpu-8g", 8, "NVIDIA A100-SXM4-40GB", 96, 680, 29.38708, GCP_A2),
    ("a3-highgpu-8g", 8, "NVIDIA H100 80GB HBM3", 208, 1872, 87.83, GCP_A3),
    ("ND96asr_v4", 8, "NVIDIA A100-SXM4-40GB", 96, 900, 27.197, AZURE),
    ("ND96amsr_A100_v4", 8, "NVIDIA A100-SXM4-80GB", 96, 1900, None, AZURE_UNKNOWN),
    ("ND96isr_H100_v5", 8, "NVIDIA H100 80GB HBM3", 96, 1900, 98.32, AZURE),
    ("m6i.2xlarge", 0, None, 8, 32, 0.384, AWS_HEADS),
    ("m6i.4xlarge", 0, None, 16, 64, 0.768, AWS_HEADS),
]

INSTANCES: dict[str, InstanceType] = {
    name: InstanceType(
        name=name, gpus=gpus, gpu=gpu, gpu_memory_gib=GPU_MEMORY_GIB[gpu] if gpu else None, cpus=cpus,
        memory_gib=memory, usd_per_hour=usd, region=region, date=date, source=source,
    )
    for name, gpus, gpu, cpus, memory, usd, (region, date, source) in _TABLE
}  # fmt: skip
INSTANCES[THIS_MACHINE] = InstanceType(
    name=THIS_MACHINE, gpus=0, gpu=None, gpu_memory_gib=None, cpus=None, memory_gib=None, usd_per_hour=None,
    region=None, date=None, source="a machine of your own, whose price is unknown",
)  # fmt: skip


def find_instance(name: str) -> InstanceType:
    """An instance type by its name; Azure's may begin with ``Standard_``, as Azure's tools write them.

    Raises:
        ValueError: there is none of this name; the message lists the known ones.
    """
    found = INSTANCES.get(name.removeprefix("Standard_"))
    if found is None:
        raise ValueError(_unknown("instance type", name, INSTANCES))
    return found


def cheapest_for_gpu(gpu: str) -> InstanceType | None:
    """The instance type with the lowest known price for an hour of one such GPU; None if no price is known."""
    priced = [
        (price, one) for one in INSTANCES.values() if one.gpu == gpu and (price := one.usd_per_gpu_hour) is not None
    ]
    return min(priced, key=lambda pair: pair[0], default=(0.0, None))[1]


def price_per_machine_hour(hired: Hired, overrides: Mapping[str, float] | None = None) -> Price | None:
    """The price of an hour of a whole machine: the user's own, else the table's on-demand price, else None.

    A spot machine without a price of the user's gets the on-demand one, an upper bound, and the source says so.

    Args:
        overrides: the user's prices (:func:`read_prices`): that of the instance type counts before those of its GPU.
    """
    overrides, instance = overrides or {}, hired.instance
    names = [instance.name + SPOT] * hired.spot + [instance.name]
    if own := next((name for name in names if name in overrides), None):
        return Price(usd=overrides[own], source=f"{own}, given by the user")
    if instance.gpus and (gpu := next((name for name in (instance.gpu, ANY) if name in overrides), None)):
        return Price(usd=instance.gpus * overrides[gpu], source=f"{instance.gpus} GPUs, given by the user")
    if instance.usd_per_hour is None:
        return None
    source = f"{instance.name} on demand in {instance.region} on {instance.date} ({instance.source})"
    if hired.spot:
        source += "; spot usually costs less, and its price of the day can be given with --prices"
    return Price(usd=instance.usd_per_hour, source=source)


def price_per_gpu_hour(gpu: str, overrides: Mapping[str, float] | None = None) -> Price | None:
    """The price of an hour of one GPU in a machine of unknown type: the user's own, else the cheapest on demand.

    Args:
        gpu: its name as ``torch.cuda.get_device_name`` gives it.
        overrides: the user's prices (:func:`read_prices`): that of the GPU counts before those of instance types.
    """
    overrides = overrides or {}
    if gpu in overrides:
        return Price(usd=overrides[gpu], source="given by the user")
    own = {
        name: price / instance.gpus
        for name, price in overrides.items()
        if (instance := INSTANCES.get(name.removesuffix(SPOT))) and instance.gpu == gpu
    }
    if own:
        name = min(own, key=lambda name: own[name])
        return Price(usd=own[name], source=f"{name}, given by the user")
    if ANY in overrides:
        return Price(usd=overrides[ANY], source="given by the user")
    instance = cheapest_for_gpu(gpu)
    if instance is None or instance.usd_per_gpu_hour is None:
        return None
    where = f"{instance.name} on demand in {instance.region} on {instance.date}"
    return Price(usd=instance.usd_per_gpu_hour, source=f"{where} ({instance.source})")


def read_prices(path: Path) -> dict[str, float]:
    """Reads the user's prices from a .toml or .json file, for ``overrides``.

    ``"p4d.24xlarge" = 21.96`` is USD an hour of the machine, ``"p4d.24xlarge spot" = 11.50`` of one on the spot market,
    ``"NVIDIA H200" = 3.20`` of one GPU, and ``any = 2.00`` of any GPU that is not named.

    Raises:
        ValueError: it cannot be read, or contains anything but names with positive numbers.
    """
    try:
        text = path.read_text("utf-8")
        prices: Any = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except Exception as error:  # of the file system, the encoding, TOML or JSON
        raise ValueError(f"the prices in {path} cannot be read ({error}); expected a .toml or .json file") from error
    example = 'expected names with USD an hour, such as "p4d.24xlarge" = 11.50 or "NVIDIA H200" = 3.20'
    if not isinstance(prices, dict):
        raise ValueError(f"the prices in {path} are not a table; {example}")
    for name, price in prices.items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price <= sys.float_info.max:
            raise ValueError(f"the price of {name!r} in {path} is {price!r}; {example}")
    for name in prices:
        if (
            name.removeprefix("Standard_").removesuffix(SPOT) not in INSTANCES
            and name != ANY
            and not name.startswith("NVIDIA ")
        ):
            raise ValueError(f"{path}: {_unknown('instance type', name, INSTANCES)}; GPUs are named NVIDIA ...")
    return {name.removeprefix("Standard_"): float(price) for name, price in prices.items()}


def named_clusters() -> list[str]:
    """The names that :func:`find_cluster` knows: the cluster files in this folder with GPU workers."""
    return sorted(path.stem for path in CLUSTER_FILES.glob("*.yaml") if _gpu_workers(_read_cluster(path)))


def find_cluster(name: str) -> NamedCluster:
    """A cluster by its file's name: ``aws-p4d`` is clusters/aws-p4d.yaml at its full size.

    Raises:
        ValueError: there is none of this name (the message lists the known ones), or its workers' type is not in the
            table.
    """
    if name not in named_clusters():
        raise ValueError(_unknown("cluster", name, named_clusters()))
    config = _read_cluster(CLUSTER_FILES / f"{name}.yaml")
    (nodes, worker), *others = _gpu_workers(config)
    if others:
        raise ValueError(f"the cluster {name} has several types of GPU workers; only one type can be planned for")
    head = config["available_node_types"][config["head_node_type"]]
    known = _instance_of(head) in INSTANCES
    return NamedCluster(name=name, nodes=nodes, worker=_hired(worker), head=_hired(head) if known else None)


def _read_cluster(path: Path) -> dict[str, Any]:
    """A file of Ray's cluster launcher; other files in the folder are empty here."""
    config = next(iter(yaml.safe_load_all(path.read_text("utf-8"))), None)
    return config if isinstance(config, dict) and "available_node_types" in config else {}


def _gpu_workers(config: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """(most machines, node type) of the workers with GPUs."""
    return [
        (min(node["max_workers"], config["max_workers"]), node)
        for name, node in config.get("available_node_types", {}).items()
        if name != config["head_node_type"] and node["resources"].get("GPU") and _instance_of(node)
    ]


def _hired(node: dict[str, Any]) -> Hired:
    """The machine of a node type."""
    return Hired(instance=find_instance(str(_instance_of(node))), spot=_is_spot(node["node_config"]))


def _is_spot(fields: dict[str, Any]) -> bool:
    """Whether a node type asks for the spot market, by the field of AWS, Azure or Google."""
    aws = fields.get("InstanceMarketOptions", {}).get("MarketType")
    azure = fields.get("azure_arm_parameters", {}).get("priority")
    google = [each for each in fields.get("scheduling") or () if isinstance(each, dict) and each.get("preemptible")]
    return "spot" in (aws, str(azure).lower()) or bool(google)


def _instance_of(node: dict[str, Any]) -> str | None:
    """The instance type of a node type: AWS, Google and Azure each name the field differently."""
    fields = node["node_config"]
    return (
        fields.get("InstanceType") or fields.get("machineType") or fields.get("azure_arm_parameters", {}).get("vmSize")
    )


def _unknown(kind: str, name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ";"
    return f"{kind} {name!r} is unknown{hint} known: {', '.join(known)}"
