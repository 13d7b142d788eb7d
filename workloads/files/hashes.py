"""SHA-256 of files, cached for large ones: hashing the weights of a 7B model (13.5 GB) takes ten seconds.

A cached hash is in this user's cache on this node. It is valid while the file at that path has the same inode, size,
mtime and ctime; nobody can set the ctime back.
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
# File systems count time in steps of some milliseconds: a second change within a step would look like none.
SETTLED_SECONDS = 2.0


def content_hash(file: Path) -> str:
    """SHA-256 of the file's content in hexadecimal."""
    before = _stat(file)
    if file.stat().st_size < LARGE_BYTES or (folder := private_folder(user_cache() / "hashes")) is None:
        return _sha256(file)
    entry = folder / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()}.json"
    if (known := _read(entry)) and known.get("file") == before:
        return known["sha256"]
    began = time.time_ns()
    digest = _sha256(file)
    settled = began - max(before["modified"], before["changed"]) > SETTLED_SECONDS * 1e9
    if settled and _stat(file) == before:
        _write(entry, {"path": str(file.resolve()), "file": before, "sha256": digest})
    return digest


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _stat(file: Path) -> dict[str, int]:
    """What differs as soon as the file does. Times in nanoseconds."""
    found = file.stat()
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"number": found.st_ino, "size": found.st_size, **times}


def _read(entry: Path) -> dict | None:
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write(entry: Path, content: dict) -> None:
    partial = entry.with_name(f".{uuid.uuid4().hex}")
    try:
        partial.write_text(json.dumps(content), "utf-8")
        partial.replace(entry)
    except OSError:  # a full disk: the file is hashed again next time
        partial.unlink(missing_ok=True)
