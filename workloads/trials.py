"""Models that trials have trained, rebuilt from a trial's folder (``trials/<fingerprint>`` of a storage root)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from workloads.checkpoint import load_newest
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engine import Engine
from workloads.errors import InputError
from workloads.models import ModelSource
from workloads.training import build_model


def load_trial(folder: Path, engine: Engine) -> tuple[nn.Module, ModelSource, TrainingConfig, int]:
    """(model, base, configuration, step): a trial's base model with its newest whole checkpoint, on ``engine``'s
    device and in its precision, not merged.

    Raises:
        InputError: no trial's folder, its base model has changed since, or it has no whole checkpoint.
    """
    try:
        trial = json.loads((folder / "trial.json").read_text())
        base, identity = trial["model"], trial["identities"]["model"]
        config = TrainingConfig(**trial["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no trial's folder: its trial.json cannot be read ({error})") from error
    source = ModelSource.parse(identity.removeprefix("hub:") if identity.startswith("hub:") else base)
    if source.identity != identity:
        raise InputError(f"trial {folder.name} trained {base} as {identity}; what lies there now is {source.identity}")
    precision = "float32" if engine.dtype == torch.float32 else "bfloat16"
    model = build_model(source, replace(config, precision=precision), engine, ExecutionConfig())
    if config.steps == 0:
        return model, source, config, 0
    found = load_newest(folder / "checkpoints")
    if found is None:
        raise InputError(f"trial {folder.name} has no whole checkpoint under {folder / 'checkpoints'}; train it first")
    tensors, state = found
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"model/{name}"])
    return model, source, config, state["step"]
