"""A document, a row of a table, and the hashes that identify them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workloads.errors import one_error

Split = Literal["train", "validation"]

# Characters hashed at once: a text without its white space is a copy.
_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class Document:
    """A named text and its split. The name is unique in its split, and no absolute path.

    ``order`` is a 64-bit hash; held-out documents are scored in its order.
    """

    name: str
    text: str
    split: Split
    order: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its unique name, its place (for error messages), and its columns."""

    name: str
    where: str
    columns: dict


def name_hash(name: str) -> int:
    """A 64-bit hash of the name: the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def text_hash(text: str) -> int:
    """A 64-bit hash of the text without its white space, so line ends and a final newline make no difference."""
    digest = hashlib.sha256()
    for begin in range(0, len(text), _PIECE):
        digest.update("".join(text[begin : begin + _PIECE].split()).encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:8], "big")


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
