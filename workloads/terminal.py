"""Text on a terminal. What was not written here (names, journals, data, answers) is shown, never obeyed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# Control characters but tab and newline, those that change the direction of text, and bytes that are no text.
_OBEYED = (
    *(set(range(0x20)) - {0x09, 0x0A}),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    *range(0xD800, 0xE000),
)
_SHOWN = {code: chr(code).encode("unicode_escape", "surrogatepass").decode() for code in _OBEYED}
# Columns of a table that goes to a file or a job log.
LOG_WIDTH = 110


def printable(text: str, *, one_line: bool = False) -> str:
    r"""The text with what a terminal would obey, or could not write, as escapes such as ``\x1b``.

    Args:
        one_line: newlines and tabs too: for what must not look like lines of ours.
    """
    return text.translate(_SHOWN | {0x09: r"\t", 0x0A: r"\n"} if one_line else _SHOWN)


class _Console(Console):
    """A console whose text contains nothing that a terminal obeys but the console's own styles."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this inside its handler, and would exit with status 1

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)  # measured as it is shown

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def make_console(width: int | None = None, *, stderr: bool = False) -> Console:
    """A console for this terminal, or of fixed width (COLUMNS, else ``width``, else LOG_WIDTH) for a file or job log.

    Text is shown as it is: square brackets and ``:names:`` of emoji have no meaning.
    """
    console = _Console(highlight=False, markup=False, emoji=False, stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = width or LOG_WIDTH
    return console
