"""Greedy answers to retrieval tests.

Generation is written out here because ``generate`` follows a model's own settings (sampling, repetition penalties),
which would make models incomparable. The whole prompt is one causal forward without a mask, with logits of the last
position alone, so memory grows with the length and not with its square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from workloads.attention.interface import full_attention
from workloads.engines.engine import Engine
from workloads.evaluation.retrieval_cases import RetrievalResult, RetrievalTest, contains
from workloads.models.rotary import fixed_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_tests(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tests: Sequence[RetrievalTest],
    engine: Engine,
    on_progress: Callable[[RetrievalTest], None] = lambda test: None,
) -> list[RetrievalResult]:
    """Runs the tests, one prompt at a time, with full attention."""
    stop = _stop_tokens(model, tokenizer)
    results = []
    was_training = model.training
    model.eval()
    with torch.inference_mode(), full_attention(model), engine.autocast():
        for test in tests:
            with fixed_length(model, test.length):
                tokens = _greedy(model, test.tokens, test.answer_tokens, stop, engine.device)
            answer = tokenizer.decode(tokens)
            correct = contains(answer, test.expected)
            results.append(RetrievalResult(test.group, test.length, test.depth, test.expected, answer, correct))
            on_progress(test)
    model.train(was_training)
    return results


def _greedy(model: nn.Module, prompt: list[int], most: int, stop: set[int], device: torch.device) -> list[int]:
    """Generates up to ``most`` tokens, each the most likely one; ends before a token of ``stop``."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([prompt], device=device)
    answer: list[int] = []
    for _ in range(most):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = output.logits[:, -1:].argmax(dim=-1)
        if (token := tokens.item()) in stop:
            break
        answer.append(token)
    return answer


def _stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: a model's configuration may have several."""
    configured = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
