"""What would make a trial fit that does not: the change that costs least."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from workloads.budget.devices import Device
from workloads.budget.memory import Memory, memory, micro_batch
from workloads.budget.shape import ModelShape
from workloads.budget.speed import step_seconds
from workloads.config import ExecutionConfig, TrainingConfig


@dataclass(frozen=True, slots=True)
class Fit:
    """An execution that fits, and what of it differs from the one that was asked for, in words."""

    execution: ExecutionConfig
    workers: int
    memory: Memory
    changes: tuple[str, ...]


def smallest_change_that_fits(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int,
    device: Device,
    max_workers: int = 1,
) -> Fit | None:
    """The execution that fits the device and costs least, by predicted device-seconds a step; None if none fits.

    Changes in the order in which they usually cost, which decides between equals too:

        micro-batch             the same FLOPs in more passes; a long sequence alone fills a GPU
        ZeRO-2                  sends what DDP sends: gradients of what trains, and it back
        more workers            the same device-seconds, but for what they exchange
        gradient checkpointing  one more forward pass: about a third more FLOPs
        ZeRO-3                  all weights over the link, twice in each pass
        offload                 over the much slower link to the host, and the update there

    What changes the result (quantisation, a shorter context) is never among them.
    """
    candidates = sorted(
        _candidates(training, execution, workers, max_workers),
        key=lambda each: (_cost(shape, training, *each, device), *_order(*each)),
    )
    for candidate, number in candidates:
        needed = memory(shape, training, candidate, number)
        if needed.total <= device.memory:
            return Fit(candidate, number, needed, tuple(_changes(candidate, number, execution, workers)))
    return None


def _candidates(
    training: TrainingConfig, execution: ExecutionConfig, workers: int, max_workers: int
) -> Iterator[tuple[ExecutionConfig, int]]:
    numbers = [n for n in range(workers, max(workers, max_workers) + 1) if n == workers or training.batch % n == 0]
    checkpointing = [True] if execution.gradient_checkpointing else [False, True]
    stages = ["zero2", "zero3"]
    engines = [*stages[stages.index(execution.engine) :]] if execution.engine in stages else [execution.engine, *stages]
    if training.quantization != "none":
        engines = [engine for engine in engines if engine != "zero3"]
    for number, recompute, engine, offload in itertools.product(numbers, checkpointing, engines, [False, True]):
        if (offload and not engine.startswith("zero")) or (execution.offload and not offload):
            continue
        if engine.startswith("zero") and number == 1 and not offload:
            continue  # nothing is shared out
        rows = micro_batch(training, execution, number)
        while rows:
            given = None if execution.micro_batch is None and rows == training.batch // number else rows
            yield (
                dataclasses.replace(
                    execution, micro_batch=given, gradient_checkpointing=recompute, engine=engine, offload=offload
                ),
                number,
            )
            rows //= 2


def _cost(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> float:
    return workers * step_seconds(shape, training, execution, workers, device) if training.steps else 0.0


def _order(execution: ExecutionConfig, workers: int) -> tuple:
    """By which of the changes that cost most a candidate goes back."""
    return (
        execution.offload,
        execution.engine == "zero3",
        execution.gradient_checkpointing,
        workers,
        execution.engine == "zero2",
        -(execution.micro_batch or sys.maxsize),
    )


def _changes(execution: ExecutionConfig, number: int, asked: ExecutionConfig, workers: int) -> Iterator[str]:
    if number != workers:
        yield f"{number} workers"
    if execution.micro_batch != asked.micro_batch:
        yield f"micro-batches of {execution.micro_batch}"
    if execution.gradient_checkpointing != asked.gradient_checkpointing:
        yield "gradient checkpointing"
    if execution.engine != asked.engine:
        yield f"the engine {execution.engine}"
    if execution.offload != asked.offload:
        yield "offload"
