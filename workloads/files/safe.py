"""Files in folders and stores that other people and programs write too: plain names, no links, whole or absent."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import uuid
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, overload

# One path component: no separator, no control character, and not "." or "..".
_PLAIN_NAME = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\x7f]{1,255}\Z")


def is_plain_name(name: Any) -> bool:
    """Whether a name read from a store or a manifest stays in the folder it is joined to."""
    return isinstance(name, str) and _PLAIN_NAME.match(name) is not None


@overload
def open_plain(path: Path, mode: Literal["rb"]) -> BufferedReader: ...
@overload
def open_plain(path: Path, mode: str) -> IO[Any]: ...
def open_plain(path: Path, mode: str) -> IO[Any]:
    """As ``path.open(mode)``, but refuses a symbolic link: it may lead to any file of this user.

    Raises:
        OSError: the path is a symbolic link, or cannot be opened.
    """
    return open(path, mode, encoding=None if "b" in mode else "utf-8", opener=_open_no_follow)


class PlainFileHandler(logging.FileHandler):
    """Appends log records to a file, and refuses a symbolic link."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_open_no_follow)


def is_plain_file(path: Path) -> bool:
    """Whether there is a file, and no symbolic link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also if the machine stops; on return it is on disk.

    A symbolic link of that name is replaced, and not followed.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}")
    try:
        with open_plain(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_no_follow(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed here; remove it", path) from None
        raise
