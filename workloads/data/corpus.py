"""A corpus: from its name, as the user gave it, to documents with a name, a text and a side of the split.

Three sources, recognised by the name alone:

    builtin:stdlib                  the running Python's own library
    books/  notes.txt  rows.jsonl   a local file, or every readable file in a folder and below
    org/name[@revision][:config]    a Hugging Face data set; files of it where :config is a name of files (hub.py)

``identity()`` is part of a trial's fingerprint: it depends on the content, not on its location.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Protocol

from workloads.data.documents import Document, Split, files_digest
from workloads.data.hub import HubSource
from workloads.data.local import SUFFIXES, LocalSource
from workloads.data.stdlib import stdlib_documents, stdlib_files
from workloads.errors import InputError
from workloads.files.given import existing_path

# Whether documents of this side are still wanted; this may change from True to False while documents are read.
Wanted = Callable[[Split], bool]


class Source(Protocol):
    """Where documents come from: it has an identity, and streams its documents with their sides."""

    @property
    def identity(self) -> str:
        """The content, as a string."""

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """Streams at least the documents of the wanted sides; others may be skipped to save work."""


@dataclass(frozen=True)
class StdlibSource:
    """The running Python's own standard library."""

    @cached_property
    def identity(self) -> str:
        """``stdlib:`` and a hash of its files."""
        return f"stdlib:{files_digest(stdlib_files())}"

    def documents(self, wanted: Wanted) -> Iterator[Document]:
        """Streams modules, validation first."""
        sides: tuple[Split, ...] = ("validation", "train")
        for side in sides:
            if wanted(side):
                yield from (Document(name, text, side) for name, text in stdlib_documents(side))


BUILTINS = {"builtin:stdlib": StdlibSource}


@dataclass(frozen=True)
class Corpus:
    """Named documents from one source. Make it with ``parse``.

    With ``max_train_tokens`` it is only the beginning of that source, in the source's own order: see packing.py.
    """

    name: str
    source: Source
    max_train_tokens: int | None = None

    @classmethod
    def parse(cls, text: str, text_column: str | None = None, max_train_tokens: int | None = None) -> "Corpus":
        """``builtin:stdlib``, a local file or folder, or ``org/name[@revision][:config]`` on the Hugging Face hub.

        A local path wins over a hub id of the same form. ``text_column`` names the column that holds the text in
        .jsonl, .parquet and hub rows (default: ``text``, else the only column of strings). Preparation
        stops reading after ``max_train_tokens``.

        Raises:
            InputError: the text is none of the three, the folder holds nothing that can be read, or the budget is not
                positive.
        """
        if max_train_tokens is not None and max_train_tokens <= 0:
            raise InputError(f"--max-train-tokens {max_train_tokens}: expected a positive number of tokens")
        if text.startswith("builtin:"):
            if text not in BUILTINS:
                nearest = get_close_matches(text, BUILTINS, n=1, cutoff=0) or list(BUILTINS)
                raise InputError(f"there is no corpus {text}; did you mean {nearest[0]}?")
            if text_column is not None:
                raise InputError(f"--text-column {text_column} has no effect on {text}. Leave it out.")
            return cls(text, BUILTINS[text](), max_train_tokens)
        if path := existing_path(text):
            source = LocalSource(path, text_column)
            source.files  # noqa: B018 (a folder without readable files is refused here, not at the first document)
            return cls(path.resolve().name, source, max_train_tokens)
        hub = HubSource.parse(text, text_column)
        if hub and (hub.config or not text.lower().endswith(SUFFIXES)):
            return cls(text, hub, max_train_tokens)
        raise InputError(
            f"corpus {text!r} is no local path (looked in {Path.cwd()}) and does not have the form of a hub data set, "
            "org/name[@revision][:config]. Give builtin:stdlib, an existing file or folder, or such an id."
        )

    def identity(self) -> str:
        """The identity of the documents, for the fingerprint; computed once.

        ``files:<SHA-256 over (relative path, content) of every file>``, ``stdlib:<the same>``, or
        ``hub:org/name@<full commit>:<config>``; with a budget, ``:<training tokens> tokens`` after it.
        """
        budget = "" if self.max_train_tokens is None else f":{self.max_train_tokens} tokens"
        return self.source.identity + budget

    @property
    def columns(self) -> list[str]:
        """The columns of text that were read so far."""
        return sorted(getattr(self.source, "columns", ()))

    def documents(self, split: Split | None = None, wanted: Wanted | None = None) -> Iterator[Document]:
        """The documents of one side, or of both in one pass: streamed, in a fixed order, blank ones left out.

        ``wanted`` is called before each document; reading ends once neither side is wanted.

        Raises:
            InputError: there is none, or a file cannot be read.
        """
        wanted = wanted or (lambda side: split in (None, side))
        empty = True
        for document in self.source.documents(wanted):
            if wanted(document.split) and document.text:
                empty = False
                yield document
            if not (wanted("train") or wanted("validation")):
                return
        if empty:
            which = "no text" if split is None else f"no {split} document"
            raise InputError(f"corpus {self.name} is empty: {which} in it. Give one that holds text.")
