"""Folders that are made once, whole or not at all, however many processes ask and whenever one of them dies."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make(partial)`` if it is not there yet.

    ``make`` fills a folder of another name, which is renamed when it is whole: what is under the final name is
    complete. A lock beside it keeps two processes from doing the same work twice.
    """
    if folder.exists():
        return folder
    from filelock import FileLock  # 20 ms, which a second run does not need

    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.exists():
            for leftover in root.glob(f".{folder.name}.*"):  # of a process that was killed: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            partial = root / f".{folder.name}.{uuid.uuid4().hex}"
            partial.mkdir()
            try:
                make(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder
