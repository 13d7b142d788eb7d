"""Fields of journal events, and what writes them."""

from collections.abc import Callable

import numpy as np

from orchestrator.records.events import make_event
from orchestrator.records.journal import Journal

# Six documents: their tokens, and how hard each is.
TOKENS = np.array([1000, 1500, 1200, 900, 1100, 1300])
HARDNESS = np.array([0.9, 1.3, 1.0, 1.1, 0.8, 1.2])


def evaluation(step, perplexity, context_length=1024):
    return {
        "step": step, "tokens": step * 10, "context_length": context_length, "perplexity": perplexity,
        "nll": [1.0], "num_tokens": [1],
    }  # fmt: skip


def document_evaluation(step, perplexity, context_length):
    """Six documents of different hardness whose joint perplexity is the one given."""
    nll = HARDNESS * TOKENS
    nll = nll + TOKENS * (np.log(perplexity) - nll.sum() / TOKENS.sum())
    return {
        "step": step, "tokens": step * 4096, "context_length": context_length, "perplexity": perplexity,
        "nll": nll.tolist(), "num_tokens": TOKENS.tolist(),
    }  # fmt: skip


def a_step(step, loss=1.0):
    return {
        "step": step, "tokens": step * 10, "loss": loss, "learning_rate": 0.1, "grad_norm": 1.0, "seconds": 2.0,
        "tokens_per_second": 5.0, "peak_memory_gib": 1.0,
    }  # fmt: skip


def emit_to(journal: Journal) -> Callable[..., None]:
    """What ``workloads.training.loop`` calls with each event, writing it to a journal."""
    return lambda name, **fields: journal.append(make_event(name, **fields))
