"""Documents from local files: one document a text file, one document a row of a JSON Lines or Parquet file.

A document is named by its path relative to the folder that was given, with ``#row`` (counted from 0) for a row.
Texts are taken byte for byte as they are (UTF-8), line ends included. Names that begin with a dot are passed over.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workloads.data.columns import choose_text_column, record_text, record_text_column
from workloads.data.documents import Document, Split, files_digest, hold_out
from workloads.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".tex")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES

# Rows of a book corpus are a megabyte each.
_PARQUET_ROWS_AT_ONCE = 32


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

    def documents(self, split: Split | None = None) -> Iterator[Document]:
        return hold_out(self._texts())

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name, path in self.files:
            suffix = path.suffix.lower()
            if suffix in TEXT_SUFFIXES:
                yield name, _decode(path.read_bytes(), path)
            else:
                rows = _jsonl_rows if suffix == ".jsonl" else _parquet_rows
                yield from ((f"{name}#{row}", text) for row, text in enumerate(rows(path, self.text_column)))


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


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start}. "
            "Convert it (iconv -t UTF-8), or take it out of the corpus."
        ) from error


def _jsonl_rows(path: Path, text_column: str | None) -> Iterator[str]:
    column = None
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            content, offset = _decode(line, path, offset), offset + len(line)
            if not content.strip():
                continue
            try:
                record = json.loads(content)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} is not JSON ({error.msg}, column {error.colno}). Mend it.") from error
            if not isinstance(record, dict):
                raise InputError(f'{where} is not a JSON object such as {{"text": "..."}}. Mend it.')
            column = column or record_text_column(record, text_column, where)
            yield record_text(record, column, where)


def _parquet_rows(path: Path, text_column: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            fields = list(file.schema_arrow)
            strings = [field.name for field in fields if field.type in (pa.string(), pa.large_string())]
            column = choose_text_column([field.name for field in fields], strings, text_column, str(path))
            for batch in file.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as Parquet, at row {row} or after: {error}. Write it anew.") from error
