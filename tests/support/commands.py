"""``python -m orchestrator.sweep`` as a user runs it, with flags for sweeps of a few seconds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ("--context-lengths", "1024", "--steps", "4", "--batch", "2", "--eval-every", "2", "--eval-documents", "2")
ONE_TRIAL = (
    "--context-lengths", "1024", "--batch", "2", "--eval-every", "50", "--eval-documents", "2", "--methods", "full",
    "--references", "--checkpoint-every", "2",
)  # fmt: skip


class SweepCommand:
    """``python -m orchestrator.sweep`` as a user runs it, in a process of its own; without a recipe, convergence."""

    def __init__(self, storage: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.storage = storage
        if flags[:1] == () or (flags[0].startswith("-") and "--spec" not in flags):
            flags = ("convergence", *flags)
        self.arguments = [sys.executable, "-m", "orchestrator.sweep", *flags, "--storage", str(storage)]
        # A user's shell has nothing that tests set. RAY_TMPDIR stays: it keeps tests without the marker ray from
        # starting it.
        removed = re.compile("RAY_(?!TMPDIR)|TUNE_|MLFLOW_TRACKING|OMP_NUM_THREADS")
        own = {name: value for name, value in os.environ.items() if not removed.match(name)}
        self.environment = {**own, "COLUMNS": "110", **(environment or {})}

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.arguments, cwd=ROOT, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self) -> tuple[int, str]:
        """Waits for the end; returns (exit status, everything that was printed)."""
        process = self.start()
        output, _ = process.communicate(timeout=400)
        return process.returncode, output


def wait_for(condition, process: subprocess.Popen, what: str, seconds: float = 400):
    """Returns the first true value of ``condition()`` while ``process`` lives."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        if value := condition():
            return value
        if process.poll() is not None:
            raise AssertionError(f"the command ended before {what}:\n{process.stdout.read()}")
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"{what} did not happen within {seconds} s:\n{process.stdout.read()}")
