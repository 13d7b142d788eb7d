"""The storage root: where everything about sweeps lies, and the truth about them.

    trials/<fingerprint>/   trial.json, journal.jsonl, log.txt, checkpoints/, lease/, mlflow.json, code-*.diff;
                            cancel.json (a request), earlier-<n>/ (what --force has put aside)
    sweeps/<name>/          spec.json, plan.json, sweep.json, rungs/, search.jsonl, comparison.json, report/, log.txt,
                            plan-and-truth.json, code-*.diff; command.json (who runs it), cancel.json (a request)
    data/<hash>/            prepared corpora, shared by all trials
    mlflow/                 MLflow's default store: mlflow.db and artifacts/
    cache/compiled/         what torch's compiler has compiled; may be removed at any time

Any process may die at any time: files that are read again are written under another name and renamed.

A storage root is a local folder, or an object store (``s3://bucket/prefix``). Everyone works on a local folder: of an
object store, each node has a mirror in its cache, to which it fetches what it reads and from which it sends what it
wrote. What lies in the store is the truth, with two differences: a journal is a row of segments (segments.py), and
MLflow's default store stays in the mirror of the node that runs the sweep, as no database lies in an object store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestrator.records import leases
from orchestrator.records.journal import Journal
from orchestrator.records.leases import Lease
from orchestrator.records.object_store import MANIFEST, LocalStore, ObjectStore, retry
from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.trial_record import TrialRecord
from orchestrator.records.writer import LocalWriter, Uploader, stored_checkpoints
from orchestrator.spec import TrialSpec
from workloads.errors import InputError
from workloads.files.cache import user_cache
from workloads.files.once import make_once

logger = logging.getLogger(__name__)

# What a sweep of the built-in model writes at most (checkpoints, journals, MLflow's store), with a margin.
LEAST_FREE_BYTES = 500 * 2**20
# Of each trial, for its last words on a full disk: several blocks of any file system.
RESERVE_BYTES = 64 * 2**10
JOURNAL = "journal.jsonl"
# Journals that are read from an object store at the same time: each is a few calls of some 30 ms.
READERS = 32


@dataclass(frozen=True)
class TrialFolder:
    """One trial's folder, named by its fingerprint; with a store, this node's mirror of it."""

    path: Path
    store: ObjectStore | None = None

    @property
    def name(self) -> str:
        """Below the storage root."""
        return f"trials/{self.path.name}"

    @property
    def journal(self) -> Journal | SegmentedJournal:
        if self.store:
            return SegmentedJournal.at(self.store, f"{self.name}/journal")
        return Journal(self.path / JOURNAL)

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def log_url(self) -> str | None:
        """Where the log is in the store, if there is one."""
        return f"{self.store.url}/{self.name}/log.txt" if self.store else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def mlflow_state(self) -> Path:
        return self.path / "mlflow.json"

    def put_aside(self) -> Path:
        """Moves what there is of the trial to ``earlier-<n>/``, so that it begins anew; returns that folder.

        The journal goes last: until then the trial is what it was, and what was interrupted can be done again.

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
        return len(list(self.path.glob(f"earlier-*/{JOURNAL}")))

    def is_visible(self) -> bool:
        """Whether this node sees what the sweep has written of the trial; fetches it from a store."""
        if self.store:
            try:
                retry(lambda: self.store.download(f"{self.name}/trial.json", self.path / "trial.json"))
            except FileNotFoundError:
                return False
        return (self.path / "trial.json").is_file()

    def lease(self, owner: dict[str, Any]) -> Lease:
        """Held by the process that trains the trial, so that two sweeps that share it do not both train it."""
        if self.store:
            return Lease(self.store, f"{self.name}/lease", owner)
        return Lease(LocalStore(self.path), "lease", owner)

    def holder(self) -> dict[str, Any] | None:
        """Who trains the trial (see :func:`orchestrator.records.leases.owner`), or None where nobody does."""
        if self.store:
            return retry(lambda: leases.holder(self.store, f"{self.name}/lease"))
        return leases.holder(LocalStore(self.path), "lease")

    def writer(self, lease: Lease) -> LocalWriter | Uploader:
        """For what the holder of the lease has to tell."""
        if self.store:
            return Uploader(self.journal, lease, self.store, self.path, self.name)
        return LocalWriter(self.journal, lease)

    def fetch_newest_checkpoint(self) -> str | None:
        """Has the newest whole checkpoint of the store, and no other, in this node's mirror; returns its name, or None
        if there is none. A damaged one is reported and passed over.
        """
        stored = retry(lambda: stored_checkpoints(self.store, self.name))
        found = next((name for name in reversed(stored) if self.fetch_checkpoint(name)), None)
        for folder in self.checkpoints.glob("*"):
            if folder.name != found:
                shutil.rmtree(folder)
        return found

    def fetch_checkpoint(self, name: str) -> bool:
        """Has a checkpoint of the store in this node's mirror; False if it is damaged."""
        from workloads.training.checkpoint import damage  # imports torch

        self.checkpoints.mkdir(parents=True, exist_ok=True)
        folder = self.checkpoints / name
        with FileLock(self.path / ".fetch.lock"):  # several workers on a node
            stored = retry(lambda: self.store.read(f"{self.name}/checkpoints/{name}/{MANIFEST}"))
            here = folder / MANIFEST
            if stored and here.exists() and here.read_bytes() == stored and damage(folder) is None:
                return True
            partial = self.checkpoints / f".partial-{name}"
            for leftover in (folder, partial):
                shutil.rmtree(leftover, ignore_errors=True)
            if self.store.download_folder(f"{self.name}/checkpoints/{name}", partial):
                partial.rename(folder)
                problem = damage(folder)
            else:
                problem = "not all of it is there"
            if problem:
                logger.warning("checkpoint %s in the storage is damaged (%s); taking the one before", name, problem)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(partial, ignore_errors=True)
            return not problem


@dataclass(frozen=True)
class Storage:
    """A storage root: ``root`` is its folder, or where there is a ``store`` this node's mirror of it."""

    root: Path
    store: ObjectStore | None = None

    @classmethod
    def open(cls, location: str) -> Storage:
        """The storage root at ``location``, made if it is not there, for a sweep to write to.

        Raises:
            InputError: it is not a folder, cannot be written, or its disk is full; or the object store cannot be
                reached, denies access, or has no such bucket.
        """
        storage = cls.at(location)
        if storage.store:
            storage.store.check()
        root = storage.root
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".writable-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
            stat = os.statvfs(root)
        except OSError as error:
            how = "XDG_CACHE_HOME" if storage.store else "--storage FOLDER"
            raise InputError(
                f"storage {root} cannot be written ({error.strerror}); choose another with {how}"
            ) from error
        free = stat.f_bavail * stat.f_frsize
        if free < LEAST_FREE_BYTES:
            raise InputError(
                f"storage {root} has {free / 2**20:,.0f} MiB free; a sweep needs {LEAST_FREE_BYTES / 2**20:,.0f} MiB. "
                "Free some, or choose another disk with --storage FOLDER"
            )
        return storage

    @classmethod
    def at(cls, location: str) -> Storage:
        """The storage root at ``location``, as it is: what a worker on any node opens."""
        if "://" not in location:
            return cls(Path(location).expanduser().resolve())
        store = ObjectStore.at(location)
        return cls(user_cache() / "storage" / hashlib.sha256(store.url.encode()).hexdigest()[:16], store)

    @property
    def location(self) -> str:
        """What ``at`` opens on any node."""
        return self.store.url if self.store else str(self.root)

    def push(self, path: Path) -> None:
        """Sends a file or a folder below the root to the store, if there is one; waits for a store that is away."""
        if self.store:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    name = file.relative_to(self.root).as_posix()
                    retry(lambda file=file, name=name: self.store.upload(file, name))

    def push_data(self, folder: Path) -> None:
        """Sends a prepared corpus to the store, if there is one and it is not there."""
        name = f"data/{folder.name}"
        if self.store and retry(lambda: self.store.read(f"{name}/{MANIFEST}")) is None:
            self.store.upload_folder(folder, name)

    def fetch_data(self, name: str, folder: Path) -> bool:
        """Fills a folder with the prepared corpus of that name, if the store has it. What is damaged there is no longer
        taken for whole, so that it is sent again.
        """
        if self.store is None:
            return False
        whole = self.store.download_folder(f"data/{name}", folder)
        if not whole:
            retry(lambda: self.store.remove([f"data/{name}/{MANIFEST}"]))
        return whole

    def corpus(self, name: str) -> Path:
        """The folder of a prepared corpus: on each node a copy of its own of what is in a store, to be memory-mapped.

        Raises:
            InputError: it is not there.
        """
        folder = self.data / name
        if self.store is None:
            return folder

        def fetch(partial: Path) -> None:
            if not self.fetch_data(name, partial):
                raise InputError(
                    f"the prepared corpus data/{name} is not whole in {self.location}; the same command prepares it "
                    "again"
                )

        return make_once(folder, fetch)

    def trial(self, fingerprint: str) -> TrialFolder:
        return TrialFolder(self.root / "trials" / fingerprint, self.store)

    def read_ahead(self, fingerprints: list[str]) -> None:
        """Reads the journals of trials from a store, many at a time; they are then in memory."""
        if self.store:
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(lambda fingerprint: self.trial(fingerprint).journal.read(), fingerprints))

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
        if self.store is None:
            folder.journal.reserve.write_bytes(bytes(RESERVE_BYTES))
        write_json(
            folder.path / "trial.json", {**trial.to_dict(), "label": trial.label, "model_location": model_location}
        )
        self.push(folder.path / "trial.json")
        return folder

    def sweep(self, name: str) -> Path:
        return self.root / "sweeps" / name

    def search_journal(self, sweep: str) -> Journal | SegmentedJournal:
        """What a sweep's search has suggested."""
        if self.store:
            return SegmentedJournal.at(self.store, f"sweeps/{sweep}/search")
        return Journal(self.sweep(sweep) / "search.jsonl")

    def write(self, name: str, content: Any) -> None:
        """Writes a small JSON file below the root, for every node to see: whole or not at all."""
        if self.store:
            encoded = json.dumps(content, default=str).encode()
            retry(lambda: self.store.write(name, encoded))
        else:
            write_json(self.root / name, content)

    def read(self, name: str) -> Any | None:
        """A JSON file below the root, or None where there is none."""
        if self.store is None:
            return read_json(self.root / name)
        content = retry(lambda: self.store.read(name))
        return None if content is None else json.loads(content)

    def remove(self, name: str) -> None:
        """Removes a file below the root, if it is there."""
        if self.store:
            retry(lambda: self.store.remove([name]))
        else:
            (self.root / name).unlink(missing_ok=True)

    def sweeps(self) -> list[str]:
        """The names of all sweeps, in no order."""
        if self.store:
            names = retry(lambda: self.store.names("sweeps"))
            return sorted({name.split("/")[1] for name in names if name.count("/") > 1})
        return sorted(path.name for path in (self.root / "sweeps").glob("*") if path.is_dir())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the root, by its name."""
        if self.store:
            return retry(self.store.sizes)
        sizes = {}
        for folder, _, files in os.walk(self.root):
            for file in files:
                path = Path(folder, file)
                with contextlib.suppress(FileNotFoundError):  # what is written just now is renamed
                    sizes[path.relative_to(self.root).as_posix()] = path.lstat().st_size
        return sizes

    def read_folder(self, name: str) -> dict[str, Any]:
        """The content of each JSON file in a folder below the root, by the file's name without its ending."""
        if self.store:
            names = [found for found in retry(lambda: self.store.names(name)) if found.endswith(".json")]
            contents = retry(lambda: self.store.read_many(names))
            return {Path(found).stem: json.loads(content) for found, content in zip(names, contents)}
        contents = {file.stem: read_json(file) for file in sorted((self.root / name).glob("*.json"))}
        return {stem: content for stem, content in contents.items() if content is not None}

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def compiled(self) -> Path | None:
        """Where workers keep what they compile, for all nodes; None in an object store, from which no code is run."""
        return None if self.store else self.root / "cache" / "compiled"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    @property
    def ray_train(self) -> Path:
        """Ray Train's and Tune's own files; nothing in them is needed again, nor on another node."""
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
