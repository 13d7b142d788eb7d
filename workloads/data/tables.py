"""Records of local JSON Lines, JSON and Parquet files: each as (its place, for error messages; its columns)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from workloads.errors import InputError

Record = tuple[str, dict]

# Rows of a book corpus are a megabyte each.
_PARQUET_ROWS_AT_ONCE = 32


def jsonl_records(path: Path) -> Iterator[Record]:
    """One object a line; blank lines are skipped.

    Raises:
        InputError: a line is not UTF-8, not JSON, or no object.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            content, offset = decode(line, path, offset), offset + len(line)
            if content.strip():
                yield where, _object(_parse(content, where), where)


def json_records(path: Path) -> Iterator[Record]:
    """The objects of a file that is one list, read whole.

    Raises:
        InputError: it is not UTF-8, not JSON, or no list of objects.
    """
    records = _parse(decode(path.read_bytes(), path), str(path))
    if not isinstance(records, list):
        raise InputError(f"{path} holds no list, but one {type(records).__name__}. Write a list of objects, [{{...}}].")
    for number, record in enumerate(records):
        where = f"{path}, item {number}"
        yield where, _object(record, where)


def parquet_records(path: Path, choose: Callable[[list[str], list[str]], list[str]] | None = None) -> Iterator[Record]:
    """One row each, with the columns that ``choose(columns, columns of strings)`` names, or with all.

    Raises:
        InputError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            fields = list(file.schema_arrow)
            names = [field.name for field in fields]
            strings = [field.name for field in fields if field.type in (pa.string(), pa.large_string())]
            columns = choose(names, strings) if choose else names
            for batch in file.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet, at row {row} or after: {error}. Write it again."
        ) from error


def decode(content: bytes, path: Path, offset: int = 0) -> str:
    """Decodes UTF-8.

    Raises:
        InputError: it is not UTF-8; ``offset`` is where ``content`` begins in the file.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start}. "
            "Convert it (iconv -t UTF-8), or take it out of the corpus."
        ) from error


def _parse(content: str, where: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise InputError(f"{where} is not JSON ({error.msg}, {place}). Fix it.") from error


def _object(record: object, where: str) -> dict:
    if not isinstance(record, dict):
        raise InputError(f'{where} is not a JSON object such as {{"text": "..."}}. Fix it.')
    return record
