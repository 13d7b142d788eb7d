"""Which column of a table holds the text: ``text``, or the only one that can, or the one that the user names."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from workloads.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The columns of a table.

    Args:
        types: of every column, in words.
        strings: the columns that hold strings.
        nested: the columns of lists or records that hold strings somewhere.
    """

    types: dict[str, str]
    strings: list[str]
    nested: list[str]

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Columns":
        """The columns of a row; a null may stand for a string."""
        return cls(
            {name: type(value).__name__ for name, value in record.items()},
            [name for name, value in record.items() if isinstance(value, str) or value is None],
            [name for name, value in record.items() if isinstance(value, dict | list) and _has_string(value)],
        )


def choose_text_column(columns: Columns, text_column: str | None, where: str) -> str:
    """The column that holds the text: the requested one, else ``text``, else the only one with strings in it.

    Raises:
        InputError: it does not exist or holds no strings, or several could be meant.
    """
    types, strings, nested = columns.types, columns.strings, columns.nested
    listing = f"its columns are {_join(types)}; of these hold strings: {_join(strings)}"
    if nested:
        listing += f"; lists or records with strings in them: {_join(nested)}"
    if text_column is not None:
        if text_column in strings:
            return text_column
        raise InputError(f"{where} has no column {text_column!r} of strings: {listing}. Name one with --text-column.")
    if "text" in strings:
        return "text"
    if "text" in types:
        raise InputError(
            f"{where}: column 'text' is of type {types['text']}, not a string; {listing}. Write its text as strings, "
            "or name another column with --text-column."
        )
    if len(strings) == 1 and not nested:
        return strings[0]
    instructions = " Conversations and instructions are for --task sft." if nested or "output" in strings else ""
    raise InputError(
        f"{where}: which column holds the text? {listing}. Name a column of strings with --text-column.{instructions}"
    )


def record_texts(records: Iterable[tuple[str, dict]], text_column: str | None, chosen: set[str]) -> Iterator[str]:
    """The text of each (place, row) of a table without a schema: the first row decides on the column.

    Args:
        chosen: receives the column's name.
    """
    column = None
    for where, record in records:
        if column is None:
            column = choose_text_column(Columns.of_record(record), text_column, where)
            chosen.add(column)
        elif text_column is None and column != "text" and "text" in record:
            raise InputError(
                f"{where} has a column 'text', and the first row had none: its only column of strings is {column!r}. "
                "Name one with --text-column."
            )
        yield _text(record, column, where)


def _text(record: dict, column: str, where: str) -> str:
    """The text of a row; a null counts as empty."""
    text = record.get(column, ...)
    if text is None:
        return ""
    if not isinstance(text, str):
        what = "is missing" if text is ... else f"is of type {type(text).__name__}, not a string"
        raise InputError(f"{where}: column {column!r} {what}. Fix the row.")
    return encodable(text, f"{where}: column {column!r}")


def encodable(text: str, where: str) -> str:
    """The text itself.

    Raises:
        InputError: it has half of a surrogate pair, which no tokenizer accepts.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} has a lone surrogate. Fix the row.") from error
    return text


def _has_string(value: Any) -> bool:
    left = [value]  # recursion would fail on deeply nested JSON
    while left:
        value = left.pop()
        if isinstance(value, str):
            return True
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
    return False


def _join(columns: Iterable[str]) -> str:
    return ", ".join(columns) or "(none)"
