"""Small JSON files that another process may read at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, default=str))
    partial.replace(path)


def read_json(path: Path) -> Any | None:
    """A file's content, or None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
