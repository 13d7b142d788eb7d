"""SHA-256 of files. Of a large one it is remembered: hashing the weights of a 7B model (13.5 GB) takes ten seconds.

What is remembered lies in this user's cache on this node, and holds while the file at that path is the same one by its
number, size and both times, of which nobody can set back the time of the last change.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from workloads.files.cache import private_folder, user_cache

LARGE_BYTES = 2**26  # 50 ms
# A file system tells times in steps of some milliseconds: what is changed twice in one looks unchanged.
SETTLED_SECONDS = 2.0


def content_hash(file: Path) -> str:
    """SHA-256 of the file in hexadecimal: what it holds, wherever it lies."""
    before = _mark(file)
    if file.stat().st_size < LARGE_BYTES or (folder := private_folder(user_cache() / "hashes")) is None:
        return _sha256(file)
    note = folder / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()}.json"
    if (known := _read(note)) and known.get("file") == before:
        return known["sha256"]
    began = time.time_ns()
    digest = _sha256(file)
    settled = began - max(before["modified"], before["changed"]) > SETTLED_SECONDS * 1e9
    if settled and _mark(file) == before:
        _write(note, {"path": str(file.resolve()), "file": before, "sha256": digest})
    return digest


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _mark(file: Path) -> dict[str, int]:
    """What is another as soon as the file is. Times in nanoseconds."""
    found = file.stat()
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"number": found.st_ino, "size": found.st_size, **times}


def _read(note: Path) -> dict | None:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


def _write(note: Path, content: dict) -> None:
    partial = note.with_name(f".{uuid.uuid4().hex}")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(note)
    except OSError:  # a full disk: it is hashed again
        partial.unlink(missing_ok=True)
