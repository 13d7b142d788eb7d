"""Which column of a table holds the text: ``text``, or the only one that holds strings, or the one the user names."""

from workloads.errors import InputError


def choose_text_column(columns: list[str], string_columns: list[str], text_column: str | None, where: str) -> str:
    """The column that holds the text: the requested one, else ``text``, else the only one of strings.

    Raises:
        InputError: it does not exist, or several could be meant.
    """
    listing = f"its columns are {_join(columns)}; of these hold strings: {_join(string_columns)}"
    if text_column is not None:
        if text_column in string_columns:
            return text_column
        raise InputError(f"{where} has no column {text_column!r} of strings: {listing}. Name one with --text-column.")
    if "text" in string_columns:
        return "text"
    if len(string_columns) == 1:
        return string_columns[0]
    raise InputError(f"{where}: which column holds the text? {listing}. Name one with --text-column.")


def record_text_column(record: dict, text_column: str | None, where: str) -> str:
    """``choose_text_column`` for rows without a schema: the first row decides (a null may stand for a string)."""
    strings = [column for column, value in record.items() if isinstance(value, str) or value is None]
    return choose_text_column(list(record), strings, text_column, where)


def record_text(record: dict, column: str, where: str) -> str:
    """The text of a row; a null counts as empty."""
    text = record.get(column, ...)
    if text is None:
        return ""
    if not isinstance(text, str):
        what = "is missing" if text is ... else f"is of type {type(text).__name__}, not a string"
        raise InputError(f"{where}: column {column!r} {what}. Fix the row.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of an escaped pair, which no tokenizer accepts
        raise InputError(f"{where}: column {column!r} has a lone surrogate. Fix the row.") from error
    return text


def _join(columns: list[str]) -> str:
    return ", ".join(columns) or "(none)"
