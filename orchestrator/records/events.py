"""The journal's events, and their one writer and parser."""

from __future__ import annotations

import errno
import json
import time
from typing import Any

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def as_line(event: str, fields: dict[str, Any]) -> str:
    return json.dumps({"event": event, "time": time.time(), **fields}) + "\n"


def parse(content: bytes) -> list[dict[str, Any]]:
    """The events of whole lines."""
    events = []
    for line in content.splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue  # cut off by a process that died
    return events
