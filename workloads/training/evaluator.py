"""A trial's evaluations between its steps: at which lengths, what they report, and which was the best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from workloads.config import ExecutionConfig, TrainingConfig
from workloads.engines.engine import Engine
from workloads.evaluation.intervals import DocumentScores
from workloads.models.positions import original_context_length
from workloads.training.compilation import uncompiled
from workloads.training.trial_data import TrialData

Emit = Callable[..., None]


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became NaN or infinite."""


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation with the lowest perplexity at the trained length so far, after a step that trained."""

    step: int
    perplexity: float


@dataclass
class Evaluator:
    """Scores a trial's model on held-out data, with full attention and uncompiled layers.

    Args:
        step_0_scores: scores at the trained length, if already measured by an untuned trial with the same positions.
    """

    model: nn.Module
    config: TrainingConfig
    execution: ExecutionConfig
    data: TrialData
    engine: Engine
    emit: Emit
    step_0_scores: DocumentScores | None = None
    best: BestEvaluation | None = None

    def evaluate(self, step: int, at_original_length: bool) -> None:
        """Scores at the trained length, on request at the model's original one too, and emits each as ``eval``."""
        trained, original = self.config.context_length, original_context_length(self.model.config)
        lengths = [trained]
        if at_original_length and original != trained and self.data.can_score(original):
            lengths.append(original)
        for length in lengths:
            known = self.step_0_scores if step == 0 and length == trained else None
            scores = known or self.score(length)
            if length == trained:
                self._note_best(step, scores.perplexity)
            self.emit(
                "eval",
                step=step,
                tokens=self.data.tokens_before(step),
                context_length=length,
                perplexity=scores.perplexity,
                nll=scores.nll.tolist(),
                num_tokens=scores.tokens.tolist(),
            )

    def score(self, length: int) -> DocumentScores:
        """Scores held-out data with a context of up to ``length`` tokens.

        Raises:
            NonFiniteLoss: some of it has no finite score.
        """
        with uncompiled(self.model):
            scores = self.data.score(self.model, length, self.engine, self.execution.eval_batch_tokens)
        if unscored := int((~np.isfinite(scores.nll)).sum()):
            raise NonFiniteLoss(
                f"evaluation at {length:,} tokens: the loss of {unscored} of {len(scores.nll)} held-out documents is "
                "NaN or infinite; use float32 if it is a matter of precision, or another model"
            )
        return scores

    def _note_best(self, step: int, perplexity: float) -> None:
        # Step 0 has no checkpoint. Every worker has the same scores, so that all save or none.
        if step and perplexity < (self.best.perplexity if self.best else math.inf):
            self.best = BestEvaluation(step, perplexity)
