"""Documents to score: the first spans of tokens of those that are long enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workloads.data import Corpus
from workloads.data.documents import Document
from workloads.data.encoding import encode_texts
from workloads.data.packed import spans_taken
from workloads.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ScoredDocument:
    """A document's name and the tokens of its first spans, int64."""

    name: str
    tokens: np.ndarray


def documents_to_score(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, span: int, count: int, held_out_only: bool = True
) -> list[ScoredDocument]:
    """Up to ``count`` documents that have ``span`` tokens, in the order of their hashes, each with its first span.

    Where fewer are long enough, further spans of them follow. Held-out documents are the same that a sweep's trials
    score (``PackedCorpus.validation_windows``), without tokenising the training split.

    Raises:
        InputError: none is long enough; the message counts those of shorter lengths.
    """
    read: list[ScoredDocument] = []
    num_long = 0
    for document in _in_fixed_order(corpus.documents("validation" if held_out_only else None)):
        (tokens,) = encode_texts(tokenizer, [document.text])
        read.append(ScoredDocument(document.name, np.array(tokens, dtype=np.uint32)))
        num_long += len(tokens) >= span
        if num_long == count:
            break
    sizes = [len(document.tokens) for document in read]
    found = [
        ScoredDocument(document.name, document.tokens[: spans * span].astype(np.int64))
        for document, spans in zip(read, spans_taken(sizes, span, count))
        if spans
    ]
    if not found:
        lengths = [2**power for power in range(6, 24) if 2**power <= max(sizes)]
        counts = ", ".join(f"{sum(size >= length for size in sizes)} at {length:,}" for length in lengths[-4:])
        which = "held-out documents" if held_out_only else "documents"
        raise InputError(
            f"no document of corpus {corpus.name} has {span:,} tokens: the longest of {len(sizes)} {which} has "
            f"{max(sizes):,}. Long enough are {counts or 'none at 64'}. Give shorter --lengths, or longer documents"
            + ("; --split all takes those that are not held out too" if held_out_only else "")
        )
    return found


def _in_fixed_order(documents: Iterable[Document]) -> list[Document]:
    # The two splits of a single document that was cut in two share its name.
    return sorted(documents, key=lambda document: (document.order, document.split))
