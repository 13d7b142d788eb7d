"""The storage root: where everything about sweeps lies, and the truth about them.

    trials/<fingerprint>/   trial.json, journal.jsonl, log.txt, checkpoints/, mlflow.json, code-*.diff
    sweeps/<name>/          spec.json, sweep.json, comparison.json, report/, code-*.diff
    data/<hash>/            prepared corpora, shared by all trials
    mlflow/                 MLflow's default store: mlflow.db and artifacts/

Any process may die at any time: files that are read again are written under another name and renamed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.journal import Journal
from orchestrator.spec import TrialSpec
from workloads.errors import InputError

# What a sweep of the built-in model writes at most (checkpoints, journals, MLflow's store), with a margin.
LEAST_FREE_BYTES = 500 * 2**20


@dataclass(frozen=True)
class TrialFolder:
    """One trial's folder, named by its fingerprint."""

    path: Path

    @property
    def journal(self) -> Journal:
        return Journal(self.path / "journal.jsonl")

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def mlflow_state(self) -> Path:
        return self.path / "mlflow.json"

    @property
    def lock(self) -> Path:
        """Held by the worker that trains the trial, so that two sweeps that share it do not both train it."""
        return self.path / ".lock"


@dataclass(frozen=True)
class Storage:
    """A storage root on a local or shared file system."""

    root: Path

    @classmethod
    def open(cls, location: str) -> Storage:
        """The storage root at ``location``, made if it is not there.

        Raises:
            InputError: it is not a folder, cannot be written, or its disk is full.
        """
        if "://" in location:
            raise InputError(
                f"storage {location}: object stores are not supported yet; give a folder that every node sees "
                "(a shared file system where there are several)"
            )
        root = Path(location).expanduser().resolve()
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".writable-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
            stat = os.statvfs(root)
        except OSError as error:
            raise InputError(
                f"storage {root} cannot be written ({error.strerror}); choose another with --storage FOLDER"
            ) from error
        free = stat.f_bavail * stat.f_frsize
        if free < LEAST_FREE_BYTES:
            raise InputError(
                f"storage {root} has {free / 2**20:,.0f} MiB free; a sweep needs {LEAST_FREE_BYTES / 2**20:,.0f} MiB. "
                "Free some, or choose another disk with --storage FOLDER"
            )
        return cls(root)

    def trial(self, fingerprint: str) -> TrialFolder:
        return TrialFolder(self.root / "trials" / fingerprint)

    def add_trial(self, trial: TrialSpec, model_location: str | None = None) -> TrialFolder:
        """Makes a trial's folder. ``model_location``, the base model's folder or id, is for its export later."""
        folder = self.trial(trial.fingerprint)
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.path / "trial.json", {**trial.to_dict(), "model_location": model_location})
        return folder

    def sweep(self, name: str) -> Path:
        return self.root / "sweeps" / name

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    @property
    def ray_train(self) -> Path:
        """Ray Train's and Tune's own files; nothing in them is needed again."""
        return self.root / ".ray"


def write_json(path: Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, default=str))
    partial.replace(path)


def read_json(path: Path) -> Any | None:
    """A file's content, or None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
