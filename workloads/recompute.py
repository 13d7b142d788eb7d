"""Gradient checkpointing of some decoder layers: they keep their input alone and compute the rest again in the backward
pass (Chen et al., arXiv 1604.06174).

How many is chosen before a trial runs (workloads/budget/fitting.py): memory that a device has is spent first.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from workloads.adaptation import decoder_layers
from workloads.config import GradientCheckpointing
from workloads.errors import InputError


def recompute_activations(model: nn.Module, count: GradientCheckpointing) -> None:
    """Has the first ``count`` of the layers that have a backward pass recompute their activations in it.

    The first ones, since their turn in the backward pass comes last: what they compute again then takes the place of
    what later layers kept. A layer before all that trains has no backward pass, keeps nothing, and is left alone.

    This sets what transformers' ``gradient_checkpointing_enable`` sets, on these layers. That would also make the
    embeddings' output require a gradient (reentrant checkpointing needs it), and so give every layer a backward pass.

    Args:
        model: as :func:`workloads.adaptation.adapt` returns it.

    Raises:
        InputError: the model has fewer layers.
    """
    if count == 0:
        return
    layers = decoder_layers(model)[1]
    if count != "all" and count > len(layers):
        raise InputError(f"gradient_checkpointing is {count}, but the model has {len(layers)} layers")
    with_backward = list(layers)[_first_with_backward(model, layers) :]
    for layer in with_backward if count == "all" else with_backward[:count]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _first_with_backward(model: nn.Module, layers: nn.ModuleList) -> int:
    if model.get_input_embeddings().weight.requires_grad:
        return 0
    trains = (any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    return next((index for index, one in enumerate(trains) if one), len(layers))
