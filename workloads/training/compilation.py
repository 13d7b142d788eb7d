"""Decoder layers, and the cross-entropy, compiled by torch.compile.

On a GPU their element-wise work is fused, and their many small kernels are launched together. One layer is compiled at
a time, and since the layers of a model are alike, compiling the first serves all. Only training runs compiled:
evaluation has other lengths, each of which would have to be compiled too, and takes little of a trial.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from workloads.adaptation.methods import decoder_layers
from workloads.budget import ModelShape, loop
from workloads.config import ExecutionConfig, TrainingConfig
from workloads.training.recompute import recomputes

BACKEND = "inductor"


def layers_compile(
    model: nn.Module, config: TrainingConfig, execution: ExecutionConfig, device: torch.device, num_workers: int
) -> bool:
    """Whether this trial trains with compiled layers, by the rule that it was planned by.

    Raises:
        InputError: as :func:`workloads.budget.loop.layers_compile`.
    """
    return loop.layers_compile(ModelShape.of(model.config), config, execution, num_workers, able=_can_compile(device))


def _can_compile(device: torch.device) -> bool:
    """Whether Triton can write kernels for the device, and a C compiler build their launchers."""
    compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and compiler


def compile_layers(model: nn.Module, fall_back: bool = False) -> None:
    """Compiles the decoder layers when they are first called in training; names and parameters stay.

    Args:
        fall_back: if the compiler fails, the layers run uncompiled, and torch warns of it.
    """
    import torch._dynamo  # takes a second, which only trials that compile need

    layers = decoder_layers(model)[1]
    # All layers count as one function, which would silently run uncompiled beyond 8 versions. Layers differ where only
    # some train, or some recompute their activations.
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, 2 * len(layers))
    # It splits compiled code for DDP to send gradients in between; layers are such pieces already.
    settings.optimize_ddp = False
    settings.suppress_errors = fall_back
    for layer in layers:
        layer.compile(dynamic=False, backend=_keeping_inputs if recomputes(layer) else BACKEND)


def _keeping_inputs(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """The backend, told to keep only a layer's inputs for the backward pass, and to recompute all else there."""
    from torch._dynamo.backends.registry import lookup_backend
    from torch._functorch import config

    with config.patch(activation_memory_budget=0):
        return lookup_backend(BACKEND)(graph, inputs)


def uncompiled(model: nn.Module) -> AbstractContextManager:
    """A context in which compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager") if _is_compiled(model) else contextlib.nullcontext()


def compiled_like(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled if the layers of ``model`` are."""
    return torch.compile(function, dynamic=False, backend=BACKEND) if _is_compiled(model) else function


def _is_compiled(model: nn.Module) -> bool:
    return any(layer._compiled_call_impl is not None for layer in decoder_layers(model)[1])
