"""Passkey retrieval (Mohtashami and Jaggi, 2023, as in the LongLoRA paper, figure 4): a number hidden in filler text.

The paper hides it at a random place, ten times at each length; here the depth is given, and the result is a table of
length by depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workloads.errors import InputError
from workloads.evaluation.retrieval import Prompter, RetrievalTest

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
