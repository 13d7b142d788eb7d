"""A document, and which side of the split it falls on.

A document belongs to "train" or to "validation" by a hash of its name, so that the side neither depends on the order
of the files nor changes when others are added. About a tenth of the documents is held out. Where so few documents
exist that one side would be empty, exactly the one with the lowest hash is held out; of a single document, its last
tenth.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation"]

VALIDATION_SHARE = 0.10


@dataclass(frozen=True, slots=True)
class Document:
    """A named text and the side it is on. The name is unique on its side, and no absolute path."""

    name: str
    text: str
    split: Split


def name_hash(name: str) -> int:
    """64 bits that depend on the name alone: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def split_of(name: str) -> Split:
    """The side a document of this name falls on, where there are enough documents."""
    return "validation" if name_hash(name) < VALIDATION_SHARE * 2**64 else "train"


def hold_out(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Give each (name, text) its side, in one pass; blank texts are left out.

    Holds back documents until both sides have one (some ten, as a rule), since only then is it known that the
    documents are not too few.
    """
    texts = ((name, text) for name, text in texts if not is_blank(text))
    first: list[tuple[str, str]] = []
    sides = set()
    for name, text in texts:
        first.append((name, text))
        sides.add(split_of(name))
        if len(sides) == 2:
            break
    if len(sides) == 2:
        yield from (Document(name, text, split_of(name)) for name, text in chain(first, texts))
    elif len(first) == 1:
        name, text = first[0]
        cut = len(text) * 9 // 10
        yield from (Document(name, text[:cut], "train"), Document(name, text[cut:], "validation"))
    elif first:
        held_out = min((name for name, _ in first), key=name_hash)
        yield from (Document(name, text, "validation" if name == held_out else "train") for name, text in first)


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over (relative path, content) of every file, in chunks: where the files lie does not enter."""
    digest = hashlib.sha256()
    for relative_path, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest() + content)
    return digest.hexdigest()
