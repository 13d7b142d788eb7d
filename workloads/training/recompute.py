"""Gradient checkpointing of some decoder layers (Chen et al., arXiv 1604.06174).

Such a layer keeps its input alone and computes the rest again in the backward pass. How many do is chosen before a
trial runs (workloads/budget/fitting.py): a device's memory is used first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from workloads.adaptation.methods import decoder_layers
from workloads.adaptation.wrapping import WrapOrder, Wrapper, wrap
from workloads.config import GradientCheckpointing
from workloads.errors import InputError


def recompute_activations(model: nn.Module, count: GradientCheckpointing, exclude: Collection[nn.Module] = ()) -> None:
    """Makes the first ``count`` of the layers that have a backward pass recompute their activations, in training.

    The first ones, since their turn in the backward pass comes last: their recomputed activations take the place of
    what later layers kept. A layer before all that trains has no backward pass, keeps nothing, and is left alone.

    Transformers' ``gradient_checkpointing_enable`` would do two things more. It makes the embeddings' output require a
    gradient (reentrant checkpointing needs it), and so gives every layer a backward pass. And in some versions it runs
    inside of what torch.compile makes of a layer, where most of what recompute should save was kept all the same: by
    all of a small Llama's layers 100 kB where the layers were not compiled, 340 kB where they were (transformers 5.23,
    torch 2.13). Here the compiler itself is told to keep a layer's inputs alone (:func:`recomputes`,
    workloads/training/compilation.py): the recomputation is then part of the backward pass, and leaves out the layer's
    last product and every sum after it.

    Args:
        model: as :func:`workloads.adaptation.methods.adapt` returns it; without a cache, which would be filled twice.
        exclude: layers that are left out, since they are offloaded.

    Raises:
        InputError: the model has fewer layers.
    """
    if count == 0:
        return
    layers = decoder_layers(model)[1]
    if count != "all" and count > len(layers):
        raise InputError(f"gradient_checkpointing is {count}, but the model has {len(layers)} layers")
    candidates = [layer for layer in layers_with_backward(model) if layer not in exclude]
    for layer in candidates if count == "all" else candidates[:count]:
        wrap(layer, _Recompute)


def layers_with_backward(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in or before which something trains."""
    layers = decoder_layers(model)[1]
    return list(layers)[_first_with_backward(model, layers) :]


def recomputes(layer: nn.Module) -> bool:
    """Whether :func:`recompute_activations` has chosen this layer."""
    return isinstance(layer, _Recompute)


class _Recompute(Wrapper):
    """Around a layer's forward pass; in compiled code the compiler's backend recomputes instead."""

    order = WrapOrder.RECOMPUTE

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and not torch.compiler.is_compiling():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


def _first_with_backward(model: nn.Module, layers: nn.ModuleList) -> int:
    if model.get_input_embeddings().weight.requires_grad:
        return 0
    trains = (any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    return next((index for index, layer_trains in enumerate(trains) if layer_trains), len(layers))
