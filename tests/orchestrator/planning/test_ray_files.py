"""Other users of a machine can neither read Ray's token nor write into its sessions; one process, one connection."""

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.planning.ray_files import open_to_others
from tests.support.commands import ROOT

STARTS = """
from pathlib import Path
import sys
from orchestrator.run_options import RunOptions
from orchestrator.planning.cluster import join_or_start
from orchestrator.planning.ray_files import open_to_others
from orchestrator.ray_internals import ray_folder
join_or_start(RunOptions(address="local"))
token, (session,) = Path.home() / ".ray/auth_token", [p for p in ray_folder().glob("session_*") if not p.is_symlink()]
print(*(f"{path.stat().st_mode & 0o7777:o}" for path in (token, session, ray_folder())), open_to_others())
try:
    join_or_start(RunOptions())
except ValueError as error:
    print(error)
"""


@pytest.mark.ray
def test_what_a_sweep_starts_is_closed_to_others(tmp_path):
    folder = Path(f"/tmp/lsf{os.getpid()}{secrets.token_hex(2)}")  # short: Ray's sockets are below
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": str(folder)}
    try:
        done = subprocess.run([sys.executable, "-c", STARTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder)
    modes, again = done.stdout.splitlines()[-2:]
    assert modes == "600 700 1777 []", done.stdout + done.stderr
    assert "connected to Ray already" in again and "ray.shutdown()" in again


def test_open_files_are_found_with_their_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    token, sessions = tmp_path / ".ray" / "auth_token", tmp_path / "ray"
    token.parent.mkdir()
    token.write_text("secret")
    (sessions / "session_1").mkdir(parents=True)
    for path, mode in ((token, 0o644), (sessions, 0o777), (sessions / "session_1", 0o777)):
        path.chmod(mode)
    remedies = [problem.rpartition("; ")[2] for problem in open_to_others()]
    assert remedies == [f"chmod 600 {token}", f"chmod 1777 {sessions}", f"chmod 700 {sessions / 'session_1'}"]
    for remedy in remedies:
        subprocess.run(remedy.split(), check=True)
    assert open_to_others() == []
