"""A large file is hashed once, and again as soon as it may be another."""

import hashlib
import os
import time

import pytest

from workloads.files import hashes
from workloads.files.hashes import content_hash


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """The files that have been read to be hashed."""
    read, digest = [], hashlib.file_digest

    def file_digest(opened, name):
        read.append(opened.name)
        return digest(opened, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE_BYTES", 8)
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -60)
    return read


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights").write_bytes(b"the weights of a model")
    return tmp_path / "weights"


def test_a_large_file_is_read_once(file, hashed):
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [content_hash(file) for _ in range(3)] == [expected] * 3
    assert len(hashed) == 1


def test_a_change_that_keeps_size_and_time_is_seen(file, hashed):
    """As of a copy that keeps the time of what it copies."""
    before, found = content_hash(file), file.stat()
    time.sleep(0.05)  # more than a step of the file system's clock
    file.write_bytes(b"THE WEIGHTS OF A MODEL")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert content_hash(file) == hashlib.sha256(file.read_bytes()).hexdigest() != before


def test_another_file_in_its_place_is_seen(file, hashed, tmp_path):
    content_hash(file)
    (tmp_path / "other").write_bytes(b"the weights of another")
    (tmp_path / "other").replace(file)
    assert content_hash(file) == hashlib.sha256(b"the weights of another").hexdigest()


def test_what_has_just_been_written_may_still_change_unseen(file, hashed, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 60)
    assert content_hash(file) == content_hash(file)
    assert len(hashed) == 2


def test_a_damaged_note_and_one_that_others_can_write_are_not_believed(file, hashed, tmp_path):
    expected = content_hash(file)
    (note,) = (tmp_path / "cache" / "longspan" / "hashes").iterdir()
    note.write_text(note.read_text()[:-5])
    assert content_hash(file) == expected and len(hashed) == 2
    note.write_text(note.read_text().replace(expected, "0" * 64))
    note.parent.chmod(0o777)
    assert content_hash(file) == expected and len(hashed) == 3
