"""How a sweep runs: what changes where, how fast and how safely its trials run, but not their results."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from workloads.config import (
    AttentionBackend,
    CompileLayers,
    EngineName,
    ExecutionConfig,
)
from workloads.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where and how a sweep runs; nothing here changes its result."""

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
    """Plan for the machines of a file in clusters/, such as aws-p4d, at its full size. A sweep waits for those that its
    cluster does not have yet: its autoscaler is asked for them."""
    workers: int = 1
    """Ray Train workers of each trial, one GPU each where there are GPUs; the batch must divide by it."""
    cpus_per_worker: float = 1
    """CPUs each worker reserves and computes with where it has no GPU."""
    gpus_per_worker: float = 1
    """GPUs each worker reserves where there are GPUs; a share such as 0.25 lets several small trials use one."""
    max_concurrent: int | None = None
    """Trials at the same time; by default as many as the cluster has room for."""
    max_failures: int = 2
    """Times a trial is started again after its worker or node was lost."""
    max_preemptions: int = 100
    """Times a trial goes on elsewhere after a notice that its node is about to be taken away."""
    hang_timeout: int = 540
    """Seconds that workers wait for one that has gone silent before it counts as lost."""
    micro_batch: int | None = None
    """Sequences in one forward and backward pass of a worker; by default the worker's whole share of the batch."""
    gradient_checkpointing: Literal["auto", "all", "none"] | int = "auto"
    """How many decoder layers recompute their activations in the backward pass: less memory, more time. auto: on a GPU
    the fewest with which the trial fits, else none."""
    offload_activations: Literal["auto", "none"] | int = "auto"
    """How many decoder layers keep their activations in pinned host memory until the backward pass, instead of
    recomputing them. auto: where layers would have to recompute, as many as the host's memory and the copies' time
    allow; none with a --gradient-checkpointing of your own."""
    attention_backend: AttentionBackend = "auto"
    """What computes the attention pattern: auto takes the fastest that the worker has."""
    compile_layers: CompileLayers = "auto"
    """Run decoder layers through torch.compile: faster steps after a slow first one. auto: on a GPU, where a trial is
    long enough to gain by it."""
    checkpoint_every: int = 100
    """Steps between checkpoints, and so the most that a crash or Ctrl-C loses."""
    checkpoint_minutes: float = 10.0
    """Where steps are slow, a checkpoint is also written when the last one is this old."""
    keep_last: int = 2
    """Checkpoints kept of each trial: so many of the newest. A trial always goes on from the newest whole one."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest perplexity at the trained length; each such evaluation writes one."""
    keep_every: int | None = None
    """Also keep the checkpoints of every so-manieth step."""
    engine: EngineName = "auto"
    """How a trial's workers train one model: ddp; zero2, zero3 (DeepSpeed); auto: ddp where there are several."""
    offload: bool = False
    """Keep in host memory what zero2 or zero3 shares out, and update there."""
    price_per_hour: float | None = None
    """USD an hour of one GPU (an instance's price divided by its GPUs), or of one CPU thread where there are no GPUs;
    by default of the cheapest instance on demand that has this GPU (clusters/prices.py), else unknown."""
    prices: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Your prices as .toml or .json: USD an hour by instance type ("p4d.24xlarge") or of one GPU ("NVIDIA H200")."""
    force: bool = False
    """Train all of the sweep's trials from the beginning, whatever is known of them; that is kept in the trial's folder
    as earlier-1, earlier-2 and so on. Only where an earlier result is not to be trusted: it would be the same again."""
    force_trials: tuple[str, ...] = ()
    """The same for these trials alone: fingerprints, or their first digits (4 or more)."""
    fit: bool = False
    """Where a trial does not fit into memory, run it with the smallest change that does: smaller micro-batches, ZeRO,
    more workers, gradient checkpointing, offload. None of them changes its result beyond rounding."""
    budget_hours: float | None = None
    """GPU hours (CPU hours where there are no GPUs) that this sweep may take, in all runs of its command: a plan beyond
    them is refused, a run that comes to them stops with checkpoints."""
    budget_usd: float | None = None
    """The same in US dollars."""
    target_perplexity: float | None = None
    """Compare what it takes to reach this perplexity; by default the one that full fine-tuning ends with."""
    as_good_within: float = 0.01
    """How far above full fine-tuning's perplexity still counts as as good, as a share of it."""
    early_stopping: Literal["none", "asha", "median"] = "none"
    """Stop trials that fall behind others of their context length: asha (asynchronous successive halving), or median.
    With none, one that was stopped goes on to its end."""
    reduction_factor: float = 3
    """ASHA's eta: of the trials at a rung one in so many goes on, to a rung so many times as far."""
    first_rung: float | None = None
    """When a trial is judged first: a share of its tokens (up to 1), or tokens. By default 1 / reduction factor²."""
    min_trials: int = 3
    """Trials that must have come to a rung before one is stopped there."""
    early_stopping_among: Literal["auto", "context", "method"] = "auto"
    """Whom a trial is compared with: all of its context length, or those of its method there. auto: of its method in
    a search, which looks for the best of each; else all."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", self.name):
            raise InputError(
                f"--name {self.name!r}: expected letters, digits and any of . _ + -, since it names a folder"
            )
        for field in (
            *("workers", "cpus_per_worker", "max_concurrent", "micro_batch", "checkpoint_every"),
            *("hang_timeout", "price_per_hour", "as_good_within", "budget_hours", "budget_usd"),
        ):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{field} is {value}; expected a positive number")
        if self.gpus_per_worker <= 0 or (self.gpus_per_worker > 1 and self.gpus_per_worker % 1):
            raise InputError(f"gpus_per_worker is {self.gpus_per_worker:g}; expected a share of one, or a whole number")
        if self.target_perplexity is not None and not 1 < self.target_perplexity < math.inf:
            raise InputError(f"target_perplexity is {self.target_perplexity}; expected a number above 1")
        self.execution()  # refuses what cannot go together

    def execution(self) -> ExecutionConfig:
        """How a trial's workers run it, with ``auto`` checkpointing as none (:mod:`orchestrator.planning.estimate` chooses)."""
        layers, offloaded = self.gradient_checkpointing, self.offload_activations
        if layers != "auto" and offloaded == "auto":
            offloaded = 0
        return ExecutionConfig(
            micro_batch=self.micro_batch,
            gradient_checkpointing=0 if layers in ("auto", "none") else layers,
            offload_activations=0 if offloaded == "none" else offloaded,
            checkpoint_every=self.checkpoint_every,
            checkpoint_minutes=self.checkpoint_minutes,
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            keep_every=self.keep_every,
            attention_backend=self.attention_backend,
            compile_layers=self.compile_layers,
            engine=self.engine,
            offload=self.offload,
        )
