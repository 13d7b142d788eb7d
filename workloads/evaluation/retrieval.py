"""Common to retrieval tests: prompts of an exact length, greedy answers, and which answers are correct.

A model answers by greedy generation with a key/value cache, and passes if the hidden text appears in its answer. The
alternative, one forward that checks whether each token of the right answer is the most likely one, saves a few cached
steps and would fail a model that finds the number but puts a word or a line break before it.

Generation is written out here because ``generate`` follows a model's own settings (sampling, repetition penalties),
which would make models incomparable. The whole prompt is one causal forward without a mask, with logits of the last
position alone, so memory grows with the length and not with its square.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from workloads.attention.interface import full_attention
from workloads.engines.engine import Engine
from workloads.errors import InputError
from workloads.models.rotary import fixed_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RetrievalTest:
    """One prompt and what its answer must contain.

    Args:
        answer_tokens: the most tokens to generate.
        depth: where the hidden text is: 0 at the beginning, 1 at the end.
        group: tests that are counted together, such as ``30 topics``.
    """

    tokens: list[int]
    expected: str
    answer_tokens: int
    depth: float
    group: str

    @property
    def length(self) -> int:
        """Tokens of the prompt and its answer: a test of length N never exceeds a context of N."""
        return len(self.tokens) + self.answer_tokens


@dataclass(frozen=True)
class RetrievalResult:
    """A test's answer, and whether it is correct."""

    group: str
    length: int
    depth: float
    expected: str
    answer: str
    correct: bool

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the results."""
        return asdict(self)


@dataclass(frozen=True)
class Prompter:
    """Turns text into a prompt's tokens.

    They follow the beginning-of-sequence token of models that have one; with ``chat`` they are a user's message in the
    tokenizer's own chat template, for the assistant to answer.

    Raises:
        InputError: ``chat``, and the tokenizer has no chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise InputError("--chat: this model's tokenizer has no chat template; leave the flag out")

    def frame(self, opening: str, closing: str, cue: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the searched text. ``cue`` is the beginning of the answer, part of the prompt."""
        if not self.chat:
            special = self.tokenizer("")["input_ids"]
            begin = [token for token in special if token == self.tokenizer.bos_token_id]
            return begin + self.encode(opening), self.encode(closing + cue)
        message = [{"role": "user", "content": "\N{OBJECT REPLACEMENT CHARACTER}"}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(message[0]["content"])
        return self.encode(before + opening), self.encode(closing + after + cue.lstrip())

    def encode(self, text: str) -> list[int]:
        """Tokenises one piece of a prompt by itself, so that the lengths of pieces add up exactly."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


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


def contains(answer: str, expected: str) -> bool:
    """Whether an answer contains the hidden text, as whole words or numbers (12345 is not in 123456).

    Case and punctuation do not matter, nor does a leading "the", which topics have or lack by chance.
    """
    return f" {_words(expected).removeprefix('the ')} " in f" {_words(answer)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


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
