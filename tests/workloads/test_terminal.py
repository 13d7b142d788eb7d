"""Text that others wrote reaches a terminal as text."""

import pytest
from rich.live import Live
from rich.table import Table
from rich.text import Text

from workloads.command import exit_status
from workloads.errors import InputError
from workloads.terminal import make_console, printable

# Clears the screen, sets the window's title, writes over the line before; C1's way to say the same; reversed text;
# a byte that is no text; and what rich would take for markup or an emoji.
HOSTILE = "a\x1b[2J\x1b]0;b\x07\r\x9b2J\u202ec\udcff[/b][red]:smile:"
SHOWN = r"a\x1b[2J\x1b]0;b\x07\r\x9b2J\u202ec\udcff[/b][red]:smile:"


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def wide(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    if request.param:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any file for a terminal
        monkeypatch.setenv("NO_COLOR", "1")


def test_what_a_terminal_obeys_is_shown_as_escapes():
    assert printable(HOSTILE) == SHOWN
    ordinary = "tab\tnewline\n[brackets] ünïcode 日本語 \u200d🎉"
    assert printable(ordinary) == ordinary
    assert printable("a\tb\nerror: c", one_line=True) == r"a\tb\nerror: c"


def test_a_console_shows_text_of_others_as_text(wide, capsys):
    console = make_console()
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text("\x1b[2J"))
    console.print(HOSTILE)
    console.print(f"note: {HOSTILE}", style="red", soft_wrap=True)
    console.print(table)
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 6
    assert "\x9b" not in printed and "\x07" not in printed and "\x1b[2J" not in printed and "\u202e" not in printed
    with Live(console=console, auto_refresh=False) as live:
        live.update(Text("\x1b]0;title"), refresh=True)
    assert "\x1b]0;title" not in capsys.readouterr().out


def test_errors_quote_what_was_given(wide, capsys):
    def command():
        raise InputError(f"--data {HOSTILE}: not found")

    assert exit_status(command) == 2
    assert f"error: --data {SHOWN}: not found" in capsys.readouterr().err
