"""The GPUs of this machine and their use, as nvidia-smi tells: without torch, in a tenth of a second."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total")
LIMIT_S = 5.0


@dataclass(frozen=True)
class Gpu:
    """``busy``: percent of the last second or less in which a kernel ran; None where the GPU does not tell (MIG)."""

    index: int
    name: str
    busy: int | None
    used_gib: float | None
    gib: float | None

    def __str__(self) -> str:
        busy = "use unknown" if self.busy is None else f"{self.busy}% busy"
        memory = "" if self.used_gib is None or self.gib is None else f", {self.used_gib:.1f} of {self.gib:.1f} GiB"
        return f"{self.index} {self.name}: {busy}{memory}"


def gpus() -> list[Gpu]:
    """None where there is no driver, or it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        index, name, busy, used, total = (cell.strip() for cell in line.split(","))
        found.append(Gpu(int(index), name, _number(busy), _gib(used), _gib(total)))
    return found


def _number(cell: str) -> int | None:
    """``[N/A]`` and the like stand for what a GPU does not tell."""
    return int(cell) if cell.isdecimal() else None


def _gib(mebibytes: str) -> float | None:
    number = _number(mebibytes)
    return None if number is None else number / 1024
