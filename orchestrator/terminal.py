"""How numbers, durations, sizes, paths and lists are written for people, and the console they are written to."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def number_or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """``2h05m``, ``3m20s``, ``45s``; days where it takes days."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def shown_path(path: Path) -> str:
    """A path as a person here would type it: relative inside the working directory, whole elsewhere."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


LOG_WIDTH = 110


def make_console() -> Console:
    """A console for this terminal, or of fixed width where the output goes to a file or a job log."""
    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def and_list(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
