"""Reads local files: texts, and the records of JSON Lines, JSON and Parquet files.

A record is (place, for error messages; columns). Text and JSON files may be compressed (.gz, .zst).
"""

import codecs
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from workloads.data.columns import Columns
from workloads.errors import InputError, first_line, one_error

if TYPE_CHECKING:
    import pyarrow as pa

Record = tuple[str, dict]

COMPRESSIONS = (".gz", ".zst")

# Rows of a book corpus are a megabyte each.
_PARQUET_ROWS_AT_ONCE = 32


def file_format(path: Path) -> str:
    """The suffix that names the format, in lower case: ``.jsonl`` of ``rows.jsonl`` and of ``rows.JSONL.gz``.

    Both suffixes of a format that is not read compressed: ``.parquet.gz``, ``.tar.gz``.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[1:] and suffixes[1] in COMPRESSIONS:
        return "".join(suffixes) if suffixes[0] in (".parquet", ".tar") else suffixes[0]
    return suffixes[-1] if suffixes else ""


def open_content(path: Path) -> IO[bytes]:
    """Opens a file for reading its content, decompressed."""
    match path.suffix.lower():
        case ".gz":
            return cast("IO[bytes]", gzip.open(path))
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def read_text(path: Path) -> str:
    """A text file's content, line ends included, without a byte order mark.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    with _reading(path), open_content(path) as file:
        return decode(file.read(), path)


def jsonl_records(path: Path) -> Iterator[Record]:
    """Yields the object of each line; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or a line is not UTF-8, not JSON, or no object.
    """
    offset = 0
    with _reading(path), open_content(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            content, offset = decode(line, path, offset), offset + len(line)
            if content.strip():
                yield where, _object(_parse(content, where), where)


def json_records(path: Path) -> Iterator[Record]:
    """Yields the objects of a file that is one list; the file is read whole.

    Raises:
        InputError: it cannot be read, is not UTF-8, not JSON, or no list of objects.
    """
    records = _parse(read_text(path), str(path))
    if not isinstance(records, list):
        raise InputError(f"{path} holds one {type(records).__name__}, not a list. Write a list of objects, [{{...}}].")
    for number, record in enumerate(records):
        where = f"{path}, item {number}"
        yield where, _object(record, where)


def parquet_records(path: Path, choose: Callable[[Columns], list[str]]) -> Iterator[Record]:
    """Yields each row, with the columns that ``choose`` names.

    Raises:
        InputError: the file cannot be read.
    """
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            fields = {field.name: field.type for field in file.schema_arrow}
            columns = choose(
                Columns(
                    {name: str(kind) for name, kind in fields.items()},
                    [name for name, kind in fields.items() if _is_string(kind)],
                    [name for name, kind in fields.items() if not _is_string(kind) and _has_string(kind)],
                )
            )
            for batch in file.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except InputError:
        raise
    except Exception as error:  # Arrow's errors, and Python's for values without a type there, as a date in 12345
        raise InputError(
            f"{path} cannot be read as Parquet, at row {row} or after ({first_line(error)}). Write it again."
        ) from error


def decode(content: bytes, path: Path, offset: int = 0) -> str:
    """Decodes UTF-8, without a byte order mark at the file's beginning.

    Raises:
        InputError: it is not UTF-8, or not text; ``offset`` is where ``content`` begins in the file.
    """
    if offset == 0:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path} is UTF-16, not UTF-8. Convert it (iconv -f UTF-16 -t UTF-8).")
        if content.startswith(codecs.BOM_UTF8):
            offset, content = len(codecs.BOM_UTF8), content.removeprefix(codecs.BOM_UTF8)
    if (nul := content.find(b"\0")) >= 0:
        raise InputError(
            f"{path} is not text: it has a NUL byte at offset {offset + nul}. If it is UTF-16, convert it (iconv -f "
            "UTF-16LE -t UTF-8); else take it out of the data, or delete its NUL bytes (tr -d '\\000')."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start}. "
            "Convert it (iconv -t UTF-8), or take it out of the corpus."
        ) from error


def _reading(path: Path) -> AbstractContextManager[None]:
    return one_error(f"{path} cannot be read", "Repair it, or take it out of the data.")


def _is_string(kind: "pa.DataType") -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # a categorical column of pandas
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _has_string(kind: "pa.DataType") -> bool:
    return _is_string(kind) or any(_has_string(kind.field(number).type) for number in range(kind.num_fields))


def _parse(content: str, where: str) -> object:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise InputError(f"{where} is not JSON ({error.msg}, {place}). Fix it.") from error
    except RecursionError as error:
        raise InputError(f"{where}: its JSON is nested too deeply to be read. Fix it.") from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise InputError(f"{where}: its JSON cannot be read ({first_line(error).split(';')[0]}). Fix it.") from error


def _object(record: object, where: str) -> dict:
    if not isinstance(record, dict):
        raise InputError(f'{where} is not a JSON object such as {{"text": "..."}}. Fix it.')
    return record
