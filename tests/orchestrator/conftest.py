"""A corpus and sweeps small enough for two cores and a few seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from orchestrator.records.object_store import ObjectStore
from tests.support.s3_server import BUCKET, S3Server
from tests.support.texts import write_texts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Documents of a few kilobytes."""
    return write_texts(tmp_path_factory.mktemp("text"), documents=30, lines=300)


@pytest.fixture(scope="module")
def s3():
    """An S3-compatible server of our own, for this process and those that it starts."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        ObjectStore.at.cache_clear()  # clients know their server
        yield server
    server.end()


@pytest.fixture
def bucket(s3) -> str:
    """A location in the server where nothing is."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


class SweepCommand:
    """``python -m orchestrator.sweep`` as a user runs it, in a process of its own."""

    def __init__(self, storage: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.storage = storage
        self.arguments = [sys.executable, "-m", "orchestrator.sweep", *flags, "--storage", str(storage)]
        # A user's shell has none of what an earlier test of this process set before it started Ray.
        own = {n: value for n, value in os.environ.items() if not n.startswith(("RAY_", "TUNE_", "MLFLOW_TRACKING"))}
        self.environment = {**own, "COLUMNS": "110", **(environment or {})}

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.arguments, cwd=ROOT, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self) -> tuple[int, str]:
        """(exit status, everything that was printed)"""
        process = self.start()
        output, _ = process.communicate(timeout=400)
        return process.returncode, output


def wait_for(condition, process: subprocess.Popen, what: str, seconds: float = 120):
    """The first true value of ``condition()``, while ``process`` lives."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if value := condition():
            return value
        if process.poll() is not None:
            raise AssertionError(f"the command ended before {what}:\n{process.stdout.read()}")
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"{what} did not happen within {seconds} s:\n{process.stdout.read()}")
