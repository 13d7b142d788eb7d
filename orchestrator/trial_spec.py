"""A trial as data, and its identity.

A trial's fingerprint is a hash of all that changes its result and nothing else: it names the trial's folder, its Ray
Train run and its MLflow run, so that the same trial is never trained twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from workloads.config import RESULT_VERSION, TrainingConfig

# What a trial.json without the field was trained by.
FIRST_RESULT_VERSION = 2


def lists_to_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Values read from JSON, which has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What a model, its tokenizer and a corpus turned out to be: hashes of their content, or ids with a revision."""

    model: str
    tokenizer: str
    data: str


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One trial.

    ``model``, ``data`` and ``eval_data`` are locations; ``identities``, ``training`` and ``result_version`` make the
    fingerprint; ``distinction`` sets the trial's label apart from its sweep's other trials of the method.
    """

    model: str
    data: str
    text_column: str | None = None
    eval_data: str | None = None
    identities: Identities
    training: TrainingConfig
    distinction: str = ""
    result_version: int = RESULT_VERSION

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the trial's result.

        Fields at their default are left out of the hash, so that a new field orphans no trial; a changed
        default needs a raised RESULT_VERSION.
        """
        identity = {
            "result_version": self.result_version,
            **dataclasses.asdict(self.identities),
            "training": self.training.not_at_default(),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def of_earlier_versions(self) -> list[TrialSpec]:
        """The same trial as earlier versions of longspan trained it, which may have other results."""
        versions = range(FIRST_RESULT_VERSION, self.result_version)
        return [dataclasses.replace(self, result_version=version) for version in versions]

    def untuned(self) -> TrialSpec:
        """The untuned model that this trial starts from, as a trial; a reference returns itself."""
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
        """Its name for people: ``lora+ 2048``, ``untuned yarn 2048``, ``lora+ 2048 lr 3e-3 r 16``."""
        training = self.training
        name = f"untuned {training.positions}" if training.method == "untuned" else training.method
        seed = f" seed {training.seed}" if training.seed else ""
        distinction = f" {self.distinction}" if self.distinction else ""
        return f"{name} {training.context_length}{distinction}{seed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; ``from_dict`` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrialSpec:
        """A trial from what ``to_dict`` gives; further keys, as in a trial.json, are ignored."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(
            **{
                "result_version": FIRST_RESULT_VERSION,
                **{name: value for name, value in values.items() if name in fields},
                "identities": Identities(**values["identities"]),
                "training": TrainingConfig(**lists_to_tuples(values["training"])),
            }
        )
