"""The storage root: sweeps, trials and prepared data. What is on disk is the truth about them.

    trials/<fingerprint>/   trial.json, journal.jsonl, log.txt, checkpoints/, lease/, mlflow.json, code-*.diff;
                            cancel.json (a request), earlier-<n>/ (put aside by --force)
    sweeps/<name>/          spec.json, plan.json, sweep.json, rungs/, search.jsonl, comparison.json, report/, log.txt,
                            plan-and-truth.json, code-*.diff; command.json (who runs it), cancel.json (a request),
                            earlier-<n>/ (put aside where the name was used again)
    data/<hash>/            prepared corpora, shared by all trials
    mlflow/                 MLflow's default store: mlflow.db and artifacts/
    cache/compiled/         output of torch's compiler; may be removed at any time

Any process may die at any time: files that are read again are written under another name and renamed.

A storage root is a local folder, or an object store (``s3://bucket/prefix``). All code works on a local folder: each
node has a mirror of an object store in its cache, fetches what it reads and uploads what it writes. The store holds the
truth, with two differences: a journal is a sequence of segments (segments.py), and MLflow's default store stays in the
mirror of the node that runs the sweep, since an object store cannot hold a database.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.records.journal import Journal
from orchestrator.records.json_files import DamagedFile, expect_fields, parse_json, read_json, write_json
from orchestrator.records.object_store import MANIFEST, ObjectStore, UnsafeName, check_names, retry
from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.trial_folder import JOURNAL, TrialFolder
from orchestrator.records.trial_record import TrialRecord
from orchestrator.trial_spec import TrialSpec
from workloads.errors import InputError, one_error
from workloads.files.cache import user_cache
from workloads.files.given import check_encoding, existing_path
from workloads.files.json_text import json_text
from workloads.files.once import make_once
from workloads.files.safe import is_plain_file, is_plain_name, replace_file

# What a sweep of the built-in model writes at most (checkpoints, journals, MLflow's store), with a margin.
LEAST_FREE_BYTES = 500 * 2**20
# Reserved in each trial's folder for the journal's last lines on a full disk: several blocks of any file system.
RESERVE_BYTES = 64 * 2**10
# Journals read from an object store at the same time: each takes a few calls of some 30 ms.
READERS = 32


@dataclass(frozen=True)
class Storage:
    """A storage root: ``root`` is its folder, or with a ``store`` this node's mirror of it.

    ``damaged``: what was found damaged and is set apart, in words.
    """

    root: Path
    store: ObjectStore | None = None
    damaged: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def open(cls, location: str) -> Storage:
        """The storage root at ``location``, created if missing, for a sweep to write to.

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
            probe = root / f".writable-{uuid.uuid4().hex}"
            replace_file(probe, b"x")
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
    def existing(cls, location: str) -> Storage:
        """The storage root at ``location``, for a command that reads it.

        Raises:
            InputError: there is none, or the object store cannot be reached or read.
        """
        storage = cls.at(location)
        if storage.store:
            storage.store.check_readable()
        elif not existing_path(str(storage.root)):
            raise InputError(f"there is no storage root {storage.root}; give one with --storage")
        return storage

    @classmethod
    def at(cls, location: str) -> Storage:
        """The storage root at ``location`` as it is: what a worker on any node opens.

        Raises:
            InputError: it is no path and no location that fsspec opens.
        """
        if location.startswith("file://"):
            location = _path_of(location)
        if "://" not in location:
            check_encoding(location)
            with one_error(f"storage {location!r} is no path", "Give a folder with --storage."):
                return cls(Path(location).expanduser().resolve())
        store = ObjectStore.at(location)
        return cls(user_cache() / "storage" / hashlib.sha256(store.url.encode()).hexdigest()[:16], store)

    @property
    def location(self) -> str:
        """What :meth:`at` opens on any node."""
        return self.store.url if self.store else str(self.root)

    def push(self, path: Path) -> None:
        """Uploads a file or a folder below the root to the store, if there is one; waits for an unreachable store."""
        if self.store:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if is_plain_file(file):
                    retry(partial(self.store.upload, file, file.relative_to(self.root).as_posix()))

    def push_data(self, folder: Path) -> None:
        """Uploads a prepared corpus to the store, if there is one that lacks it."""
        name = f"data/{folder.name}"
        if self.store and retry(partial(self.store.read, f"{name}/{MANIFEST}")) is None:
            self.store.upload_folder(folder, name)

    def fetch_data(self, name: str, folder: Path) -> bool:
        """Downloads the prepared corpus of that name into a folder, and returns whether the store has it.

        A damaged one loses its manifest there, and is uploaded again.
        """
        if self.store is None:
            return False
        whole = self.store.download_folder(f"data/{name}", folder)
        if not whole:
            retry(partial(self.store.remove, [f"data/{name}/{MANIFEST}"]))
        return whole

    def corpus(self, name: str) -> Path:
        """The folder of a prepared corpus; with a store, a copy on this node, to be memory-mapped.

        Raises:
            InputError: it is not there.
        """
        check_names([name], f"{self.location}/data")
        folder = self.data / name
        if self.store is None:
            return folder

        def fetch(partial_folder: Path) -> None:
            if not self.fetch_data(name, partial_folder):
                raise InputError(
                    f"the prepared corpus data/{name} is not whole in {self.location}; the same command prepares it "
                    "again"
                )

        return make_once(folder, fetch)

    def trial(self, fingerprint: str) -> TrialFolder:
        """A trial's folder, whether it exists or not.

        Raises:
            InputError: the fingerprint is no plain name: it comes from a file that others may write.
        """
        check_names([fingerprint], f"{self.location}/trials")
        return TrialFolder(self.root / "trials" / fingerprint, self.store)

    def read_ahead(self, fingerprints: list[str]) -> None:
        """Reads trials' journals from a store into memory, many at a time."""
        if self.store:
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(lambda fingerprint: self.trial(fingerprint).journal.read(), fingerprints))

    def others(self, trials: list[TrialSpec], most: int = 20) -> list[tuple[TrialSpec, TrialRecord]]:
        """Trials of the same model that other sweeps have trained here, the newest first, with their records."""
        known = {trial.fingerprint for trial in trials}
        model = {trial.identities.model for trial in trials}
        journals = [path for path in self.root.glob(f"trials/*/{JOURNAL}") if path.parent.name not in known]
        found = []
        for path in sorted(journals, key=lambda path: path.lstat().st_mtime, reverse=True)[:most]:
            with self.set_apart():
                trial = TrialFolder(path.parent).read_trial()
                if trial.identities.model in model:
                    found.append((trial, TrialRecord.of(Journal(path))))
        return found

    @contextlib.contextmanager
    def set_apart(self) -> Iterator[None]:
        """A context that a damaged file ends: it is noted in ``damaged``, and stops nothing else."""
        try:
            yield
        except (DamagedFile, UnsafeName, OSError) as error:
            self.note_damage(str(error))

    def note_damage(self, what: str | None) -> None:
        """Adds to ``damaged``; None adds nothing."""
        if what and what not in self.damaged:
            self.damaged.append(what)

    def add_trial(self, trial: TrialSpec, model_location: str | None = None) -> TrialFolder:
        """Creates a trial's folder. ``model_location``: the base model's folder or id, for its export later.

        Raises:
            InputError: it is a symbolic link, which may lead anywhere.
        """
        folder = self.trial(trial.fingerprint)
        if folder.path.is_symlink():
            raise InputError(f"{folder.path} is a symbolic link, which a trial is not written through; remove it")
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.reserve(RESERVE_BYTES)
        write_json(
            folder.path / "trial.json", {**trial.to_dict(), "label": trial.label, "model_location": model_location}
        )
        self.push(folder.path / "trial.json")
        return folder

    def sweep(self, name: str) -> Path:
        """A sweep's folder."""
        check_names([name], f"{self.location}/sweeps")
        return self.root / "sweeps" / name

    def read_listed(self, name: str) -> list[str] | None:
        """The fingerprints of a sweep's trials, as its sweep.json lists them; None if there is none.

        Raises:
            DamagedFile, UnsafeName: it is damaged.
        """
        file = f"sweeps/{name}/sweep.json"
        content = self.read(file)
        if content is None:
            return None
        listed = expect_fields(content, f"{self.location}/{file}", trials=list)["trials"]
        check_names(listed, f"{self.location}/{file}")
        return listed

    def lists_others(self, name: str, fingerprints: set[str]) -> bool:
        """Whether the sweep of this name is another one: it lists a trial that is not among these.

        A sweep may grow. A damaged list counts as another one's.
        """
        with self.set_apart():
            return not set(self.read_listed(name) or ()) <= fingerprints
        return True

    def put_aside_sweep(self, name: str) -> Path:
        """Moves a sweep's spec, plan, comparison and report to ``earlier-<n>/``, which it returns."""
        folder = self.sweep(name)
        found = [file for file in self.sizes() if file.startswith(f"sweeps/{name}/")]
        number = 1 + len({file.split("/")[2] for file in found if file.split("/")[2].startswith("earlier-")})
        aside = f"sweeps/{name}/earlier-{number}"
        for file in found:
            below = file.removeprefix(f"sweeps/{name}/")
            if not re.match(r"(spec|plan|sweep|comparison|plan-and-truth)\.json$|report/|code-[^/]*\.diff$", below):
                continue
            if self.store:
                content = retry(partial(self.store.read, file))
                retry(partial(self.store.write, f"{aside}/{below}", content or b""))
                retry(partial(self.store.remove, [file]))
                (self.root / file).unlink(missing_ok=True)
            else:
                (self.root / aside / below).parent.mkdir(parents=True, exist_ok=True)
                (self.root / file).rename(self.root / aside / below)
        return folder / f"earlier-{number}"

    def search_journal(self, sweep: str) -> Journal | SegmentedJournal:
        """The suggestions of a sweep's search."""
        if self.store:
            return SegmentedJournal.at(self.store, f"sweeps/{sweep}/search")
        return Journal(self.sweep(sweep) / "search.jsonl")

    def write(self, name: str, content: Any) -> None:
        """Writes a small JSON file below the root, for every node to see: whole or not at all."""
        check_names(name.split("/"), self.location)
        if self.store:
            retry(partial(self.store.write, name, json_text(content, default=str).encode()))
        else:
            write_json(self.root / name, content)

    def read(self, name: str) -> Any | None:
        """A JSON file below the root, or None if there is none."""
        check_names(name.split("/"), self.location)
        if self.store is None:
            return read_json(self.root / name)
        content = retry(partial(self.store.read, name))
        return None if content is None else parse_json(content, f"{self.location}/{name}")

    def remove(self, name: str) -> None:
        """Removes a file below the root, if it is there."""
        check_names(name.split("/"), self.location)
        if self.store:
            retry(partial(self.store.remove, [name]))
        else:
            (self.root / name).unlink(missing_ok=True)

    def sweeps(self) -> list[str]:
        """The names of all sweeps, sorted."""
        if self.store:
            names = {name.split("/")[1] for name in retry(partial(self.store.names, "sweeps")) if name.count("/") > 1}
            return sorted(filter(is_plain_name, names))
        return sorted(path.name for path in (self.root / "sweeps").glob("*") if path.is_dir())

    def sizes(self) -> dict[str, int]:
        """The size of every file below the root in bytes, by name."""
        if self.store:
            return retry(self.store.sizes)
        sizes = {}
        for folder, _, files in os.walk(self.root):
            for file in files:
                path = Path(folder, file)
                with contextlib.suppress(FileNotFoundError):  # a file being written is renamed
                    sizes[path.relative_to(self.root).as_posix()] = path.lstat().st_size
        return sizes

    def read_folder(self, name: str) -> dict[str, Any]:
        """The content of each JSON file in a folder below the root, by the file's name without its extension.

        Damaged ones are set apart.
        """
        stored: dict[str, bytes | Path]
        if self.store:
            names = [found for found in retry(partial(self.store.names, name)) if found.endswith(".json")]
            stored = dict(zip(names, retry(partial(self.store.read_many, names))))
        else:
            stored = {file.name: file for file in sorted((self.root / name).glob("*.json"))}
        contents = {}
        for found, content in stored.items():
            with self.set_apart():
                value = read_json(content) if isinstance(content, Path) else parse_json(content, found)
                if value is not None:
                    contents[Path(found).stem] = value
        return contents

    @property
    def data(self) -> Path:
        """The folder of prepared corpora."""
        return self.root / "data"

    @property
    def compiled(self) -> Path | None:
        """Where workers of all nodes keep compiled code; None in an object store, from which no code is run."""
        return None if self.store else self.root / "cache" / "compiled"

    @property
    def mlflow(self) -> Path:
        """The folder of MLflow's default store."""
        return self.root / "mlflow"

    @property
    def ray_train(self) -> Path:
        """Ray Train's and Tune's own files; no later run or other node needs them."""
        return self.root / ".ray"


def _path_of(url: str) -> str:
    """The path of a file:// URL.

    Raises:
        InputError: it names another machine, or could be read in two ways.
    """
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path or any(sign in url for sign in "%?#"):
        raise InputError(f"storage {url}: expected file:///folder, or better the folder's path as it is: /folder")
    return parts.path
