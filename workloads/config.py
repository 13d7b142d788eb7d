"""What one trial trains, as data: typed, frozen, checked where it is made. Imports neither torch nor transformers.

Every field of :class:`TrainingConfig` changes the result and so belongs to a trial's identity; what only changes how
fast or where it runs is in :class:`ExecutionConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from workloads.attention.patterns import PATTERNS, Attention
from workloads.errors import InputError
from workloads.models.positions import Positions

# RESULT_VERSION is raised by hand when this package is meant to give other numbers for the same configuration; it is
# part of every trial's identity. Golden losses in tests/workloads/training/test_loop.py say when that is so.
RESULT_VERSION = 2

Method = Literal["untuned", "lora", "lora+norm", "lora+embed", "lora+", "full"]
AttentionBackend = Literal["auto", "sdpa", "cudnn", "flash2", "flash3", "flash4", "varlen", "flex"]
Precision = Literal["float32", "bfloat16"]
Schedule = Literal["constant", "cosine", "linear"]
Quantization = Literal["none", "nf4", "fp8"]
Task = Literal["pretraining", "sft"]
LongExamples = Literal["drop", "truncate"]
EngineName = Literal["auto", "ddp", "zero2", "zero3"]
CompileLayers = Literal["auto", "on", "off"]
GradientCheckpointing = int | Literal["all"]
OffloadActivations = int | Literal["auto"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """One trial's training and evaluation.

    Args:
        context_length: tokens in a training sequence, and in an evaluation window.
        method: ``lora``; ``lora+norm`` and ``lora+embed``, where norms or embeddings train too; ``lora+`` (the paper's
            improved LoRA: both); ``full``; or ``untuned``, which trains nothing and is evaluated as it is.
        attention: the pattern in training: ``s2`` (shifted sparse attention), ``full``, or another of those that
            workloads/attention/patterns defines. Evaluation is always full.
        group_size: tokens in a group (window, block) of the pattern; even, and the context length is a multiple of it.
            None with ``full``.
        document_mask: in training, attention stops at the boundaries of the documents in a sequence; positions go on.
        positions: ``linear`` (position interpolation), ``ntk`` (NTK-aware), ``dynamic`` (dynamic NTK), ``yarn``,
            ``llama3`` or ``none``: see :mod:`workloads.models.positions`.
        lora_rank, lora_alpha: of all LoRA methods (paper: rank 8; the authors' code: alpha 16).
        lora_targets: the linear modules that LoRA adapts, by the last part of their names; None: the attention
            projections. In whatever order they are given, they are kept sorted.
        train_layers: the decoder layers that train, see :func:`trained_layers`. It restricts LoRA matrices, norms of
            layers and ``full``; embeddings and the final norm of the LoRA methods follow the method alone, and
            ``full`` with a choice other than ``all`` trains nothing outside the chosen layers.
        quantization: of the frozen linear weights of a LoRA method. ``nf4`` keeps them in 4 bits (QLoRA): needs a GPU.
            ``fp8`` multiplies with those of all layers but the last in FP8, with attention's in the backward pass alone
            (workloads/adaptation/float8.py): faster on a GPU that has it, slow on a CPU.
        steps: optimiser steps.
        batch: sequences in an optimiser step, over all workers.
        learning_rate: peak, reached after ``warmup_steps`` of linear warm-up.
        learning_rate_embeddings, learning_rate_norms: peaks of their own for embeddings and norms that train;
            None: the same as ``learning_rate``.
        schedule: from the peak on ``constant``, or to zero at ``steps`` along half a ``cosine`` or a line (``linear``):
            see :func:`workloads.training.optimization.learning_rate`.
        beta1, beta2, weight_decay: AdamW's (paper: 0.9, 0.95, 0).
        max_grad_norm: gradients are clipped to this norm; None does not clip.
        precision: ``bfloat16`` keeps frozen weights in bfloat16 and computes in it; trainable parameters and the
            optimiser's state are float32 either way.
        seed: of the LoRA initialisation and of the order of the data.
        eval_every: steps between evaluations; step 0 and the last are always evaluated.
        eval_documents: held-out documents that are scored.
        eval_span: tokens scored of each, from its start; a multiple of the context length.
        task: ``pretraining`` on packed documents, or ``sft``: supervised fine-tuning on the answers of instruction
            data, where the loss is the mean over all answer tokens of the batch, and ``eval_documents`` held-out
            examples that fit into the context are scored, whole (``eval_span`` means nothing).
        long_examples: what ``sft`` does with training examples longer than the context: ``drop`` or ``truncate``.
    """

    context_length: int
    method: Method
    attention: Attention = "s2"
    group_size: int | None = None
    document_mask: bool = False
    positions: Positions = "linear"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] | None = None
    train_layers: str = "all"
    quantization: Quantization = "none"
    steps: int = 0
    batch: int = 64
    learning_rate: float = 2e-5
    learning_rate_embeddings: float | None = None
    learning_rate_norms: float | None = None
    schedule: Schedule = "constant"
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
    task: Task = "pretraining"
    long_examples: LongExamples = "drop"

    def not_at_default(self) -> dict[str, Any]:
        """The fields that are not at their default: what a trial is known by, so that a new field orphans none."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def __post_init__(self) -> None:
        for field in ("context_length", "batch", "lora_rank", "eval_every", "eval_documents", "eval_span"):
            if getattr(self, field) <= 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected a positive number")
        for field in ("steps", "warmup_steps", "seed"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected zero or a positive number")
        if self.method != "untuned" and not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; expected a positive number")
        self._check_what_trains()
        if self.document_mask and self.task == "sft":
            raise InputError(
                "document_mask has no meaning with the task 'sft': an example is one document; leave it out"
            )
        if self.method == "untuned" and self.steps:
            raise InputError(f"steps is {self.steps}, but the method 'untuned' trains nothing; set it to 0")
        if (self.group_size is None) == PATTERNS[self.attention].has_group_size:
            expected = "every pattern but full has a group size, and full has none"
            raise InputError(f"group_size is {self.group_size} with attention {self.attention!r}; {expected}")
        if self.group_size is not None and self.context_length % self.group_size:
            raise InputError(
                f"context length {self.context_length} is not a multiple of the group size {self.group_size}; "
                f"{_nearest_multiple(self.context_length, self.group_size)} would be"
            )
        if self.long_examples != "drop" and self.task != "sft":
            raise InputError(
                f"long_examples {self.long_examples!r} has no effect on the task {self.task!r}; leave it out"
            )
        if self.eval_span % self.context_length:
            raise InputError(
                f"eval_span is {self.eval_span}; expected a multiple of the context length {self.context_length}, "
                f"for example {_nearest_multiple(self.eval_span, self.context_length)}"
            )

    def _check_what_trains(self) -> None:
        trained_layers(self.train_layers, sys.maxsize)  # its form; its range once the model is known
        if self.lora_targets is not None:
            if not self.lora_targets:
                raise InputError("lora_targets is empty; name at least one linear module, such as q_proj")
            object.__setattr__(self, "lora_targets", tuple(sorted(set(self.lora_targets))))
        trains = {
            "learning_rate_embeddings": trains_embeddings(self.method, self.train_layers),
            "learning_rate_norms": trains_norms(self.method),
        }
        for field, has_effect in trains.items():
            rate = getattr(self, field)
            if rate is not None and not 0 < rate < math.inf:
                raise InputError(f"{field} is {rate}; expected a positive number")
            if rate is not None and not has_effect:
                what = field.removeprefix("learning_rate_")
                raise InputError(
                    f"{field} is {rate}, but no {what} train with the method {self.method!r} and train_layers "
                    f"{self.train_layers!r}; leave it out"
                )
        if self.quantization != "none" and not self.method.startswith("lora"):
            raise InputError(
                f"quantization is {self.quantization!r} with the method {self.method!r}: quantised weights cannot "
                "train; choose a LoRA method, such as lora+, or quantization none"
            )
        if self.quantization == "fp8" and self.precision != "bfloat16":
            raise InputError(
                f"quantization is 'fp8' with the precision {self.precision!r}: products in FP8 give bfloat16; choose "
                "precision bfloat16, or quantization none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    """How a trial runs; none of it changes the result beyond rounding.

    Args:
        micro_batch: sequences in one forward and backward on one worker; None takes the worker's whole share.
        gradient_checkpointing: how many decoder layers recompute their activations in the backward pass to save memory,
            counted from the first that has one; a number or ``all`` (workloads/training/recompute.py).
        offload_activations: how many decoder layers keep their activations in pinned host memory until the backward
            pass, spread evenly (workloads/training/offload.py); the others recompute theirs, or keep them. ``auto``: as many as
            a plan chooses (workloads/budget/fitting.py), none where nothing is planned.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        checkpoint_minutes: a checkpoint is also written when the last one is this old.
        keep_last: so many of the newest checkpoints stay; with one there is none to fall back to if it is damaged.
        keep_best: the checkpoint of the evaluation with the lowest perplexity at the trained length stays too; each
            such evaluation is followed by a checkpoint.
        keep_every: and the checkpoints of each so-manieth step, which are written whatever ``checkpoint_every`` is.
        eval_batch_tokens: about how many tokens one evaluation forward takes.
        attention_backend: what computes the attention pattern (workloads/attention/backends.py); ``auto`` takes the
            fastest that can serve.
        compile_layers: run decoder layers through torch.compile in training; ``auto`` where the trial is long enough to
            pay for it (workloads/training/compilation.py).
        engine: how several workers train one model: ``ddp``; ``zero2`` or ``zero3`` (DeepSpeed); ``auto`` is ``ddp``
            where there are several.
        offload: keep in host memory what ZeRO shares out: gradients and optimiser state, with ``zero3`` the weights.
    """

    micro_batch: int | None = None
    gradient_checkpointing: GradientCheckpointing = 0
    offload_activations: OffloadActivations = 0
    checkpoint_every: int = 100
    checkpoint_minutes: float = 10.0
    keep_last: int = 2
    keep_best: bool = False
    keep_every: int | None = None
    eval_batch_tokens: int = 8192
    attention_backend: AttentionBackend = "auto"
    compile_layers: CompileLayers = "auto"
    engine: EngineName = "auto"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.attention_backend not in get_args(AttentionBackend):
            known = ", ".join(get_args(AttentionBackend))
            raise InputError(f"attention_backend is {self.attention_backend!r}; expected one of {known}")
        if self.compile_layers not in get_args(CompileLayers):
            raise InputError(f"compile_layers is {self.compile_layers!r}; expected auto, on or off")
        if isinstance(self.gradient_checkpointing, bool):  # as journals of earlier versions have it
            object.__setattr__(self, "gradient_checkpointing", "all" if self.gradient_checkpointing else 0)
        layers = self.gradient_checkpointing
        if layers != "all" and not (isinstance(layers, int) and layers >= 0):
            raise InputError(f"gradient_checkpointing is {layers!r}; expected a number of decoder layers, or all")
        offloaded = self.offload_activations
        if offloaded != "auto" and (isinstance(offloaded, bool) or not (isinstance(offloaded, int) and offloaded >= 0)):
            raise InputError(f"offload_activations is {offloaded!r}; expected a number of decoder layers, or auto")
        if self.layers_offloaded and self.engine.startswith("zero"):
            raise InputError(
                f"offload_activations is {offloaded} with the engine {self.engine!r}, which moves tensors by itself; "
                "choose the engine ddp, or offload_activations 0"
            )
        if not self.checkpoint_minutes > 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; expected a positive number")
        for field in ("keep_last", "keep_every"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise InputError(f"{field} is {value}; expected at least 1")
        if self.offload and not self.engine.startswith("zero"):
            raise InputError(f"offload is on with the engine {self.engine!r}; choose zero2 or zero3, which can offload")

    @property
    def layers_offloaded(self) -> int:
        """``offload_activations`` as a number: an ``auto`` that no plan has settled is none."""
        return 0 if self.offload_activations == "auto" else self.offload_activations


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


def trains_norms(method: Method) -> bool:
    return method in ("lora+norm", "lora+", "full")


def trains_embeddings(method: Method, train_layers: str = "all") -> bool:
    return method in ("lora+embed", "lora+") or (method == "full" and train_layers == "all")


def trained_layers(choice: str, num_layers: int) -> Sequence[int]:
    """The layers that train, counted from 0, by a choice: ``all``; ``last 4``; ``every 2`` (0, 2, 4 and so on); or a
    list such as ``0,5,11``, in increasing order.

    Raises:
        InputError: the choice has none of these forms, or goes beyond the model's number of layers.
    """
    if choice == "all":
        return range(num_layers)
    listed = [int(number) for number in re.findall(r"\d+", choice)]
    if re.fullmatch(r"last [1-9]\d*", choice):
        layers, fits = range(num_layers - listed[0], num_layers), listed[0] <= num_layers
    elif re.fullmatch(r"every [1-9]\d*", choice):
        layers, fits = range(0, num_layers, listed[0]), listed[0] <= num_layers
    elif re.fullmatch(r"\d+(,\d+)*", choice) and listed == sorted(set(listed)):
        layers, fits = listed, listed[-1] < num_layers
    else:
        raise InputError(
            f"train_layers is {choice!r}; expected all, a number of last layers such as 'last 4', every n-th such as "
            "'every 2', or a list in increasing order such as 0,5,11"
        )
    if not fits:
        raise InputError(f"train_layers is {choice!r}, but the model has {num_layers} layers (0 to {num_layers - 1})")
    return layers


def _nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
