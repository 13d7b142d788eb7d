"""Documents from local files: one document a text file, one document a row of a JSON Lines or Parquet file.

A document is named by its path relative to the folder that was given, with ``#row`` (counted from 0) for a row.
Texts are taken byte for byte as they are (UTF-8), line ends included. Names that begin with a dot are passed over.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workloads.data.columns import choose_text_column, record_text, record_text_column
from workloads.data.documents import Document, Split, files_digest, hold_out
from workloads.data.tables import decode, jsonl_records, parquet_records
from workloads.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".tex")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES


@dataclass(frozen=True)
class LocalSource:
    """A file, or every readable file below a folder."""

    path: Path
    text_column: str | None = None

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        """(posix path relative to the folder, file), sorted by the former; symbolic links are followed.

        Raises:
            InputError: there is none that can be read.
        """
        if self.path.is_file():
            found = [(self.path.name, self.path)]
        else:
            found = sorted((path.relative_to(self.path).as_posix(), path) for path in _walk(self.path))
        files = [(name, path) for name, path in found if path.suffix.lower() in SUFFIXES]
        if not files:
            what = "is not a file" if self.path.is_file() else f"has no file (of {len(found)})"
            raise InputError(f"corpus {self.path} {what} that longspan reads, by its suffix: {', '.join(SUFFIXES)}.")
        if self.text_column is not None and not any(path.suffix.lower() in TABLE_SUFFIXES for _, path in files):
            raise InputError(
                f"--text-column {self.text_column} has no effect: corpus {self.path} has no "
                f"{' or '.join(TABLE_SUFFIXES)} file. Leave it out."
            )
        return files

    @cached_property
    def identity(self) -> str:
        # "text" is what no column named comes to.
        column = "" if self.text_column in (None, "text") else f":{self.text_column}"
        return f"files:{files_digest(self.files)}{column}"

    def documents(self, wanted: Callable[[Split], bool]) -> Iterator[Document]:
        return hold_out(self._texts())

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name, path in self.files:
            suffix = path.suffix.lower()
            if suffix in TEXT_SUFFIXES:
                yield name, decode(path.read_bytes(), path)
            else:
                texts = _jsonl_texts if suffix == ".jsonl" else _parquet_texts
                yield from ((f"{name}#{row}", text) for row, text in enumerate(texts(path, self.text_column)))


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()  # a link to a folder above would lead round and round
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _jsonl_texts(path: Path, text_column: str | None) -> Iterator[str]:
    column = None
    for where, record in jsonl_records(path):
        column = column or record_text_column(record, text_column, where)
        yield record_text(record, column, where)


def _parquet_texts(path: Path, text_column: str | None) -> Iterator[str]:
    def choose(names: list[str], strings: list[str]) -> list[str]:
        return [choose_text_column(names, strings, text_column, str(path))]

    for _, record in parquet_records(path, choose):
        (text,) = record.values()
        yield text or ""
