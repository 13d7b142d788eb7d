"""A storage that others write too: names that lead out of it, and links, reach no other file of this user."""

import contextlib
import json
import logging
import uuid

import pytest

from orchestrator.expansion import expand
from orchestrator.records.cancellation import request
from orchestrator.records.events import Finished
from orchestrator.records.object_store import ObjectStore
from orchestrator.records.provenance import Provenance
from orchestrator.records.storage import Storage
from orchestrator.running.worker import log_to
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from workloads.errors import InputError

SPEC = SweepSpec(context_lengths=(1024,), methods=("lora+",), references=())
(TRIAL,) = expand(SPEC, Identities(model="m", tokenizer="t", data="d"), "float32").trials
CHANGED = Provenance("0123456789ab-dirty", diff="a changed line")


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A storage in an object store, with its mirror."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Storage.at(f"memory://{uuid.uuid4().hex}")


def put(storage, folder, files, **described):
    """A folder in the store with the manifest of these files; ``described`` replaces a file's entry."""
    store: ObjectStore = storage.store
    for name, content in files.items():
        store.fs.pipe_file(f"{store.root}/{folder}/{name}", content)
    manifest = {name: {"bytes": len(content)} for name, content in files.items()} | described
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["ABSOLUTE", "../../victim", "a/b", "..", "", "line\nbreak", "back\\slash"])
@pytest.mark.parametrize("what", ["corpus", "checkpoint"])
def test_a_manifest_writes_nothing_outside_of_its_folder(storage, tmp_path, name, what, caplog):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    name = str(victim) if name == "ABSOLUTE" else name
    folder = f"trials/{TRIAL.fingerprint}/checkpoints/step-00000001" if what == "checkpoint" else "data/abc"
    put(storage, folder, {"train.bin": b"fine"}, **{name: {"bytes": 4}})
    if name:  # fsspec's memory has no object without a name
        storage.store.fs.store[f"{storage.store.root}/{folder}/{name}"] = storage.store.fs.store[
            f"{storage.store.root}/{folder}/train.bin"
        ]
    if what == "checkpoint":
        assert storage.trial(TRIAL.fingerprint).fetch_newest_checkpoint() is None
    else:
        with pytest.raises(InputError, match="is not whole"):
            storage.corpus("abc")
    assert victim.read_text() == "mine"
    assert [file for file in files_below(tmp_path) if not file.endswith(".lock")] == ["victim"]  # not even train.bin
    assert repr(name) in caplog.text


@pytest.mark.parametrize("content", [b"[1]", b"{}", b"null", b"[" * 100_000, b'{"train.bin": 4}', b'{"train.bin": {}}'])
def test_a_broken_manifest_is_a_damaged_folder(storage, content, tmp_path):
    put(storage, "data/abc", {"train.bin": b"fine"})
    storage.store.write("data/abc/manifest.json", content)
    assert storage.fetch_data("abc", tmp_path / "to") is False
    assert not (tmp_path / "to").exists()


def test_a_file_with_other_content_of_the_same_size_is_damaged(storage, tmp_path):
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "train.bin").write_bytes(b"fine")
    storage.push_data(tmp_path / "abc")
    storage.store.write("data/abc/train.bin", b"evil")
    assert storage.fetch_data("abc", tmp_path / "to") is False


@pytest.mark.parametrize("name", ["..", "step-1", "step-00000001.", "other"])
def test_a_checkpoint_of_another_name_reaches_no_delete(storage, name):
    folder = storage.trial(TRIAL.fingerprint)
    folder.checkpoints.mkdir(parents=True)
    (folder.path / "journal.jsonl").write_text("")
    put(storage, f"{folder.name}/checkpoints/{name}", {"state.json": b"{}"})
    assert folder.fetch_newest_checkpoint() is None and not folder.fetch_checkpoint(name)
    assert (folder.path / "journal.jsonl").exists() and folder.checkpoints.is_dir()


@pytest.mark.parametrize("at", ["local", "store"])
@pytest.mark.parametrize("name", ["..", "../../victim", "/etc", ""])
def test_names_that_a_storage_gives_stay_inside(storage, tmp_path, at, name):
    storage = storage if at == "store" else Storage.at(str(tmp_path / "runs"))
    for use in (
        lambda: storage.trial(name),
        lambda: storage.sweep(name),
        lambda: storage.corpus(name),
        lambda: storage.write(f"trials/{name}/cancel.json", {}),
        lambda: storage.remove(f"trials/{name}/cancel.json"),
    ):
        with pytest.raises(InputError, match="plain name"):
            use()


def write_everything(folder, storage):
    """All that a sweep, its driver and its worker write into a trial's folder, each as they write it."""

    def log():
        with log_to(folder.log):
            logging.getLogger("a library").warning("a line of a log")

    for write in (
        lambda: storage.add_trial(TRIAL),
        lambda: folder.journal.append(Finished()),
        lambda: request(storage, folder.name, "somebody"),
        lambda: CHANGED.keep_diff(folder.path),
        log,
    ):
        with contextlib.suppress(OSError):  # refused
            write()


@pytest.mark.parametrize("exists", [True, False])
def test_links_in_a_trials_folder_are_not_written_through(tmp_path, exists):
    storage = Storage.open(str(tmp_path / "runs"))
    folder = storage.trial(TRIAL.fingerprint)
    folder.path.mkdir(parents=True)
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("mine")
    for name in ("trial.json", ".reserve", "journal.jsonl", "log.txt", "cancel.json", CHANGED.diff_name):
        (folder.path / name).symlink_to(victim)
    write_everything(folder, storage)
    assert (victim.read_text() == "mine") if exists else not victim.exists()


def test_a_link_for_a_trials_folder_is_refused(tmp_path):
    storage = Storage.open(str(tmp_path / "runs"))
    (tmp_path / "home").mkdir()
    (storage.root / "trials").mkdir()
    (storage.root / "trials" / TRIAL.fingerprint).symlink_to(tmp_path / "home")
    with pytest.raises(InputError, match="symbolic link"):
        storage.add_trial(TRIAL)
    assert not any((tmp_path / "home").iterdir())


def test_links_are_not_uploaded(storage, tmp_path):
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    folder = storage.add_trial(TRIAL)
    folder.log.symlink_to(secret)
    storage.push(folder.path)
    with pytest.raises(OSError, match="symbolic link"):
        storage.store.upload(folder.log, f"{folder.name}/log.txt")
    assert storage.store.names(folder.name) == [f"{folder.name}/trial.json"]
