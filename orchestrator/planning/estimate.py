"""What a trial will take, before it runs: workers, memory, speed, time, hours and money; and what makes it fit.

Memory and FLOPs come from ``workloads.budget``, prices from ``clusters.prices``. Speeds are those that trials measured
on the same hardware, scaled by FLOPs; without such trials they follow from the device's stated efficiency.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.planning.cluster import Cluster
from orchestrator.planning.rates import Rates
from orchestrator.records.trial_record import TrialRecord
from orchestrator.run_options import RunOptions
from orchestrator.terminal import and_list, gib
from orchestrator.trial_spec import TrialSpec
from workloads.budget import (
    Device,
    Memory,
    ModelShape,
    calibrated,
    checkpoint_bytes,
    memory_needed,
    resolve_auto,
    smallest_change_that_fits,
    step_seconds,
    trial_seconds,
    what_trains,
    with_fewest_recomputed,
)
from workloads.config import ExecutionConfig, TrainingConfig

# From a trial's launch until its model is ready, if no trial of this storage has measured it: 9 to 10 s on two CPU
# cores (docs/performance.md). A model from a hub is downloaded as well.
START_UP_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """What one trial takes. None is unknown.

    A device that workloads/budget/devices.py lacks has no speed; one that no instance type of clusters/prices.py has,
    no price.

    Args:
        devices: of all workers together: GPUs, or CPU threads.
        memory: what each worker needs.
        device_memory: bytes that each worker has.
        seconds: to its end, including start-up and evaluations.
        usd: the share of its devices in the price of their machine; machines are billed whole (planning/cost.py).
        disk: bytes of its checkpoints.
        layers: layers with a backward pass, which could recompute their activations.
        changes: what --fit has changed.
        refusal: why it cannot run as asked, and what would make it fit.
    """

    workers: int
    devices: float
    execution: ExecutionConfig
    memory: Memory
    device_memory: int
    tokens_per_second: float | None
    seconds: float | None
    usd: float | None
    disk: int
    layers: int
    changes: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def hours(self) -> float | None:
        """Hours of all its devices together: GPU hours where there are GPUs, else CPU hours."""
        return None if self.seconds is None else self.devices * self.seconds / 3600


def _normalised(training: TrainingConfig) -> TrainingConfig:
    """Without fields that change neither memory nor time: trials that differ only in them share an estimate."""
    return replace(training, seed=0, learning_rate=1.0, schedule="constant", warmup_steps=0)


@dataclass(frozen=True)
class Timed:
    """A trial that was timed on this hardware."""

    training: TrainingConfig
    execution: ExecutionConfig
    workers: int
    tokens_per_second: float


@dataclass(frozen=True)
class Placed:
    """How a trial runs, and whether it fits that way."""

    workers: int
    execution: ExecutionConfig
    memory: Memory
    changes: tuple[str, ...] = ()
    refusal: str | None = None


class Estimator:
    """Estimates the trials of one sweep on one cluster."""

    def __init__(
        self,
        shape: ModelShape,
        original_length: int,
        cluster: Cluster,
        options: RunOptions,
        prices: Mapping[str, float],
    ) -> None:
        self.shape, self.original_length = shape, original_length
        self.cluster, self.options = cluster, options
        self.device = cluster.device(options)
        self.rates = Rates.of(cluster, self.device.name, prices)
        self.zero = cluster.is_only_planned_for or importlib.util.find_spec("deepspeed") is not None
        self.start_up = START_UP_SECONDS
        self.timed: list[Timed] = []
        self.untuned: set[str] = set()  # fingerprints: their scores are step 0 of the trials that start from them
        # Many trials of a sweep differ by their seed or learning rate alone, and share these.
        self._placed: dict[tuple[TrainingConfig, bool], Placed] = {}
        self._timed_devices: dict[TrainingConfig, Device] = {}

    def with_options(self, options: RunOptions) -> Estimator:
        """An estimator for the same trials and machines under other options, which has learned the same."""
        other = copy.copy(self)
        other.options, other.device = options, self.cluster.device(options)
        other._placed, other._timed_devices = {}, {}
        return other

    def learn(self, known: Iterable[tuple[TrialSpec, TrialRecord]]) -> None:
        """Learns from what trials of the same model measured on the same kind of device."""
        known = list(known)
        self.untuned = {trial.fingerprint for trial, _ in known if trial.training.method == "untuned"}
        hardware = self.cluster.hardware(self.options)
        here = [(trial, r, r.started) for trial, r in known if r.started and hardware in (r.started.hardware or "")]
        self.timed = [
            Timed(trial.training, ExecutionConfig(**started.execution), started.workers, record.tokens_per_second)
            for trial, record, started in here
            if record.tokens_per_second and trial.training.steps
        ]
        if starts := [record.start_up_seconds for _, record, _ in here if record.start_up_seconds]:
            self.start_up = statistics.median(starts)
        self._timed_devices.clear()

    def estimate(self, trial: TrialSpec, record: TrialRecord | None = None, fit: bool = False) -> Estimate:
        """Estimates what is left of a trial.

        Args:
            record: its progress; None: not started.
            fit: make the smallest change that makes it fit.
        """
        training = _normalised(trial.training)
        if (training, fit) not in self._placed:
            self._placed[training, fit] = self._place(training, fit)
        return self._estimate(trial, training, record, self._placed[training, fit])

    def _place(self, training: TrainingConfig, fit: bool) -> Placed:
        options = self.options
        workers = options.workers if training.steps else 1
        asked = resolve_auto(self.shape, training, options.execution())
        execution = replace(asked, offload_activations=asked.layers_offloaded)
        # With --fit, recompute is one of the changes that are compared.
        if options.gradient_checkpointing == "auto" and self.cluster.gpus and not fit:
            every = resolve_auto(self.shape, training, replace(execution, gradient_checkpointing="all"))
            execution = with_fewest_recomputed(self.shape, training, asked, workers, self.device) or every
        needs = memory_needed(self.shape, training, execution, workers, self.device)
        if execution.layers_offloaded and 0 < self.device.host_memory < needs.host:
            has = f"{gib(needs.host)} of {gib(self.device.host_memory)} of host memory for each worker"
            refusal = f"needs {has}; --offload-activations auto takes as many layers as fit"
            return Placed(workers, execution, needs, refusal=refusal)
        if needs.total <= self.device.memory:
            return Placed(workers, execution, needs)
        lacks = f"needs more than the {gib(self.device.memory)} of {self.device.name}"
        found = smallest_change_that_fits(
            self.shape, training, asked, workers, self.device, self.cluster.most_workers(options), zero=self.zero
        )
        if found is None:
            more = "" if self.zero else " (ZeRO needs DeepSpeed: pip install 'longspan[deepspeed]')"
            refusal = f"{lacks}; nothing that leaves its result as it is makes it fit{more}"
        elif not fit:
            refusal = f"{lacks}; {and_list(found.changes)} would make it fit (--fit)"
        else:
            return Placed(found.workers, found.execution, found.memory, found.changes)
        return Placed(workers, execution, needs, refusal=refusal)

    def _estimate(
        self, trial: TrialSpec, training: TrainingConfig, record: TrialRecord | None, placed: Placed
    ) -> Estimate:
        workers, execution = placed.workers, placed.execution
        if training not in self._timed_devices:
            self._timed_devices[training] = self._timed_device(training)
        device = self._timed_devices[training]
        devices = workers * (
            self.options.gpus_per_worker if self.cluster.gpus else max(1, int(self.options.cpus_per_worker))
        )
        seconds = tokens_per_second = usd = None
        if device.bfloat16:
            if training.steps:
                a_step = step_seconds(self.shape, training, execution, workers, device)
                tokens_per_second = training.batch * training.context_length / a_step
            seconds = 0.0
            if record is None or record.state != "finished":
                seconds = self.start_up + trial_seconds(
                    self.shape, training, execution, workers, device,
                    original_length=self.original_length, from_step=record.saved_step if record else 0,
                    step_0_known=self._step_0_known(trial),
                )  # fmt: skip
            if self.rates.device is not None:
                usd = seconds * devices / 3600 * self.rates.device
        return Estimate(
            workers=workers,
            devices=devices,
            execution=execution,
            memory=placed.memory,
            device_memory=self.device.memory,
            tokens_per_second=tokens_per_second,
            seconds=seconds,
            usd=usd,
            disk=checkpoints_on_disk(training, execution) * checkpoint_bytes(self.shape, training),
            layers=len(what_trains(self.shape, training).backward),
            changes=placed.changes,
            refusal=placed.refusal,
        )

    def _step_0_known(self, trial: TrialSpec) -> bool:
        training = trial.training
        return bool(training.steps) and training.quantization == "none" and trial.untuned().fingerprint in self.untuned

    def _timed_device(self, training: TrainingConfig) -> Device:
        """The device, with the speed of the timed trial that resembles this one most."""
        if not self.timed:
            return self.device

        def distance(timed: Timed) -> tuple[bool, bool, float]:
            other = timed.training
            lengths = other.context_length, training.context_length
            return (
                other.attention != training.attention,
                other.method != training.method,
                max(lengths) / min(lengths),
            )

        near = min(self.timed, key=distance)
        return calibrated(self.device, self.shape, near.training, near.execution, near.workers, near.tokens_per_second)

    @property
    def source(self) -> str:
        """Where the speeds come from, in words."""
        if not self.device.bfloat16:
            return f"the speed of {self.device.name} is unknown: no trial has been timed on it here"
        if self.timed:
            return f"speeds measured by {len(self.timed)} trial{'s' * (len(self.timed) > 1)} here on this hardware"
        return f"speeds from {self.device.name}'s peak times an efficiency ({self.device.efficiency_source})"


def checkpoints_on_disk(training: TrainingConfig, execution: ExecutionConfig) -> int:
    """How many checkpoints a trial has at most: those that its rule keeps, and one that is being written."""
    if not training.steps:
        return 0
    every = training.steps // execution.keep_every if execution.keep_every else 0
    return execution.keep_last + execution.keep_best + every + 1
