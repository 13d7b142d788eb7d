"""What is kept on disk between processes, outside of any sweep: where, and when it can be trusted."""

from __future__ import annotations

import functools
import grp
import os
import pwd
import stat
from pathlib import Path


def user_cache() -> Path:
    """This user's cache on this node: ``$XDG_CACHE_HOME/longspan``, by default ``~/.cache/longspan``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"


def private_folder(folder: Path) -> Path | None:
    """The folder, made if it is not there and with symbolic links resolved, if nobody but this user can change what is
    in it; None if others can, or it cannot be made.

    It belongs to the user and is closed to all others, and no folder above it lets others put another one in its place
    (root may, and in a folder with the sticky bit, such as /tmp, only the owner). A group of the user alone, which many
    systems give everybody and let write by default, is not others.
    """
    try:
        for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve()
        return folder if _is_private(folder) else None
    except OSError:
        return None


def _is_private(folder: Path) -> bool:
    me, found = os.getuid(), folder.stat()
    if found.st_uid != me or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return False
    for parent in folder.parents:
        found = parent.stat()
        group_writes = found.st_mode & stat.S_IWGRP and not _is_of_this_user_alone(found.st_gid)
        others_write = group_writes or found.st_mode & stat.S_IWOTH
        if found.st_uid not in (me, 0) or (others_write and not found.st_mode & stat.S_ISVTX):
            return False
    return True


@functools.cache
def _is_of_this_user_alone(group: int) -> bool:
    """Whether it is the user's own group by its number, its name and who is in it."""
    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:  # in a container, perhaps
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and not {*found.gr_mem} - {user.pw_name}
