"""A document, and which side of the split it falls on.

A hash of its name assigns a document to "train" or "validation", so its side neither depends on the order of files nor
changes when others are added: validation has the lowest tenth of all hashes. If that holds out fewer than eight
documents, their number would be too random, and is exact instead: those with the lowest hashes, a tenth of the
documents (at most eight, at least one), and never more than half. Of a single document, the last tenth is held out.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

from workloads.errors import one_error

Split = Literal["train", "validation"]
Item = TypeVar("Item")

VALIDATION_SHARE = 0.10
ENOUGH_HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class Document:
    """A named text and its side. The name is unique on its side, and no absolute path."""

    name: str
    text: str
    split: Split


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its unique name, its place (for error messages), and its columns."""

    name: str
    where: str
    columns: dict


def name_hash(name: str) -> int:
    """A 64-bit hash of the name: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def split_of(name: str) -> Split:
    """The side of a document with this name, if there are enough documents."""
    return "validation" if name_hash(name) < VALIDATION_SHARE * 2**64 else "train"


def hold_out(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Assigns each (name, text) its side, in one pass; blank texts are left out."""
    for name, text, side in assign_sides((name, text) for name, text in texts if not is_blank(text)):
        if side is None:
            cut = len(text) * 9 // 10
            yield from (Document(name, text[:cut], "train"), Document(name, text[cut:], "validation"))
        else:
            yield Document(name, text, side)


def assign_sides(items: Iterable[tuple[str, Item]]) -> Iterator[tuple[str, Item, Split | None]]:
    """Yields each (name, item) with its side; None if it is the only item.

    Buffers items until enough are held out (usually after about eighty), since before that they might be too few.
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


def first_words(text: str) -> str:
    """How a text begins: its first line that is not blank, of at most 100 characters."""
    return text.lstrip()[:100].partition("\n")[0].rstrip()


def is_blank(text: str) -> bool:
    """Whether a text is empty or all white space."""
    return not text or text.isspace()


def files_digest(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over (relative path, content) of every file, independent of their folder."""
    digest = hashlib.sha256()
    for relative_path, path in files:
        with one_error(f"{path} cannot be read", "Make it readable, or take it out."), path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest() + content)
    return digest.hexdigest()
