"""A sweep as data: frozen, typed, checked where it is made.

A recipe makes a :class:`SweepSpec`, and :func:`~orchestrator.expansion.expand` its trials. The fields that each trial
takes unchanged are defined in :mod:`workloads.config`; the fields here choose what is compared, or are resolved for
each trial. A field with several values is an axis: see :mod:`orchestrator.axes`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.axes import AXES, check_values, flag, in_words, join, split
from orchestrator.learning_rates import Rule
from workloads.config import (
    Method,
    Positions,
    TrainingFields,
    refuse_not_finite,
    refuse_number,
    trains_embeddings,
    trains_norms,
)
from workloads.errors import InputError

TrainedMethod = Literal["lora", "lora+norm", "lora+embed", "lora+", "full"]

# Learning rates besides a method's own, which a trial has if it trains what they are for.
EXTRA_RATES = ("learning_rate_embeddings", "learning_rate_norms")
# A sweep trains each of these with each combination of its axes. More trials than this are a slip of the hand.
COUNTED = ("context_lengths", "methods", "seeds", "learning_rate_sweep")
MAX_TRIALS = 10_000
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
    eval_data: str | None = None
    """Own held-out data, in the forms of --data, which then trains whole; by default a part of --data is held out."""
    holdout: float | None = None
    """Share of the documents (for sft, examples) to hold out, chosen by a hash of their text; by default 0.1."""
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
    """What a sweep compares: every context length with every method, seed and axis value, and the untuned references.

    ``SweepSpec.of(values)`` takes a list for each axis; ``axes`` has the values by field, of which the first is also
    the field's own.
    """

    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
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
    learning_rate_for: tuple[str, ...] = ()
    """Learning rates of some trials, FIELD=VALUE:RATE, such as positions=yarn:1e-3 method=lora+,positions=yarn:3e-3;
    the last one that matches a trial holds."""
    learning_rate_sweep: tuple[float, ...] = (1.0,)
    """Multiples of each method's own learning rates to train with, such as 0.3 1 3: each is a trial, and the comparison
    takes each method's best."""
    learning_rates_chosen: str = "not stated"
    """How the methods' learning rates were chosen, as text for the report; it changes no trial."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs and on processors with bfloat16 arithmetic, else float32."""
    eval_span: int | None = None
    """Tokens scored of each held-out document, a span, the same at every context length; by default the longest of
    them."""
    search: Literal["none", "random", "optuna"] = "none"
    """Search each method's best setting at each context length, with all values of axes: at random, or by Optuna's TPE
    (Bayesian)."""
    search_trials: int = 16
    """Trials of a search for each of these, the method's own setting first if in the ranges."""
    search_learning_rate: tuple[float, float] | None = None
    """Lowest and highest learning rate of a search; by default from a tenth to ten times the method's own."""
    search_rank: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Ranks that a search chooses from for the LoRA methods."""
    search_group_size: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Group sizes that a search chooses from: shares of the context length (up to 1), or tokens."""

    def __post_init__(self) -> None:
        for name in COUNTED:
            check_values(name, getattr(self, name))
        self._check_axes()
        self._check_number()
        for multiple in self.learning_rate_sweep:
            if not 0 < multiple < math.inf:
                raise InputError(f"--learning-rate-sweep {multiple:g}: expected positive multiples, such as 0.3 1 3")
        only_pretraining: dict[str, Any] = {
            "--text-column": self.text_column,
            "--max-train-tokens": self.max_train_tokens,
        }
        for name, given in only_pretraining.items():
            if self.task == "sft" and given is not None:
                raise InputError(f"{name} {given} has no effect with --task sft. Leave it out")
        if min(steps := self.values_of("steps")) < 1:
            raise InputError(f"--steps {in_words(steps)}: expected at least 1; the untuned models are always evaluated")
        self._check_search()
        refuse_not_finite(self)
        for text in self.learning_rate_for:
            Rule.parse(text)
        trained = set[str]()
        for method, layers in itertools.product(self.methods, self.values_of("train_layers")):
            trained |= extra_rates(method, layers)
        for name in EXTRA_RATES:
            if name not in trained and any(rate is not None for rate in self.values_of(name)):
                raise InputError(
                    f"{flag(name)} {getattr(self, name)}: none of the methods {' '.join(self.methods)} "
                    "trains them; leave it out, or add a method that does, such as lora+"
                )

    def _check_number(self) -> None:
        counts = {name: len(getattr(self, name)) for name in COUNTED} | {n: len(v) for n, v in self.axes.items()}
        if (number := math.prod(counts.values())) > MAX_TRIALS:
            several = " x ".join(f"{count} {name}" for name, count in counts.items() if count > 1)
            raise InputError(f"{several} make {number:,} trials; expected at most {MAX_TRIALS:,} in a sweep")

    def _check_axes(self) -> None:
        """Puts the axes in the order of ``AXES``, and checks what ``dataclasses.replace`` may have broken."""
        for name, values in self.axes.items():
            if name not in AXES:
                raise InputError(f"{name!r} cannot be an axis; expected one of {', '.join(AXES)}")
            check_values(name, values)
            for value in values:
                refuse_number(name, value)
            if values[0] != getattr(self, name):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, and an axis of {in_words(values)}: change both "
                    "by SweepSpec.changed"
                )
        ordered = {name: self.axes[name] for name in AXES if len(self.axes.get(name, ())) > 1}
        object.__setattr__(self, "axes", ordered)

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
            other = "seeds" if len(self.seeds) > 1 else "learning_rate_sweep"
            raise InputError(
                f"{flag(other)} with --search {self.search}: a search compares settings of one seed, and chooses "
                "learning rates itself. Leave it out, and train the best setting with several seeds afterwards"
            )
        for name, searched in (("lora_rank", "search_rank"), ("group_size", "search_group_size")):
            if self.search != "none" and name in self.axes and (choices := getattr(self, searched)):
                raise InputError(
                    f"{flag(name)} {in_words(self.axes[name])} with --search {self.search}, which chooses it from "
                    f"{flag(searched)} {in_words(choices)}: give one value, or {flag(searched)} without any"
                )

    def values_of(self, name: str) -> tuple[Any, ...]:
        """All values of a field: those of its axis, else the one that it has."""
        return self.axes.get(name, (getattr(self, name),))

    def values(self) -> dict[str, Any]:
        """All fields as plain data, an axis as the list of its values; ``of`` is the inverse."""
        values = dataclasses.asdict(self)
        values.pop("axes")
        return join({name: values[name] for name in dict.fromkeys((*HASHED, *values))}, self.axes)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "the sweep") -> SweepSpec:
        """A sweep from its fields as plain data; a list of values makes a field of what is trained an axis.

        ``learning_rate_for`` may also be a mapping, ``{"positions=yarn": 1e-3}``.

        Raises:
            InputError: a field that a sweep does not have, or values that it cannot have.
        """
        known = {each.name for each in dataclasses.fields(cls)} - {"axes"}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"{where} has the unknown fields {', '.join(unknown)}; expected a sweep's fields: "
                f"{', '.join(sorted(known))}"
            )
        fields, axes = split(values)
        if isinstance(rules := fields.get("learning_rate_for"), Mapping):
            fields["learning_rate_for"] = tuple(f"{condition}:{rate}" for condition, rate in rules.items())
        return cls(**fields, axes=axes)

    def changed(self, **values: Any) -> SweepSpec:
        """This sweep with other values; a list makes a field an axis."""
        return SweepSpec.of(self.values() | values)

    def digest(self) -> str:
        """6 hexadecimal digits that distinguish this sweep from others of its recipe, for its name."""
        hashed = {name: getattr(self, name) for name in HASHED}
        for each in dataclasses.fields(self):
            default = {} if each.name == "axes" else each.default
            if each.name not in hashed and getattr(self, each.name) != default:
                hashed[each.name] = getattr(self, each.name)
        return hashlib.sha256(json.dumps(hashed, indent=1).encode()).hexdigest()[:6]


def extra_rates(method: Method, train_layers: str) -> set[str]:
    """The learning rates that a method has besides its own: those of embeddings and norms, where they train."""
    trains = {
        "learning_rate_embeddings": trains_embeddings(method, train_layers),
        "learning_rate_norms": trains_norms(method),
    }
    return {name for name, trained in trains.items() if trained}
