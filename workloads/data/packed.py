"""Token sequences of a corpus, read from a memory-mapped stream.

``prepare`` (see packing.py) wrote all documents of a split one after the other, each followed by the tokenizer's
end-of-sequence token, as one stream of unsigned integers:

    <folder>/train.bin         tokens of the training documents
    <folder>/validation.bin    tokens of the validation documents
    <folder>/index.json        dtype, counts, names, offsets and order of the validation documents, how the corpus was
                               divided, SHA-256 of the files

A context length is a view of that stream, without a copy: training sequence i at context length N is the tokens
[i * N, (i + 1) * N); the remainder is dropped. Sequences cross documents, validation windows do not.
"""

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from workloads.data.near_copies import near_copies
from workloads.data.split import Division
from workloads.errors import InputError
from workloads.files.hashes import content_hash

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class Prepared(Protocol):
    """Data prepared in a folder, with an index of its fields."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each of its files."""


T = TypeVar("T", bound=Prepared)

# Raised when a folder written before can no longer be read, or would hold other tokens.
FORMAT_VERSION = 3
# The dtypes that tokens are stored in.
DTYPES = ("uint8", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class ValidationDocument:
    """The first spans of one validation document, in windows: (num_windows, context_length), int64."""

    name: str
    tokens: np.ndarray

    @property
    def num_scored(self) -> int:
        """Its scored tokens: all but the first of each window."""
        return self.tokens[:, 1:].size


@dataclass(frozen=True, eq=False)
class PackedCorpus:
    """A prepared corpus. Cheap to open and to pickle: tokens stay on disk until they are read.

    ``validation_offsets[i]`` is where document i begins in the validation stream, counting end-of-sequence tokens;
    its last entry is the stream's length. ``validation_hashes[i]`` is a 64-bit hash: document i is scored in its order.
    ``columns`` are the columns of text that were read, and ``sample`` is how the first document begins.
    """

    folder: Path
    corpus: str
    corpus_identity: str
    tokenizer_identity: str
    dtype: str
    eos_token_id: int
    train_tokens: int
    train_documents: int
    validation_tokens: int
    validation_names: list[str]
    validation_offsets: list[int]
    validation_hashes: list[int]
    division: Division
    columns: list[str]
    sample: str

    def __post_init__(self) -> None:
        check_index(
            self.dtype,
            eos_token_id=self.eos_token_id,
            train_tokens=self.train_tokens,
            train_documents=self.train_documents,
            validation_tokens=self.validation_tokens,
        )
        check_names(self.validation_names, self.validation_hashes, len(self.validation_offsets) - 1)
        check_offsets(np.array(self.validation_offsets), self.validation_tokens, "validation_offsets")

    @classmethod
    def open(cls, folder: Path | str) -> "PackedCorpus":
        """Opens what ``prepare`` wrote.

        Raises:
            InputError: it is absent, its index is invalid, or its files are not those that were prepared.
        """
        return open_prepared(cls, folder, "corpus", FORMAT_VERSION)

    def sizes(self) -> dict[str, int]:
        """Bytes of each of its files."""
        itemsize = np.dtype(self.dtype).itemsize
        return {"train.bin": self.train_tokens * itemsize, "validation.bin": self.validation_tokens * itemsize}

    def __reduce__(self):
        return PackedCorpus.open, (self.folder,)  # a memory map would be pickled by its content

    def num_train_sequences(self, context_length: int) -> int:
        """Training sequences of this length."""
        return self.train_tokens // context_length

    def check(self, context_length: int, batch: int) -> None:
        """Checks that the training stream has a sequence of this length; warns if a batch repeats a sequence.

        Raises:
            InputError: the stream is shorter than one context.
        """
        sequences = self.num_train_sequences(context_length)
        if sequences == 0:
            raise InputError(
                f"corpus {self.corpus} has {self.train_tokens:,} training tokens, and one sequence needs "
                f"{context_length:,}. Give a longer corpus or a shorter context length."
            )
        if sequences < batch:
            warnings.warn(
                f"corpus {self.corpus} has {sequences} sequences of {context_length:,} tokens, fewer than the batch of "
                f"{batch}: a batch repeats some of them",
                stacklevel=2,
            )

    def train_batch(
        self, step: int, batch: int, context_length: int, seed: int, rows: slice = slice(None)
    ) -> np.ndarray:
        """Batch number ``step`` (from 0) as (batch, context_length), int64; ``rows`` reads only these of its rows.

        Depends only on the arguments, so a checkpoint's position in the data is its step, for any number of
        workers. Every sequence comes once an epoch, each epoch in a different order; a batch may hold the end of
        one epoch and the start of the next.
        """
        sequences = self.num_train_sequences(context_length)
        if sequences == 0:
            self.check(context_length, batch)
        order = epoch_order(step, batch, sequences, seed, rows)
        view = self._train[: sequences * context_length].reshape(sequences, context_length)
        return view[order].astype(np.int64)

    def validation_windows(self, context_length: int, span: int, num_documents: int) -> list[ValidationDocument]:
        """Spans of up to ``num_documents`` validation documents, from their starts, cut into windows.

        Takes the documents that have at least ``span`` tokens of their own (the end-of-sequence token does not count
        and is in no window), in the order of their hashes: an unbiased sample, which changes little when documents are
        added. Of each the first ``span`` tokens; where fewer documents are long enough, further spans of them follow
        (see :func:`spans_taken`). Windows neither overlap nor cross documents. The same span scores the same tokens at
        every context length that divides it.

        Raises:
            InputError: the context length does not divide the span, or no document is long enough.
        """
        if span % context_length:
            raise InputError(
                f"evaluation span {span:,} is not a multiple of the window of {context_length:,} tokens. "
                f"Give {-(-span // context_length) * context_length:,}."
            )
        order = self._validation_order
        lengths = np.diff(self.validation_offsets) - 1
        documents = []
        for i, spans in zip(order, spans_taken(lengths[order].tolist(), span, num_documents)):
            if spans:
                begin = self.validation_offsets[i]
                tokens = self._validation[begin : begin + spans * span].astype(np.int64).reshape(-1, context_length)
                documents.append(ValidationDocument(self.validation_names[i], tokens))
        if not documents:
            raise InputError(
                f"no validation document of corpus {self.corpus} has {span:,} tokens: the longest of "
                f"{len(self.validation_names):,} has {lengths.max(initial=0):,}. Give a shorter context length "
                "(evaluation span), longer documents, or own held-out ones by --eval-data."
            )
        return documents

    def near_copies(self, shingle: int) -> dict[str, float]:
        """Held-out documents of which training has more than half (see near_copies.py), with that share."""
        return near_copies(self._train, self._validation_tokens(), shingle)

    def _validation_tokens(self) -> Iterator[tuple[str, np.ndarray]]:
        for i in self._validation_order:
            begin, end = self.validation_offsets[i : i + 2]
            yield self.validation_names[i], self._validation[begin : end - 1]

    @cached_property
    def _train(self) -> np.ndarray:
        return self._map("train", self.train_tokens)

    @cached_property
    def _validation(self) -> np.ndarray:
        return self._map("validation", self.validation_tokens)

    @cached_property
    def _validation_order(self) -> list[int]:
        return sorted(range(len(self.validation_names)), key=lambda i: (self.validation_hashes[i], i))

    def _map(self, split: str, tokens: int) -> np.ndarray:
        if tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.folder / f"{split}.bin", dtype=self.dtype, mode="r", shape=(tokens,))


def spans_taken(lengths: Sequence[int], span: int, count: int) -> list[int]:
    """How many spans are scored of each document, given its tokens: ``count`` in all, if there are so many.

    One of each document in turn, then a second one of each that is long enough, and so on: as many documents as there
    are, since documents are what intervals resample.
    """
    taken = [0] * len(lengths)
    left = count
    for turn in range(1, max(lengths, default=0) // span + 1):
        for i, length in enumerate(lengths):
            if left and length >= turn * span:
                taken[i] = turn
                left -= 1
        if not left:
            break
    return taken


def open_prepared(kind: Callable[..., T], folder: Path | str, what: str, format_version: int) -> T:
    """Opens prepared data: a ``kind`` made from its index, whose files are checked against it.

    Raises:
        InputError: it is not there, of another version, its index is none, or a file has another size
            or SHA-256.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text("utf-8"))
        if index.pop("format_version") != format_version:
            raise ValueError("it was written by another version of longspan")
        hashes = index.pop("sha256")
        prepared = kind(folder=folder, division=Division(**index.pop("division")), **index)
        for name, expected in prepared.sizes().items():
            found = (folder / name).stat().st_size
            if found != expected:
                raise ValueError(f"{name} has {found} bytes, its index says {expected}")
            if hashes.get(name) != content_hash(folder / name):
                raise ValueError(
                    f"the content of {name} is not what was prepared: its SHA-256 differs from the index's"
                )
    except Exception as error:  # whatever an index with values of other types raises
        raise InputError(
            f"prepared {what} {folder} cannot be read ({error}). Delete that folder; the next run prepares it again."
        ) from error
    return prepared


def check_index(dtype: str, **counts: int) -> None:
    """Checks an index's dtype, which numpy would otherwise read pointers by, and its counts.

    Raises:
        ValueError: no unsigned integer, or a count below 0.
    """
    if dtype not in DTYPES:
        raise ValueError(f"its index has the dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    for name, count in counts.items():
        if not isinstance(count, int) or not 0 <= count < 2**63:
            raise ValueError(f"its index has {count!r} as {name}; expected a whole number of at least 0")


def check_names(names: list[str], hashes: list[int], expected: int) -> None:
    """Raises ValueError if an index's names and hashes are not ``expected`` strings and numbers."""
    for found, kind in ((names, str), (hashes, int)):
        if not isinstance(found, list) or len(found) != expected or not all(type(one) is kind for one in found):
            raise ValueError(f"its index does not name {expected:,} validation documents")


def check_offsets(offsets: np.ndarray, tokens: int, name: str) -> None:
    """Raises ValueError unless offsets of documents run from 0 up to the number of tokens."""
    if (
        offsets.dtype.kind != "i"
        or offsets.ndim != 1
        or (offsets[0], offsets[-1]) != (0, tokens)
        or (np.diff(offsets) <= 0).any()
    ):
        raise ValueError(f"{name} does not run from 0 to {tokens:,}, document by document")


def write_index(prepared: "DataclassInstance", folder: Path, format_version: int) -> None:
    """Writes the index of data whose files are in ``folder``; ``open_prepared`` reads it."""
    fields = dataclasses.asdict(prepared)
    del fields["folder"]
    index = {"format_version": format_version, **fields, "sha256": hashes_of(folder)}
    (folder / "index.json").write_text(json.dumps(index, indent=1), "utf-8")


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that was prepared in a folder, for its index."""
    return {path.name: content_hash(path) for path in sorted(folder.iterdir())}


def epoch_order(step: int, batch: int, sequences: int, seed: int, rows: slice = slice(None)) -> np.ndarray:
    """The sequences of batch number ``step``: each once an epoch, in a different order each epoch."""
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch)[rows], sequences)
    order = [permutation(sequences, seed, epoch)[place] for epoch, place in zip(epochs.tolist(), places.tolist())]
    return np.array(order, dtype=np.int64)


@lru_cache(maxsize=2)  # two epochs can meet in a batch
def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's sequences."""
    # RandomState, since numpy promises never to change its streams: the order is part of a trial's result.
    return np.random.RandomState([seed, epoch]).permutation(length)
