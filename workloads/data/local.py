"""Documents from local files: one document a text file, one document a row of a JSON Lines or Parquet file; and rows.

A document is named by its path relative to the folder that was given, with ``#row`` (counted from 0) for a row.
Texts are read byte for byte (UTF-8), line ends included. Names that begin with a dot are skipped.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workloads.data.columns import choose_text_column, record_text, record_text_column
from workloads.data.documents import Document, Row, Split, files_digest, hold_out
from workloads.data.tables import decode, json_records, jsonl_records, parquet_records
from workloads.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".tex")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
ROW_SUFFIXES = (".json", ".jsonl", ".parquet")


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
        files = _find_files(self.path, SUFFIXES, "corpus")
        if self.text_column is not None and not any(path.suffix.lower() in TABLE_SUFFIXES for _, path in files):
            raise InputError(
                f"--text-column {self.text_column} has no effect: corpus {self.path} has no "
                f"{' or '.join(TABLE_SUFFIXES)} file. Leave it out."
            )
        return files

    @cached_property
    def identity(self) -> str:
        """``files:`` and a hash of all files, and a text column of another name than ``text``, the default."""
        column = "" if self.text_column in (None, "text") else f":{self.text_column}"
        return f"files:{files_digest(self.files)}{column}"

    def documents(self, wanted: Callable[[Split], bool]) -> Iterator[Document]:
        """Streams every document with its side."""
        return hold_out(self._texts())

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name, path in self.files:
            suffix = path.suffix.lower()
            if suffix in TEXT_SUFFIXES:
                yield name, decode(path.read_bytes(), path)
            else:
                texts = _jsonl_texts if suffix == ".jsonl" else _parquet_texts
                yield from ((f"{name}#{row}", text) for row, text in enumerate(texts(path, self.text_column)))


@dataclass(frozen=True)
class LocalRows:
    """The rows of a table, or of every table below a folder: instruction data."""

    path: Path

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        """As of a :class:`LocalSource`.

        Raises:
            InputError: there is none that can be read.
        """
        return _find_files(self.path, ROW_SUFFIXES, "instruction data")

    @cached_property
    def identity(self) -> str:
        """``files:`` and a hash of all files."""
        return f"files:{files_digest(self.files)}"

    def sides(self) -> Iterator[tuple[Split | None, Iterator[Row]]]:
        """Yields all rows, without a side: rows are held out by hash."""
        yield None, self._rows()

    def _rows(self) -> Iterator[Row]:
        readers = {".json": json_records, ".jsonl": jsonl_records, ".parquet": parquet_records}
        for name, path in self.files:
            for number, (where, record) in enumerate(readers[path.suffix.lower()](path)):
                yield Row(f"{name}#{number}", where, record)


def _find_files(path: Path, suffixes: tuple[str, ...], what: str) -> list[tuple[str, Path]]:
    if path.is_file():
        found = [(path.name, path)]
    else:
        found = sorted((file.relative_to(path).as_posix(), file) for file in _walk(path))
    files = [(name, file) for name, file in found if file.suffix.lower() in suffixes]
    if not files:
        problem = "is not a file" if path.is_file() else f"has no file (of {len(found)})"
        raise InputError(f"{what} {path} {problem} that longspan reads, by its suffix: {', '.join(suffixes)}.")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()  # a link to a parent folder would loop
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
