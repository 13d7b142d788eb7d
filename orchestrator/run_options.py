"""How a sweep runs: what changes where, how fast and how safely its trials run, but not their results."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from workloads.config import ExecutionConfig, ExecutionFields, GradientCheckpointing
from workloads.errors import InputError

# File systems take 255, and what is written beside a folder has a longer name.
MAX_NAME_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a sweep runs, on how much of it, and where it keeps its results."""

    storage: Annotated[str, tyro.conf.arg(metavar="FOLDER|URL")] = "./runs"
    """Storage root: trials, prepared data, reports and (by default) MLflow's store. A folder that every node sees, or
    an object store such as s3://bucket/prefix."""
    name: str | None = None
    """Name of the sweep: its folder, and its run in MLflow. By default the recipe's, with a hash if fields differ."""
    tracking_uri: str | None = None
    """MLflow tracking server; by default MLFLOW_TRACKING_URI, else a store under the storage root."""
    experiment: str = "longspan"
    """MLflow experiment."""
    address: str | None = None
    """Ray cluster to join (auto, or host:port); by default the one of a submitted job or RAY_ADDRESS, else a new one
    on this machine."""
    cluster: str | None = None
    """Plan for the machines of a file in clusters/, such as aws-p4d, at its full size. A sweep asks its autoscaler for
    those that its cluster does not have yet, and waits for them."""
    workers: int = 1
    """Ray Train workers of each trial, one GPU each where there are GPUs; the batch must divide by it."""
    cpus_per_worker: float = 1
    """CPUs each worker reserves, and computes with if it has no GPU."""
    gpus_per_worker: float = 1
    """GPUs each worker reserves where there are GPUs; a share such as 0.25 lets several small trials use one."""
    max_concurrent: int | None = None
    """Trials to run at the same time; by default as many as the cluster has room for."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(ExecutionFields, Placement):
    """Where and how a sweep runs; nothing here changes its result."""

    gradient_checkpointing: Literal["auto", "all", "none"] | int = "auto"
    """How many decoder layers recompute their activations in the backward pass: less memory, more time. auto: on a GPU
    the fewest with which the trial fits, else none."""
    offload_activations: Literal["auto", "none"] | int = "auto"
    """How many decoder layers keep their activations in pinned host memory until the backward pass, instead of
    recomputing them. auto: if layers would have to recompute, as many as the host's memory and the time of the
    copies allow; none if --gradient-checkpointing is given."""
    max_failures: int = 2
    """Times a trial is restarted after its worker or node was lost."""
    max_preemptions: int = 100
    """Times a trial is moved after a notice that its node is about to be reclaimed."""
    hang_timeout: int = 540
    """Seconds without a sign of life after which the others count a worker as lost."""
    price_per_hour: float | None = None
    """USD an hour of one GPU (an instance's price divided by its GPUs), or of one CPU thread if there are no GPUs;
    by default that of the cluster's machines, or of the cheapest on-demand instance with this GPU
    (clusters/prices.py), else unknown."""
    prices: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Your prices as .toml or .json: USD an hour of a machine by its type ("p4d.24xlarge", "p4d.24xlarge spot"), or of
    one GPU ("NVIDIA H200")."""
    force: bool = False
    """Train all of the sweep's trials from the beginning, even if they are finished; earlier results are kept in the
    trial's folder as earlier-1, earlier-2 and so on. Use it only if an earlier result cannot be trusted."""
    force_trials: tuple[str, ...] = ()
    """Train only these trials again: fingerprints, or their first digits (4 or more)."""
    fit: bool = True
    """If a trial does not fit into memory, run it with the smallest change that makes it fit: smaller micro-batches,
    ZeRO, more workers, gradient checkpointing, offload. None of them changes its result beyond rounding, and the plan
    names them. With --no-fit such a trial is refused."""
    budget_hours: float | None = None
    """GPU hours (CPU hours if there are no GPUs) that this sweep may take, over all runs of its command: a plan that
    exceeds them is refused, and a run that reaches them stops with checkpoints."""
    budget_usd: float | None = None
    """The same limit in US dollars: what the machines cost, idle GPUs and the head included."""
    budget_usd_per_hour: float | None = None
    """US dollars an hour that the machines may cost together: of a cluster of clusters/, as many are used as that
    allows."""
    target_perplexity: float | None = None
    """Perplexity whose cost is compared; by default the final perplexity of full fine-tuning."""
    as_good_within: float = 0.01
    """How far above full fine-tuning's perplexity still counts as equally good, as a share of it."""
    baseline: str | None = None
    """Setting that the others are compared with, by its name in reports, such as 'LoRA+ · YaRN' or 'lora+ yarn'; by
    default full fine-tuning with the same values of the axes."""
    early_stopping: Literal["none", "asha", "median"] = "none"
    """Stop trials that fall behind others of their context length: asha (asynchronous successive halving), or median.
    With none, a trial that was stopped earlier runs to its end."""
    reduction_factor: float = 3
    """ASHA's eta: one in eta trials at a rung continues, to a rung eta times as far."""
    first_rung: float | None = None
    """When a trial is first judged: a share of its tokens (up to 1), or tokens. By default 1 / reduction factor²."""
    min_trials: int = 3
    """Trials that must have reached a rung before one is stopped there."""
    early_stopping_among: Literal["auto", "context", "method"] = "auto"
    """Which trials a trial is compared with: all of its context length, or those of its method there, with its values
    of axes. auto: its method's in a search, which looks for the best of each; else all."""

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name, "--name")
        for field in (
            *("workers", "cpus_per_worker", "max_concurrent", "micro_batch", "checkpoint_every"),
            *("hang_timeout", "price_per_hour", "as_good_within", "budget_hours", "budget_usd"),
            "budget_usd_per_hour",
        ):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{field} is {value}; expected a positive number")
        if self.gpus_per_worker <= 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise InputError(f"gpus_per_worker is {self.gpus_per_worker:g}; expected a share of one, or a whole number")
        if self.target_perplexity is not None and not 1 < self.target_perplexity < math.inf:
            raise InputError(f"target_perplexity is {self.target_perplexity}; expected a number above 1")
        self.execution()  # refuses combinations that cannot run

    def execution(self) -> ExecutionConfig:
        """How a trial's workers run it; ``auto`` checkpointing is none until planning/estimate.py chooses."""
        layers: GradientCheckpointing = 0
        if self.gradient_checkpointing != "auto" and self.gradient_checkpointing != "none":
            layers = self.gradient_checkpointing
        offloaded = self.offload_activations
        if offloaded == "none" or (offloaded == "auto" and self.gradient_checkpointing != "auto"):
            offloaded = 0
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(ExecutionFields)}
        return ExecutionConfig(
            gradient_checkpointing=layers,
            offload_activations=offloaded,
            **shared,
        )


def check_name(name: str, where: str) -> None:
    """Raises InputError if no sweep can have this name; ``where`` begins the error, such as ``--name``."""
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
        raise InputError(f"{where} {name!r}: expected letters, digits and any of . _ + -, since it names a folder")
    if (size := len(os.fsencode(name))) > MAX_NAME_BYTES:
        raise InputError(f"{where} of {size} bytes: it names a folder; expected at most {MAX_NAME_BYTES}")
