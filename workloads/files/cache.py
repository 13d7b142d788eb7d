"""This user's cache on disk, outside of any sweep: where it is, and when its files can be trusted."""

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
    """The folder, created if absent, with symbolic links resolved; None if others could change what is in it.

    It must belong to the user and be closed to all others, and no parent folder may let others replace it (root may;
    in a folder with the sticky bit, such as /tmp, only the owner can). A group that holds the user alone, which many
    systems create for every user with write access, does not count as others. None also if it cannot be created.
    """
    try:
        for absent in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            absent.mkdir(mode=0o700, exist_ok=True)
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
    """Whether it is the user's own group by its number, its name and its members."""
    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:  # in a container, perhaps
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and not {*found.gr_mem} - {user.pw_name}
