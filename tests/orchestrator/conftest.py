"""A corpus and sweeps small enough for two cores and a few seconds."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from orchestrator.records.object_store import ObjectStore
from tests.support.s3_server import BUCKET, S3Server
from tests.support.texts import write_texts


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Documents of a few kilobytes."""
    return write_texts(tmp_path_factory.mktemp("text"), documents=30, lines=300)


@pytest.fixture(scope="module")
def s3():
    """An S3-compatible server of our own, for this process and those that it starts."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        ObjectStore.at.cache_clear()  # clients know their server
        yield server
    server.end()


@pytest.fixture
def bucket(s3) -> str:
    """A location in the server where nothing is."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"
