"""A trial's model: loaded, with extended positions, and adapted to what trains and how."""

from __future__ import annotations

import torch
from torch import nn

from workloads.adaptation.float8 import quantise_base
from workloads.adaptation.methods import adapt, compute_dtype, keep_autocast_dtype
from workloads.attention.interface import use_pattern
from workloads.attention.patterns import AttentionPattern
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.models.quantization import nf4_loading
from workloads.models.source import ModelSource
from workloads.training.offload import layers_to_offload, offload_activations
from workloads.training.recompute import recompute_activations


def build_model(source: ModelSource, config: TrainingConfig, engine: Engine, execution: ExecutionConfig) -> nn.Module:
    """Loads a trial's model, extends its positions, and adapts it (:func:`prepare_model`)."""
    torch.manual_seed(config.seed)  # LoRA's A matrices are random
    dtype = compute_dtype(config.precision)
    quantized = nf4_loading(engine.device, dtype) if config.quantization == "nf4" else None
    model = source.load(config.context_length, config.positions, dtype, quantized, engine.home, config.original_length)
    return prepare_model(model, config, engine, execution)


def prepare_model(model: nn.Module, config: TrainingConfig, engine: Engine, execution: ExecutionConfig) -> nn.Module:
    """Adapts a loaded model as a trial trains it: attention pattern, what trains, FP8, recompute, offload, device.

    Modules are replaced first (LoRA, FP8), then wrapped (fused LoRA, recompute, offload), in the order of
    :class:`workloads.adaptation.wrapping.WrapOrder`.
    """
    pattern = AttentionPattern(name=config.attention, group_size=config.group_size)
    use_pattern(
        model,
        pattern,
        execution.attention_backend,
        device=engine.device,
        dtype=engine.dtype,
        documents=config.document_mask,
    )
    model = adapt(
        model,
        config.method,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        train_layers=config.train_layers,
    )
    if config.quantization == "fp8":
        quantise_base(model, engine.device)
    if config.method.startswith("lora"):
        from workloads.adaptation.lora_fusion import fuse_lora  # imports PEFT: a second that other methods save

        fuse_lora(model)
    keep_autocast_dtype(model)
    offloaded = layers_to_offload(model, execution.layers_offloaded)
    recompute_activations(model, execution.gradient_checkpointing, exclude=offloaded)
    offload_activations(model, execution.layers_offloaded, engine.device)
    return engine.place(model)
