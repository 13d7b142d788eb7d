"""Passkey retrieval (Mohtashami and Jaggi, 2023, as in the LongLoRA paper, figure 4): a number hidden in filler text.

The paper hides it at a random place, ten times at each length; here the depth is given, and the result is a table of
length by depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from workloads.errors import InputError
from workloads.evaluation import pictures
from workloads.evaluation.retrieval import Prompter, RetrievalOptions, collect_tests, prepare_tests, retrieval_table
from workloads.evaluation.retrieval_cases import RetrievalTest
from workloads.evaluation.task import EvaluationTask, Result, Run

if TYPE_CHECKING:
    from workloads.evaluation.subject import Subject

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key?"
CUE = " The pass key is"

# The paper draws keys from 1 to 50,000; these always have five digits, which makes them equally hard to guess.
KEYS = range(10_000, 50_000)
# Room for five digits, a space and some words, even for a tokenizer of bytes.
ANSWER_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class PasskeyOptions(RetrievalOptions):
    """Where the key is hidden."""

    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """passkey: where the key is hidden, in percent of the filler before it; tests cycle through them."""

    def __post_init__(self) -> None:
        """Checks the values."""
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise InputError(f"--depths {' '.join(map(str, self.depths))}: expected percentages from 0 to 100")
        super().__post_init__()


def _prepare(subject: Subject, options: PasskeyOptions, console: Console) -> Run:
    """Prepares passkey prompts of each length."""
    prompter = Prompter(subject.tokenizer, options.chat)
    depths = [depth / 100 for depth in options.depths]

    def make(length: int) -> list[RetrievalTest]:
        return passkey_tests(prompter, [length], depths, options.tests, options.seed)

    return prepare_tests(subject, options, console, "passkey", collect_tests(subject, options, console, make))


def passkey_tests(
    prompter: Prompter, lengths: Sequence[int], depths: Sequence[float], tests: int, seed: int
) -> list[RetrievalTest]:
    """``tests`` prompts of each length, which cycle through the depths.

    A prompt and the room for its answer are exactly ``length`` tokens: filler is cut to the length that is left, and
    the sentence with the key comes after a share ``depth`` of it.

    Raises:
        InputError: a length has no room for filler.
    """
    generator = np.random.default_rng(seed)
    return [
        _test(prompter, length, depths[index % len(depths)], str(generator.integers(KEYS.start, KEYS.stop)))
        for length in lengths
        for index in range(tests)
    ]


def _test(prompter: Prompter, length: int, depth: float, key: str) -> RetrievalTest:
    before, after = prompter.frame(TASK, QUESTION, CUE)
    needle = prompter.encode(NEEDLE.format(key=key))
    room = length - ANSWER_TOKENS - len(before) - len(needle) - len(after)
    if room < 0:
        raise InputError(f"a passkey prompt needs {length - room} tokens with this tokenizer, not {length}")
    line = prompter.encode(FILLER)
    filler = (line * (room // len(line) + 1))[:room]
    place = round(depth * room)
    tokens = before + filler[:place] + needle + filler[place:] + after
    return RetrievalTest(tokens, key, ANSWER_TOKENS, depth, group=f"{length} tokens")


def _picture(result: Result, path: Path) -> Path:
    """The heat map: rows depth, columns length, colour the share of tests passed."""
    rows = result["lengths"]
    depths = sorted({cell["depth"] for row in rows for cell in row["depths"]})
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    colours = LinearSegmentedColormap.from_list("accuracy", [pictures.LIGHT, pictures.BLUE])
    with pictures.style():
        width = 150 + max(220, 46 * len(rows))
        figure, axes = pictures.figure(
            result, "Passkey retrieval", width, 138 + 26 * max(4, len(depths)),
            f"share of keys found (dark: all), {rows[0]['tests']} tests each length",
        )  # fmt: skip
        for column, row in enumerate(rows):
            for cell in row["depths"]:
                share, place = cell["correct"] / cell["tests"], depths.index(cell["depth"])
                axes.add_patch(pictures.square(column, place, colours(share)))
                ink = "white" if sum(to_rgb(colours(share))) < 1.6 else pictures.INK
                axes.text(column, place, f"{share:.0%}", ha="center", va="center", color=ink, size=8.6)
        axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(len(depths) - 0.5, -0.5))
        axes.set_xticks(range(len(rows)), [pictures.short(row["length"]) for row in rows])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("length, tokens")
        axes.set_ylabel("depth of the key (0%: at the start)")
        inside = sum(row["length"] <= result["model"]["original_context_length"] for row in rows)
        if 0 < inside < len(rows):
            axes.axvline(inside - 0.5, color=pictures.ORANGE, linewidth=1.6)
            axes.annotate(
                "beyond the original context →", (inside - 0.5, 1), (4, 4), ("data", "axes fraction"), "offset points",
                color=pictures.ORANGE, size=8.6,
            )  # fmt: skip
        return pictures.save(figure, path)


PASSKEY = EvaluationTask(
    name="passkey", options=PasskeyOptions, prepare=_prepare, table=retrieval_table, picture=_picture
)
