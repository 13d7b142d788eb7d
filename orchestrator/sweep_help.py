"""The help of ``sweep`` and ``plan``: one screen, or every field with ``--help-all``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from orchestrator.field_help import GROUPS, MOST_USED, Field, fields_of, in_words
from orchestrator.recipes import DEFAULT, RECIPES

WIDTH = 80
COLUMN = 26  # where descriptions begin


def print_help(prog: str, what: str, records: Iterable[Any], whole: bool) -> None:
    """Prints the help of the fields of these records, whose values are the defaults."""
    fields = {name: field for record in records for name, field in fields_of(record).items()}
    print((whole_help if whole else short_help)(prog, what, fields))


def short_help(prog: str, what: str, fields: dict[str, Field]) -> str:
    """One screen: what the command does, the fields that matter most, and the names of the others by group."""
    recipes = ", ".join(f"{name} (default)" if name == DEFAULT else name for name in RECIPES)
    lines = [
        f"usage: {prog} [RECIPE | FILE] [flags]",
        "",
        what,
        *textwrap.wrap(f"RECIPE: {recipes}.", WIDTH, subsequent_indent="    ", break_on_hyphens=False),
        "FILE: a sweep as .yaml or .json (--print-schema: for editors), or a spec.json.",
        "",
        *(f"{f'{fields[name].flag} {_short(fields[name])}':<{COLUMN}}{text}" for name, text in MOST_USED.items()),
        "",
        "More flags, written with -- and described by --help-all:",
    ]
    for title, names in GROUPS.items():
        others = " ".join(name.replace("_", "-") for name in names if name not in MOST_USED)
        lines += textwrap.wrap(f"{title}: {others}", WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def whole_help(prog: str, what: str, fields: dict[str, Field]) -> str:
    """Every field with its type, default and description, by group."""
    recipes = [f"  {name}: {(make.__doc__ or '').partition(chr(10))[0]}" for name, make in RECIPES.items()]
    lines = [
        f"usage: {prog} [RECIPE | FILE] [flags]",
        "",
        *textwrap.wrap(
            f"{what} The same command always continues: finished trials are not trained again. FILE is a sweep as "
            ".yaml or .json (docs/files.md).",
            WIDTH,
        ),
        "",
        "RECIPE is one of",
        *recipes,
    ]
    for title, names in GROUPS.items():
        lines += ["", title]
        for name in names:
            field = fields[name]
            text = field.help if field.default is None else f"{field.help} Default: {shown(field.default)}."
            lines.append(f"  {field.flag} {in_words(field.type)}".rstrip())
            lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(field: Field) -> str:
    text = in_words(field.type)
    return text if len(text) < 10 else "NAME ..." if text.endswith("...") else "NAME"
