"""Tokenise a corpus once per tokenizer, for every context length (the layout is in packed.py).

The folder's name is a hash of the corpus's identity, the tokenizer's, and the format.

A corpus with a budget of training tokens is the beginning of each split of the whole one: reading stops once the
training split has its tokens and the validation split ``BUDGETED_VALIDATION_TOKENS``. No more than that is fetched of a
data set larger than the disk, and the held-out documents are the same for every budget.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workloads.data.corpus import Corpus
from workloads.data.documents import Document, Split, first_words
from workloads.data.encoding import encode_texts
from workloads.data.near_copies import shingle_size
from workloads.data.packed import FORMAT_VERSION, PackedCorpus, write_index
from workloads.data.split import Division, refuse_same_data
from workloads.errors import InputError
from workloads.files.once import make_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters tokenised at once: enough to keep the tokenizer's threads busy, in about 300 MB of memory.
_BATCH_CHARACTERS = 2**20

# Held out of a corpus with a budget: 128 documents of 32,768 tokens, as many as LongLoRA scores of proof-pile.
BUDGETED_VALIDATION_TOKENS = 2**22


def prepare(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase | Callable[[], PreTrainedTokenizerBase]",
    tokenizer_identity: str,
    root: Path | str,
    on_progress: Callable[[int], None] | None = None,
    fetch: Callable[[str, Path], bool] = lambda name, folder: False,
) -> PackedCorpus:
    """Opens the packed corpus below ``root``, after preparing it if it is absent.

    Args:
        tokenizer: a transformers tokenizer, or a function without arguments that loads one: it is called only to
            tokenise, so a second run need not import transformers.
        tokenizer_identity: of the tokenizer; it is part of the folder's name.
        on_progress: is called with the number of documents done so far, after each batch of documents.
        fetch: fills a folder with the data prepared elsewhere under a name, if it can; returns whether it did.

    Raises:
        InputError: the corpus is empty or cannot be read, or the tokenizer has no end-of-sequence token.
    """
    key = json.dumps([FORMAT_VERSION, corpus.identity(), tokenizer_identity])
    folder = Path(root) / hashlib.sha256(key.encode()).hexdigest()[:16]

    def write(partial: Path) -> None:
        if fetch(folder.name, partial):
            return
        loaded = tokenizer if hasattr(tokenizer, "eos_token_id") else tokenizer()
        _write(partial, corpus, loaded, tokenizer_identity, on_progress or (lambda done: None))

    return PackedCorpus.open(make_once(folder, write))


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    tokenizer_identity: str,
    on_progress: Callable[[int], None],
) -> None:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path or tokenizer_identity} has no end-of-sequence token, which separates "
            "the documents. Set its eos_token, or take another tokenizer."
        )
    dtype = np.min_scalar_type(max(eos, *tokenizer.get_vocab().values()))
    tokens = {"train": 0, "validation": 0}
    documents = {"train": 0, "validation": 0}
    budget = {"train": sys.maxsize, "validation": sys.maxsize}
    if corpus.max_train_tokens is not None:
        budget = {"train": corpus.max_train_tokens, "validation": BUDGETED_VALIDATION_TOKENS}

    def wanted(split: Split) -> bool:
        return tokens[split] < budget[split]

    names: list[str] = []
    hashes: list[int] = []
    offsets = [0]
    characters = 0
    sample = ""
    division = Division()
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        files = {"train": train, "validation": validation}
        for batch in _batches(corpus.documents(wanted=wanted, division=division)):
            sample = sample or first_words(batch[0].text)
            for document, ids in zip(batch, encode_texts(tokenizer, [document.text for document in batch])):
                split = document.split
                if not wanted(split):
                    continue
                ids = [*ids, eos]
                if split == "train" and tokens[split] + len(ids) > budget[split]:
                    ids = ids[: budget[split] - tokens[split]]
                files[split].write(np.array(ids, dtype=dtype).data)
                tokens[split] += len(ids)
                documents[split] += 1
                if split == "validation":
                    names.append(document.name)
                    hashes.append(document.order)
                    offsets.append(tokens[split])
                    characters += len(document.text)
            on_progress(sum(documents.values()))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    refuse_same_data(corpus.name, documents["train"], division)
    prepared = PackedCorpus(
        folder=folder,
        corpus=corpus.name,
        corpus_identity=corpus.identity(),
        tokenizer_identity=tokenizer_identity,
        dtype=dtype.name,
        eos_token_id=eos,
        train_tokens=tokens["train"],
        train_documents=documents["train"],
        validation_tokens=tokens["validation"],
        validation_names=names,
        validation_offsets=offsets,
        validation_hashes=hashes,
        division=division,
        columns=corpus.columns,
        sample=sample,
    )
    division.shingle = shingle_size(characters, tokens["validation"] - documents["validation"])
    division.near_copies = prepared.near_copies(division.shingle)
    write_index(prepared, folder, FORMAT_VERSION)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
