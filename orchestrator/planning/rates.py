"""What an hour of a cluster's machines costs: whole machines, idle devices included, since that is what is billed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clusters.prices import price_per_gpu_hour, price_per_machine_hour
from orchestrator.planning.cluster import Cluster
from orchestrator.terminal import usd


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Prices in US dollars an hour; None: unknown.

    Args:
        machines: of each machine, in the cluster's order; 0 for one on which nothing trains.
        head: of a head that trains nothing; 0 without one.
        device: of one GPU (or CPU thread): its share of its machine.
        source: where the prices come from, in words.
        hired: whether they are those of a cluster file's machines, which a worker does not know.
    """

    machines: tuple[float | None, ...]
    head: float | None
    device: float | None
    source: str
    hired: bool = False

    @classmethod
    def of(cls, cluster: Cluster, device: str, prices: Mapping[str, float]) -> Rates:
        """The rates of a cluster.

        Args:
            device: the name of the device that trials compute on.
            prices: the user's own (:func:`clusters.prices.read_prices`).
        """
        if cluster.worker is not None:
            return cls._hired(cluster, prices)
        unit = "GPU" if cluster.gpus else "CPU"
        price = price_per_gpu_hour(device, prices)
        each: list[float | None] = []
        for node in cluster.nodes:
            own = price_per_gpu_hour(node.gpu or device, prices) if node.gpus else price
            devices = node.gpus if cluster.gpus else node.cpus
            each.append(0.0 if not devices else devices * own.usd if own else None)
        source = (
            f"{usd(price.usd)} per {unit} hour: {price.source}"
            if price
            else f"the price of {device} is unknown; set one with --price-per-hour"
        )
        return cls(machines=tuple(each), head=0.0, device=price.usd if price else None, source=source)

    @classmethod
    def _hired(cls, cluster: Cluster, prices: Mapping[str, float]) -> Rates:
        assert cluster.worker is not None
        kind = cluster.worker.instance
        machine = price_per_machine_hour(cluster.worker, prices)
        head = price_per_machine_hour(cluster.head, prices) if cluster.head else None
        if machine is None:
            source = f"the price of {kind.name} is unknown; give it with --prices"
        else:
            source = f"{usd(machine.usd)} an hour of a machine, {machine.source}"
        if cluster.head is None:
            source += "; the head is not counted, its type is unknown"
        elif head:
            source += f"; {usd(head.usd)} an hour of the head, {cluster.head.instance.name}"
        return cls(
            machines=(machine.usd if machine else None,) * len(cluster.nodes),
            head=0.0 if cluster.head is None else head.usd if head else None,
            device=machine.usd / kind.gpus if machine else None,
            source=source,
            hired=True,
        )

    def of_attempt(self) -> dict[str, Any]:
        """Fields of the journal's ``started``: prices that its worker cannot know."""
        if not self.hired or self.device is None:
            return {}
        return {"usd_per_device_hour": self.device, "price_source": self.source, "head_usd_per_hour": self.head or None}
