"""One retrieval test and its result, and when an answer is correct. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


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


def contains(answer: str, expected: str) -> bool:
    """Whether an answer contains the hidden text, as whole words or numbers (12345 is not in 123456).

    Case and punctuation do not matter, nor does a leading "the", which topics have or lack by chance.
    """
    return f" {_words(expected).removeprefix('the ')} " in f" {_words(answer)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))
