"""Instruction data as tokens, prepared once and read from memory-mapped files.

``prepare_examples`` writes all examples of a split one after the other; a token belongs to an answer or to a prompt:

    <folder>/train.tokens, validation.tokens      tokens, unsigned integers
    <folder>/train.answers, validation.answers    one byte a token: 1 if it is of an answer
    <folder>/train.offsets, validation.offsets    int64: the start of each example, and the end of the last
    <folder>/index.json                           dtype, counts, names and order of the validation examples, how data
                                                  was divided, SHA-256 of the files

Examples are stored whole, for every context length. Training drops those longer than the context, or on request cuts
them at its end; longer held-out examples are never scored.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workloads.config import LongExamples
from workloads.data.batch import Batch
from workloads.data.documents import Split, first_words
from workloads.data.instructions import (
    Instructions,
    empty_answer,
    encode_rows,
    example_text,
    first_text,
    form_of,
)
from workloads.data.near_copies import near_copies, shingle_size
from workloads.data.packed import (
    check_index,
    check_names,
    check_offsets,
    epoch_order,
    open_prepared,
    permutation,
    write_index,
)
from workloads.data.split import Division, refuse_same_data
from workloads.errors import InputError
from workloads.files.once import make_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raised when a folder written before can no longer be read, or would hold other tokens.
FORMAT_VERSION = 3

SPLITS: tuple[Split, ...] = ("train", "validation")
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class ValidationExample:
    """A held-out example: tokens (length,), int64, and which of them are scored (length,), bool."""

    name: str
    tokens: np.ndarray
    scored: np.ndarray

    @property
    def num_scored(self) -> int:
        """Its scored tokens."""
        return int(self.scored.sum())


@dataclass(frozen=True, eq=False)
class ExampleCorpus:
    """Prepared instruction data. Cheap to open and to pickle: tokens stay on disk until they are read.

    ``long_examples`` says what training does with examples longer than the context: ``drop``, or ``truncate`` (cut at
    the context's end, and dropped if no token of an answer is left). ``validation_hashes`` and ``division`` are as of a
    PackedCorpus. ``columns`` are the columns that were read, and
    ``sample`` is how the first text begins.
    """

    folder: Path
    corpus: str
    corpus_identity: str
    tokenizer_identity: str
    dtype: str
    tokens: dict[Split, int]
    examples: dict[Split, int]
    validation_names: list[str]
    validation_hashes: list[int]
    division: Division
    columns: list[str]
    sample: str

    def __post_init__(self) -> None:
        for counts in (self.tokens, self.examples):
            check_index(self.dtype, **{split: counts[split] for split in SPLITS})
        check_names(self.validation_names, self.validation_hashes, self.examples["validation"])

    @classmethod
    def open(cls, folder: Path | str) -> ExampleCorpus:
        """Opens what ``prepare_examples`` wrote.

        Raises:
            InputError: it is absent, its index is invalid, or its files are not those that were prepared.
        """
        return open_prepared(cls, folder, "instruction data", FORMAT_VERSION)

    def sizes(self) -> dict[str, int]:
        """Bytes of each of its files."""
        itemsize = np.dtype(self.dtype).itemsize
        return {
            f"{split}.{kind}": size
            for split in SPLITS
            for kind, size in (
                ("tokens", self.tokens[split] * itemsize),
                ("answers", self.tokens[split]),
                ("offsets", self.examples[split] * 8 + 8),
            )
        }

    def __reduce__(self):
        return ExampleCorpus.open, (self.folder,)  # a memory map would be pickled by its content

    def num_train_examples(self, context_length: int, long_examples: LongExamples = "drop") -> int:
        """Training examples that can be used at this context length."""
        return len(self._usable(context_length, long_examples))

    def check(self, context_length: int, batch: int, long_examples: LongExamples = "drop") -> None:
        """Checks that there are examples to train on at this context length; warns if a batch repeats an example.

        Raises:
            InputError: every training example is longer than the context.
        """
        usable = self.num_train_examples(context_length, long_examples)
        if usable == 0:
            raise InputError(
                f"no training example of {self.corpus} fits into {context_length:,} tokens: the shortest of "
                f"{self.examples['train']:,} has {self._lengths('train').min(initial=0):,}. Give a longer context "
                "length, or --long-examples truncate."
            )
        if usable < batch:
            warnings.warn(
                f"{self.corpus} has {usable} examples of up to {context_length:,} tokens, fewer than the batch of "
                f"{batch}: a batch repeats some of them",
                stacklevel=2,
            )

    def left_out(self, context_length: int, long_examples: LongExamples = "drop") -> str | None:
        """A note on the training examples longer than the context; None without any."""
        longer = int((self._lengths("train") > context_length).sum())
        if not longer:
            return None
        dropped = self.examples["train"] - self.num_train_examples(context_length, long_examples)
        done = "dropped" if dropped == longer else f"cut, and {dropped:,} of them dropped because no answer is left"
        return (
            f"{longer:,} of {self.examples['train']:,} training examples are longer than {context_length:,} tokens and "
            f"are {done if dropped else 'cut'}"
        )

    def filled(self, context_length: int, long_examples: LongExamples = "drop") -> float:
        """The mean share of the context that training examples fill; 0 if there are none."""
        usable = self._usable(context_length, long_examples)
        lengths = np.minimum(self._lengths("train")[usable], context_length)
        return float(lengths.mean()) / context_length if len(lengths) else 0.0

    def train_batch(
        self, step: int, batch: int, context_length: int, seed: int, long_examples: LongExamples = "drop"
    ) -> Batch:
        """Batch number ``step`` (from 0) of ``batch`` examples; depends only on the arguments, as in a PackedCorpus."""
        usable = self._usable(context_length, long_examples)
        if not len(usable):
            self.check(context_length, batch, long_examples)
        examples = [self._example("train", i) for i in usable[epoch_order(step, batch, len(usable), seed)]]
        return Batch.padded(
            [tokens[:context_length] for tokens, _ in examples], [answers[:context_length] for _, answers in examples]
        )

    def tokens_before(
        self, step: int, batch: int, context_length: int, seed: int, long_examples: LongExamples = "drop"
    ) -> int:
        """Tokens, without padding, of all batches before number ``step``."""
        usable = self._usable(context_length, long_examples)
        lengths = np.minimum(self._lengths("train")[usable], context_length)
        epochs, rest = divmod(step * batch, len(usable))
        return epochs * int(lengths.sum()) + int(lengths[permutation(len(usable), seed, epochs)[:rest]].sum())

    def validation_examples(self, context_length: int, num_examples: int) -> list[ValidationExample]:
        """Up to ``num_examples`` held-out examples that fit into the context, in the order of their hashes.

        They are an unbiased sample of those that fit.

        Raises:
            InputError: every held-out example is longer.
        """
        lengths = self._lengths("validation")
        order = [i for i in self._validation_order if lengths[i] <= context_length][:num_examples]
        if not order:
            raise InputError(
                f"no held-out example of {self.corpus} fits into {context_length:,} tokens: the shortest of "
                f"{len(lengths):,} has {lengths.min(initial=0):,}. Give a longer context length, or more examples."
            )
        found = []
        for i in order:
            tokens, answers = self._example("validation", i)
            found.append(ValidationExample(self.validation_names[i], tokens, np.append(False, answers[1:])))
        return found

    def has_validation_examples(self, context_length: int) -> bool:
        """Whether a held-out example fits into the context."""
        return bool((self._lengths("validation") <= context_length).any())

    def near_copies(self, shingle: int) -> dict[str, float]:
        """Held-out examples of which training has more than half (see near_copies.py), with that share."""
        tokens = ((self.validation_names[i], self._example("validation", i)[0]) for i in self._validation_order)
        return near_copies(self._maps["train", "tokens"], tokens, shingle)

    def _usable(self, context_length: int, long_examples: LongExamples) -> np.ndarray:
        """The training examples with a scored token within a context of this length."""
        if long_examples == "truncate":
            return np.flatnonzero(self._first_answers < context_length)
        return np.flatnonzero(self._lengths("train") <= context_length)

    def _example(self, split: Split, index: int) -> tuple[np.ndarray, np.ndarray]:
        begin, end = self._maps[split, "offsets"][index : index + 2]
        tokens, answers = (self._maps[split, kind][begin:end] for kind in ("tokens", "answers"))
        return tokens.astype(np.int64), answers.astype(bool)

    def _lengths(self, split: Split) -> np.ndarray:
        return np.diff(self._maps[split, "offsets"])

    @cached_property
    def _first_answers(self) -> np.ndarray:
        """The position of each training example's first scored token."""
        answers = np.flatnonzero(self._maps["train", "answers"])
        begins = self._maps["train", "offsets"][:-1]
        return answers[np.searchsorted(answers, begins + 1)] - begins

    @cached_property
    def _validation_order(self) -> list[int]:
        return sorted(range(len(self.validation_names)), key=lambda i: (self.validation_hashes[i], i))

    @cached_property
    def _maps(self) -> dict[tuple[Split, str], np.ndarray]:
        def mapped(split: Split, kind: str, dtype: str) -> np.ndarray:
            path = self.folder / f"{split}.{kind}"
            # An empty file cannot be mapped.
            return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)

        dtypes = {"tokens": self.dtype, "answers": "uint8", "offsets": "int64"}
        maps = {(split, kind): mapped(split, kind, dtype) for split in SPLITS for kind, dtype in dtypes.items()}
        for split in SPLITS:
            try:
                check_offsets(maps[split, "offsets"], self.tokens[split], f"{split}.offsets")
            except ValueError as error:
                raise InputError(f"prepared instruction data {self.folder}: {error}; delete that folder") from error
        return maps


def prepare_examples(
    instructions: Instructions,
    tokenizer: PreTrainedTokenizerBase | Callable[[], PreTrainedTokenizerBase],
    tokenizer_identity: str,
    root: Path | str,
    fetch: Callable[[str, Path], bool] = lambda name, folder: False,
) -> ExampleCorpus:
    """Opens the prepared examples below ``root``, after preparing them if they are absent.

    Args:
        tokenizer: a transformers tokenizer, or a function without arguments that loads one.
        tokenizer_identity: of the tokenizer and its chat template; it is part of the folder's name.
        fetch: fills a folder with the data prepared elsewhere under a name, if it can; returns whether it did.

    Raises:
        InputError: a row is no example, some have empty answers, or the tokenizer has no end-of-sequence token.
    """
    key = json.dumps(["examples", FORMAT_VERSION, instructions.identity(), tokenizer_identity])
    folder = Path(root) / hashlib.sha256(key.encode()).hexdigest()[:16]

    def write(partial: Path) -> None:
        if fetch(folder.name, partial):
            return
        loaded = tokenizer if hasattr(tokenizer, "eos_token_id") else tokenizer()
        _write(partial, instructions, loaded, tokenizer_identity)

    return ExampleCorpus.open(make_once(folder, write))


def _write(
    folder: Path, instructions: Instructions, tokenizer: PreTrainedTokenizerBase, tokenizer_identity: str
) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path or tokenizer_identity} has no end-of-sequence token, which ends an "
            "answer. Set its eos_token, or take another tokenizer."
        )
    dtype = np.min_scalar_type(max(tokenizer.eos_token_id, *tokenizer.get_vocab().values()))
    offsets: dict[Split, list[int]] = {split: [0] for split in SPLITS}
    names = []
    hashes = []
    characters = 0
    division = Division()
    rows = instructions.rows(division)
    with ExitStack() as stack:
        tokens_of, answers_of = (
            {split: stack.enter_context(open(folder / f"{split}.{kind}", "wb")) for split in SPLITS}
            for kind in ("tokens", "answers")
        )
        empty: list[str] = []
        columns: set[str] = set()
        sample = ""
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            empty += filter(None, (empty_answer(row) for row, *_ in chunk))
            if empty:
                continue  # the rest is read only to report all of them at once
            columns.update(form_of(row) for row, *_ in chunk)
            sample = sample or first_words(first_text(chunk[0][0]))
            encoded = encode_rows([row for row, *_ in chunk], tokenizer)
            for (row, split, order), (tokens, answers) in zip(chunk, encoded, strict=True):
                tokens_of[split].write(tokens.astype(dtype).data)
                answers_of[split].write(answers.astype(np.uint8).data)
                offsets[split].append(offsets[split][-1] + len(tokens))
                if split == "validation":
                    names.append(row.name)
                    hashes.append(order)
                    characters += len(example_text(row))
        if empty:
            more = f", and {len(empty) - 1:,} more rows have an empty answer" if len(empty) > 1 else ""
            raise InputError(f"{empty[0]}{more}. Take {'these rows' if more else 'the row'} out.")
        for file in (*tokens_of.values(), *answers_of.values()):
            file.flush()
            os.fsync(file.fileno())
    for split in SPLITS:
        np.array(offsets[split], dtype=np.int64).tofile(folder / f"{split}.offsets")
    refuse_same_data(instructions.name, len(offsets["train"]) - 1, division)
    prepared = ExampleCorpus(
        folder=folder,
        corpus=instructions.name,
        corpus_identity=instructions.identity(),
        tokenizer_identity=tokenizer_identity,
        dtype=dtype.name,
        tokens={split: offsets[split][-1] for split in SPLITS},
        examples={split: len(offsets[split]) - 1 for split in SPLITS},
        validation_names=names,
        validation_hashes=hashes,
        division=division,
        columns=sorted(columns),
        sample=sample,
    )
    division.shingle = shingle_size(characters, prepared.tokens["validation"])
    division.near_copies = prepared.near_copies(division.shingle)
    write_index(prepared, folder, FORMAT_VERSION)
