"""Perplexity over held-out documents, with full attention, by two rules.

A document is cut into windows of N tokens that lie inside it and begin every ``stride`` tokens from its start: at N
they do not overlap; smaller, they slide. What is left after the last whole window is not scored. A window is forwarded
by itself, so a token's context begins at its window's start. Of each window,

    all     scores every token but the first, which has no context: N - 1 tokens, the early ones with little context.
            This is how the LongLoRA paper's own evaluation scores, with stride 256 (there, windows cross documents).
    last    scores the last K tokens only, each with at least N - K tokens of context. With stride = K each token is
            scored exactly once: the sliding window of Press et al. (2021), less its first window's other tokens.

Perplexity is exp of the mean negative log-likelihood over all scored tokens; where windows slide, ``all`` counts a
token once for each window it is in. Where they do not overlap, ``all`` scores the same tokens at every length that
divides the span (but for windows' first), while ``last`` scores the ends of windows, which are other tokens at other
lengths: to compare lengths by ``last``, slide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from workloads.attention.interface import full_attention
from workloads.engines.engine import Engine
from workloads.evaluation.bootstrap import DocumentScores
from workloads.training.loss import next_token_losses


class Windows(Protocol):
    """A document's windows: ``tokens`` has the shape (windows, context length)."""

    tokens: np.ndarray


def score_documents(
    model: nn.Module, documents: Sequence[Windows], engine: Engine, batch_tokens: int = 8192
) -> DocumentScores:
    """Scores every window of every document by the rule ``all``; with several workers each takes its share and all
    get the result.
    """
    windows = np.concatenate([document.tokens for document in documents])
    owner = np.repeat(np.arange(len(documents)), [len(document.tokens) for document in documents])
    scored = windows.shape[1] - 1
    nll = score_windows(model, windows, [scored], engine, batch_tokens)[:, 0]
    return by_document(owner, nll, scored, len(documents))


def score_windows(
    model: nn.Module,
    windows: np.ndarray,
    scored: Sequence[int],
    engine: Engine,
    batch_tokens: int = 8192,
    on_progress: Callable[[int], None] = lambda windows: None,
) -> np.ndarray:
    """The negative log-likelihood (nats) of each window's last tokens, summed: shape (windows, rules), float64.

    Args:
        windows: token ids, shape (windows, N).
        scored: for each rule, how many of a window's last tokens it scores; N - 1 is the rule ``all``.
        batch_tokens: about how many tokens one forward takes; at least one window.
        on_progress: is called with the number of windows of each forward.
    """
    per_forward = max(1, batch_tokens // windows.shape[1])
    nll = torch.zeros(len(windows), len(scored), dtype=torch.float64)
    # Every worker makes as many forward passes as any other, since under ZeRO-3 they fetch the weights together: some
    # score a window once more to fill up the last round, and what they find is not counted.
    rounded = math.ceil(len(windows) / engine.num_workers) * engine.num_workers
    mine = np.arange(rounded)[engine.rank :: engine.num_workers]

    was_training = model.training
    model.eval()
    # Not inference_mode: ZeRO-3 keeps weights that it fetches here, and training could not go on with them.
    with torch.no_grad(), full_attention(model), engine.autocast():
        for start in range(0, len(mine), per_forward):
            rows = mine[start : start + per_forward]
            tokens = torch.from_numpy(windows[rows % len(windows)]).to(engine.device)
            losses = next_token_losses(model, tokens).double()
            sums = torch.stack([losses[:, -last:].sum(dim=1) for last in scored], dim=1).cpu()
            counted = rows < len(windows)
            nll[rows[counted]] = sums[torch.from_numpy(counted)]
            on_progress(int(counted.sum()))
    model.train(was_training)
    return engine.sum(nll).numpy()


def by_document(owner: np.ndarray, nll: np.ndarray, scored: int, num_documents: int) -> DocumentScores:
    """Scores of windows, summed over the document that each belongs to; ``owner`` and ``nll`` are (windows,)."""
    return DocumentScores(
        np.bincount(owner, weights=nll, minlength=num_documents),
        np.bincount(owner, minlength=num_documents) * scored,
    )


def cut_windows(documents: Sequence[np.ndarray], length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(windows, owner): all windows of ``length`` tokens that begin every ``stride`` tokens and lie inside a document,
    shape (windows, length), and the index of the document that each is of, shape (windows,).
    """
    cut = [np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride] for tokens in documents]
    return np.concatenate(cut), np.repeat(np.arange(len(cut)), [len(windows) for windows in cut])
