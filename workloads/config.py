"""What one trial trains, as data: typed, frozen, checked where it is made. Imports neither torch nor transformers.

A field that a sweep passes on to its trials is defined once, with its type, default, help and label:
:class:`TrainingFields` change a trial's result and so belong to its identity, :class:`ExecutionFields` only change how
fast or how safely it runs. The trial (:class:`TrainingConfig`, :class:`ExecutionConfig`), the sweep and its command
line (orchestrator/spec.py, orchestrator/run_options.py) inherit them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from workloads.attention.patterns import PATTERNS, Attention
from workloads.errors import InputError
from workloads.models.positions import Positions

# Part of every trial's identity: raise it when results are meant to change for the same configuration (docs/log.md says
# why). Golden losses in tests/workloads/training/test_loop.py show when they change.
RESULT_VERSION = 3

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


# Fields that only the LoRA methods have.
OF_LORA = ("lora_rank", "lora_alpha", "lora_targets")


@dataclass(frozen=True, slots=True)
class Label:
    """What reports call a field; ``short`` is for the label of a trial among others, such as ``lr 3e-3``."""

    text: str
    short: str = ""


def labels(fields: type) -> dict[str, Label]:
    """The label of each field of a dataclass: the one in its annotation, else its name in words."""
    hints = get_type_hints(fields, include_extras=True)
    found = {}
    for field in dataclasses.fields(fields):
        own = (one for one in getattr(hints[field.name], "__metadata__", ()) if isinstance(one, Label))
        found[field.name] = next(own, Label(field.name.replace("_", " ").capitalize()))
    return found


def refuse_not_finite(settings: Any) -> None:
    """Raises InputError if a field of a dataclass has a number that JSON or other programs cannot hold."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            refuse_number(field.name, each)


def refuse_number(field: str, value: Any) -> None:
    """Raises InputError if a value is NaN, infinite or an integer of 64 bits and more."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{field} is {value}; expected a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{field} has 64 bits or more; expected a smaller number")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFields:
    """What a sweep hands to each of its trials unchanged; all of it changes the result."""

    task: Task = "pretraining"
    """pretraining on packed documents; or sft, supervised fine-tuning on the answers of instruction data: rows with
    messages, or with instruction and output (.json, .jsonl, .parquet, or a Hugging Face id such as
    Yukang/LongAlpaca-12k)."""
    long_examples: Annotated[LongExamples, Label("Examples longer than the context", "long examples")] = "drop"
    """What sft does with training examples longer than the context: drop or truncate."""
    train_layers: Annotated[str, Label("Layers that train", "layers")] = "all"
    """Layers that train: all, 'last 4', 'every 2', or a list such as 0,5,11; full then trains nothing outside them."""
    quantization: Annotated[Quantization, Label("Frozen weights in training", "quantization")] = "none"
    """Of the frozen linear weights of the LoRA methods; references are not quantised. nf4: 4 bits (QLoRA; needs a GPU).
    fp8: multiplied in FP8, all layers but the last, attention's in the backward pass alone; faster where layers are
    compiled (GPUs from compute capability 8.9 on; slow on CPUs)."""
    attention: Annotated[Attention, Label("Attention in training", "attention")] = "s2"
    """Attention in training: s2 (shifted sparse attention) across heads, or across layers (s2-layers); only unshifted
    (short) or only shifted groups; dilated, block-sparse, stride-sparse; or full. Evaluation is always full."""
    document_mask: bool = False
    """In training, stop attention at the boundaries of the documents in a sequence; positions continue across them."""
    positions: Positions = "linear"
    """How positions extend beyond the original length: linear interpolation, ntk (NTK-aware), dynamic (dynamic NTK),
    yarn, llama3 (Llama 3's scaling), or none."""
    original_length: Annotated[int | None, Label("Original context length")] = None
    """Tokens that the base was pretrained on, if its configuration leaves that open: a linear factor may count from
    max_position_embeddings or lead to it. By default as the configuration says."""
    lora_rank: Annotated[int, Label("LoRA rank", "r")] = 8
    """Rank of the LoRA methods (paper: 8)."""
    lora_alpha: Annotated[float, Label("LoRA alpha", "alpha")] = 16.0
    """LoRA's alpha: updates are scaled by alpha / rank (the authors' code: 16)."""
    lora_targets: Annotated[tuple[str, ...] | None, Label("LoRA targets", "targets")] = None
    """Linear modules that LoRA adapts, by the last part of their names, such as q_proj v_proj; by default the attention
    projections."""
    batch: int = 64
    """Sequences in an optimiser step, over all workers of a trial."""
    learning_rate_embeddings: Annotated[float | None, Label("Learning rate of embeddings", "embeddings lr")] = None
    """Peak learning rate of embeddings where they train; by default the method's own."""
    learning_rate_norms: Annotated[float | None, Label("Learning rate of norms", "norms lr")] = None
    """Peak learning rate of norms where they train; by default the method's own."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: Schedule = "constant"
    """Learning rate after warm-up: constant, or down to zero at the last step by cosine or linear."""
    beta1: float = 0.9
    """AdamW's beta1 (paper: 0.9)."""
    beta2: float = 0.95
    """AdamW's beta2 (paper: 0.95)."""
    weight_decay: float = 0.0
    """AdamW's weight decay (paper: 0)."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm; None does not clip."""
    eval_every: int = 100
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    eval_documents: int = 100
    """Held-out documents to score; where fewer are long enough, further spans of theirs follow. For sft, held-out
    examples that fit into the context, scored whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig(TrainingFields):
    """One trial's training and evaluation.

    ``train_layers`` restricts LoRA matrices, norms of layers and ``full``; embeddings and the final norm of the LoRA
    methods follow the method alone, and ``full`` with a choice other than ``all`` trains nothing outside the chosen
    layers. ``lora_targets`` are kept sorted.
    """

    context_length: Annotated[int, Label("Context length in training")]
    """Tokens in a training sequence, and in an evaluation window."""
    method: Method
    """``lora``; ``lora+norm`` and ``lora+embed``, where norms or embeddings train too; ``lora+`` (the paper's improved
    LoRA: both); ``full``; or ``untuned``, which trains nothing and is evaluated as it is."""
    group_size: Annotated[int | None, Label("Group size", "g")] = None
    """Tokens in a group (window, block) of the pattern: even, a divisor of the context length; None with ``full``."""
    steps: int = 0
    """Optimiser steps."""
    learning_rate: Annotated[float, Label("Learning rate", "lr")] = 2e-5
    """The peak, reached after ``warmup_steps``: see :func:`workloads.training.optimization.learning_rate`."""
    precision: Precision = "float32"
    """``bfloat16`` keeps frozen weights in bfloat16 and computes in it; trainable parameters and the optimiser's state
    are float32 either way."""
    seed: Annotated[int, Label("Seed", "seed")] = 0
    """Of the LoRA initialisation and of the order of the data."""
    eval_span: int
    """Tokens scored of each held-out document, from its start, or in each of its spans where documents are few: a
    multiple of the context length. Unused by ``sft``."""

    def not_at_default(self) -> dict[str, Any]:
        """The fields that differ from their default: they identify a trial, so that a new field orphans none."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def __post_init__(self) -> None:
        refuse_not_finite(self)
        for field in ("context_length", "batch", "lora_rank", "eval_every", "eval_documents", "eval_span"):
            if getattr(self, field) <= 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected a positive number")
        for field in ("steps", "warmup_steps", "seed"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected zero or a positive number")
        if self.lora_alpha <= 0:
            raise InputError(f"lora_alpha is {self.lora_alpha:g}; expected a positive number")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field):g}; expected a number from 0 to less than 1")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay is {self.weight_decay:g}; expected zero or a positive number")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise InputError(
                f"max_grad_norm is {self.max_grad_norm:g}; expected a positive number, or None, which does not clip"
            )
        if self.original_length is not None and self.original_length <= 0:
            raise InputError(f"original_length is {self.original_length}; expected a positive number of tokens")
        if self.method != "untuned" and not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate}; expected a positive number")
        self._check_what_trains()
        if self.document_mask and self.task == "sft":
            raise InputError(
                "document_mask has no effect with the task 'sft': an example is one document; leave it out"
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
        trained_layers(self.train_layers, sys.maxsize)  # checks the form; the range is checked once the model is known
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
class ExecutionFields:
    """What a sweep's options hand to each of its trials unchanged; none of it changes the result beyond rounding."""

    micro_batch: int | None = None
    """Sequences in one forward and backward pass of a worker; by default the worker's whole share of the batch."""
    attention_backend: AttentionBackend = "auto"
    """What computes the attention pattern (workloads/attention/backends.py); auto: the fastest that the worker has."""
    compile_layers: CompileLayers = "auto"
    """Run decoder layers through torch.compile in training: faster steps after a slow first one. auto: on a GPU, where
    a trial is long enough to gain by it."""
    checkpoint_every: int = 100
    """Steps between checkpoints, and so the most that a crash or Ctrl-C loses; the last step is always saved."""
    checkpoint_minutes: float = 10.0
    """Where steps are slow, a checkpoint is also written when the last one is this old."""
    keep_last: int = 2
    """Newest checkpoints to keep of each trial, which resumes from the newest intact one; with 1 there is no fallback
    if that one is damaged."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest perplexity at the trained length; each such evaluation writes one."""
    keep_every: int | None = None
    """Also write and keep a checkpoint every N steps, whatever --checkpoint-every is."""
    engine: EngineName = "auto"
    """How several workers train one model: ddp; zero2, zero3 (DeepSpeed); auto: ddp if there are several."""
    offload: bool = False
    """Keep what zero2 or zero3 partitions in host memory (gradients and optimiser state, with zero3 the weights), and
    update it there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig(ExecutionFields):
    """How a trial runs; none of it changes the result beyond rounding."""

    gradient_checkpointing: GradientCheckpointing = 0
    """How many decoder layers recompute their activations in the backward pass to save memory, counted from the first
    that has one; a number or ``all`` (workloads/training/recompute.py)."""
    offload_activations: OffloadActivations = 0
    """How many decoder layers keep their activations in pinned host memory until the backward pass, spread evenly
    (workloads/training/offload.py); the others recompute theirs, or keep them. ``auto``: as many as a plan chooses
    (workloads/budget/fitting.py), none if there is no plan."""
    eval_batch_tokens: int = 8192
    """About how many tokens one evaluation forward takes."""

    def __post_init__(self) -> None:
        if self.attention_backend not in get_args(AttentionBackend):
            known = ", ".join(get_args(AttentionBackend))
            raise InputError(f"attention_backend is {self.attention_backend!r}; expected one of {known}")
        if self.compile_layers not in get_args(CompileLayers):
            raise InputError(f"compile_layers is {self.compile_layers!r}; expected auto, on or off")
        if isinstance(self.gradient_checkpointing, bool):  # in journals of earlier versions
            object.__setattr__(self, "gradient_checkpointing", "all" if self.gradient_checkpointing else 0)
        layers = self.gradient_checkpointing
        if layers != "all" and not (isinstance(layers, int) and layers >= 0):
            raise InputError(f"gradient_checkpointing is {layers!r}; expected a number of decoder layers, or all")
        offloaded = self.offload_activations
        if offloaded != "auto" and (isinstance(offloaded, bool) or not (isinstance(offloaded, int) and offloaded >= 0)):
            raise InputError(f"offload_activations is {offloaded!r}; expected a number of decoder layers, or auto")
        if self.layers_offloaded and self.engine.startswith("zero"):
            raise InputError(
                f"offload_activations is {offloaded} with the engine {self.engine!r}, which moves tensors itself; "
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
        """``offload_activations`` as a number; ``auto`` that no plan has resolved counts as 0."""
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
    """Whether the method trains norms."""
    return method in ("lora+norm", "lora+", "full")


def trains_embeddings(method: Method, train_layers: str = "all") -> bool:
    """Whether the method trains embeddings; ``full`` does so only if all layers train."""
    return method in ("lora+embed", "lora+") or (method == "full" and train_layers == "all")


def trained_layers(choice: str, num_layers: int) -> Sequence[int]:
    """The layers that train, counted from 0, as ``train_layers`` chooses them.

    A choice is ``all``; ``last 4``; ``every 2`` (0, 2, 4 and so on); or a list such as ``0,5,11``, in increasing order.

    Raises:
        InputError: the choice has none of these forms, or exceeds the model's number of layers.
    """
    if choice == "all":
        return range(num_layers)
    layers: Sequence[int]
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
