"""A trial's journal: what happened in it, one JSON object a line, in the order it happened.

Workers append; everything else (the live view, MLflow, the comparison) reads. A line that a dying process left
unfinished is passed over. A trial that went on from a checkpoint may tell of the same step twice: the later line holds.

Every line has ``event``, ``time`` (Unix seconds) and the event's own fields: those of ``workloads.training.loop``, and

    launched   sweep, resources (workers, and the cpus and gpus of each): Tune has started the trial's driver
    started    a worker has begun: what it runs on (orchestrator.records.provenance.describe_machine), git_commit, git_diff,
               execution (the settings of ExecutionConfig; gradient_checkpointing and offload_activations are numbers
               of layers)
    finished   the trial is complete
    stopped    step, tokens, sweep, reason, rule, rung (tokens), score, cutoff, compared_with: stopped early, see
               orchestrator/planning/early_stopping.py; unfinished, and can go on from its checkpoint
    failed     kind (see orchestrator.running.faults), reason, attempt: the attempt ended in an error
    retry      kind, remedy, pause: the trial is tried again, what is different then, and in how many seconds
    preempted  attempt: a node was about to be taken away; the trial stopped with a checkpoint and goes on elsewhere
    cancelled  step, by: stopped with a checkpoint, or not begun, since a person asked for it (orchestrator/cancel.py);
               unfinished, and can go on
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.records.events import DISK_FULL, as_line, parse

if TYPE_CHECKING:
    pass


class Journal:
    """A journal in a local file. ``orchestrator.records.segments`` has the same in an object store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: Any) -> None:
        """Adds a line and has it on disk before returning, since what follows may kill the process."""
        line = as_line(event, fields)
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in DISK_FULL or not self.reserve.exists():
                raise
            self.reserve.unlink()
            self._write(line)

    @property
    def reserve(self) -> Path:
        """A file of a few kilobytes that is given up for a line that finds the disk full: what says so."""
        return self.path.with_name(".reserve")

    def _write(self, line: str) -> None:
        with self.path.open("ab") as file:
            if file.tell() and not self._ends_with_newline():
                line = "\n" + line  # the line before was cut off
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """(complete lines from a byte offset on, the offset after them)."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                content = file.read()
        except FileNotFoundError:
            return [], offset
        end = content.rfind(b"\n") + 1
        return parse(content[:end]), offset + end

    def poll(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """As ``read``, for those who follow: may come a little later, and never waits."""
        return self.read(offset)

    def exists(self) -> bool:
        return self.path.exists()

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
