"""Gradient checkpointing of some decoder layers: they keep their input alone and compute the rest again in the backward
pass (Chen et al., arXiv 1604.06174).

How many is chosen before a trial runs (workloads/budget/fitting.py): memory that a device has is spent first.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from workloads.adaptation.methods import decoder_layers
from workloads.config import GradientCheckpointing
from workloads.errors import InputError


def recompute_activations(model: nn.Module, count: GradientCheckpointing, besides: Collection[nn.Module] = ()) -> None:
    """Has the first ``count`` of the layers that have a backward pass recompute their activations in it, in training.

    The first ones, since their turn in the backward pass comes last: what they compute again then takes the place of
    what later layers kept. A layer before all that trains has no backward pass, keeps nothing, and is left alone.

    Transformers' ``gradient_checkpointing_enable`` would do two things more. It makes the embeddings' output require a
    gradient (reentrant checkpointing needs it), and so gives every layer a backward pass. And in some versions it goes
    inside of what torch.compile makes of a layer, where most of what recompute should save was kept all the same: by
    all of a small Llama's layers 100 kB where the layers were not compiled, 340 kB where they were (transformers 5.23,
    torch 2.13). Here the compiler itself is told to keep a layer's inputs alone (:func:`recomputes`,
    workloads/training/compilation.py): what it computes again is then part of the backward pass, and only what that needs, not
    the layer's last product nor any sum after it.

    Args:
        model: as :func:`workloads.adaptation.methods.adapt` returns it; without a cache, which recompute would fill twice.
        besides: layers that are left out, since they are offloaded.

    Raises:
        InputError: the model has fewer layers.
    """
    if count == 0:
        return
    layers = decoder_layers(model)[1]
    if count != "all" and count > len(layers):
        raise InputError(f"gradient_checkpointing is {count}, but the model has {len(layers)} layers")
    others = [layer for layer in layers_with_backward(model) if layer not in besides]
    for layer in others if count == "all" else others[:count]:
        layer.__class__ = _recomputing(type(layer))


def layers_with_backward(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in or before which something trains."""
    layers = decoder_layers(model)[1]
    return list(layers)[_first_with_backward(model, layers) :]


def recomputes(layer: nn.Module) -> bool:
    """Whether :func:`recompute_activations` has chosen it."""
    return isinstance(layer, _Recomputing)


class _Recomputing:
    """In front of a module's class: what it computes is forgotten, and computed again in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and not torch.compiler.is_compiling():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


@cache  # one class for all layers that are alike, so that torch.compile serves them with the same code
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputing, kind), {"__module__": kind.__module__})


def _first_with_backward(model: nn.Module, layers: nn.ModuleList) -> int:
    if model.get_input_embeddings().weight.requires_grad:
        return 0
    trains = (any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers)
    return next((index for index, one in enumerate(trains) if one), len(layers))
