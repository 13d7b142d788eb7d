"""Common to retrieval tests: prompts of an exact length, which answers are correct, and the accuracy by length.

A model answers by greedy generation with a key/value cache, and passes if the hidden text appears in its answer. The
alternative, one forward that checks whether each token of the right answer is the most likely one, saves a few cached
steps and would fail a model that finds the number but puts a word or a line break before it. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from workloads.errors import InputError
from workloads.evaluation.intervals import accuracy_interval
from workloads.evaluation.options import CommonOptions
from workloads.evaluation.retrieval_cases import RetrievalResult, RetrievalTest
from workloads.evaluation.task import Result, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from workloads.evaluation.subject import Subject


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(CommonOptions):
    """What retrieval tests share."""

    tests: int = 10
    """passkey, topics: prompts of each length (the paper: 10); with LongChat's cases, of each file."""
    chat: bool = False
    """passkey, topics: put prompts into the tokenizer's chat template."""

    def __post_init__(self) -> None:
        """Checks the values."""
        self._require_positive("tests")
        super().__post_init__()


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


def collect_tests(
    subject: Subject, options: RetrievalOptions, console: Console, make: Callable[[int], list[RetrievalTest]]
) -> list[RetrievalTest]:
    """Tests of every length. The original length, if it was only added, may be too short for a prompt."""
    tests: list[RetrievalTest] = []
    for length in subject.lengths:
        try:
            tests += make(length)
        except InputError as error:
            if length in options.lengths or len(subject.lengths) == 1:
                raise
            console.print(f"note: no tests at the original length: {error}")
    return tests


def prepare_tests(
    subject: Subject, options: RetrievalOptions, console: Console, what: str, tests: list[RetrievalTest]
) -> Run:
    """Prints the cost of the tests; the run counts correct answers by group, and by depth within it."""
    from workloads.evaluation.greedy import run_tests
    from workloads.evaluation.time_estimate import print_cost, progress  # imports torch, which --help does not need

    counts = Counter(len(test.tokens) for test in tests)
    cost = print_cost(subject, what, counts, max(test.answer_tokens for test in tests), console)

    def run() -> Result:
        with progress(console, cost.tokens) as advance:
            results = run_tests(
                subject.model, subject.tokenizer, tests, subject.engine,
                on_progress=lambda test: advance(len(test.tokens)),
            )  # fmt: skip
        return {
            "what": what,
            "rule": "greedy answer contains what was hidden; length counts the prompt and the room for the answer",
            "chat": options.chat,
            "cost": vars(cost),
            "lengths": _accuracies(results),
            "answers": [result.to_dict() for result in results],
        }

    return run


def _accuracies(results: list[RetrievalResult]) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(result.group for result in results):
        mine = [result for result in results if result.group == group]
        interval = accuracy_interval(sum(result.correct for result in mine), len(mine))
        cells = {}
        for depth in sorted({result.depth for result in mine}):
            cell = [result.correct for result in mine if result.depth == depth]
            cells[depth] = {"depth": depth, "correct": sum(cell), "tests": len(cell)}
        rows.append(
            {
                "group": group,
                "length": round(np.mean([result.length for result in mine])),
                "correct": sum(result.correct for result in mine),
                "tests": len(mine),
                "accuracy": interval.value,
                "low": interval.low,
                "high": interval.high,
                "depths": list(cells.values()),
            }
        )
    return rows


def retrieval_table(result: Result) -> tuple[str, Table]:
    """A heading, and one row a length, or a file of LongChat's cases."""
    table = Table(box=None, pad_edge=False)
    heading = f"\n{result['what']}: answers of {result['model']['label']}, {result['confidence']:.0%} Wilson intervals"
    named = any(row["group"] != f"{row['length']} tokens" for row in result["lengths"])
    if named:
        table.add_column("cases")
    for column in ("length", "correct", "accuracy", "interval"):
        table.add_column(column, justify="right")
    for row in result["lengths"]:
        table.add_row(
            *([row["group"]] if named else []),
            f"{row['length']:,}",
            f"{row['correct']} of {row['tests']}",
            f"{row['accuracy']:.0%}",
            f"{row['low']:.0%} to {row['high']:.0%}",
        )
    return heading, table
