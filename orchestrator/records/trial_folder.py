"""One trial's folder: its journal, log, checkpoints and lease (``trials/<fingerprint>/`` of the storage root)."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestrator.records import leases
from orchestrator.records.journal import Journal
from orchestrator.records.json_files import DamagedFile, expect_fields, read_json
from orchestrator.records.leases import Lease
from orchestrator.records.object_store import MANIFEST, LocalStore, ObjectStore, retry
from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.writer import CHECKPOINT_NAME, LocalWriter, Uploader, stored_checkpoints
from orchestrator.trial_spec import TrialSpec
from workloads.errors import InputError, reason
from workloads.files.safe import replace_file

logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"


def parse_trial(values: Any, name: str) -> TrialSpec:
    """The trial from a trial.json's values.

    Raises:
        DamagedFile: they are no trial of this version of longspan.
    """
    try:
        return TrialSpec.from_dict(values)
    except Exception as error:  # whatever values of other types make the fields' checks raise
        raise DamagedFile(f"{name} is no trial of this version of longspan ({reason(error)})") from error


@dataclass(frozen=True)
class TrialFolder:
    """One trial's folder, named by its fingerprint; with a store, this node's mirror of it."""

    path: Path
    store: ObjectStore | None = None

    @property
    def name(self) -> str:
        """The folder below the storage root."""
        return f"trials/{self.path.name}"

    @property
    def journal(self) -> Journal | SegmentedJournal:
        """The trial's journal, in the store if there is one."""
        return self._segments(self.store) if self.store else self._local_journal

    def _segments(self, store: ObjectStore) -> SegmentedJournal:
        return SegmentedJournal.at(store, f"{self.name}/journal")

    @property
    def _local_journal(self) -> Journal:
        return Journal(self.path / JOURNAL)

    @property
    def log(self) -> Path:
        """What a worker on this node logs."""
        return self.path / "log.txt"

    @property
    def log_url(self) -> str | None:
        """Where the log is in the store, if there is one."""
        return f"{self.store.url}/{self.name}/log.txt" if self.store else None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints on this node."""
        return self.path / "checkpoints"

    @property
    def mlflow_state(self) -> Path:
        """What has been logged to MLflow."""
        return self.path / "mlflow.json"

    def read_trial(self) -> TrialSpec:
        """The trial, from its trial.json on this node.

        Raises:
            DamagedFile: there is none, or it is damaged.
        """
        file = self.path / "trial.json"
        values = read_json(file)
        if values is None:
            raise DamagedFile(f"{self.path} has no trial.json")
        return parse_trial(values, str(file))

    def read_mlflow_state(self) -> dict[str, dict[str, Any]]:
        """What was logged to each MLflow store; empty if the file is damaged, since logging again changes nothing."""
        try:
            stores = expect_fields(read_json(self.mlflow_state) or {}, str(self.mlflow_state))
            return {key: expect_fields(each, key, run_id=str, logged=dict) for key, each in stores.items()}
        except DamagedFile as error:
            logger.warning("%s", error)
            return {}

    def reserve(self, size: int) -> None:
        """Sets bytes aside for the journal's last lines on a full disk."""
        if self.store is None:
            replace_file(self._local_journal.reserve, bytes(size))

    def put_aside(self) -> Path:
        """Moves everything of the trial to ``earlier-<n>/``, for a fresh start, and returns that folder.

        The journal goes last: until then the trial is unchanged, and an interrupted call can be repeated.

        Raises:
            InputError: the storage is an object store, in which nothing can be moved.
        """
        if self.store:
            raise InputError(
                f"{self.store.url} is an object store, where --force cannot keep what there is; train into another "
                "--storage, or remove the trial's folder yourself"
            )
        number = self.times_put_aside + 1
        aside = self.path / f"earlier-{number}"
        aside.mkdir(exist_ok=True)
        stays = ("trial.json", "lease", "cancel.json")
        moved = [p for p in self.path.iterdir() if p.name not in stays and not p.name.startswith(("earlier-", "."))]
        for path in sorted(moved, key=lambda path: path.name == JOURNAL):
            path.rename(aside / path.name)
        return aside

    @property
    def times_put_aside(self) -> int:
        """How often :meth:`put_aside` was completed."""
        return len(list(self.path.glob(f"earlier-*/{JOURNAL}")))

    def is_visible(self) -> bool:
        """Whether this node sees what the sweep has written of the trial; fetches it from a store."""
        file = self.path / "trial.json"
        if self.store:
            try:
                retry(partial(self.store.download, f"{self.name}/trial.json", self.path))
            except FileNotFoundError:
                return False
        return file.is_file()

    def lease(self, owner: dict[str, Any]) -> Lease:
        """The lease of the process that trains the trial: two sweeps that share it do not both train it."""
        if self.store:
            return Lease(self.store, f"{self.name}/lease", owner)
        return Lease(LocalStore(self.path), "lease", owner)

    def holder(self) -> dict[str, Any] | None:
        """The process that trains the trial (see :func:`orchestrator.records.leases.owner`), or None."""
        if self.store:
            return retry(partial(leases.holder, self.store, f"{self.name}/lease"))
        return leases.holder(LocalStore(self.path), "lease")

    def writer(self, lease: Lease) -> LocalWriter | Uploader:
        """Writes the journal, and to a store the checkpoints and the log, for the holder of the lease."""
        if self.store:
            return Uploader(self._segments(self.store), lease, self.store, self.path, self.name)
        return LocalWriter(self._local_journal, lease)

    def fetch_newest_checkpoint(self) -> str | None:
        """Mirrors the store's newest whole checkpoint, and no other, on this node.

        Returns its name, or None if there is none. A damaged one is logged and skipped. Without a store: None.
        """
        if self.store is None:
            return None
        stored = retry(partial(stored_checkpoints, self.store, self.name))
        found = next((name for name in reversed(stored) if self.fetch_checkpoint(name)), None)
        for folder in self.checkpoints.glob("*"):
            if folder.name != found:
                shutil.rmtree(folder)
        return found

    def fetch_checkpoint(self, name: str) -> bool:
        """Mirrors a checkpoint of the store on this node. False if it is damaged, or there is no store."""
        from workloads.training.checkpoint import damage  # imports torch

        store = self.store
        if store is None or not CHECKPOINT_NAME.fullmatch(name):
            return False
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        folder = self.checkpoints / name
        with FileLock(self.path / ".fetch.lock"):  # a node may have several workers
            stored = retry(partial(store.read, f"{self.name}/checkpoints/{name}/{MANIFEST}"))
            here = folder / MANIFEST
            if stored and here.exists() and here.read_bytes() == stored and damage(folder) is None:
                return True
            incomplete = self.checkpoints / f".partial-{name}"
            for leftover in (folder, incomplete):
                shutil.rmtree(leftover, ignore_errors=True)
            if store.download_folder(f"{self.name}/checkpoints/{name}", incomplete):
                incomplete.rename(folder)
                problem = damage(folder)
            else:
                problem = "it is incomplete"
            if problem:
                logger.warning("checkpoint %s in the storage is damaged (%s); taking the one before", name, problem)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(incomplete, ignore_errors=True)
            return not problem
