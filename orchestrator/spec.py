"""A sweep and its trials as data: frozen, typed, checked where they are made; and a trial's identity.

A recipe makes a :class:`SweepSpec`; with what its model and data turn out to be (:class:`Identities`) it becomes
:class:`TrialSpec` s. A trial's fingerprint is a hash of all that changes its result and nothing else: the same
fingerprint names its folder, its Ray Train run and its MLflow run, so that the same trial is never trained twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from workloads.config import (
    RESULT_VERSION,
    Attention,
    LongExamples,
    Positions,
    Precision,
    Quantization,
    Schedule,
    Task,
    TrainingConfig,
    group_size_in_tokens,
    trains_embeddings,
    trains_norms,
)
from workloads.errors import InputError

TrainedMethod = Literal["lora", "lora+norm", "lora+embed", "lora+", "full"]


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """What a sweep compares: every context length with every method and seed, and the untuned references."""

    model: str = "builtin:tiny"
    """Base model: builtin:tiny, a folder, a .gguf file, or a Hugging Face id (org/name, or org/name@revision)."""
    data: str = "builtin:stdlib"
    """Corpus: builtin:stdlib, a file or folder of .txt, .md, .tex, .jsonl or .parquet, or a Hugging Face id."""
    text_column: str | None = None
    """Column of .jsonl, .parquet and Hugging Face data that holds the text; found by itself where there is but one."""
    task: Task = "pretraining"
    """pretraining on documents; or sft, on the answers of instruction data: rows with messages, or with instruction
    and output (.json, .jsonl, .parquet, or a Hugging Face id such as Yukang/LongAlpaca-12k)."""
    long_examples: LongExamples = "drop"
    """What sft does with training examples longer than the context: drop or truncate."""
    max_train_tokens: int | None = None
    """Training tokens to prepare: reads only the beginning of data too large for a disk. By default all of it."""
    context_lengths: tuple[int, ...]
    """Context lengths to train, in tokens."""
    methods: tuple[TrainedMethod, ...] = ("lora", "lora+", "full")
    """What trains: lora; lora+norm; lora+embed; lora+ (with norms and embeddings, the paper's improved LoRA); full."""
    train_layers: str = "all"
    """Layers that train: all, 'last 4', 'every 2', or a list such as 0,5,11; full then trains nothing outside them."""
    quantization: Quantization = "none"
    """Of the frozen weights of the LoRA methods; references stay as they are. nf4: in 4 bits (QLoRA; needs a GPU). fp8:
    multiplied in FP8, all layers but the last, attention's in the backward pass alone; faster where layers are compiled
    (GPUs from compute capability 8.9 on; slow on CPUs)."""
    references: tuple[Positions, ...] = ("none", "yarn")
    """Untuned models to compare with, by their positions; none: no change. What tuning starts from joins by itself."""
    attention: Attention = "s2"
    """Attention in training: s2 (shifted sparse attention) across heads, or across layers (s2-layers); only unshifted
    (short) or only shifted groups; dilated, block-sparse, stride-sparse; or full. Evaluation always attends fully."""
    group_size: float = 0.25
    """Group size (window, block) of every pattern but full: a share of the context length (up to 1), or tokens."""
    document_mask: bool = False
    """Stop attention in training at the boundaries of the documents that a sequence is packed from."""
    positions: Positions = "linear"
    """How positions reach beyond the original length: linear interpolation, (dynamic) NTK, YaRN, Llama 3's, none."""
    lora_rank: int = 8
    """Rank of the LoRA methods."""
    lora_alpha: float = 16.0
    """LoRA's alpha: updates are scaled by alpha / rank."""
    lora_targets: tuple[str, ...] | None = None
    """Linear modules that LoRA adapts, such as q_proj v_proj; by default the attention projections."""
    steps: int = 1000
    """Optimiser steps of each trial."""
    batch: int = 64
    """Sequences in an optimiser step, over all workers of a trial."""
    learning_rate_lora: float = 2e-5
    """Learning rate of the methods lora and lora+norm."""
    learning_rate_lora_plus: float = 2e-5
    """Learning rate of the methods lora+ and lora+embed."""
    learning_rate_full: float = 2e-5
    """Learning rate of the method full."""
    learning_rate_embeddings: float | None = None
    """Learning rate of embeddings where they train; by default the method's own."""
    learning_rate_norms: float | None = None
    """Learning rate of norms where they train; by default the method's own."""
    learning_rate_sweep: tuple[float, ...] = (1.0,)
    """Multiples of each method's own learning rates to train with, such as 0.3 1 3: each is a trial, and the comparison
    takes each method's best."""
    learning_rates_chosen: str = "not stated"
    """How the methods' learning rates were chosen, in words for the report; it changes no trial."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    schedule: Schedule = "constant"
    """Learning rate after warm-up: constant, or down to zero at the last step by cosine or linear."""
    beta1: float = 0.9
    """AdamW's beta1."""
    beta2: float = 0.95
    """AdamW's beta2."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs and on processors that multiply in it, else float32."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each is a trial of its own."""
    eval_every: int = 100
    """Steps between evaluations; step 0 and the last are always evaluated."""
    eval_documents: int = 100
    """Held-out documents that are scored."""
    eval_span: int | None = None
    """Tokens scored of each held-out document, the same at every context length; the longest one where not given."""
    search: Literal["none", "random", "optuna"] = "none"
    """Looks for each method's best setting at each context length: at random, or by Optuna's TPE (Bayesian)."""
    search_trials: int = 16
    """Trials of a search for each method and context length; its own setting first, where that lies in the ranges."""
    search_learning_rate: tuple[float, float] | None = None
    """Lowest and highest learning rate of a search; by default from a tenth to ten times the method's own."""
    search_rank: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Ranks that a search chooses from for the LoRA methods."""
    search_group_size: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Group sizes that a search chooses from: shares of the context length (up to 1), or tokens."""

    def __post_init__(self) -> None:
        for field in ("context_lengths", "methods", "seeds", "learning_rate_sweep"):
            values = getattr(self, field)
            flag = f"--{field.replace('_', '-')}"
            if not values:
                raise InputError(f"{flag} is empty; expected at least one value")
            if len(set(values)) != len(values):
                given = " ".join(str(value) for value in values)
                raise InputError(f"{flag} {given}: expected none of the values twice")
        for multiple in self.learning_rate_sweep:
            if not 0 < multiple < math.inf:
                raise InputError(f"--learning-rate-sweep {multiple:g}: expected positive multiples, such as 0.3 1 3")
        for flag, given in (("--text-column", self.text_column), ("--max-train-tokens", self.max_train_tokens)):
            if self.task == "sft" and given is not None:
                raise InputError(f"{flag} {given} has no effect with --task sft. Leave it out")
        if self.steps < 1:
            raise InputError(f"--steps {self.steps}: expected at least 1; the untuned models are always evaluated")
        self._check_search()
        for field in ("learning_rate_embeddings", "learning_rate_norms"):
            if getattr(self, field) is not None and not any(field in self.learning_rates(m) for m in self.methods):
                raise InputError(
                    f"--{field.replace('_', '-')} {getattr(self, field)}: none of the methods {' '.join(self.methods)} "
                    "trains them; leave it out, or add a method that does, such as lora+"
                )

    def _check_search(self) -> None:
        if self.search_trials < 1:
            raise InputError(f"--search-trials {self.search_trials}: expected at least 1")
        if self.search_learning_rate is not None:
            low, high = self.search_learning_rate
            if not 0 < low <= high < math.inf:
                raise InputError(f"--search-learning-rate {low:g} {high:g}: expected a positive number, then a higher")
        if self.search != "none" and (len(self.seeds) > 1 or len(self.learning_rate_sweep) > 1):
            flag = "--seeds" if len(self.seeds) > 1 else "--learning-rate-sweep"
            raise InputError(
                f"{flag} with --search {self.search}: a search compares settings of one seed, and chooses learning "
                "rates itself. Leave it out, and train the best setting with several seeds afterwards"
            )

    def learning_rates(self, method: TrainedMethod, multiple: float = 1.0) -> dict[str, float | None]:
        """The learning rates of a method, by TrainingConfig's fields; those of what it does not train are left out.

        With a multiple of ``learning_rate_sweep`` all of them are scaled by it, so that their ratio stays.
        """
        rate = {
            "lora": self.learning_rate_lora,
            "lora+norm": self.learning_rate_lora,
            "lora+embed": self.learning_rate_lora_plus,
            "lora+": self.learning_rate_lora_plus,
            "full": self.learning_rate_full,
        }[method]
        rates = {"learning_rate": rate}
        if trains_embeddings(method, self.train_layers):
            rates["learning_rate_embeddings"] = self.learning_rate_embeddings
        if trains_norms(method):
            rates["learning_rate_norms"] = self.learning_rate_norms
        if multiple != 1:
            # Rounded, so that 0.3 x 2e-5 is the trial that somebody has trained at 6e-6.
            rates = {name: rate and float(f"{rate * multiple:.12g}") for name, rate in rates.items()}
        return rates

    def trials(self, identities: Identities, precision: Precision) -> list[TrialSpec]:
        """The trials of this sweep: by context length, untuned ones first.

        Where there are references, the untuned model that the tuned ones start from is always among them: it takes
        seconds, and its score is step 0 of every tuned trial.

        Raises:
            InputError: a setting that no trial can have, such as a context that is no multiple of the group size.
        """
        configs = []
        for context_length in self.context_lengths:
            shared = {
                "context_length": context_length,
                "precision": precision,
                "eval_documents": self.eval_documents,
                "eval_span": self.eval_span or max(self.context_lengths),
                "task": self.task,
            }
            if self.task == "sft":  # examples are scored whole
                shared["eval_span"] = context_length
            untuned = dict.fromkeys((*self.references, self.positions)) if self.references else ()
            configs += [
                TrainingConfig(method="untuned", attention="full", positions=positions, **shared)
                for positions in untuned
            ]
            group_size = group_size_in_tokens(self.group_size, context_length) if self.attention != "full" else None
            for method in self.methods:
                lora = ("lora_rank", "lora_alpha", "lora_targets") if method != "full" else ()
                configs += [
                    TrainingConfig(
                        method=method,
                        attention=self.attention,
                        group_size=group_size,
                        document_mask=self.document_mask,
                        positions=self.positions,
                        train_layers=self.train_layers,
                        quantization=self.quantization,
                        steps=self.steps,
                        batch=self.batch,
                        **self.learning_rates(method, multiple),
                        warmup_steps=self.warmup_steps,
                        schedule=self.schedule,
                        beta1=self.beta1,
                        beta2=self.beta2,
                        weight_decay=self.weight_decay,
                        max_grad_norm=self.max_grad_norm,
                        eval_every=self.eval_every,
                        seed=seed,
                        long_examples=self.long_examples,
                        **{field: getattr(self, field) for field in lora},
                        **shared,
                    )
                    for multiple in self.learning_rate_sweep
                    for seed in self.seeds
                ]
        return [
            TrialSpec(
                model=self.model,
                data=self.data,
                text_column=self.text_column,
                identities=identities,
                training=config,
                distinction=f"lr {config.learning_rate:g}"
                if config.method != "untuned" and self.learning_rate_sweep != (1.0,)
                else "",
            )
            for config in configs
        ]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, where: str) -> SweepSpec:
        """A saved sweep.

        Raises:
            InputError: it is no JSON object, or has a field that a sweep does not have.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"{where} is not JSON ({error}); expected the spec.json of a sweep's folder") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            found = f"the unknown fields {', '.join(unknown)}" if isinstance(values, dict) else "no object"
            raise InputError(f"{where} has {found}; expected a sweep's fields: {', '.join(sorted(known))}")
        return cls(**_without_lists(values))


def _without_lists(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What a model, its tokenizer and a corpus turned out to be: hashes of their content, or ids with a revision."""

    model: str
    tokenizer: str
    data: str


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial. ``model`` and ``data`` say where things are; ``identities`` and ``training`` are what it is;
    ``distinction`` is what tells it from its sweep's other trials of the method, for its label.
    """

    model: str
    data: str
    text_column: str | None = None
    identities: Identities
    training: TrainingConfig
    distinction: str = ""

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the trial's result.

        Fields at their default are left out of the hash, so that a new field orphans no trial; a default that changes
        raises RESULT_VERSION.
        """
        what = {
            "result_version": RESULT_VERSION,
            **dataclasses.asdict(self.identities),
            "training": self.training.not_at_default(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def untuned(self) -> TrialSpec:
        """The untuned model that this trial starts from, as a trial; a reference is its own."""
        training = self.training
        untuned = TrainingConfig(
            method="untuned",
            attention="full",
            context_length=training.context_length,
            positions=training.positions,
            precision=training.precision,
            eval_documents=training.eval_documents,
            eval_span=training.eval_span,
            task=training.task,
        )
        return dataclasses.replace(self, training=untuned, distinction="")

    @property
    def label(self) -> str:
        """How people call it: ``lora+ 2048``, ``untuned yarn 2048``, ``lora+ 2048 lr 3e-3 r 16``."""
        training = self.training
        name = f"untuned {training.positions}" if training.method == "untuned" else training.method
        seed = f" seed {training.seed}" if training.seed else ""
        distinction = f" {self.distinction}" if self.distinction else ""
        return f"{name} {training.context_length}{distinction}{seed}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialSpec:
        """A trial as ``to_dict`` gives it, or with more beside it, as in a trial.json."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(
            **{
                **{name: value for name, value in values.items() if name in fields},
                "identities": Identities(**values["identities"]),
                "training": TrainingConfig(**_without_lists(values["training"])),
            }
        )
