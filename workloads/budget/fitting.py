"""Makes a trial fit: the fewest layers that recompute, or the cheapest change if that is not enough.

With ``offload_activations`` at ``auto``, it offloads as few layers as minimise recompute, up to the number whose copies
are hidden behind compute.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from workloads.budget.devices import Device
from workloads.budget.loop import Loop
from workloads.budget.memory import Memory, memory, micro_batch
from workloads.budget.shape import ModelShape, what_trains
from workloads.budget.speed import forward_seconds, step_seconds
from workloads.config import EngineName, ExecutionConfig, TrainingConfig

# The share of the host's memory that activations may take. The rest is for processes, the model being read and the page
# cache; Ray ends workers at 95%. Chosen, not measured.
HOST_SHARE = 0.6
# The share of the forward pass that copies to the host may take, whose rate was measured without compute beside them.
# Chosen, not measured.
COPY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Fit:
    """An execution that fits, and its differences from the requested one, as text."""

    execution: ExecutionConfig
    workers: int
    memory: Memory
    changes: tuple[str, ...]


def memory_needed(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> Memory:
    """Returns the memory that one of ``workers`` workers needs on such a device.

    It includes a reserve for what torch does not count (:attr:`Memory.reserve`): the only margin in what fits.

    Raises:
        InputError: as :func:`workloads.budget.memory.memory`.
    """
    return memory(shape, training, execution, workers, loop=Loop.of(shape, training, execution, workers, device))


def resolve_auto(shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig) -> ExecutionConfig:
    """Returns the execution with gradient checkpointing as the number of layers that recompute.

    ``all`` becomes the number of layers that have a backward pass; an untuned trial has none.

    Raises:
        InputError: the model has fewer layers.
    """
    return dataclasses.replace(execution, gradient_checkpointing=_num_recomputed(shape, training, execution))


def _num_recomputed(shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig) -> int:
    trains = what_trains(shape, training, execution.gradient_checkpointing, execution.layers_offloaded)
    return len(trains.checkpointed)


def with_fewest_recomputed(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> ExecutionConfig | None:
    """Returns the execution with the fewest recomputing layers that fit the device, at least as many as it has.

    Where ``offload_activations`` is ``auto``, it becomes the smallest number up to :func:`most_offloaded` with which
    the fewest layers recompute: 0 where none has to. Returns None if recomputing all layers is not enough.
    """
    if execution.offload_activations != "auto":
        fewest = _min_recomputed_layers(shape, training, execution, workers, device)
        return None if fewest is None else dataclasses.replace(execution, gradient_checkpointing=fewest)
    first = _num_recomputed(shape, training, execution)
    best = dataclasses.replace(execution, gradient_checkpointing=first, offload_activations=0)
    fewest = _min_recomputed_layers(shape, training, best, workers, device)
    if fewest == first:
        return best
    for number in range(1, most_offloaded(shape, training, execution, workers, device) + 1):
        offloading = dataclasses.replace(best, gradient_checkpointing=first, offload_activations=number)
        found = _min_recomputed_layers(shape, training, offloading, workers, device)
        if found is not None and (fewest is None or found < fewest):
            best, fewest = offloading, found
        if found == first:  # no more layers have to recompute
            break
    return None if fewest is None else dataclasses.replace(best, gradient_checkpointing=fewest)


def most_offloaded(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> int:
    """Returns how many layers may keep their activations in host memory.

    :data:`HOST_SHARE` of it must hold them, and :data:`COPY_SHARE` of the forward pass must suffice for the copies, so
    they cost no time. 0 for CPUs, GPUs of unknown peak or host memory, ZeRO, untuned trials, and ``sft`` (each length
    needs other buffers).
    """
    known = device.is_gpu and device.peak(training.precision) and device.host_memory
    if not known or execution.engine.startswith("zero") or training.task == "sft" or not training.steps:
        return 0
    layers = len(what_trains(shape, training).backward)
    if layers < 2:
        return 0
    one = dataclasses.replace(execution, gradient_checkpointing=0, offload_activations=1)
    layer_bytes = memory_needed(shape, training, one, workers, device).host
    by_memory = HOST_SHARE * device.host_memory / layer_bytes
    seconds = forward_seconds(shape, training, execution, workers, device)
    by_time = COPY_SHARE * seconds * device.host_link / layer_bytes
    return int(min(by_memory, by_time, layers - 1))


def _min_recomputed_layers(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> int | None:
    """Returns the fewest recomputing layers that fit with a fixed number of offloaded ones; None if none fits.

    If a number fits, every larger one does.
    """

    def fits(number: int) -> bool:
        with_layers = dataclasses.replace(execution, gradient_checkpointing=number)
        return memory_needed(shape, training, with_layers, workers, device).total <= device.memory

    first = _num_recomputed(shape, training, execution)
    most = len(what_trains(shape, training, "all", execution.layers_offloaded).checkpointed)
    if fits(first):
        return first
    if not fits(most):
        return None
    return bisect.bisect_left(range(most), True, lo=first + 1, key=fits)


def reduce_memory(
    execution: ExecutionConfig, share: int, layers: int, *, of_host: bool = False
) -> ExecutionConfig | None:
    """Returns the next smaller memory plan of a trial that ran out of memory; None where there is none.

    Tries in order: micro-batches a quarter the size, which cost almost no time; recompute in half (at least four) of
    the layers that keep activations on the device, once; recompute in all layers, with no activations in host memory;
    offload of ZeRO's state. If host memory ran out and activations are there, recompute in half is skipped.

    Args:
        share: sequences of the batch that each worker trains in a step.
        layers: those that have a backward pass.
        of_host: the host's memory ran out, not the device's.
    """
    if (execution.micro_batch or share) > 1:
        return dataclasses.replace(execution, micro_batch=max(1, (execution.micro_batch or share) // 4))
    recompute = layers if execution.gradient_checkpointing == "all" else execution.gradient_checkpointing
    offloaded = execution.layers_offloaded
    kept = layers - recompute - offloaded
    if kept > 0 and not (of_host and offloaded):
        more = min(kept, max(4, (kept + 1) // 2))
        return dataclasses.replace(execution, gradient_checkpointing=recompute + more)
    if offloaded:
        return dataclasses.replace(execution, gradient_checkpointing=layers, offload_activations=0)
    if execution.engine.startswith("zero") and not execution.offload:
        return dataclasses.replace(execution, offload=True)
    return None


def smallest_change_that_fits(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int,
    device: Device,
    max_workers: int = 1,
    zero: bool = True,
) -> Fit | None:
    """Returns the execution that fits and costs the fewest predicted device-seconds a step; None if none fits.

    Changes, usually cheapest first; ties break in this order:

        micro-batch             the same FLOPs in more passes; a long sequence alone fills a GPU
        ZeRO-2                  sends as much as DDP: gradients, and the updated parameters back
        more workers            the same device-seconds, except for communication
        gradient checkpointing  one more forward pass of as few layers as possible: of all, about a third more FLOPs;
                                fewer with activations in host memory, where ``offload_activations`` is ``auto``
        ZeRO-3                  all weights over the link, twice in each pass
        offload                 over the much slower link to the host, and the update there

    Changes of the result (quantisation, a shorter context) are never made.

    Args:
        zero: whether ZeRO may be chosen, which needs DeepSpeed.
    """
    requested = resolve_auto(shape, training, execution)

    def cost(candidate: ExecutionConfig, number: int) -> tuple:
        return _cost(shape, training, candidate, number, device), *_order(candidate, number)

    best, best_cost = None, (math.inf,)
    # Sorted by a lower bound of the cost (no extra recompute): once it reaches the best cost, stop.
    for lower_bound, candidate, number in sorted(
        ((cost(*each), *each) for each in _candidates(training, requested, workers, max_workers, zero)),
        key=lambda each: each[0],
    ):
        if lower_bound >= best_cost:
            break
        fitting = with_fewest_recomputed(shape, training, candidate, number, device)
        if fitting and (fitting_cost := cost(fitting, number)) < best_cost:
            best, best_cost = (fitting, number), fitting_cost
    if best is None:
        return None
    layers = len(what_trains(shape, training).backward)
    return Fit(*best, memory_needed(shape, training, *best, device), tuple(_changes(*best, requested, workers, layers)))


def _candidates(
    training: TrainingConfig, execution: ExecutionConfig, workers: int, max_workers: int, zero: bool
) -> Iterator[tuple[ExecutionConfig, int]]:
    numbers = [n for n in range(workers, max(workers, max_workers) + 1) if n == workers or training.batch % n == 0]
    stages: list[EngineName] = ["zero2", "zero3"] if zero else []
    engines = [*stages[stages.index(execution.engine) :]] if execution.engine in stages else [execution.engine, *stages]
    if execution.layers_offloaded:
        engines = [engine for engine in engines if not engine.startswith("zero")]
    if training.quantization != "none" or execution.compile_layers == "on":
        engines = [engine for engine in engines if engine != "zero3"]
    for number, engine, offload in itertools.product(numbers, engines, [False, True]):
        if (offload and not engine.startswith("zero")) or (execution.offload and not offload):
            continue
        if engine.startswith("zero") and number == 1 and not offload:
            continue  # one worker has nothing to shard
        rows = micro_batch(training, execution, number)
        while rows:
            micro = None if execution.micro_batch is None and rows == training.batch // number else rows
            yield dataclasses.replace(execution, micro_batch=micro, engine=engine, offload=offload), number
            rows //= 2


def _cost(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> float:
    if not training.steps or not device.peak(training.precision):  # for an unknown device only the order decides
        return 0.0
    return workers * step_seconds(shape, training, execution, workers, device)


def _order(execution: ExecutionConfig, workers: int) -> tuple:
    """Sorts candidates of equal cost: the kinds of change that usually cost most come last."""
    return (
        execution.offload,
        execution.engine == "zero3",
        execution.gradient_checkpointing,
        workers,
        execution.engine == "zero2",
        -(execution.micro_batch or sys.maxsize),
    )


def _changes(
    execution: ExecutionConfig, number: int, requested: ExecutionConfig, workers: int, layers: int
) -> Iterator[str]:
    if number != workers:
        yield f"{number} workers"
    if execution.micro_batch != requested.micro_batch:
        yield f"micro-batches of {execution.micro_batch}"
    if execution.gradient_checkpointing != requested.gradient_checkpointing:
        recompute = layers if execution.gradient_checkpointing == "all" else execution.gradient_checkpointing
        yield "gradient checkpointing" + (f" of {recompute} of {layers} layers" if recompute < layers else "")
    if execution.layers_offloaded != requested.layers_offloaded:
        yield f"activations of {execution.layers_offloaded} of {layers} layers in host memory"
    if execution.engine != requested.engine:
        yield f"the engine {execution.engine}"
    if execution.offload != requested.offload:
        yield "offload"
