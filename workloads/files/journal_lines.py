"""The lines of a trial's journal: one JSON object each, with the name of an event and when it happened.

``orchestrator/records/events.py`` makes typed events of them; what reads a trained trial's scores needs no more.
"""

from __future__ import annotations

import json
from typing import Any

# Times must be below the year 2603, in Unix seconds: no other number is a time.
MAX_TIME = 2e10


def parse_line(line: bytes) -> dict[str, Any]:
    """The values of a line, ``event`` (a name) and ``time`` (Unix seconds) among them.

    Raises:
        ValueError: a dying process cut it off, or it is damaged.
    """
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(values, dict) or not isinstance(values.get("event"), str):
        raise ValueError("not a JSON object with the name of an event")
    if not isinstance(when := values.get("time"), int | float) or not 0 <= when < MAX_TIME:
        raise ValueError(f"{values['event']!r} without a time")
    return values
