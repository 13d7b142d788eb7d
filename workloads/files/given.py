"""Paths as a user gives them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from workloads.errors import InputError


def existing_path(text: str) -> Path | None:
    """The file or folder that a user named; None if there is none, or no path can be of that form.

    Raises:
        InputError: it is a link to what does not exist, or this Python cannot read its name.
    """
    check_encoding(text)
    try:
        path = Path(text).expanduser()
        if text and path.exists():
            return path
        target = os.readlink(path) if path.is_symlink() else None
    except (OSError, ValueError, RuntimeError):  # a name of 256 bytes; NUL in it; the home of no user
        return None
    if target is not None:
        raise InputError(f"{text} is a link to {target}, where there is nothing. Give what exists.")
    return None


def check_encoding(path: str) -> None:
    """Raises InputError if a name's bytes are no text in the encoding that this Python reads names in."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        try:
            shown = os.fsencode(path).decode(errors="backslashreplace")
        except UnicodeEncodeError:  # of a Python program or JSON: no bytes of a name
            shown = ascii(path)
        raise InputError(
            f"{shown}: this Python reads names of files as "
            f"{sys.getfilesystemencoding()}, in which this is none. Set PYTHONUTF8=1, or give it another name."
        ) from error
