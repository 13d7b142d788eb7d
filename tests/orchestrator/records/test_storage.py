"""Objects in an S3-compatible server: whole, in order, and complete after an outage."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.expansion import expand
from orchestrator.fetch import fetch
from orchestrator.records import object_store
from orchestrator.records.events import Cancelled, Eval, Finished, Saved, Started, Step
from orchestrator.records.journal import Journal
from orchestrator.records.leases import LeaseLost, owner
from orchestrator.records.object_store import ObjectStore, StoreUnavailable, retry
from orchestrator.records.segments import SegmentedJournal
from orchestrator.records.storage import Storage
from orchestrator.records.trial_record import TrialRecord
from orchestrator.spec import SweepSpec
from orchestrator.trial_spec import Identities
from tests.support.events import a_step, evaluation
from workloads.data import Corpus, prepare
from workloads.errors import InputError
from workloads.models.source import ModelSource
from workloads.training.checkpoint import load_newest, save_checkpoint

SPEC = SweepSpec(context_lengths=(1024,), methods=("lora+",), references=())
(TRIAL,) = expand(SPEC, Identities(model="m", tokenizer="t", data="d"), "float32").trials


def on_node(name, bucket, tmp_path, monkeypatch):
    """The storage as another node sees it: a mirror of its own, and nothing in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    SegmentedJournal.at.cache_clear()
    return Storage.open(bucket)


def events(journal):
    return [(event.name, getattr(event, "step", None)) for event in journal.read().events]


def save(folder, step):
    save_checkpoint(folder.checkpoints, step, {"weight": torch.full((1000,), float(step))}, {"note": "x"})


@pytest.fixture
def training(bucket, tmp_path, monkeypatch):
    """(storage, the trial's folder, a function that opens its writer)."""
    storage = on_node("one", bucket, tmp_path, monkeypatch)
    folder = storage.add_trial(TRIAL)
    folder.log.write_text("")
    lease = folder.lease(owner("attempt", "sweep"))
    with lease:
        yield storage, folder, lambda: folder.writer(lease)


def test_no_bucket_nobody_there_and_a_password_are_each_told(s3, monkeypatch):
    with pytest.raises(InputError, match="there is no bucket nowhere; create it"):
        Storage.open("s3://nowhere/runs")
    with pytest.raises(InputError, match="credentials do not belong into a location") as refused:
        Storage.open("s3://key:planted@bucket/runs")
    assert "planted" not in str(refused.value)
    monkeypatch.setattr(object_store, "FIRST_RETRY_LIMIT_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"has not answered for .* Check the network, and the address"):
        Storage.open("s3://nobody/runs")


def test_a_store_that_only_pretends_to_create_is_refused(bucket, monkeypatch):
    """Fsspec's own way, which a file system may not override: to look whether there is one, and then to write."""
    store = ObjectStore.at(bucket)

    def look_then_write(path, content, mode="overwrite"):
        if mode == "create" and store.fs.exists(path):
            raise FileExistsError
        type(store.fs).pipe_file(store.fs, path, content)

    monkeypatch.setattr(store.fs, "pipe_file", look_then_write)
    with pytest.raises(InputError, match="overwrites an object that was to be created only if absent"):
        store.check()


def test_only_what_can_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr(object_store, "LONGEST_PAUSE_S", 0.01)
    tried = []

    def fails(error):
        tried.append(error)
        raise error

    for final in (PermissionError("denied"), FileNotFoundError("gone"), OSError(errno.EINVAL, "bad"), KeyError("x")):
        with pytest.raises(type(final)):
            retry(lambda final=final: fails(final))
    assert len(tried) == 4
    answers = [ConnectionRefusedError(), OSError(errno.EIO, "500"), OSError(errno.EBUSY, "slow down"), TimeoutError()]
    assert retry(lambda: fails(answers.pop()) if answers else "there") == "there"
    with pytest.raises(StoreUnavailable, match="ConnectionRefusedError"):
        retry(lambda: fails(ConnectionRefusedError()), give_up=lambda waited: len(tried) > 10)


def test_writers_of_one_journal_lose_nothing_and_a_follower_sees_each_line_once(bucket, monkeypatch):
    monkeypatch.setattr("orchestrator.records.segments.POLL_S", 0.0)
    store = ObjectStore.at(bucket)
    follower = TrialRecord(SegmentedJournal(store, "journal"))
    seen = []

    def write(writer):
        journal = SegmentedJournal(store, "journal")
        for number in range(10):
            journal.append(Cancelled(step=number, by=str(writer)))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen += follower.follow()
    seen += follower.follow()
    for writer in range(3):
        assert [event.step for event in seen if event.by == str(writer)] == list(range(10))
    assert len(seen) == 30
    assert seen == SegmentedJournal(store, "journal").read().events


def test_a_record_says_the_same_of_a_journal_in_a_store_as_of_one_in_a_file(bucket, tmp_path):
    file, segments = Journal(tmp_path / "journal.jsonl"), SegmentedJournal(ObjectStore.at(bucket), "journal")
    for journal in (file, segments):
        assert not journal.exists()
        journal.append(Started(hardware="one"))
        for step in (1, 2):
            journal.append(Step(**a_step(step)))
        journal.append(Eval(**evaluation(2, 5.0)))
        journal.append(Saved(step=2))
        journal.append(Finished())
        assert journal.exists()
    one, other = (TrialRecord.of(journal) for journal in (file, segments))
    assert (one.state, one.saved_step, one.last_step) == (other.state, other.saved_step, other.last_step)
    assert [e.perplexity for e in one.curve(1024)] == [e.perplexity for e in other.curve(1024)] == [5.0]
    segments.save(tmp_path / "saved.jsonl")
    assert Journal(tmp_path / "saved.jsonl").read().events == segments.read().events


def test_training_goes_on_while_the_store_is_away_and_nothing_is_lost(training, s3, bucket, tmp_path, monkeypatch):
    _, folder, writer = training
    with writer() as writer:
        writer.append(Started(hardware="here"))
        s3.stop()
        for step in range(1, 7):
            writer.append(Step(**a_step(step)))
            if step % 2 == 0:
                save(folder, step)
                writer.append(Saved(step=step))
        s3.start()
        writer.append(Finished())
    elsewhere = on_node("other", bucket, tmp_path, monkeypatch).trial(TRIAL.fingerprint)
    told = events(elsewhere.journal)
    assert [step for event, step in told if event == "step"] == [1, 2, 3, 4, 5, 6]
    assert ("saved", 6) in told and told[-1] == ("finished", None)
    assert elsewhere.fetch_newest_checkpoint() == "step-00000006"
    tensors, _ = load_newest(elsewhere.checkpoints)
    assert torch.equal(tensors["weight"], torch.full((1000,), 6.0))


def test_a_checkpoint_is_sent_after_all_that_came_before_it(training, monkeypatch):
    """A resumed trial does not record it again, so it would be missing if the process died in between."""
    storage, folder, writer = training
    upload, stored_before = storage.store.upload_folder, []

    def upload_folder(*arguments):
        stored_before.append(events(SegmentedJournal(storage.store, f"{folder.name}/journal")))
        upload(*arguments)

    monkeypatch.setattr(storage.store, "upload_folder", upload_folder)
    with writer() as writer:
        writer.append(Step(**a_step(1)))
        writer.append(Eval(**evaluation(1, 5.0)))
        save(folder, 1)
        writer.append(Saved(step=1))
    assert stored_before == [[("step", 1), ("eval", 1)]]


def test_a_damaged_checkpoint_is_passed_over_on_another_node(training, bucket, tmp_path, monkeypatch, caplog):
    storage, folder, writer = training
    with writer() as writer:
        for step in (1, 2, 3):
            save(folder, step)
            writer.append(Saved(step=step))
            writer.append(Finished())  # waits until it is stored
    names = storage.store.names(folder.name)
    assert {name.split("/")[-2] for name in names if "checkpoints" in name} == {"step-00000002", "step-00000003"}
    tensors = f"{folder.name}/checkpoints/step-00000003/tensors.safetensors"
    whole = storage.store.read(tensors)
    for damaged in (whole[:-1], bytes(len(whole))):
        storage.store.write(tensors, damaged)
        elsewhere = on_node(f"node {damaged[:1]}", bucket, tmp_path, monkeypatch).trial(TRIAL.fingerprint)
        with caplog.at_level(logging.WARNING):
            assert elsewhere.fetch_newest_checkpoint() == "step-00000002"
        assert "step-00000003 in the storage is damaged" in caplog.text
        assert load_newest(elsewhere.checkpoints)[1]["step"] == 2
    storage.store.write(tensors, whole)
    assert elsewhere.fetch_newest_checkpoint() == "step-00000003"
    storage.store.remove([f"{folder.name}/checkpoints/step-00000003/manifest.json"])
    assert elsewhere.fetch_newest_checkpoint() == "step-00000002"


def test_who_lost_the_lease_sends_nothing_more(training, monkeypatch):
    storage, folder, writer = training
    with pytest.raises(LeaseLost), writer() as writer:
        writer.append(Started())
        writer.append(Finished())
        with folder.lease(owner("attempt", "another start")):
            writer.append(Step(**a_step(1)))  # not known yet
            with pytest.raises(LeaseLost):
                writer.lease._beat()
            writer.append(Step(**a_step(2)))
    assert "step" not in [event for event, _ in events(SegmentedJournal(storage.store, f"{folder.name}/journal"))]


def test_a_corpus_is_prepared_once_and_fetched_once_a_node(bucket, tmp_path, text_folder, monkeypatch):
    source, corpus = ModelSource.parse("builtin:tiny"), Corpus.parse(str(text_folder), None, None)

    def prepared_on(storage, tokenizer=None):
        return prepare(corpus, tokenizer, source.tokenizer_identity, storage.data, fetch=storage.fetch_data)

    one = on_node("one", bucket, tmp_path, monkeypatch)
    packed = prepared_on(one, source.tokenizer)
    one.push_data(packed.folder)

    other = on_node("other", bucket, tmp_path, monkeypatch)
    again = prepared_on(other)  # without a tokenizer there is nothing to do but to fetch it
    worker = type(again).open(on_node("worker", bucket, tmp_path, monkeypatch).corpus(packed.folder.name))
    for fetched in (again, worker):
        assert fetched.folder != packed.folder and isinstance(fetched._train, np.memmap)
        assert np.array_equal(fetched.train_batch(0, 4, 256, seed=0), packed.train_batch(0, 4, 256, seed=0))

    other.store.write(f"data/{packed.folder.name}/train.bin", b"cut off")
    third = on_node("third", bucket, tmp_path, monkeypatch)
    with pytest.raises(InputError, match="is not whole"):
        third.corpus(packed.folder.name)
    third.push_data(prepared_on(third, source.tokenizer).folder)
    assert third.store.read(f"data/{packed.folder.name}/train.bin") != b"cut off"


KILLED = """
import os, signal, sys, torch
from orchestrator.records.events import Saved, Started, Step
from orchestrator.records.leases import owner
from orchestrator.records.storage import Storage
from tests.support.events import a_step
from workloads.training.checkpoint import save_checkpoint

folder = Storage.at(sys.argv[1]).trial(sys.argv[2])
assert folder.is_visible()
folder.log.write_text("")
with folder.lease(owner("attempt", "sweep")) as lease, folder.writer(lease) as writer:
    writer.append(Started())
    for step in range(1, 1000):
        writer.append(Step(**a_step(step)))
        save_checkpoint(folder.checkpoints, step, {"weight": torch.full((1000,), float(step))}, {})
        writer.append(Saved(step=step))
        print(step, flush=True)
"""


def test_what_a_killed_process_has_sent_is_whole(training, bucket, tmp_path, monkeypatch):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "killed")}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, bucket, TRIAL.fingerprint],
        cwd=Path(__file__).parents[3], env=environment, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    journal = SegmentedJournal(ObjectStore.at(bucket), f"trials/{TRIAL.fingerprint}/journal")
    while not any(event == "saved" for event, _ in events(journal)):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    storage = on_node("other", bucket, tmp_path, monkeypatch)
    told = events(storage.trial(TRIAL.fingerprint).journal)
    tensors, state = load_newest(fetch(bucket, TRIAL.fingerprint) / "checkpoints")
    assert state["step"] >= max(step for event, step in told if event == "saved")
    # A trial that resumes from a checkpoint does not repeat earlier lines.
    assert {step for event, step in told if event == "step"} >= set(range(1, state["step"] + 1))
    assert torch.equal(tensors["weight"], torch.full((1000,), float(state["step"])))
