"""A corpus: from its name, as the user gave it, to documents with a name, a text and a split.

Three sources, recognised by the name alone:

    builtin:stdlib                  the running Python's own library
    books/  notes.txt  rows.jsonl   a local file, or every readable file in a folder and below
    org/name[@revision][:config]    a Hugging Face data set; files of it where :config is a name of files (hub.py)

``identity()`` is part of a trial's fingerprint: it depends on the content, not on its location.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from workloads.data.documents import Document, Split, files_digest, is_blank
from workloads.data.hub import HubSource
from workloads.data.local import SUFFIXES, TABLE_SUFFIXES, LocalSource
from workloads.data.split import EVALUATED_ON, HOLDOUT, Division, Part, Wanted, check_holdout, divide
from workloads.data.stdlib import stdlib_documents, stdlib_files
from workloads.errors import InputError
from workloads.files.given import existing_path


class Source(Protocol):
    """Where texts come from: it has an identity, and streams its texts by name."""

    @property
    def identity(self) -> str:
        """The content, as a string."""

    @property
    def has_columns(self) -> bool:
        """Whether a column of text can be chosen."""

    def parts(self) -> Iterator[Part[str]]:
        """Streams all texts; of a source with its own split, the held-out part first."""


@dataclass(frozen=True)
class StdlibSource:
    """The running Python's own standard library, with the split that ``builtin:tiny`` was trained by."""

    has_columns: ClassVar = False

    @cached_property
    def identity(self) -> str:
        """``stdlib:`` and a hash of its files."""
        return f"stdlib:{files_digest(stdlib_files())}"

    def parts(self) -> Iterator[Part[str]]:
        """Streams modules, validation first."""
        splits: tuple[Split, ...] = ("validation", "train")
        yield from ((split, stdlib_documents(split)) for split in splits)


BUILTINS = {"builtin:stdlib": StdlibSource}


@dataclass(frozen=True)
class Corpus:
    """Named documents from one source. Make it with ``parse``.

    With ``max_train_tokens`` it is only the beginning of that source, in the source's own order: see packing.py. What
    is held out is a ``holdout`` of it (None: the default), or the documents of ``evaluation``: see split.py.
    """

    name: str
    source: Source
    max_train_tokens: int | None = None
    holdout: float | None = None
    evaluation: "Corpus | None" = None

    @classmethod
    def parse(
        cls,
        text: str,
        text_column: str | None = None,
        max_train_tokens: int | None = None,
        holdout: float | None = None,
        eval_data: str | None = None,
    ) -> "Corpus":
        """``builtin:stdlib``, a local file or folder, or ``org/name[@revision][:config]`` on the Hugging Face hub.

        A local path wins over a hub id of the same form. ``text_column`` names the column that holds the text in
        .jsonl, .parquet and hub rows (default: ``text``, else the only column of strings), of ``eval_data`` too.
        Preparation stops reading after ``max_train_tokens``.

        Raises:
            InputError: a text is none of the three, a folder holds nothing that can be read, or the budget, the column
                or the share to hold out cannot be or has no effect.
        """
        if max_train_tokens is not None and max_train_tokens <= 0:
            raise InputError(f"--max-train-tokens {max_train_tokens}: expected a positive number of tokens")
        share = check_holdout(holdout, eval_data)
        if text in BUILTINS and holdout is not None:
            raise InputError(f"--holdout {holdout:g} has no effect: {text} has its own split. Leave it out.")
        name, source = _source(text, text_column)
        sources = [source]
        evaluation = None
        if eval_data is not None:
            evaluation = cls(*_source(eval_data, text_column))
            sources.append(evaluation.source)
        if text_column is not None and not any(source.has_columns for source in sources):
            names = " and ".join(filter(None, (text, eval_data)))
            raise InputError(
                f"--text-column {text_column} has no effect: {names} has no {' or '.join(TABLE_SUFFIXES)} file. Leave "
                "it out."
            )
        return cls(name, source, max_train_tokens, share, evaluation)

    def identity(self) -> str:
        """The identity of the documents and of their split, for the fingerprint; computed once.

        ``files:<SHA-256 over (relative path, content) of every file>``, ``stdlib:<the same>``, or
        ``hub:org/name@<full commit>:<config>``; after it, where they are given, ``:<training tokens> tokens``,
        ``:<share> held out``, or ``:evaluated on <identity of other data>``.
        """
        budget = "" if self.max_train_tokens is None else f":{self.max_train_tokens} tokens"
        share = "" if self.holdout is None else f":{self.holdout:g} held out"
        evaluation = "" if self.evaluation is None else f"{EVALUATED_ON}{self.evaluation.identity()}"
        return self.source.identity + budget + share + evaluation

    @property
    def columns(self) -> list[str]:
        """The columns of text that were read so far."""
        return sorted(getattr(self.source, "columns", ()))

    def documents(
        self, split: Split | None = None, wanted: Wanted | None = None, division: Division | None = None
    ) -> Iterator[Document]:
        """The documents of one split, or of both in one pass: streamed, in a fixed order, blank ones left out.

        Args:
            wanted: is called before each document; reading ends once neither split is wanted.
            division: receives how the documents are divided.

        Raises:
            InputError: there is none, a file cannot be read, or ``holdout`` has no effect.
        """
        # Held-out documents are read for the training split too, which has no copies of them.
        wanted = wanted or (lambda each: split in (None, each) or each == "validation")
        empty = True
        for document in self._divided(wanted, division or Division()):
            if split in (None, document.split) and wanted(document.split) and document.text:
                empty = False
                yield document
            if not (wanted("train") or wanted("validation")):
                return
        if empty:
            which = "no text" if split is None else f"no {split} document"
            raise InputError(f"corpus {self.name} is empty: {which} in it. Give one that holds text.")

    def _divided(self, wanted: Wanted, division: Division) -> Iterator[Document]:
        evaluation = None if self.evaluation is None else (self.evaluation.name, self.evaluation._parts())
        for found in divide(self._parts(), str, self.name, division, wanted, self.holdout, evaluation):
            name, text, order = found.name, found.item, found.order
            if found.split is None:
                cut = int(len(text) * (1 - (self.holdout or HOLDOUT)))
                yield Document(name, text[:cut], "train", order)
                yield Document(name, text[cut:], "validation", order)
            else:
                yield Document(name, text, found.split, order)

    def _parts(self) -> Iterator[Part[str]]:
        for split, texts in self.source.parts():
            yield split, ((name, text) for name, text in texts if not is_blank(text))


def _source(text: str, text_column: str | None) -> tuple[str, Source]:
    """The name and the source of a corpus, as the user gave it."""
    if text.startswith("builtin:"):
        if text not in BUILTINS:
            nearest = get_close_matches(text, BUILTINS, n=1, cutoff=0) or list(BUILTINS)
            raise InputError(f"there is no corpus {text}; did you mean {nearest[0]}?")
        return text, BUILTINS[text]()
    if path := existing_path(text):
        source = LocalSource(path, text_column)
        source.files  # noqa: B018 (a folder without readable files is refused here, not at the first document)
        return path.resolve().name, source
    hub = HubSource.parse(text, text_column)
    if hub and (hub.config or not text.lower().endswith(SUFFIXES)):
        return text, hub
    raise InputError(
        f"corpus {text!r} is no local path (looked in {Path.cwd()}) and does not have the form of a hub data set, "
        "org/name[@revision][:config]. Give builtin:stdlib, an existing file or folder, or such an id."
    )
