"""How numbers, durations, sizes, money, paths and lists are written for people."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import filesize

GIB = 2**30


def number_or_dash(value: float | None, form: str) -> str:
    """A number in a format such as ``.3f``, or a dash for None."""
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """``2h05m``, ``3m20s``, ``45s``; from two days on ``2d03h``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def file_size(size: int) -> str:
    """Bytes as ``3.2 GiB``, ``512.0 MiB``, ``4.0 KiB`` or ``17 bytes``."""
    unit, suffix = filesize.pick_unit_and_suffix(size, ["bytes", "KiB", "MiB", "GiB", "TiB"], 1024)
    return f"{size / unit:,.{0 if unit == 1 else 1}f} {suffix}"


def gib(size: float) -> str:
    """Bytes as ``3.2 GiB``, however few."""
    return f"{size / GIB:.1f} GiB"


def device_hours(hours: float, unit: str | None) -> str:
    """``3.20 GPU hours``; with more digits below a tenth of an hour."""
    return f"{hours:,.{2 if hours >= 0.1 else 4}f} {unit or 'hours'}"


def usd(value: float) -> str:
    """``1,234.50 USD``."""
    return f"{value:,.2f} USD"


def shell_command(*words: str) -> str:
    """A command line as a shell takes it: words with spaces, quotes, $ and the like are quoted."""
    return shlex.join(words)


def shown_path(path: Path) -> str:
    """A path as a person here would type it: relative inside the working directory, absolute elsewhere."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def and_list(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def first_of(words: Sequence[str], most: int) -> str:
    """``a, b, c``; of more than ``most`` words the first ones, ``and 3 more``."""
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
