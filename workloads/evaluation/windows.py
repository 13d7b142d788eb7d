"""Windows of held-out documents, and their scores with full attention by two rules.

A document is cut into windows of N tokens inside it that begin every ``stride`` tokens from its start: with a stride
of N they do not overlap; with a smaller one they slide. The rest after the last whole window is not scored. A window is
forwarded by itself, so a token's context begins at its window's start. Of each window,

    all     scores every token but the first, which has no context: N - 1 tokens, the early ones with little context.
            This is how the LongLoRA paper's own evaluation scores, with stride 256 (there, windows cross documents).
    last    scores the last K tokens only, each with at least N - K tokens of context. With stride = K each token is
            scored exactly once: the sliding window of Press et al. (2021), without its first window's other tokens.

Perplexity is exp of the mean negative log-likelihood over all scored tokens; if windows slide, ``all`` counts a token
once for each window it is in. If they do not overlap, ``all`` scores the same tokens at every length that divides the
span (except windows' first), while ``last`` scores the ends of windows, which are other tokens at other lengths: to
compare lengths by ``last``, let windows slide.
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
from workloads.evaluation.intervals import DocumentScores
from workloads.training.loss import next_token_losses


class Windows(Protocol):
    """A document's windows: ``tokens`` has the shape (windows, context length)."""

    @property
    def tokens(self) -> np.ndarray:
        """Token ids."""


def score_documents(
    model: nn.Module, documents: Sequence[Windows], engine: Engine, batch_tokens: int = 8192
) -> DocumentScores:
    """Scores every window of every document by the rule ``all``; several workers share the windows.

    All workers get the whole result.
    """
    windows = np.concatenate([document.tokens for document in documents])
    owner = np.repeat(np.arange(len(documents)), [len(document.tokens) for document in documents])
    scored = windows.shape[1] - 1
    nll = score_windows(model, windows, [scored], engine, batch_tokens)[:, 0]
    return DocumentScores.of_windows(owner, nll, scored, len(documents))


def score_windows(
    model: nn.Module,
    windows: np.ndarray,
    scored: Sequence[int],
    engine: Engine,
    batch_tokens: int = 8192,
    on_progress: Callable[[int], None] = lambda windows: None,
) -> np.ndarray:
    """The summed negative log-likelihood (nats) of each window's last tokens: shape (windows, rules), float64.

    Args:
        windows: token ids, shape (windows, N).
        scored: for each rule, how many of a window's last tokens it scores; N - 1 is the rule ``all``.
        batch_tokens: about how many tokens one forward takes; at least one window.
        on_progress: is called with the number of windows of each forward.
    """
    per_forward = max(1, batch_tokens // windows.shape[1])
    nll = torch.zeros(len(windows), len(scored), dtype=torch.float64)
    # Every worker makes equally many forward passes, since under ZeRO-3 they fetch the weights together: some score a
    # window again to fill the last round, uncounted.
    rounded = math.ceil(len(windows) / engine.num_workers) * engine.num_workers
    mine = np.arange(rounded)[engine.rank :: engine.num_workers]

    was_training = model.training
    model.eval()
    # Not inference_mode: ZeRO-3 keeps weights that it fetches here, and could not train with them.
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


def cut_windows(documents: Sequence[np.ndarray], length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into windows of ``length`` tokens that begin every ``stride`` tokens.

    Returns (windows, owner): shape (windows, length), and each window's document by index, shape (windows,).
    """
    cut = [np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride] for tokens in documents]
    return np.concatenate(cut), np.repeat(np.arange(len(cut)), [len(windows) for windows in cut])
