"""Seconds: of a step, of an evaluation, of a trial; and model FLOPs utilisation.

A step takes its linear FLOPs over the linear rate, plus its attention FLOPs over the attention rate, plus the bytes
that everything else moves (traffic.py) over the memory's rate, with separate shares for tokens and for weights; at
least as long as the host needs to launch its kernels; plus communication between workers and with host memory. Nothing
else overlaps, except copies of offloaded activations, which are assumed to cost no time: a plan offloads no more layers
than the forward pass hides (fitting.py). A rate is a device's peak times a stated share of it (devices.py). If another
trial was timed on the same hardware, :func:`calibrated` fits the shares to it.
"""

from __future__ import annotations

import dataclasses
import math

from workloads.budget.devices import Device
from workloads.budget.flops import Flops, forward_flops, training_flops
from workloads.budget.loop import Loop
from workloads.budget.memory import micro_batch
from workloads.budget.shape import ModelShape, Training, what_trains
from workloads.budget.traffic import traffic
from workloads.config import ExecutionConfig, TrainingConfig

# AdamW in host memory reads and writes weight, gradient and two moments: 28 bytes a parameter, at the rate of a few
# memory channels. Chosen, not measured.
HOST_UPDATE_BYTES, HOST_MEMORY_RATE = 28, 20e9


def device_seconds(
    flops: Flops, moved: float, device: Device, training: TrainingConfig, streamed: float = 0.0
) -> float:
    """Returns the seconds that FLOPs and bytes take on a device.

    Args:
        moved: bytes of tokens read and written outside matrix products and attention.
        streamed: bytes of weights, of their gradients and moments.
    """
    peak = device.peak(training.precision)
    linear = (flops.linear - flops.float8) / (peak * device.linear_efficiency)
    linear += flops.float8 / (device.float8_rate or peak * device.linear_efficiency)
    attention = flops.attention / (peak * device.attention_efficiency)
    other = moved / device.bandwidth_efficiency + streamed / device.streaming_efficiency
    return linear + attention + other / device.bandwidth


def step_seconds(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int,
    device: Device,
    *,
    loop: Loop | None = None,
) -> float:
    """Returns the seconds of one optimiser step on ``workers`` such devices of one machine.

    Args:
        loop: how training computes; None: as this package does on the device.

    Raises:
        InputError: the batch does not divide among the workers.
    """
    compute = compute_seconds(shape, training, execution, workers, device, loop)
    return compute + exchange_seconds(shape, training, execution, workers, device)


def compute_seconds(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int,
    device: Device,
    loop: Loop | None = None,
) -> float:
    """Returns the seconds of a step without communication."""
    sequences = training.batch / workers
    passes = math.ceil(sequences / micro_batch(training, execution, workers))
    loop = loop or Loop.of(shape, training, execution, workers, device)
    recomputed = len(_trains(shape, training, execution).checkpointed)
    other = traffic(shape, training, recomputed, loop)
    moved = sequences * training.context_length * other.training
    streamed = passes * other.micro_batch() + other.update() * (not execution.offload)
    flops = training_flops(shape, training, recomputed) * sequences
    return max(device_seconds(flops, moved, device, training, streamed), passes * other.kernels * device.launch)


def forward_seconds(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> float:
    """Returns the seconds of the forward pass of one micro-batch on one worker."""
    rows = micro_batch(training, execution, workers)
    other = traffic(shape, training, 0, Loop.of(shape, training, execution, workers, device))
    flops = training_flops(shape, training)
    forward = Flops(
        forward_linear=flops.forward_linear,
        forward_attention=flops.forward_attention,
        float8=forward_flops(shape, training.context_length, training).float8,
    )
    return device_seconds(forward * rows, rows * training.context_length * other.forward(), device, training)


def exchange_seconds(
    shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig, workers: int, device: Device
) -> float:
    """Returns the seconds of communication in a step, between workers and with the host's memory.

    DDP sums gradients over workers once (two passes over them). ZeRO-2 sends each micro-batch's gradients to their
    owners and the updated weights back; ZeRO-3 also gathers all weights, frozen ones too, for the forward and for the
    backward pass of each micro-batch.
    """
    trains = _trains(shape, training, execution)
    rows = micro_batch(training, execution, workers)
    passes = math.ceil(training.batch / workers / rows)
    trained = 4 * trains.trainable
    whole = trained + trains.frozen * (2 if training.precision == "bfloat16" else 4)
    between, with_host = 0.0, 0.0
    if execution.engine == "zero3":
        between = passes * (2 * whole + trained)
    elif execution.engine == "zero2":
        between = passes * trained + trained
    else:
        between = 2 * trained
    if execution.offload:
        with_host = (2 * trained + (2 * passes * whole if execution.engine == "zero3" else 0)) / workers
    update = HOST_UPDATE_BYTES * trains.trainable / workers / HOST_MEMORY_RATE * execution.offload
    return between * (workers - 1) / workers / device.link + with_host / device.host_link + update


def _trains(shape: ModelShape, training: TrainingConfig, execution: ExecutionConfig) -> Training:
    return what_trains(shape, training, execution.gradient_checkpointing, execution.layers_offloaded)


def evaluation_seconds(
    shape: ModelShape, training: TrainingConfig, workers: int, device: Device, context_length: int | None = None
) -> float:
    """Returns the seconds of one evaluation, with full attention.

    ``eval_documents`` spans of ``eval_span`` tokens in windows of the context length (or another one); of ``sft``, at
    most that many examples of the context length.
    """
    length = context_length or training.context_length
    windows = math.ceil(training.eval_documents * max(1, training.eval_span // length) / workers)
    loop = Loop.of(
        shape, training, ExecutionConfig(compile_layers="off"), workers, device
    )  # evaluation is not compiled
    moved = windows * length * traffic(shape, training, 0, loop).forward()
    return device_seconds(forward_flops(shape, length, training) * windows, moved, device, training)


def num_evaluations(training: TrainingConfig) -> int:
    """The number of evaluations: at step 0, every ``eval_every`` steps, and at the last."""
    return 1 + math.ceil(training.steps / training.eval_every)


def trial_seconds(
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int,
    device: Device,
    *,
    original_length: int | None = None,
    from_step: int = 0,
    step_0_known: bool = False,
) -> float:
    """Returns the seconds of a trial's steps and evaluations; not of start-up, model loading and checkpoints.

    Args:
        original_length: the model's own context length, at which the last evaluation scores too.
        from_step: the step that it resumes from.
        step_0_known: an untuned trial with the same start has already given the first evaluation.
    """
    evaluated = 1 + from_step // training.eval_every if from_step else int(step_0_known)
    left = num_evaluations(training) - evaluated
    seconds = left * evaluation_seconds(shape, training, workers, device)
    if original_length not in (None, training.context_length) and training.eval_span % original_length == 0:
        seconds += evaluation_seconds(shape, training, workers, device, original_length)
    if training.steps:
        seconds += (training.steps - from_step) * step_seconds(shape, training, execution, workers, device)
    return seconds


def calibrated(
    device: Device,
    shape: ModelShape,
    training: TrainingConfig,
    execution: ExecutionConfig,
    workers: int,
    tokens_per_second: float,
) -> Device:
    """Returns the device with all its rates scaled so that the prediction for a timed trial equals its measurement.

    Args:
        tokens_per_second: measured, of all workers together, in steps without evaluations.
    """
    tokens = training.batch * training.context_length
    computed = tokens / tokens_per_second - exchange_seconds(shape, training, execution, workers, device)
    predicted = compute_seconds(shape, training, execution, workers, device)
    # If the measured time is less than the assumed exchange, the assumption is wrong and is ignored.
    factor = predicted / (computed if computed > 0 else tokens / tokens_per_second)
    return dataclasses.replace(
        device,
        linear_efficiency=device.linear_efficiency * factor,
        attention_efficiency=device.attention_efficiency * factor,
        bandwidth_efficiency=device.bandwidth_efficiency * factor,
        streaming_efficiency=device.streaming_efficiency * factor,
        launch=device.launch / factor,
        efficiency_source=f"measured: {tokens_per_second:,.0f} tokens/s at {training.context_length:,} tokens",
    )


def model_flops_utilisation(
    shape: ModelShape, training: TrainingConfig, tokens_per_second: float, device: Device
) -> float:
    """Returns the share of the device's peak that goes into the model's own FLOPs.

    Attention counts causally, nothing counts twice (:attr:`workloads.budget.flops.Flops.model`), and frozen weights
    have no weight gradients.

    Args:
        tokens_per_second: of one device.
    """
    a_token = training_flops(shape, training).model / training.context_length
    return a_token * tokens_per_second / device.peak(training.precision)
