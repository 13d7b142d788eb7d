"""What one trial trains, as data: typed, frozen, checked where it is made. Imports neither torch nor transformers.

Every field of :class:`TrainingConfig` changes the result and so belongs to a trial's identity; what only changes how
fast or where it runs is in :class:`ExecutionConfig`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from workloads.errors import InputError

# RESULT_VERSION is raised by hand when this package is meant to give other numbers for the same configuration; it is
# part of every trial's identity. Golden losses in tests/workloads/test_training.py say when that is so.
RESULT_VERSION = 1

Method = Literal["untuned", "lora", "lora+", "full"]
Attention = Literal["s2", "full"]
Positions = Literal["linear", "yarn", "none"]
Precision = Literal["float32", "bfloat16"]
EngineName = Literal["auto", "ddp", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One trial's training and evaluation.

    Args:
        context_length: tokens in a training sequence, and in an evaluation window.
        method: ``lora``; ``lora+`` (the paper's improved LoRA: embeddings and norms train too); ``full``; or
            ``untuned``, which trains nothing and is evaluated as it is.
        attention: the pattern in training: ``s2`` (shifted sparse attention) or ``full``. Evaluation is always full.
        group_size: tokens in a group of ``s2``; even, and the context length is a multiple of it. None with ``full``.
        positions: ``linear`` (position interpolation), ``yarn`` or ``none``.
        lora_rank, lora_alpha: of both LoRA methods (paper: rank 8; the authors' code: alpha 16).
        steps: optimiser steps.
        batch: sequences in an optimiser step, over all workers.
        learning_rate: peak, reached after ``warmup_steps`` of linear warm-up and kept from there.
        beta1, beta2, weight_decay: AdamW's (paper: 0.9, 0.95, 0).
        max_grad_norm: gradients are clipped to this norm; None does not clip.
        precision: ``bfloat16`` keeps frozen weights in bfloat16 and computes in it; trainable parameters and the
            optimiser's state are float32 either way.
        seed: of the LoRA initialisation and of the order of the data.
        eval_every: steps between evaluations; step 0 and the last are always evaluated.
        eval_documents: held-out documents that are scored.
        eval_span: tokens scored of each, from its start; a multiple of the context length.
    """

    context_length: int
    method: Method
    attention: Attention = "s2"
    group_size: int | None = None
    positions: Positions = "linear"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    steps: int = 0
    batch: int = 64
    learning_rate: float = 2e-5
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    precision: Precision = "float32"
    seed: int = 0
    eval_every: int = 100
    eval_documents: int = 100
    eval_span: int

    def __post_init__(self) -> None:
        for field in ("context_length", "batch", "lora_rank", "eval_every", "eval_documents", "eval_span"):
            if getattr(self, field) <= 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected a positive number")
        for field in ("steps", "warmup_steps", "seed"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected zero or a positive number")
        if self.method != "untuned" and not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; expected a positive number")
        if self.method == "untuned" and self.steps:
            raise InputError(f"steps is {self.steps}, but the method 'untuned' trains nothing; set it to 0")
        if (self.group_size is not None) != (self.attention == "s2"):
            raise InputError(f"group_size is {self.group_size} with attention {self.attention!r}; only s2 has groups")
        if self.group_size is not None and self.context_length % self.group_size:
            raise InputError(
                f"context length {self.context_length} is not a multiple of the group size {self.group_size}; "
                f"{_nearest_multiple(self.context_length, self.group_size)} would be"
            )
        if self.eval_span % self.context_length:
            raise InputError(
                f"eval_span is {self.eval_span}; expected a multiple of the context length {self.context_length}, "
                f"for example {_nearest_multiple(self.eval_span, self.context_length)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How a trial runs; none of it changes the result beyond rounding.

    Args:
        micro_batch: sequences in one forward and backward on one worker; None takes the worker's whole share.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        eval_batch_tokens: about how many tokens one evaluation forward takes.
        engine: how several workers train one model: ``ddp``; ``zero2`` or ``zero3`` (DeepSpeed); ``auto`` is ``ddp``
            where there are several.
        offload: keep in host memory what ZeRO shares out: gradients and optimiser state, with ``zero3`` the weights.
    """

    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int = 100
    eval_batch_tokens: int = 8192
    engine: EngineName = "auto"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.offload and not self.engine.startswith("zero"):
            raise InputError(f"offload is on with the engine {self.engine!r}; choose zero2 or zero3, which can offload")


def group_size_in_tokens(group_size: int | float, context_length: int) -> int:
    """A group size in tokens, from a number of tokens or a share of the context length (0.25: a quarter).

    Raises:
        InputError: it is not even, positive and a divisor of the context length.
    """
    tokens = group_size * context_length if isinstance(group_size, float) and group_size <= 1 else group_size
    if tokens != int(tokens) or tokens <= 0 or int(tokens) % 2 or context_length % int(tokens):
        raise InputError(
            f"group size {group_size:g} at context length {context_length} makes groups of {tokens:g} tokens; expected "
            "an even number of tokens that divides the context length, or a share of it such as 0.25"
        )
    return int(tokens)


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
