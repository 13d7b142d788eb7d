"""Small JSON files that another process may read at any time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workloads.errors import InputError
from workloads.files.json_text import json_text
from workloads.files.safe import replace_file


class DamagedFile(InputError):
    """A file of a storage that cannot be used. The message names it."""


def expect_fields(content: Any, name: str, **kinds: type) -> dict[str, Any]:
    """The content of a JSON file, once it is seen to be an object whose fields have these types.

    Raises:
        DamagedFile: it is not.
    """
    if not isinstance(content, dict):
        raise DamagedFile(f"{name} is damaged (it is no JSON object)")
    for field, kind in kinds.items():
        if not isinstance(content.get(field), kind):
            raise DamagedFile(f"{name} is damaged (its {field} is no {kind.__name__})")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    replace_file(path, json_text(content, indent=1, default=str).encode())


def read_json(path: Path) -> Any | None:
    """A file's content, or None if there is none.

    Raises:
        DamagedFile: it cannot be read, or is not JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error.strerror})") from error
    return parse_json(content, str(path))


def parse_json(content: bytes, name: str) -> Any:
    """The value of a JSON file, which others may have written.

    Raises:
        DamagedFile: it is not JSON.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else f"it is not JSON: {error}"
        raise DamagedFile(f"{name} is damaged ({reason})") from error
    if value is None:
        raise DamagedFile(f"{name} is damaged (it is null)")
    return value
