"""What a trial trains and is scored on: packed documents, or the answers of instruction data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from workloads.attention.documents import document_ids
from workloads.config import TrainingConfig
from workloads.data import Batch, ExampleCorpus, PackedCorpus
from workloads.engines.engine import Engine
from workloads.evaluation.answers import score_answers
from workloads.evaluation.intervals import DocumentScores
from workloads.evaluation.windows import score_documents


class TrialData(Protocol):
    """A corpus, as a trial's configuration reads it."""

    def batch(self, step: int) -> Batch:
        """The sequences of the step after ``step`` steps, of all workers."""

    def tokens_before(self, step: int) -> int:
        """Tokens of the first ``step`` steps, over all workers, without padding."""

    def model_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model's call takes in training beside ``tokens`` and the attention mask."""

    def can_score(self, length: int) -> bool:
        """Whether there is held-out data to score with a context of ``length`` tokens."""

    def score(self, model: nn.Module, length: int, engine: Engine, batch_tokens: int) -> DocumentScores:
        """Scores held-out data with a context of ``length`` tokens."""


def trial_data(corpus: PackedCorpus | ExampleCorpus, config: TrainingConfig) -> TrialData:
    """The data of a trial with this configuration."""
    return Examples(corpus, config) if isinstance(corpus, ExampleCorpus) else PackedDocuments(corpus, config)


@dataclass(frozen=True)
class PackedDocuments:
    """Pretraining: sequences of packed documents; held-out documents are scored in windows."""

    corpus: PackedCorpus
    config: TrainingConfig

    def batch(self, step: int) -> Batch:
        """The sequences of the step after ``step`` steps."""
        config = self.config
        return Batch.whole(self.corpus.train_batch(step, config.batch, config.context_length, config.seed))

    def tokens_before(self, step: int) -> int:
        """Tokens of the first ``step`` steps."""
        return step * self.config.batch * self.config.context_length

    def model_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Document boundaries, if attention stops at them."""
        return {"document_ids": document_ids(tokens, self.corpus.eos_token_id)} if self.config.document_mask else {}

    def can_score(self, length: int) -> bool:
        """Whether windows of this length fill the span that is scored."""
        return self.config.eval_span % length == 0

    def score(self, model: nn.Module, length: int, engine: Engine, batch_tokens: int) -> DocumentScores:
        """Scores windows of held-out documents."""
        windows = self.corpus.validation_windows(length, self.config.eval_span, self.config.eval_documents)
        return score_documents(model, windows, engine, batch_tokens)


@dataclass(frozen=True)
class Examples:
    """Supervised fine-tuning: padded examples, of which the answers are scored, held-out ones whole."""

    corpus: ExampleCorpus
    config: TrainingConfig

    def batch(self, step: int) -> Batch:
        """The sequences of the step after ``step`` steps."""
        config = self.config
        return self.corpus.train_batch(step, config.batch, config.context_length, config.seed, config.long_examples)

    def tokens_before(self, step: int) -> int:
        """Tokens of the first ``step`` steps."""
        config = self.config
        if not config.steps:
            return 0
        return self.corpus.tokens_before(step, config.batch, config.context_length, config.seed, config.long_examples)

    def model_inputs(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Nothing: an example is one document."""
        return {}

    def can_score(self, length: int) -> bool:
        """Whether a held-out example fits."""
        return self.corpus.has_validation_examples(length)

    def score(self, model: nn.Module, length: int, engine: Engine, batch_tokens: int) -> DocumentScores:
        """Scores the answers of held-out examples."""
        return score_answers(
            model, self.corpus.validation_examples(length, self.config.eval_documents), engine, batch_tokens
        )
