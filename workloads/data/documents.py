"""A document, and which side of the split it falls on.

A document belongs to "train" or to "validation" by a hash of its name, so that the side neither depends on the order
of the files nor changes when others are added: validation has the lowest tenth of all hashes. Where that holds out
fewer than eight documents, chance would decide too much, and the count is exact instead: still those with the lowest
hashes, a tenth of the documents (at most eight, at least one), and never more than half. Of a single document, the
last tenth is held out.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

Split = Literal["train", "validation"]
Item = TypeVar("Item")

VALIDATION_SHARE = 0.10
ENOUGH_HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class Document:
    """A named text and the side it is on. The name is unique on its side, and no absolute path."""

    name: str
    text: str
    split: Split


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its unique name, where it is (for an error to say), its columns, and the side it is known to be
    on, if any.
    """

    name: str
    where: str
    columns: dict
    split: Split | None = None


def name_hash(name: str) -> int:
    """64 bits that depend on the name alone: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def split_of(name: str) -> Split:
    """The side a document of this name falls on, where there are enough documents."""
    return "validation" if name_hash(name) < VALIDATION_SHARE * 2**64 else "train"


def hold_out(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Give each (name, text) its side, in one pass; blank texts are left out."""
    for name, text, side in assign_sides((name, text) for name, text in texts if not is_blank(text)):
        if side is None:
            cut = len(text) * 9 // 10
            yield from (Document(name, text[:cut], "train"), Document(name, text[cut:], "validation"))
        else:
            yield Document(name, text, side)


def assign_sides(items: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item, Split | None]]:
    """Each (name, item) with its side; without one where it is the only item.

    Holds back items until enough are held out (after some eighty, as a rule), since only then is it known that they
    are not too few.
    """
    items = iter(items)
    first: list[tuple[str, Item]] = []
    sides: Counter[Split] = Counter()
    for name, item in items:
        first.append((name, item))
        sides[split_of(name)] += 1
        if sides["validation"] >= ENOUGH_HELD_OUT and sides["train"]:
            yield from ((name, item, split_of(name)) for name, item in chain(first, items))
            return
    if len(first) == 1:
        yield (*first[0], None)
        return
    count = max(1, sides["validation"], min(ENOUGH_HELD_OUT, len(first) // 10))
    by_hash = sorted((name for name, _ in first), key=name_hash)
    held_out = frozenset(by_hash[: min(count, len(first) // 2)])
    yield from ((name, item, "validation" if name in held_out else "train") for name, item in first)


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
