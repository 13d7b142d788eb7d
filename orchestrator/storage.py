"""The storage root: where everything about sweeps lies, and the truth about them.

    trials/<fingerprint>/   trial.json, journal.jsonl, log.txt, checkpoints/, mlflow.json, code-*.diff
    sweeps/<name>/          spec.json, plan.json, sweep.json, rungs/, search.jsonl, comparison.json, report/, log.txt,
                            code-*.diff
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

from orchestrator.journal import Journal, TrialRecord
from orchestrator.spec import TrialSpec
from workloads.errors import InputError

# What a sweep of the built-in model writes at most (checkpoints, journals, MLflow's store), with a margin.
LEAST_FREE_BYTES = 500 * 2**20
# Of each trial, for its last words on a full disk: several blocks of any file system.
RESERVE_BYTES = 64 * 2**10


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

    def others(self, trials: list[TrialSpec], most: int = 20) -> list[tuple[TrialSpec, TrialRecord]]:
        """Trials of the same model that other sweeps have trained here, the newest first, with their records."""
        known = {trial.fingerprint for trial in trials}
        model = {trial.identities.model for trial in trials}
        journals = [path for path in self.root.glob("trials/*/journal.jsonl") if path.parent.name not in known]
        found = []
        for path in sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True)[:most]:
            trial = TrialSpec.from_dict(read_json(path.with_name("trial.json")))
            if trial.identities.model in model:
                found.append((trial, TrialRecord.of(Journal(path))))
        return found

    def add_trial(self, trial: TrialSpec, model_location: str | None = None) -> TrialFolder:
        """Makes a trial's folder. ``model_location``, the base model's folder or id, is for its export later."""
        folder = self.trial(trial.fingerprint)
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.journal.reserve.write_bytes(bytes(RESERVE_BYTES))
        write_json(
            folder.path / "trial.json", {**trial.to_dict(), "label": trial.label, "model_location": model_location}
        )
        return folder

    def sweep(self, name: str) -> Path:
        return self.root / "sweeps" / name

    def search_journal(self, sweep: str) -> Journal:
        """What a sweep's search has suggested."""
        return Journal(self.sweep(sweep) / "search.jsonl")

    def write(self, name: str, content: Any) -> None:
        """Writes a small JSON file below the root, for every node to see: whole or not at all."""
        write_json(self.root / name, content)

    def read(self, name: str) -> Any | None:
        """A JSON file below the root, or None where there is none."""
        return read_json(self.root / name)

    def read_folder(self, name: str) -> dict[str, Any]:
        """The content of each JSON file in a folder below the root, by the file's name without its ending."""
        contents = {file.stem: read_json(file) for file in sorted((self.root / name).glob("*.json"))}
        return {stem: content for stem, content in contents.items() if content is not None}

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
