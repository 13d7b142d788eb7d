"""JSON that every reader takes: Python alone writes and reads a bare NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def json_text(content: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """As ``json.dumps``, with null in place of numbers that are not finite."""
    try:
        return json.dumps(content, indent=indent, default=default, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
