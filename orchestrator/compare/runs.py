"""Find single runs by any of their names, and list what differs between them.

Differences come before results: a run that is better with another seed, data, code or machine does not
show what one with only another learning rate does.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.records.events import Started
from orchestrator.records.storage import Storage
from orchestrator.records.trial_folder import TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec
from workloads.errors import InputError
from workloads.files.given import existing_path

EXPECTED = (
    "expected a trial's folder, its fingerprint or the beginning of it (4 digits or more), SWEEP/LABEL such as "
    "'convergence/lora+ 2048', or an MLflow run id"
)


@dataclass(frozen=True)
class Run:
    """A trial with its journal's record and its folder."""

    trial: TrialSpec
    record: TrialRecord
    folder: Path

    @property
    def name(self) -> str:
        """The trial's label with the beginning of its fingerprint."""
        return f"{self.trial.label} ({self.trial.fingerprint[:8]})"

    def described(self) -> dict[str, dict[str, Any]]:
        """Everything that may explain a difference, by section and field, from the last attempt."""
        trial, started = self.trial, self.record.started or Started()
        execution = {
            **started.execution,
            # Resolved values where the setting is auto.
            "attention_backend": self.record.model.attention_backend if self.record.model else None,
            "workers": self.record.started and started.workers,
        }
        code, machine = ("git_commit", "git_diff", "python"), (
            *("hardware", "devices", "device_memory_gib", "driver", "cuda", "allocator", "host", "platform"),
            *("cpus", "memory_gib"),
        )  # fmt: skip
        return {
            "model and data": {
                "model": trial.model,
                "data": trial.data,
                "text column": trial.text_column,
                "held-out data": trial.eval_data,
                **{f"{name} identity": value for name, value in dataclasses.asdict(trial.identities).items()},
            },
            "training": dataclasses.asdict(trial.training),
            "execution": execution,
            "code": {"result version": trial.result_version, **{name: getattr(started, name) for name in code}},
            "packages": started.packages,
            "machine": {name: getattr(started, name) for name in machine},
        }


def find_run(text: str, storage: Storage) -> Run:
    """The run with that folder, fingerprint, label or MLflow id.

    Raises:
        InputError: there is none, or there are several.
    """
    folder = existing_path(text)
    if folder and (folder / "trial.json").is_file():
        return _read(TrialFolder(folder.resolve()))
    trials = storage.root / "trials"
    if not existing_path(str(trials)):
        raise InputError(f"{storage.root} holds no trials; name a sweep's storage root with --storage FOLDER")
    found: list[TrialFolder] = []
    if re.fullmatch(r"[0-9a-f]{4,16}", text):
        found = [TrialFolder(path) for path in sorted(trials.glob(f"{text}*")) if (path / "trial.json").is_file()]
    elif re.fullmatch(r"[0-9a-f]{32}", text):
        found = [folder for folder in map(TrialFolder, sorted(trials.iterdir())) if _has_mlflow_run(folder, text)]
    elif "/" in text:
        found = _by_sweep_and_label(text, storage)
    if len(found) > 1:
        each = ", ".join(f"{folder.path.name} ({_read(folder).trial.label})" for folder in found)
        raise InputError(f"{text!r} may mean {each}; give more digits of the fingerprint")
    if not found:
        raise InputError(f"no run {text!r} in {storage.root}; {EXPECTED}")
    return _read(found[0])


def _by_sweep_and_label(text: str, storage: Storage) -> list[TrialFolder]:
    name, _, label = text.partition("/")
    listed = storage.read_listed(name) if re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name) else None
    if listed is None:
        known = sorted(path.parent.name for path in storage.root.glob("sweeps/*/sweep.json"))
        raise InputError(f"no sweep {name!r} in {storage.root}; it has {', '.join(known) or 'none'}. {EXPECTED}")
    labels = {}
    for folder in map(storage.trial, listed):
        with storage.set_apart():
            labels[folder.read_trial().label] = folder
    if label not in labels:
        damaged = f". Damaged: {'; '.join(storage.damaged)}" if storage.damaged else ""
        raise InputError(f"the sweep {name} has no trial {label!r}; it has {', '.join(labels)}{damaged}")
    return [labels[label]]


def _has_mlflow_run(folder: TrialFolder, run_id: str) -> bool:
    return any(state["run_id"] == run_id for state in folder.read_mlflow_state().values())


def _read(folder: TrialFolder) -> Run:
    return Run(folder.read_trial(), TrialRecord.of(folder.journal), folder.path)


def differences(runs: list[Run]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What differs between runs, and how many fields of each section are the same.

    A difference has a section, a field, and a value for each run, None if none is recorded.
    """
    described = [run.described() for run in runs]
    differ: list[dict[str, Any]] = []
    same: dict[str, int] = {}
    for section in described[0]:
        fields = dict.fromkeys(name for each in described for name in each[section])
        for name in fields:
            values = [each[section].get(name) for each in described]
            if all(value == values[0] for value in values):
                same[section] = same.get(section, 0) + (values[0] is not None)
            else:
                differ.append({"section": section, "field": name, "values": values})
    return differ, same
