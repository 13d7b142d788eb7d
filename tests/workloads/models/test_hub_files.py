"""A model of the hub is checked before it is downloaded: by what is in the cache, else by the headers on the hub."""

import json

import pytest
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

from tests.support.hub_server import COMMIT, hub_of
from tests.support.models import small_llama
from workloads.errors import InputError
from workloads.models.source import ModelSource


@pytest.fixture
def folder(tmp_path):
    small_llama(num_key_value_heads=2).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def check(cache, folder, monkeypatch, download=False):
    """The notes on the model, and the bytes of weights that were fetched for them."""
    with hub_of(folder, monkeypatch, cache) as requests:
        source = ModelSource.parse("org/name")
        assert source.revision == COMMIT
        for file in folder.iterdir() if download else ():
            hf_hub_download("org/name", file.name, revision=COMMIT)
        config = source.config()
        requests.clear()
        _, notes = source.check_files(config)
        return notes, sum(int(line.split()[2]) for line in requests if ".safetensors " in line)


def test_weights_that_are_not_in_the_cache_are_checked_by_their_headers(folder, tmp_path, monkeypatch):
    (note,), fetched = check(tmp_path / "cache", folder, monkeypatch)
    assert "names and shapes were checked" in note and "finite when it loads them" in note
    assert fetched and not list((tmp_path / "cache").rglob("*.safetensors"))


def test_weights_in_the_cache_are_checked_as_local_ones(folder, tmp_path, monkeypatch):
    assert check(tmp_path / "cache", folder, monkeypatch, download=True) == ([], 0)
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds NaN or infinity"):
        check(tmp_path / "other", folder, monkeypatch, download=True)


def test_what_cannot_be_trained_is_refused_by_name(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}), "utf-8")
    with pytest.raises(InputError, match=r"model org/name: .*have another shape"):
        check(tmp_path / "cache", folder, monkeypatch)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match=r"org/name: the hub has no \.safetensors weights.*pickle is never loaded"):
        check(tmp_path / "cache", folder, monkeypatch)


def test_without_the_hub_the_note_says_what_is_not_checked(folder, tmp_path, monkeypatch):
    with hub_of(folder, monkeypatch, tmp_path / "cache"):
        source = ModelSource.parse(f"org/name@{COMMIT}")
        config = source.config()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    _, (note,) = source.check_files(config)
    assert "not in this machine's cache, and the hub does not answer" in note and "each worker checks them" in note
