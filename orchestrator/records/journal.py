"""A trial's journal: what happened to it, one event a line (orchestrator/records/events.py), in order.

Workers append; everything else (the live view, MLflow, the comparison) reads. A trial that continues from a checkpoint
may repeat a step: the later line holds.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from orchestrator.records.events import Event, Skipped, as_line, parse
from workloads.files.safe import open_plain

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Read(NamedTuple):
    """What was read from a journal. ``offset``: where the next read begins; ``skipped``: lines without an event."""

    events: list[Event]
    offset: int
    skipped: list[Skipped]


class Journal:
    """A journal in a local file. ``orchestrator.records.segments`` has the same in an object store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Event) -> None:
        """Adds a line, which is on disk on return: what follows may kill the process."""
        line = as_line(event)
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in DISK_FULL or not self.reserve.exists():
                raise
            self.reserve.unlink()
            self._write(line)

    @property
    def reserve(self) -> Path:
        """A file of some kilobytes, removed to make room for the line that reports a full disk."""
        return self.path.with_name(".reserve")

    def _write(self, line: str) -> None:
        with open_plain(self.path, "ab") as file:
            if file.tell() and not self._ends_with_newline():
                line = "\n" + line  # the line before was cut off
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @property
    def location(self) -> str:
        """The file, to be shown."""
        return str(self.path)

    def read(self, offset: int = 0) -> Read:
        """The complete lines from a byte offset on."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                content = file.read()
        except FileNotFoundError:
            return Read([], offset, [])
        end = content.rfind(b"\n") + 1
        events, skipped = parse(content[:end])
        return Read(events, offset + end, skipped)

    def poll(self, offset: int) -> Read:
        """As ``read``, for followers: never waits, and may be a little behind in an object store."""
        return self.read(offset)

    def exists(self) -> bool:
        """Whether anything was ever written."""
        return self.path.exists()

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
