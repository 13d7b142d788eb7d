"""Perplexity over held-out documents, with full attention.

The rule: each document is cut into windows of the evaluation length that do not overlap and do not cross documents;
every token of a window is scored except its first, which has no context (so N - 1 of N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from workloads.attention import full_attention
from workloads.engine import Engine
from workloads.evaluation.bootstrap import DocumentScores


class Windows(Protocol):
    """A document's windows: ``tokens`` has the shape (windows, context length)."""

    tokens: np.ndarray


def score_documents(
    model: nn.Module, documents: Sequence[Windows], engine: Engine, batch_tokens: int = 8192
) -> DocumentScores:
    """Scores every window of every document; with several workers each takes its share and all get the result."""
    windows = np.concatenate([document.tokens for document in documents])
    owner = np.repeat(np.arange(len(documents)), [len(document.tokens) for document in documents])
    context_length = windows.shape[1]
    # Every worker makes as many forward passes as any other, since under ZeRO-3 they fetch the weights together: the
    # windows that fill up the last round belong to no document.
    rounded = math.ceil(len(windows) / engine.num_workers) * engine.num_workers
    owner = np.append(owner, np.full(rounded - len(windows), len(documents)))
    windows = windows[np.arange(rounded) % len(windows)]
    per_forward = max(1, batch_tokens // context_length)
    nll = torch.zeros(len(documents) + 1, dtype=torch.float64)
    mine = np.arange(len(windows))[engine.rank :: engine.num_workers]

    was_training = model.training
    model.eval()
    with torch.inference_mode(), full_attention(model), engine.autocast():
        for start in range(0, len(mine), per_forward):
            rows = mine[start : start + per_forward]
            tokens = torch.from_numpy(windows[rows]).to(engine.device)
            losses = next_token_losses(model(input_ids=tokens).logits, tokens)
            nll.index_add_(0, torch.from_numpy(owner[rows]), losses.double().sum(dim=1).cpu())
    model.train(was_training)

    tokens_scored = np.bincount(owner, minlength=len(documents) + 1) * (context_length - 1)
    return DocumentScores(engine.sum(nll).numpy()[:-1], tokens_scored[:-1])


def next_token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (nats) of each token but the first: logits (batch, N, vocabulary) -> (batch, N - 1)."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(tokens.shape[0], -1)
