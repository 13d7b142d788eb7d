"""A sweep as data: frozen, typed, checked where it is made.

A recipe makes a :class:`SweepSpec`; with the identities of its model and data it becomes
:class:`~orchestrator.trial_spec.TrialSpec` s. The fields that it hands to each trial unchanged are defined in
:mod:`workloads.config`; the fields here choose what is compared, or are resolved for each trial.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from orchestrator.field_types import describe_type, is_of_type
from orchestrator.trial_spec import Identities, TrialSpec, lists_to_tuples
from workloads.config import (
    Positions,
    Precision,
    TrainingConfig,
    TrainingFields,
    group_size_in_tokens,
    trains_embeddings,
    trains_norms,
)
from workloads.errors import InputError

TrainedMethod = Literal["lora", "lora+norm", "lora+embed", "lora+", "full"]

# Shared fields that not every trial has: references have these alone; only LoRA methods have a rank; and learning rates
# are those of what a method trains.
OF_UNTUNED = ("eval_documents", "task")
OF_LORA = ("lora_rank", "lora_alpha", "lora_targets")
RATES = ("learning_rate_embeddings", "learning_rate_norms")
# The name of a sweep holds a hash of these fields in this order, so sweeps in storage depend on it. A field that is not
# among them enters the hash only if it is not at its default.
HASHED = (
    "model", "data", "text_column", "task", "long_examples", "max_train_tokens", "context_lengths", "methods",
    "train_layers", "quantization", "references", "attention", "group_size", "document_mask", "positions", "lora_rank",
    "lora_alpha", "lora_targets", "steps", "batch", "learning_rate_lora", "learning_rate_lora_plus",
    "learning_rate_full", "learning_rate_embeddings", "learning_rate_norms", "learning_rate_sweep",
    "learning_rates_chosen", "warmup_steps", "schedule", "beta1", "beta2", "weight_decay", "max_grad_norm", "precision",
    "seeds", "eval_every", "eval_documents", "eval_span", "search", "search_trials", "search_learning_rate",
    "search_rank", "search_group_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a sweep trains on, and what it compares."""

    model: str = "builtin:tiny"
    """Base model: builtin:tiny, a folder, a .gguf file, or a Hugging Face id (org/name, or org/name@revision)."""
    data: str = "builtin:stdlib"
    """Corpus: builtin:stdlib, a file or folder of .txt, .md, .tex, .jsonl or .parquet, or a Hugging Face id."""
    text_column: str | None = None
    """Column of .jsonl, .parquet and Hugging Face data that holds the text; detected if there is only one."""
    max_train_tokens: int | None = None
    """Training tokens to prepare: reads only the beginning of data too large for a disk. By default all of it."""
    context_lengths: tuple[int, ...]
    """Context lengths to train, in tokens."""
    methods: tuple[TrainedMethod, ...] = ("lora", "lora+", "full")
    """What trains: lora; lora+norm; lora+embed; lora+ (with norms and embeddings, the paper's improved LoRA); full."""
    references: tuple[Positions, ...] = ("none", "yarn")
    """Untuned models to compare with, by their positions; none: no change. The model that tuning starts from is added
    automatically."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each is a separate trial."""


@dataclass(frozen=True, kw_only=True)
class SweepSpec(TrainingFields, Compared):
    """What a sweep compares: every context length with every method and seed, and the untuned references."""

    group_size: float = 0.25
    """Group size (window, block) of every pattern but full: a share of the context length (up to 1), or tokens."""
    steps: int = 1000
    """Optimiser steps of each trial."""
    learning_rate_lora: float = 2e-5
    """Learning rate of the methods lora and lora+norm."""
    learning_rate_lora_plus: float = 2e-5
    """Learning rate of the methods lora+ and lora+embed."""
    learning_rate_full: float = 2e-5
    """Learning rate of the method full."""
    learning_rate_sweep: tuple[float, ...] = (1.0,)
    """Multiples of each method's own learning rates to train with, such as 0.3 1 3: each is a trial, and the comparison
    takes each method's best."""
    learning_rates_chosen: str = "not stated"
    """How the methods' learning rates were chosen, as text for the report; it changes no trial."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs and on processors with bfloat16 arithmetic, else float32."""
    eval_span: int | None = None
    """Tokens scored of each held-out document, the same at every context length; by default the longest of them."""
    search: Literal["none", "random", "optuna"] = "none"
    """Search each method's best setting at each context length: at random, or by Optuna's TPE (Bayesian)."""
    search_trials: int = 16
    """Trials of a search for each method and context length, the method's own setting first if in the ranges."""
    search_learning_rate: tuple[float, float] | None = None
    """Lowest and highest learning rate of a search; by default from a tenth to ten times the method's own."""
    search_rank: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Ranks that a search chooses from for the LoRA methods."""
    search_group_size: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Group sizes that a search chooses from: shares of the context length (up to 1), or tokens."""

    def __post_init__(self) -> None:
        for field in ("context_lengths", "methods", "seeds", "learning_rate_sweep"):
            values: tuple[Any, ...] = getattr(self, field)
            flag = f"--{field.replace('_', '-')}"
            if not values:
                raise InputError(f"{flag} is empty; expected at least one value")
            if len(set(values)) != len(values):
                given = " ".join(str(value) for value in values)
                raise InputError(f"{flag} {given}: expected each value once")
        for multiple in self.learning_rate_sweep:
            if not 0 < multiple < math.inf:
                raise InputError(f"--learning-rate-sweep {multiple:g}: expected positive multiples, such as 0.3 1 3")
        only_pretraining: dict[str, Any] = {
            "--text-column": self.text_column,
            "--max-train-tokens": self.max_train_tokens,
        }
        for flag, given in only_pretraining.items():
            if self.task == "sft" and given is not None:
                raise InputError(f"{flag} {given} has no effect with --task sft. Leave it out")
        if self.steps < 1:
            raise InputError(f"--steps {self.steps}: expected at least 1; the untuned models are always evaluated")
        self._check_search()
        for field in RATES:
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
                raise InputError(
                    f"--search-learning-rate {low:g} {high:g}: expected a positive number, then a higher one"
                )
        if self.search != "none" and (len(self.seeds) > 1 or len(self.learning_rate_sweep) > 1):
            flag = "--seeds" if len(self.seeds) > 1 else "--learning-rate-sweep"
            raise InputError(
                f"{flag} with --search {self.search}: a search compares settings of one seed, and chooses learning "
                "rates itself. Leave it out, and train the best setting with several seeds afterwards"
            )

    def learning_rates(self, method: TrainedMethod, multiple: float = 1.0) -> dict[str, float | None]:
        """The learning rates of what a method trains, by TrainingConfig's fields.

        All are scaled by ``multiple``, one of ``learning_rate_sweep``, so that their ratio stays.
        """
        rate = {
            "lora": self.learning_rate_lora,
            "lora+norm": self.learning_rate_lora,
            "lora+embed": self.learning_rate_lora_plus,
            "lora+": self.learning_rate_lora_plus,
            "full": self.learning_rate_full,
        }[method]
        rates: dict[str, float | None] = {"learning_rate": rate}
        if trains_embeddings(method, self.train_layers):
            rates["learning_rate_embeddings"] = self.learning_rate_embeddings
        if trains_norms(method):
            rates["learning_rate_norms"] = self.learning_rate_norms
        if multiple != 1:
            # Rounded, so that 0.3 x 2e-5 is the same trial as 6e-6.
            rates = {name: rate and float(f"{rate * multiple:.12g}") for name, rate in rates.items()}
        return rates

    def trials(self, identities: Identities, precision: Precision) -> list[TrialSpec]:
        """The trials of this sweep: by context length, untuned ones first.

        If there are references, the untuned model that the tuned ones start from is always among them: it takes
        seconds, and its score is step 0 of every tuned trial.

        Raises:
            InputError: a setting that no trial can have, such as a context that is not a multiple of the group size.
        """
        configs = [
            config
            for context_length in self.context_lengths
            for config in (*self._untuned(context_length, precision), *self._tuned(context_length, precision))
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

    def _untuned(self, context_length: int, precision: Precision) -> list[TrainingConfig]:
        shared = self._shared(OF_UNTUNED)
        return [
            TrainingConfig(
                method="untuned",
                context_length=context_length,
                attention="full",
                positions=positions,
                precision=precision,
                eval_span=self._eval_span(context_length),
                **shared,
            )
            for positions in (dict.fromkeys((*self.references, self.positions)) if self.references else ())
        ]

    def _tuned(self, context_length: int, precision: Precision) -> list[TrainingConfig]:
        group_size = group_size_in_tokens(self.group_size, context_length) if self.attention != "full" else None
        fields = [field.name for field in dataclasses.fields(TrainingFields) if field.name not in RATES]
        return [
            TrainingConfig(
                method=method,
                context_length=context_length,
                group_size=group_size,
                steps=self.steps,
                seed=seed,
                precision=precision,
                eval_span=self._eval_span(context_length),
                **(
                    self._shared(field for field in fields if method != "full" or field not in OF_LORA)
                    | self.learning_rates(method, multiple)
                ),
            )
            for method in self.methods
            for multiple in self.learning_rate_sweep
            for seed in self.seeds
        ]

    def _shared(self, fields: Iterable[str]) -> dict[str, Any]:
        return {field: getattr(self, field) for field in fields}

    def _eval_span(self, context_length: int) -> int:
        if self.task == "sft":  # examples are scored whole
            return context_length
        return self.eval_span or max(self.context_lengths)

    def to_json(self) -> str:
        """The content of a sweep's spec.json; ``from_json`` is the inverse."""
        values = dataclasses.asdict(self)
        return json.dumps({name: values[name] for name in dict.fromkeys((*HASHED, *values))}, indent=1)

    def digest(self) -> str:
        """6 hexadecimal digits that tell this sweep from others of its recipe, for its name."""
        hashed = {name: getattr(self, name) for name in HASHED}
        for field in dataclasses.fields(self):
            if field.name not in hashed and getattr(self, field.name) != field.default:
                hashed[field.name] = getattr(self, field.name)
        return hashlib.sha256(json.dumps(hashed, indent=1).encode()).hexdigest()[:6]

    @classmethod
    def from_json(cls, text: str, where: str) -> SweepSpec:
        """A saved sweep.

        Raises:
            InputError: it is not a JSON object, or has a field that a sweep does not have.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}); expected the spec.json of a sweep's folder") from error
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or (unknown := sorted(set(values) - known)):
            found = f"the unknown fields {', '.join(unknown)}" if isinstance(values, dict) else "no object"
            raise InputError(f"{where} has {found}; expected a sweep's fields: {', '.join(sorted(known))}")
        values = lists_to_tuples(values)
        for name, kind in get_type_hints(cls).items():
            if name in values and not is_of_type(values[name], kind):
                raise InputError(f"{where}: {name} is {values[name]!r}; expected {describe_type(kind)}")
        if "context_lengths" not in values:
            raise InputError(f"{where} has no context_lengths; expected the spec.json of a sweep's folder")
        return cls(**values)
