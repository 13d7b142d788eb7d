"""Predicts what a trial costs: FLOPs, memory and seconds, from configurations alone. Imports no torch.

``shape``        a model's sizes and parameter counts, and which of its parameters a configuration trains
``flops``        FLOPs of patterns, forward passes and training steps, in closed form; the paper's table
``activations``  what a model keeps for its backward pass
``traffic``      bytes that move beside matrix products, and kernels that are launched
``loop``         how the training loop computes, where configurations do not say
``memory``       memory of one worker, by parts, at the peak of a step; a checkpoint's size
``devices``      devices by name: memory, peaks, bandwidth, efficiencies
``speed``        seconds of steps, evaluations and trials; calibration; model FLOPs utilisation
``offloading``   which layers keep their activations in host memory, and when they are copied
``fitting``      the fewest layers that recompute; the cheapest change that makes a trial fit
"""

from workloads.budget.devices import Device, host_memory
from workloads.budget.fitting import (
    Fit,
    memory_needed,
    most_offloaded,
    reduce_memory,
    resolve_auto,
    smallest_change_that_fits,
    with_fewest_recomputed,
)
from workloads.budget.flops import attended_pairs, forward_flops, paper_flops, training_flops
from workloads.budget.loop import Loop
from workloads.budget.memory import Memory, checkpoint_bytes, memory
from workloads.budget.shape import ModelShape, Training, what_trains
from workloads.budget.speed import (
    calibrated,
    evaluation_seconds,
    model_flops_utilisation,
    step_seconds,
    trial_seconds,
)

__all__ = [
    "Device",
    "Fit",
    "Loop",
    "Memory",
    "ModelShape",
    "Training",
    "attended_pairs",
    "calibrated",
    "checkpoint_bytes",
    "evaluation_seconds",
    "forward_flops",
    "host_memory",
    "memory",
    "memory_needed",
    "model_flops_utilisation",
    "most_offloaded",
    "paper_flops",
    "reduce_memory",
    "resolve_auto",
    "smallest_change_that_fits",
    "step_seconds",
    "training_flops",
    "trial_seconds",
    "what_trains",
    "with_fewest_recomputed",
]
