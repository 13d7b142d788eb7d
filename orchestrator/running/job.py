"""What the sweep sends to a driver, and the driver to its workers: one typed record.

Tune and Train pass configurations as plain data, and Tune writes them to files. :meth:`TrialJob.to_config` and
:meth:`TrialJob.from_config` are the only places that convert.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from orchestrator.planning.early_stopping import EarlyStopping
from orchestrator.trial_spec import TrialSpec, lists_to_tuples
from workloads.config import ExecutionConfig
from workloads.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a trial reserves: ``cpus`` and ``gpus`` are for each worker. The journal's ``launched`` has these fields."""

    workers: int
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class FaultLimits:
    """When to give up.

    Args:
        max_failures: attempts that may lose a worker or its node.
        max_preemptions: attempts that may be preempted.
        hang_timeout: seconds that a worker may be silent in a collective operation.
    """

    max_failures: int
    max_preemptions: int
    hang_timeout: float


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """The trials that one driver trains, one after the other, with everything that its workers need.

    Args:
        id: names the driver across restarts of its process; the journal's ``started`` has it as ``drive``.
        sweep: its name.
        storage: the storage root, for :meth:`orchestrator.records.storage.Storage.at`.
        trials: one that trains, or all of a sweep's untuned trials.
        model: the base model of all of them.
        corpus: the name of the prepared data in the storage.
        execution: how the trials run; a remedy changes it between attempts.
        layers: decoder layers that have a backward pass.
        own_cluster: whether the sweep started the Ray cluster that it runs on.
        early_stopping: the sweep's rule; None: no early stopping.
        provenance: fields of ``started`` that only the sweep's process knows: the git commit, a hired machine's price.
        prices: the user's own, in USD an hour (:func:`orchestrator.records.provenance.own_prices`).
        attempt: names one run of Ray Train, so that its errors are told from earlier ones.
    """

    id: str
    sweep: str
    storage: str
    trials: tuple[TrialSpec, ...]
    model: ModelSource
    corpus: str
    execution: ExecutionConfig
    layers: int
    resources: Resources
    limits: FaultLimits
    own_cluster: bool
    early_stopping: EarlyStopping | None
    provenance: dict[str, Any]
    prices: dict[str, float]
    attempt: str = ""

    def to_config(self) -> dict[str, Any]:
        """This job as plain data, which JSON can hold."""
        return dataclasses.asdict(self) | {"trials": [trial.to_dict() for trial in self.trials]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TrialJob:
        """The job that :meth:`to_config` made ``config`` from."""
        stopping = config["early_stopping"]
        return cls(
            **config
            | {
                "trials": tuple(TrialSpec.from_dict(trial) for trial in config["trials"]),
                "model": ModelSource(**config["model"]),
                "execution": ExecutionConfig(**config["execution"]),
                "resources": Resources(**config["resources"]),
                "limits": FaultLimits(**config["limits"]),
                "early_stopping": stopping and EarlyStopping(**lists_to_tuples(stopping)),
            }
        )
