"""The tensors in a trial's checkpoint: trainable parameters, the optimiser's state and the random state.

They are the same for every engine and any number of workers. The position in the data is the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workloads.config import TrainingConfig
from workloads.engines.engine import Engine
from workloads.errors import InputError

# What a tensor's name in a checkpoint begins with.
PARAMETER, OPTIMIZER = "model/", "optimizer/"


def collect_state(engine: Engine) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint. All workers call it; worker 0 gets what the engine has shared out."""
    tensors = {PARAMETER + name: tensor for name, tensor in engine.weights().items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in engine.optimizer_state().items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if engine.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(engine.device)
    return tensors


@torch.no_grad()
def load_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies a checkpoint's parameters into the model's, before the engine prepares them."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[PARAMETER + name])


def load_optimizer_and_random_state(engine: Engine, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restores the rest of a checkpoint, after the engine has prepared model and optimiser."""
    engine.load_optimizer_state(
        {name.removeprefix(OPTIMIZER): tensor for name, tensor in tensors.items() if name.startswith(OPTIMIZER)}
    )
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and engine.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], engine.device)


def refuse_another_trial(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    config: TrainingConfig,
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """Raises InputError if a checkpoint in ``folder`` is of another configuration or another model."""
    ours, theirs = json.loads(json.dumps(config.not_at_default())), state.get("training", {})
    different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    names = {name.removeprefix(PARAMETER) for name in tensors if name.startswith(PARAMETER)}
    shapes_agree = names == parameters.keys() and all(
        tensors[PARAMETER + name].shape == parameter.shape for name, parameter in parameters.items()
    )
    if different or not shapes_agree:
        what = ", ".join(sorted(different)) or "the model's parameters"
        raise InputError(
            f"the checkpoints in {folder} are another trial's: {what} differ. Move them away, or train in another "
            "folder"
        )
