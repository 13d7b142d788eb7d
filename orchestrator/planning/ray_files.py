"""Who may read and write what Ray keeps on this machine: its token, and its sessions' sockets and logs.

Ray writes the token readable for everyone (0644) and makes its folders writable for everyone (0777).
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from orchestrator.ray_internals import ray_folder

OTHERS = stat.S_IRWXG | stat.S_IRWXO


def token_file() -> Path:
    """The file that Ray reads its token from."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()


def make_token_folder() -> None:
    """Makes the folder that Ray writes a new token to, for this user alone."""
    with contextlib.suppress(OSError):
        (Path.home() / ".ray").mkdir(mode=0o700, exist_ok=True)


def restrict(session: Path) -> None:
    """Closes a session of Ray that this process started, and the token, to other users.

    The folder of all sessions stays open to every user, but nobody can remove or replace what another made there.
    """
    for path, mode in ((session, 0o700), (token_file(), 0o600), (session.parent, 0o1777)):
        with contextlib.suppress(OSError):  # of another user, or not there
            path.chmod(mode)


def open_to_others() -> list[str]:
    """What other users of this machine could read or change of Ray's, each with its remedy; for ``doctor``."""
    found = []
    token, sessions = token_file(), ray_folder()
    if (mode := _own_mode(token)) and mode & OTHERS:
        found.append(f"{token} has mode {mode:04o}: others may read Ray's token; chmod 600 {token}")
    if (mode := _own_mode(sessions)) and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        found.append(f"{sessions} has mode {mode:04o}: others may replace sessions; chmod 1777 {sessions}")
    for session in sorted(sessions.glob("session_*")):
        if not session.is_symlink() and (mode := _own_mode(session)) and mode & stat.S_IWOTH:
            found.append(f"{session} has mode {mode:04o}: others may write to it; chmod 700 {session}")
    return found


def _own_mode(path: Path) -> int | None:
    """The permissions of what this user owns; None of anything else."""
    try:
        found = path.stat()
    except OSError:
        return None
    return stat.S_IMODE(found.st_mode) if found.st_uid == os.getuid() else None
