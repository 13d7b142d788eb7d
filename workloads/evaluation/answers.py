"""Perplexity over the answers of held-out examples, with full attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from workloads.attention.interface import full_attention
from workloads.data import Batch, ValidationExample
from workloads.engines.engine import Engine
from workloads.evaluation.intervals import DocumentScores
from workloads.models.rotary import padded_inputs
from workloads.training.loss import next_token_losses


def score_answers(
    model: nn.Module, examples: Sequence[ValidationExample], engine: Engine, batch_tokens: int = 8192
) -> DocumentScores:
    """Scores the answers of every example, each a document of the result; several workers share the examples."""
    # Similar lengths together, for little padding; the longest first, so that memory runs out at once or never.
    left = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens), reverse=True)
    nll = torch.zeros(len(examples), dtype=torch.float64)

    was_training = model.training
    model.eval()
    with torch.no_grad(), full_attention(model), engine.autocast():
        while left:
            per_round = max(1, batch_tokens // len(examples[left[0]].tokens)) * engine.num_workers
            together, left = left[:per_round], left[per_round:]
            mine = together[engine.rank :: engine.num_workers]
            # Under ZeRO-3 the workers fetch the weights together: one without a share takes part, uncounted.
            rows = mine or together[:1]
            batch = Batch.padded([examples[i].tokens for i in rows], [examples[i].scored for i in rows])
            tokens, scored, mask = to_device(batch, engine.device)
            losses = next_token_losses(model, tokens, **padded_inputs(model, mask))
            if mine:
                nll[rows] = (losses.double() * scored[:, 1:]).sum(dim=1).cpu()
    model.train(was_training)

    return DocumentScores(engine.sum(nll).numpy(), np.array([example.num_scored for example in examples]))


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A batch's tokens, which of them are scored, and the attention mask (None where nothing is padding)."""
    mask = batch.attention_mask
    return _copy(batch.tokens, device), _copy(batch.scored, device), None if mask is None else _copy(mask, device)


def _copy(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    # A GPU copies asynchronously only from pinned memory; otherwise the host waits for all work before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
