"""Folders that are made once, completely or not at all, by any number of processes, any of which may die."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from workloads.files.safe import flush


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns ``folder``, after ``make(partial)`` has filled it if it was absent.

    ``make`` fills a folder of another name, which is then renamed: a folder with the final name is complete. A lock
    beside it keeps two processes from doing the same work twice.
    """
    if folder.exists():
        return folder
    from filelock import FileLock  # 20 ms that a second run saves

    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.exists():
            for leftover in root.glob(f".{folder.name}.*"):  # of a killed process: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            partial = root / f".{folder.name}.{uuid.uuid4().hex}"
            partial.mkdir()
            try:
                make(partial)
                for path in (*partial.rglob("*"), partial):
                    flush(path)
                partial.rename(folder)
                flush(root)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder
