"""AdamW, the learning rate of each kind of parameter, and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from workloads.adaptation.methods import is_norm, trainable_parameters
from workloads.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over what trains in ``model``, in three parameter groups: main, embeddings, norms.

    Main is LoRA matrices, or everything else. A group has its ``name`` and its ``peak`` learning rate, and is left out
    where nothing of its kind trains. An output layer that is not tied to the embeddings belongs to main.
    """
    embeddings = {model.get_input_embeddings().weight}
    norms = {parameter for module in model.modules() if is_norm(module) for parameter in module.parameters()}
    kinds: dict[str, list[nn.Parameter]] = {"main": [], "embeddings": [], "norms": []}
    for parameter in trainable_parameters(model).values():
        kind = "embeddings" if parameter in embeddings else "norms" if parameter in norms else "main"
        kinds[kind].append(parameter)
    peaks = {
        "main": config.learning_rate,
        "embeddings": config.learning_rate_embeddings or config.learning_rate,
        "norms": config.learning_rate_norms or config.learning_rate,
    }
    return torch.optim.AdamW(
        [{"params": kinds[kind], "name": kind, "peak": peaks[kind]} for kind in kinds if kinds[kind]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int) -> None:
    """Sets each group's rate for the update after ``step`` steps."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, group["peak"])


def learning_rate(config: TrainingConfig, step: int, peak: float | None = None) -> float:
    """The learning rate of the update after ``step`` steps, for a group with this peak (default: the main group's).

    Warm-up is linear and reaches the peak with its last update. Then, with p the share of the remaining steps that is
    done: the peak (constant), peak * (1 - p) (linear), or peak * (1 + cos(pi * p)) / 2 (cosine). The first update after
    warm-up has the full peak; zero would be the rate of the update after the last.
    """
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return peak * (1 - done) if config.schedule == "linear" else peak * (1 + math.cos(math.pi * done)) / 2
