"""What the parts of a storage root take: nothing is removed when a sweep ends, so that a person can decide."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.records.storage import Storage


@dataclass
class TrialUsage:
    """Bytes of one trial. ``earlier``: what ``--force`` has put aside."""

    fingerprint: str
    checkpoints: int = 0
    num_checkpoints: int = 0
    earlier: int = 0
    rest: int = 0  # journal, log, diffs

    @property
    def total(self) -> int:
        return self.checkpoints + self.earlier + self.rest


@dataclass(frozen=True)
class DiskUsage:
    """Bytes: ``trials`` by fingerprint, ``data`` by prepared corpus, and the rest."""

    trials: dict[str, TrialUsage]
    data: dict[str, int]
    mlflow: int
    rest: int  # sweeps: reports, plans, rungs; and what was compiled

    @property
    def total(self) -> int:
        return sum(trial.total for trial in self.trials.values()) + sum(self.data.values()) + self.mlflow + self.rest


def disk_usage(storage: Storage) -> DiskUsage:
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


def in_words(size: int) -> str:
    """``3.2 GiB``, ``512 MiB``, ``4 KiB``."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{-(-size // 1024)} KiB"
