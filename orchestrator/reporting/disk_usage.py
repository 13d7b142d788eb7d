"""Disk usage of a storage root by trial and kind. No sweep removes anything at its end: that is the user's decision."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.records.storage import Storage


@dataclass
class TrialUsage:
    """Bytes of one trial. ``earlier``: results moved aside by ``--force``."""

    fingerprint: str
    checkpoints: int = 0
    num_checkpoints: int = 0
    earlier: int = 0
    rest: int = 0  # journal, log, diffs

    @property
    def total(self) -> int:
        """All of the trial's bytes."""
        return self.checkpoints + self.earlier + self.rest


@dataclass(frozen=True)
class DiskUsage:
    """Bytes: ``trials`` by fingerprint, ``data`` by prepared corpus, and the rest."""

    trials: dict[str, TrialUsage]
    data: dict[str, int]
    mlflow: int
    rest: int  # sweeps (reports, plans, rungs) and compiled code

    @property
    def total(self) -> int:
        """All bytes below the root."""
        return sum(trial.total for trial in self.trials.values()) + sum(self.data.values()) + self.mlflow + self.rest


def disk_usage(storage: Storage) -> DiskUsage:
    """The usage of a storage root, from the sizes of its files."""
    trials: dict[str, TrialUsage] = {}
    checkpoints: set[tuple[str, str]] = set()
    data: dict[str, int] = {}
    mlflow = rest = 0
    for name, size in storage.sizes().items():
        match name.split("/"):
            case ["trials", fingerprint, *below] if below:
                trial = trials.setdefault(fingerprint, TrialUsage(fingerprint))
                if below[0] == "checkpoints":
                    trial.checkpoints += size
                    checkpoints.add((fingerprint, below[1]))
                elif below[0].startswith("earlier-"):
                    trial.earlier += size
                else:
                    trial.rest += size
            case ["data", corpus, _]:
                data[corpus] = data.get(corpus, 0) + size
            case ["mlflow", *_]:
                mlflow += size
            case _:
                rest += size
    for fingerprint, _ in checkpoints:
        trials[fingerprint].num_checkpoints += 1
    return DiskUsage(trials, data, mlflow, rest)
