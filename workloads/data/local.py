"""Local files as documents or as rows of instruction data.

A text file is one document, and so is a row of a JSON Lines or Parquet file. A document is named by its path relative
to the folder that was given, with ``#row`` (counted from 0) for a row. Texts are read as they are (UTF-8), line ends
included, without a byte order mark. Text and JSON files may be compressed (.gz, .zst). Names that begin with a dot are
skipped; ``passed_over`` lists other files that are not read.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from workloads.data.columns import Columns, choose_text_column, record_texts
from workloads.data.documents import Row, files_digest, is_blank
from workloads.data.split import Part
from workloads.data.tables import file_format, json_records, jsonl_records, parquet_records, read_text
from workloads.errors import InputError, one_error

TEXT_SUFFIXES = (".txt", ".md", ".tex")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
ROW_SUFFIXES = (".json", ".jsonl", ".parquet")

# Columns that instruction data has (see instructions.py); of a Parquet file that has some, no others are read.
ROW_COLUMNS = ("instruction", "input", "output", "messages", "conversations")


@dataclass(frozen=True)
class FoundFiles:
    """The files below a path: those that are read, as (posix path relative to it, file), and the names of the others.

    Both sorted by name.
    """

    read: list[tuple[str, Path]]
    passed_over: list[str]


@dataclass(frozen=True)
class LocalSource:
    """A file, or every readable file below a folder.

    ``columns`` are the columns of text that were read so far.
    """

    path: Path
    text_column: str | None = None
    columns: set[str] = field(default_factory=set, compare=False)

    @cached_property
    def files(self) -> FoundFiles:
        """The files, symbolic links followed.

        Raises:
            InputError: there is none that can be read.
        """
        return _find_files(self.path, SUFFIXES, "corpus")

    @property
    def has_columns(self) -> bool:
        """Whether some of the files are tables."""
        return any(file_format(path) in TABLE_SUFFIXES for _, path in self.files.read)

    @cached_property
    def identity(self) -> str:
        """``files:``, a hash of all files, and the text column unless it is ``text``."""
        column = "" if self.text_column in (None, "text") or not self.has_columns else f":{self.text_column}"
        return f"files:{files_digest(self.files.read)}{column}"

    def parts(self) -> Iterator[Part[str]]:
        """All texts by name, to be divided."""
        yield None, self._texts()

    def first_text(self) -> str:
        """The first text that is not blank, or an empty one; reads no further."""
        return next((text for _, text in self._texts() if not is_blank(text)), "")

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name, path in self.files.read:
            kind = file_format(path)
            if kind in TEXT_SUFFIXES:
                yield name, read_text(path)
            elif kind == ".jsonl":
                texts = record_texts(jsonl_records(path), self.text_column, self.columns)
                yield from ((f"{name}#{row}", text) for row, text in enumerate(texts))
            else:
                yield from ((f"{name}#{row}", text) for row, text in enumerate(self._parquet_texts(path)))

    def _parquet_texts(self, path: Path) -> Iterator[str]:
        def choose(columns: Columns) -> list[str]:
            column = choose_text_column(columns, self.text_column, str(path))
            self.columns.add(column)
            return [column]

        for _, record in parquet_records(path, choose):
            (text,) = record.values()
            yield text or ""


@dataclass(frozen=True)
class LocalRows:
    """The rows of a table, or of every table below a folder: instruction data."""

    path: Path

    @cached_property
    def files(self) -> FoundFiles:
        """The files, as :attr:`LocalSource.files`.

        Raises:
            InputError: there is none that can be read.
        """
        return _find_files(self.path, ROW_SUFFIXES, "instruction data")

    @cached_property
    def identity(self) -> str:
        """``files:`` and a hash of all files."""
        return f"files:{files_digest(self.files.read)}"

    def row_parts(self) -> Iterator[Part[Row]]:
        """All rows by name, to be divided."""
        yield None, ((row.name, row) for row in self._rows())

    def _rows(self) -> Iterator[Row]:
        readers = {".json": json_records, ".jsonl": jsonl_records, ".parquet": _parquet_rows}
        for name, path in self.files.read:
            for number, (where, record) in enumerate(readers[file_format(path)](path)):
                yield Row(f"{name}#{number}", where, record)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    return parquet_records(
        path, lambda columns: [name for name in columns.types if name in ROW_COLUMNS] or [*columns.types]
    )


def _find_files(path: Path, suffixes: tuple[str, ...], what: str) -> FoundFiles:
    if not path.is_dir():
        found = [(path.name, path)]
    else:
        with one_error(f"{what} {path} cannot be read", "Make all of its folders readable, or give another."):
            found = sorted((file.relative_to(path).as_posix(), file) for file in _walk(path))
    files = FoundFiles(
        [(name, file) for name, file in found if file_format(file) in suffixes],
        [name for name, file in found if file_format(file) not in suffixes],
    )
    if not files.read:
        problem = f"has no file (of {len(found)})" if path.is_dir() else "is not a file"
        raise InputError(f"{what} {path} {problem} that longspan reads, by its suffix: {', '.join(suffixes)}.")
    for _, file in files.read:
        if not file.is_file():  # reading a pipe would block
            link = f", but a link to {os.readlink(file)}, where there is none" if file.is_symlink() else ""
            raise InputError(f"{what}: {file} is no regular file{link}. Take it out, or put the file there.")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()  # else a link to a parent folder would loop
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_fail):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _fail(error: OSError) -> None:
    raise error
