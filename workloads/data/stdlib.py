"""``builtin:stdlib``: the running Python's own standard-library source, as documents.

Long, coherent text that every machine already has, so a first sweep needs no download. The texts differ a little from
one Python version to the next; a module's split does not, since it depends only on its path.
"""

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

VALIDATION_SHARE = 0.10

# Folders left out at any depth: tests quote the modules they test, and what pip installed is not the library.
_EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

# Left out at the top: generated files. In encodings, 80 character tables are near-copies of one another, so any split
# puts copies into both splits; pydoc_data is one file of prose that would be 43% of the held-out bytes; the
# last two record how this Python was built, under a path that names its platform.
_GENERATED = ("encodings/", "pydoc_data/", "config-", "_sysconfigdata")


def stdlib_files() -> list[tuple[str, Path]]:
    """The corpus's files, as (posix path relative to the standard-library folder, file), sorted by the former."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in folder.rglob("*.py"):
        relative = file.relative_to(folder)
        path = relative.as_posix()
        if not _EXCLUDED_FOLDERS.isdisjoint(relative.parts[:-1]) or path.startswith(_GENERATED):
            continue
        if file.stat().st_size > 0:
            files.append((path, file))
    return sorted(files)


def split_of(relative_path: str) -> str:
    """A module's split, "train" or "validation", by SHA-256 of its path in the library."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64 else "train"


def stdlib_documents(split: str) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every document of "train" or "validation"; a file that does not decode is skipped.

    Raises:
        ValueError: ``split`` is neither of the two.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split is {split!r}; expected "train" or "validation"')
    for relative_path, file in stdlib_files():
        if split_of(relative_path) != split:
            continue
        try:
            with tokenize.open(file) as source:  # honours the coding line (PEP 263)
                text = source.read()
        except (SyntaxError, UnicodeDecodeError):  # an unknown coding line, or bytes that do not follow it
            continue
        if text.strip():
            yield relative_path, text
